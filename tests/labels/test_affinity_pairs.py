"""Labels of affinity pairs: every case of two runs, and the reduction to the map."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isim.labels.affinity_pairs import IGNORE, affinity_label, reduce_label


@pytest.mark.parametrize(
    "foreground_run, background_run, label",
    [
        (7, 7, 7),
        (254, 254, 254),
        (0, 0, 0),
        (0, 7, IGNORE),
        (7, 0, IGNORE),
        (7, 8, IGNORE),
        (8, 7, IGNORE),
        (IGNORE, IGNORE, IGNORE),
        (IGNORE, 0, IGNORE),
        (7, IGNORE, IGNORE),
    ],
)
def test_every_case(foreground_run, background_run, label):
    found = affinity_label(np.uint8([[foreground_run]]), np.uint8([[background_run]]))
    assert found.dtype == np.uint8 and found.tolist() == [[label]]


def test_each_pixel_is_decided_by_itself():
    high = np.uint8([[0, 0, 3], [3, 3, 5]])
    low = np.uint8([[0, 3, 3], [0, 5, 5]])
    expected = [[0, IGNORE, 3], [IGNORE, IGNORE, 5]]
    assert affinity_label(high, low).tolist() == expected


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
