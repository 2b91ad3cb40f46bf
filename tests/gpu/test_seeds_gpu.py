"""Seeds in PyTorch equal those of `labels.seeds`."""

import numpy as np
import torch

from isim.gpu import seeds as gpu
from isim.labels import seeds


def test_equal_those_of_the_arrays():
    # Few values, so that there are ties, also with the threshold.
    rng = np.random.default_rng(0)
    for count in (0, 1, 4):
        planes = rng.integers(0, 11, (count, 20, 30)).astype(np.float32) / np.float32(10)
        ids = np.array([2, 5, 7, 20])[:count]
        best, height = gpu.peak(torch.from_numpy(planes), torch.from_numpy(ids))
        expected, top = seeds.peak(planes, ids)
        assert best.dtype == torch.uint8
        assert (best.numpy() == expected).all() and (height.numpy() == top).all()
        for threshold in (0.0, 0.3, 0.7):
            cut = gpu.cut(best, height, threshold)
            assert cut.dtype == torch.uint8
            assert (cut.numpy() == seeds.cut(expected, top, threshold)).all()


def test_levels_say_for_every_threshold_what_rises_above_it():
    height = torch.rand(40, 50, generator=torch.Generator().manual_seed(0))
    thresholds = np.linspace(0.05, 0.6, 12).astype(np.float32)
    height[0, :12] = torch.from_numpy(thresholds)
    levels = gpu.levels(height, thresholds.tolist()).numpy()
    assert levels.dtype == np.uint8
    for index, threshold in enumerate(thresholds):
        assert ((levels > index) == (height.numpy() > threshold)).all()
