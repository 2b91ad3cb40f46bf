"""The dCRF of tensors: whatever is in a batch, its images come out as if alone.

That they are right alone is the contract of `test_refine.py`.
"""

import numpy as np
import pytest
import torch
from support.crf import LABELS, changed, coarse, energies, expected, marginals, photo, softmax
from support.devices import DEVICES, tensor

from isim.errors import UserError
from isim.labels.crf import batched
from isim.labels.crf.batched import refine_batch, refine_soft_batch

# Odd sizes, portrait, and each remainder of pixels that four do not divide.
SIZES = [(40, 60), (41, 63), (58, 33), (25, 37), (39, 66)] * 2
COUNTS = [3, 2, 21, 4, 2, 3, 3, 1, 2, 6]
IDS = [np.arange(count - 1, 0, -1, dtype=np.int64) * 9 for count in COUNTS]
IMAGES = [photo(size, number).transpose(2, 0, 1) for number, size in enumerate(SIZES)]
SEEDS = [
    coarse(size, [0, *ids], number)
    for number, (size, ids) in enumerate(zip(SIZES, IDS, strict=True))
]

pytestmark = pytest.mark.parametrize("device", DEVICES)


def tensors(arrays, device):
    return [tensor(array, device) for array in arrays]


@pytest.mark.parametrize("kind", ["seeds", "probabilities", "energies"])
def test_images_in_a_batch_are_as_if_alone_each_time(kind, device):
    images = tensors(IMAGES, device)
    if kind == "seeds":
        function, given = refine_batch, [images, tensors(SEEDS, device), IDS]
    else:
        make, function = {
            "probabilities": (softmax, refine_soft_batch),
            "energies": (energies, marginals),
        }[kind]
        several = enumerate(zip(SIZES, COUNTS, strict=True))
        given = [images, tensors([make(*case, n) for n, case in several], device)]
    together = function(*given, LABELS)
    assert all(map(torch.equal, together, function(*given, LABELS)))
    for *parts, found, size in zip(*given, together, SIZES, strict=True):
        (alone,) = function(*([part] for part in parts), LABELS)
        assert found.shape[-2:] == size
        if kind == "energies":
            torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
        else:
            assert found.dtype == torch.uint8 and (found != alone).float().mean() <= 1e-3
        if kind == "seeds":
            _, seed, ids = parts
            assert set(found.unique().tolist()) <= {0, *ids}
            assert len(ids) == 0 or (found != seed).any()


def test_big_batches_are_split(monkeypatch, device):
    ids = [np.array([7])] * 5
    seeds = [coarse(size, [0, 7], number) for number, size in enumerate(SIZES[:5])]
    batch = tensors(IMAGES[:5], device), tensors(seeds, device), ids, LABELS
    whole = refine_batch(*batch)
    counts, infer = [], batched._infer

    def spy(batch, *arguments):
        counts.append(len(batch.images))
        return infer(batch, *arguments)

    monkeypatch.setattr(batched, "_infer", spy)
    pixel = batched.BYTES_OF_PIXEL + batched.BYTES_OF_CHANNEL
    # 2400, 2583, 1914, 925 and 2574 pixels.
    for budget, expected_counts in ((5000 * pixel, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(batched, "BUDGET", budget)
        counts.clear()
        assert all(map(torch.equal, whole, refine_batch(*batch)))
        assert counts == expected_counts


def test_narrow_kernels_fit_into_the_keys_or_are_refused(device):
    unary = energies((41, 63), 2)
    batch = tensors(IMAGES[1:2] * 3, device), tensors([unary] * 3, device)
    narrow = changed(bilateral_srgb=0.2)
    wanted = expected(np.ascontiguousarray(IMAGES[1].transpose(1, 2, 0)), unary, narrow)
    for found in marginals(*batch, narrow):
        assert np.abs(found.flatten(1).cpu().numpy() - wanted).max() < 1e-3
    for name in ("bilateral_srgb", "gaussian_sxy"):
        with pytest.raises(UserError, match=r"too narrow for a GPU .*1e-09") as caught:
            marginals(*batch, changed(**{name: 1e-9}))
        assert "\n" not in str(caught.value)


def test_an_empty_batch_is_nothing(device):
    assert refine_batch([], [], [], LABELS) == refine_soft_batch([], [], LABELS) == []
