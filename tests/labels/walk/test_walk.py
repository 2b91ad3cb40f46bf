"""The random walk: what it conserves, what it mixes, its dense definition and its memory."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.devices import DEVICES, tensor
from support.walk import random_affinities, regional_affinities

from isim.labels.seeds.seeds import seed
from isim.labels.walk.batched import walk_batch
from isim.labels.walk.pairs import half_disc
from isim.labels.walk.walk import background_plane, label_map, resize, transition, walk
from isim.runtime import kernels

RADIUS = 5
# The fixture of the test holds for all examples alike.
EXAMPLES = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30
)
SIZES = st.tuples(st.integers(1, 8), st.integers(1, 8))
SEEDS = st.integers(0, 99)


@pytest.fixture(params=["compiled", "numpy", *DEVICES])
def walked(request, monkeypatch):
    """Each way to take 2^t steps, as a function of planes and affinities."""

    def by_arrays(planes, affinity, t, beta=8):
        return walk(planes, transition(affinity, RADIUS, beta), t)

    def by_tensors(planes, affinity, t, beta=8):
        given = [tensor(planes, request.param)], [tensor(affinity, request.param)]
        return walk_batch(*given, radius=RADIUS, beta=beta, t=t)[0].cpu().numpy()

    if request.param in DEVICES:
        return by_tensors
    if request.param == "numpy":
        monkeypatch.setattr(kernels, "available", lambda *_: False)
    else:
        assert kernels.available("walk", "")
    return by_arrays


def planes_of(size, count=3, start=1):
    return np.random.default_rng(start).uniform(0, 1, (count, *size)).astype(np.float32)


def dense(affinity, beta):
    """The symmetric affinity^beta by a loop over pixels, in double precision."""
    _, height, width = affinity.shape
    matrix = np.eye(height * width)
    for p, (dy, dx) in enumerate(half_disc(RADIUS)):
        for y in range(height):
            for x in range(width):
                if y + dy < height and 0 <= x + dx < width:
                    one, two = y * width + x, (y + dy) * width + x + dx
                    matrix[one, two] = matrix[two, one] = float(affinity[p, y, x]) ** beta
    return matrix


@given(SIZES, SEEDS, st.sampled_from([1, 8, 2.5]))
@EXAMPLES
def test_a_step_is_the_normalised_affinity(walked, size, start, beta):
    affinity, count = random_affinities(size, seed=start), size[0] * size[1]
    every = np.eye(count, dtype=np.float32).reshape(count, *size)
    matrix = dense(affinity, beta)
    found = walked(every, affinity, 0, beta).reshape(count, count)
    np.testing.assert_allclose(found, matrix / matrix.sum(0), 1e-6, 1e-30)
    np.testing.assert_allclose(found.sum(0, dtype=np.float64), 1, rtol=1e-6)


@given(SIZES, SEEDS, st.integers(0, 8), st.integers(0, 7), st.sampled_from([1, 0]))
@EXAMPLES
def test_the_walk_equals_the_dense_power(walked, size, start, t, count, strength):
    """Each plane on its own, however many walk together; without any affinity it stays."""
    affinity = random_affinities(size, seed=start) * np.float32(strength)
    planes, matrix = planes_of(size, count), dense(affinity, 8)
    power = np.linalg.matrix_power(matrix / matrix.sum(0), 2**t)
    flat = planes.reshape(count, size[0] * size[1]).astype(np.float64)
    expected = (flat @ power).reshape(planes.shape)
    found = walked(planes, affinity, t)
    assert found.dtype == np.float32 and found.shape == planes.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert strength or (found == planes).all()


def test_regions_without_mutual_affinity_exchange_nothing(walked):
    region = np.arange(56).reshape(7, 8) % 8 >= 3
    planes, affinity = planes_of((7, 8)), regional_affinities(region, 0.8, 0)
    both = walked(planes, affinity, 8)
    for inside in (region, ~region):
        alone = walked(planes * inside, affinity, 8)
        assert (alone[:, ~inside] == 0).all()
        assert (alone[:, inside] == both[:, inside]).all()
    # Within each region all is mixed.
    assert np.ptp(both[:, region], axis=1).max() < 0.1 * np.ptp(planes[:, region], axis=1).min()


def test_a_seed_of_a_part_grows_to_its_object(walked):
    """What the walk is for: the CAM finds a tenth of the object, affinity ends at its border."""
    truth = np.zeros((20, 24), bool)
    truth[4:16, 6:18] = True
    affinity = regional_affinities(truth, 0.95, 0.3)
    # Faint on the object, faintly over its border; high on a part.
    cam = np.zeros((1, 20, 24), np.float32)
    cam[0, 3:17, 5:19] = 0.2
    cam[0, 5:9, 7:11] = 1
    assert (((cam[0] > 0.3) != truth).mean()) > 0.25
    for background in (0.3, walked(background_plane(cam, 16)[None], affinity, 5)[0]):
        found = label_map(walked(cam, affinity, 5), np.array([3]), (20, 24), background)
        assert ((found == 3) == truth).all()


@pytest.mark.parametrize("stride", [8, 4])
@pytest.mark.parametrize("compiled", [True, False])
def test_an_image_of_500x500_needs_less_than_200_megabytes(stride, compiled, monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda *_: compiled)
    side = -(-500 // stride)
    affinity = random_affinities((side, side))
    cam = planes_of((125, 125), count=5)
    ids = np.arange(1, 6)
    tracemalloc.start()
    try:
        small = resize(cam, (side, side))
        planes = np.concatenate([background_plane(small, 16)[None], small])
        # Steps after the first need no more memory; a power would be full by now.
        walked = walk(planes, transition(affinity, RADIUS, 8), 4)
        label_map(walked[1:], ids, (500, 500), walked[0])
        label_map(walked[1:], ids, (500, 500), 0.3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 34 * side * side * 4 < peak < 200e6


def test_the_background_is_high_where_every_cam_is_low():
    found = background_plane(np.float32([[[0.0, 0.5, 1.0]], [[0.0, 0.1, 0.2]]]), 16)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[1, 0.5**16, 0]], rtol=1e-6)
    assert (background_plane(np.zeros((0, 2, 3), np.float32), 16) == np.ones((2, 3))).all()


def test_planes_shrink_to_the_mean_of_the_area_and_grow_between_the_centres_of_pixels():
    planes = planes_of((8, 12))
    expected = planes.reshape(3, 2, 4, 3, 4).mean((2, 4))
    np.testing.assert_allclose(resize(planes, (2, 3)), expected, rtol=1e-5)
    row = [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]
    np.testing.assert_allclose(resize(np.float32([[[0, 1]]]), (2, 8)), [[row, row]], atol=1e-6)
    assert (resize(planes, (8, 12)) == planes).all()
    assert resize(planes[:0], (9, 9)).shape == (0, 9, 9)


class TestLabelMap:
    @pytest.mark.parametrize(
        ("background", "labels"),
        [
            # Planes of maximum one: 0.05 / 0.20 is below 0.3, 0.01 / 0.02 above.
            (0.3, [[4, 4, 9, 9]]),
            (0.6, [[4, 0, 0, 9]]),
            # A walked background is compared as it is.
            (np.float32([[0.1, 0.07, 0.0, 0.03]]), [[4, 0, 4, 0]]),
        ],
    )
    def test_planes_are_set_against_the_background(self, background, labels):
        walked = np.float32([[[0.20, 0.07, 0.05, 0.0]], [[0.0, 0.0, 0.01, 0.02]]])
        found = label_map(walked, np.array([4, 9]), (1, 4), background)
        assert found.dtype == np.uint8 and found.tolist() == labels

    @pytest.mark.parametrize("size", [(21, 34), (9, 50)])
    def test_it_is_decided_at_the_size_of_the_image(self, size):
        walked = planes_of((5, 8), count=2)
        full = resize(walked, size)
        full /= full.max((1, 2), keepdims=True) + 1e-5
        found = label_map(walked, np.array([2, 3]), size, 0.5)
        assert found.shape == size and (found == seed(full, np.array([2, 3]), 0.5)).all()
        background = planes_of((5, 8), count=1, start=9)[0]
        planes = np.concatenate([background[None], walked])
        expected = np.array([0, 2, 3])[resize(planes, size).argmax(0)]
        assert (label_map(walked, np.array([2, 3]), size, background) == expected).all()

    @pytest.mark.parametrize("background", [0.3, np.ones((2, 3), np.float32)])
    def test_an_image_without_classes_is_background(self, background):
        found = label_map(np.zeros((0, 2, 3), np.float32), np.zeros(0, int), (4, 6), background)
        assert found.dtype == np.uint8 and found.shape == (4, 6) and not found.any()
