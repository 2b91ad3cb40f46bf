"""What there is of tensors alone; that seeds are right is the contract of `test_seeds.py`."""

import numpy as np
import pytest
from support.devices import DEVICES, tensor

from isim.labels.seeds import batched


@pytest.mark.parametrize("device", DEVICES)
def test_levels_say_for_every_threshold_what_rises_above_it(device):
    height = np.random.default_rng(0).random((40, 50), np.float32)
    thresholds = np.linspace(0.05, 0.6, 12).astype(np.float32)
    height[0, :12] = thresholds
    levels = batched.levels(tensor(height, device), thresholds.tolist()).cpu().numpy()
    assert levels.dtype == np.uint8
    for index, threshold in enumerate(thresholds):
        assert ((levels > index) == (height > threshold)).all()
