"""Seeds: the background plane, ties and label sets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isim.labels.seeds import seed


def one_row(*values):
    return np.array([[values]], np.float32)


def test_a_cam_must_rise_above_the_threshold():
    cam = one_row(0.0, np.nextafter(np.float32(0.3), 0), 0.3, np.nextafter(np.float32(0.3), 1), 1.0)
    assert seed(cam, np.array([7]), 0.3).tolist() == [[0, 0, 0, 7, 7]]


def test_the_highest_cam_wins_and_its_id_is_written():
    cam = np.stack([one_row(0.9, 0.4, 0.1)[0], one_row(0.5, 0.6, 0.2)[0]])
    assert seed(cam, np.array([3, 20]), 0.3).tolist() == [[3, 20, 0]]


@pytest.mark.parametrize("shape", [(1, 1), (5, 7)])
def test_an_image_without_classes_is_background(shape):
    labels = seed(np.zeros((0, *shape), np.float32), np.zeros(0, np.int64), 0.3)
    assert labels.dtype == np.uint8 and labels.shape == shape and not labels.any()


@given(
    hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(0, 1, width=32)),
    st.floats(0.01, 0.99),
)
def test_equals_the_argmax_below_a_constant_plane(cam, threshold):
    """The definition of spec 5; argmax takes the first of equals, so a tie is background."""
    ids = np.array([2, 5, 254])
    plane = np.full((1, 4, 5), threshold, np.float32)
    expected = np.array([0, 2, 5, 254])[np.concatenate([plane, cam]).argmax(0)]
    found = seed(cam, ids, threshold)
    assert found.dtype == np.uint8 and (found == expected).all()
