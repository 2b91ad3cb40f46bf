"""Labels of affinity pairs: every case of two runs, and the reduction to the map."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from isim.labels.walk.affinity_labels import affinity_label, reduce_label

# Labels of the run with the high plane, of that with the low one, and what is left of them.
FOREGROUND_RUN = np.uint8([[7, 254, 0, 0, 7], [7, 8, 255, 255, 7]])
BACKGROUND_RUN = np.uint8([[7, 254, 0, 7, 0], [8, 7, 255, 0, 255]])
LABEL = np.uint8([[7, 254, 0, 255, 255], [255, 255, 255, 255, 255]])


def test_every_case_pixel_by_pixel():
    found = affinity_label(FOREGROUND_RUN, BACKGROUND_RUN)
    assert found.dtype == np.uint8 and (found == LABEL).all()


def test_a_label_is_taken_from_the_centre_of_its_area():
    label = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert reduce_label(label, 4).tolist() == [[2 * 8 + 2, 2 * 8 + 6], [6 * 8 + 2, 6 * 8 + 6]]


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 4, 8]))
def test_equals_torch_and_has_the_size_of_the_map(height, width, stride):
    rng = np.random.default_rng(height * 100 + width)
    label = rng.integers(0, 256, (2, height, width), np.uint8)
    found = reduce_label(label, stride)
    size = (-(-height // stride), -(-width // stride))
    assert found.dtype == np.uint8 and found.shape == (2, *size)
    given = torch.from_numpy(label)[None].double()
    expected = torch.nn.functional.interpolate(given, size, mode="nearest-exact")[0]
    assert (found == expected.numpy()).all()
