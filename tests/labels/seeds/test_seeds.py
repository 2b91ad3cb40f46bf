"""Seeds, of arrays and of tensors: the background plane, ties and label sets."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.devices import DEVICES, tensor

from isim.labels.seeds import batched, seeds


@pytest.fixture(params=["arrays", *DEVICES])
def seed(request):
    def of_tensors(cam, class_ids, threshold):
        peak = batched.peak(tensor(cam, request.param), tensor(class_ids, "cpu"))
        assert all(map(np.array_equal, (part.cpu() for part in peak), seeds.peak(cam, class_ids)))
        return batched.cut(*peak, threshold).cpu().numpy()

    return of_tensors if request.param in DEVICES else seeds.seed


def test_a_cam_must_rise_above_the_threshold(seed):
    below, above = (np.nextafter(np.float32(0.3), side) for side in (0, 1))
    cam = np.float32([[[0, below, 0.3, above, 1]]])
    assert seed(cam, np.array([7]), 0.3).tolist() == [[0, 0, 0, 7, 7]]


@pytest.mark.parametrize("shape", [(1, 1), (5, 7)])
def test_an_image_without_classes_is_background(seed, shape):
    labels = seed(np.zeros((0, *shape), np.float32), np.zeros(0, np.int64), 0.3)
    assert labels.dtype == np.uint8 and labels.shape == shape and not labels.any()


# Few values, too, so that there are ties, also with the threshold.
FEW = np.linspace(0, 1, 11, dtype=np.float32).tolist()


@given(
    st.sampled_from([st.floats(0, 1, width=32), st.sampled_from(FEW)]).flatmap(
        lambda values: hnp.arrays(np.float32, (3, 4, 5), elements=values)
    ),
    st.sampled_from([0.3, 0.7]) | st.floats(0.01, 0.99),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_equals_the_argmax_below_a_constant_plane(seed, cam, threshold):
    """The definition of spec 5; argmax takes the first of equals, so a tie is background."""
    ids = np.array([2, 5, 254])
    plane = np.full((1, 4, 5), threshold, np.float32)
    expected = np.array([0, 2, 5, 254])[np.concatenate([plane, cam]).argmax(0)]
    found = seed(cam, ids, threshold)
    assert found.dtype == np.uint8 and (found == expected).all()
