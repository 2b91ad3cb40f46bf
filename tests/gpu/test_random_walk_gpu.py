"""The random walk in PyTorch, on the CPU: equal to that of `labels`, whatever is in a batch."""

import numpy as np
import pytest
import torch

from isim.gpu import random_walk as gpu
from isim.gpu.random_walk import walk_batch
from isim.labels import random_walk
from isim.pairs import half_disc, overlap


def image(size, count, radius, seed):
    """Planes and affinities; what is outside must not be read, and is no number."""
    rng = np.random.default_rng(seed)
    planes = rng.uniform(0, 1, (count, *size)).astype(np.float32)
    affinity = np.full((len(half_disc(radius)), *size), np.nan, np.float32)
    for plane, offset in zip(affinity, half_disc(radius), strict=True):
        here, _ = overlap(offset, *size)
        plane[here] = rng.uniform(0.3, 1, plane[here].shape)
    return planes, affinity


IMAGES = [((9, 12), 3), ((12, 7), 1), ((1, 1), 2), ((9, 12), 0), ((2, 15), 4), ((11, 1), 2)]


@pytest.mark.parametrize("radius", [1, 2, 5])
@pytest.mark.parametrize("t", [0, 3, 8])
def test_equals_the_walk_of_the_cpu(radius, t):
    images = [image(size, count, radius, n) for n, (size, count) in enumerate(IMAGES)]
    found = walk_batch(
        [torch.from_numpy(planes) for planes, _ in images],
        [torch.from_numpy(affinity) for _, affinity in images],
        *(radius, 8, t),
    )
    for (planes, affinity), walked in zip(images, found, strict=True):
        expected = random_walk.walk(planes, random_walk.transition(affinity, radius, 8), t)
        assert walked.dtype == torch.float32 and walked.shape == planes.shape
        np.testing.assert_allclose(walked.numpy(), expected, rtol=0, atol=1e-6)
    assert radius == 1 or (found[0].numpy() != images[0][0]).any()


def test_big_batches_are_split(monkeypatch):
    images = [image(size, count, 5, n) for n, (size, count) in enumerate(IMAGES)]
    planes = [torch.from_numpy(planes) for planes, _ in images]
    affinities = [torch.from_numpy(affinity) for _, affinity in images]
    whole = walk_batch(planes, affinities, 5, 8, 4)
    counts = []
    walk = gpu._walk

    def spy(planes, *arguments):
        counts.append(len(planes))
        return walk(planes, *arguments)

    monkeypatch.setattr(gpu, "_walk", spy)
    for budget, expected in ((1, [1] * 6), (1 << 30, [6])):
        counts.clear()
        monkeypatch.setattr(gpu, "BUDGET", budget)
        for one, two in zip(walk_batch(planes, affinities, 5, 8, 4), whole, strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=0)
        assert counts == expected
    # Two of the first size fit, with as many planes as the larger number.
    monkeypatch.setattr(gpu, "BUDGET", 2 * 8 * 81 * 3 * 12 * (12 + 5))
    counts.clear()
    walk_batch(planes, affinities, 5, 8, 0)
    assert counts[0] == 2 and sum(counts) == 6


def test_an_empty_batch_is_nothing():
    assert walk_batch([], [], 5, 8, 8) == []
