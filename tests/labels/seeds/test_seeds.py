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


@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(0, 1, width=32)),
    st.sampled_from([1, 4, 10]),
)
@settings(deadline=None)
def test_otsu_parts_the_bins_with_the_most_variance_between(heights, levels):
    """Against a search over all edges; with few levels there are ties, and bins of one kind."""
    heights = np.round(heights * levels) / np.float32(levels)
    bins = np.minimum((heights * 256).astype(int), 255)
    centres = (bins + 0.5) / 256

    def apart(edge):
        low, high = centres[bins < edge], centres[bins >= edge]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    edges = [edge for edge in range(1, 256) if 0 < (bins < edge).sum() < len(bins)]
    found = seeds.otsu(heights)
    if edges:
        assert round(found * 256) in edges
        assert apart(round(found * 256)) == pytest.approx(max(map(apart, edges)))
    else:
        assert found == 0.5


def test_otsu_of_two_heaps_lies_between_and_of_none_is_half():
    rng = np.random.default_rng(0)
    heaps = np.concatenate([rng.normal(0.2, 0.05, 900), rng.normal(0.8, 0.05, 100)])
    assert 0.35 < seeds.otsu(heaps.clip(0, 1).astype(np.float32)) < 0.65
    for heights in (np.zeros(0, np.float32), np.full(5, 0.3, np.float32), np.ones(2, np.float32)):
        assert seeds.otsu(heights) == 0.5
    parts = [seeds.histogram(some.clip(0, 1).astype(np.float32)) for some in np.split(heaps, 4)]
    assert seeds.otsu_of(sum(parts)) == seeds.otsu(heaps.clip(0, 1).astype(np.float32))


@given(
    hnp.arrays(np.uint8, (12, 20), elements=st.sampled_from([0, 1, 2, 255])),
    st.sampled_from([(3, 4), (12, 20), (6, 5), (1, 1)]),
    st.sampled_from([0.31, 0.49, 0.61]),
)
@settings(deadline=None)
def test_reduced_labels_are_those_of_a_count(label, size, share):
    """Each patch has whole pixels, whose shares are never exactly the least one."""
    rows, columns = (whole // part for whole, part in zip(label.shape, size, strict=True))
    expected = []
    for row in range(size[0]):
        for column in range(size[1]):
            patch = label[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
            shares = [(patch == value).mean() for value in (0, 1, 2)]
            best = int(np.argmax(shares))
            expected.append(best if shares[best] > share else 255)
    found = seeds.reduced(label, size, share)
    assert found.dtype == np.uint8 and found.shape == (size[0] * size[1],)
    assert found.tolist() == expected


def test_reduced_labels_of_halves_and_of_patches_that_part_pixels():
    assert seeds.reduced(np.uint8([[2, 1]]), (1, 1), 0.5).tolist() == [255], "half is not more"
    assert seeds.reduced(np.uint8([[2, 1]]), (1, 1), 0.4).tolist() == [1], "the lower of equals"
    # Two patches on three pixels: the middle one counts half in each.
    label = np.uint8([[1, 1, 2]])
    assert seeds.reduced(label, (1, 2), 0.6).tolist() == [1, 2]
    assert seeds.reduced(label, (1, 2), 0.7).tolist() == [1, 255]
    assert seeds.reduced(np.full((5, 7), 255, np.uint8), (2, 3), 0.0).tolist() == [255] * 6
