"""The random walk of tensors: whatever is in a batch, its images walk as if alone.

That they are right alone is the contract of `test_walk.py`.
"""

import numpy as np
import pytest
import torch
from support.devices import DEVICES, tensor
from support.walk import random_affinities

from isim.labels.walk import batched, walk
from isim.labels.walk.batched import walk_batch

IMAGES = [((9, 12), 3), ((12, 7), 1), ((1, 1), 2), ((9, 12), 0), ((2, 15), 4), ((11, 1), 2)]

pytestmark = pytest.mark.parametrize("device", DEVICES)


def batch(radius):
    """Planes and affinities of each image."""
    rng = np.random.default_rng(0)
    return [
        (rng.random((count, *size), np.float32), random_affinities(size, radius, number, 0.3))
        for number, (size, count) in enumerate(IMAGES)
    ]


def walked(images, device, radius, t):
    tensors = [[tensor(array, device) for array in arrays] for arrays in zip(*images, strict=True)]
    return walk_batch(*tensors, radius=radius, beta=8, t=t)


@pytest.mark.parametrize("radius", [1, 2, 5])
@pytest.mark.parametrize("t", [0, 3, 8])
def test_equals_the_walk_of_arrays(device, radius, t):
    images = batch(radius)
    for (planes, affinity), found in zip(images, walked(images, device, radius, t), strict=True):
        expected = walk.walk(planes, walk.transition(affinity, radius, 8), t)
        assert found.dtype == torch.float32 and found.shape == planes.shape
        np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=0, atol=1e-6)
        assert radius == 1 or planes.size <= 2 or (found.cpu().numpy() != planes).any()


def test_big_batches_are_split(monkeypatch, device):
    images = batch(5)
    whole = walked(images, device, 5, 4)
    counts = []
    walk_some = batched._walk

    def spy(planes, *arguments, **named):
        counts.append(len(planes))
        return walk_some(planes, *arguments, **named)

    monkeypatch.setattr(batched, "_walk", spy)
    # Two of the first size fit, with as many planes as the larger number.
    two = 2 * 8 * 81 * 3 * 12 * (12 + 5)
    for budget, expected in ((1, [1] * 6), (1 << 30, [6]), (two, [2])):
        counts.clear()
        monkeypatch.setattr(batched, "BUDGET", budget)
        for one, other in zip(walked(images, device, 5, 4), whole, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
        assert counts[: len(expected)] == expected and sum(counts) == 6


def test_an_empty_batch_is_nothing(device):
    assert walk_batch([], [], radius=5, beta=8, t=8) == []
