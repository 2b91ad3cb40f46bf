"""The random walk: what it conserves, what it mixes, its dense definition and its memory."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isim.labels import random_walk
from isim.labels.random_walk import background_plane, label_map, resize, transition, walk
from isim.labels.seeds import seed
from isim.pairs import half_disc

RADIUS = 5
# The fixture of the module holds for all examples alike.
FIXTURE = [HealthCheck.function_scoped_fixture]
SIZES = st.tuples(st.integers(1, 8), st.integers(1, 8))


def affinities(size, start=0, low=0.0):
    """Also outside the map, where nothing must be read."""
    rng = np.random.default_rng(start)
    return rng.uniform(low, 1, (len(half_disc(RADIUS)), *size)).astype(np.float32)


def planes_of(size, count=3, start=1):
    return np.random.default_rng(start).uniform(0, 1, (count, *size)).astype(np.float32)


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def _steps(request, monkeypatch):
    """Both ways to take a step."""
    if request.param == "numpy":
        monkeypatch.setattr(random_walk, "_kernel", lambda: None)
    else:
        assert random_walk._kernel() is not None


def matrix_of(moves):
    """(N, N): where one step takes each pixel's value."""
    count = moves.size[0] * moves.size[1]
    every = np.eye(count, dtype=np.float32).reshape(count, *moves.size)
    return walk(every, moves, 0).reshape(count, count)


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


@given(SIZES, st.integers(0, 99), st.sampled_from([1, 8, 2.5]))
@settings(deadline=None, suppress_health_check=FIXTURE, max_examples=30)
def test_the_transition_is_the_normalised_affinity(size, start, beta):
    affinity = affinities(size, start)
    found = transition(affinity, RADIUS, beta)
    matrix = dense(affinity, beta)
    np.testing.assert_allclose(matrix_of(found), matrix / matrix.sum(0), 1e-6, 1e-30)


@given(SIZES, st.integers(0, 99))
@settings(deadline=None, suppress_health_check=FIXTURE, max_examples=30)
def test_columns_of_the_transition_sum_to_one(size, start):
    matrix = matrix_of(transition(affinities(size, start), RADIUS, 8))
    np.testing.assert_allclose(matrix.sum(0, dtype=np.float64), 1, rtol=1e-6)


def test_a_map_without_any_affinity_stays_as_it_is():
    still = transition(np.zeros((34, 4, 5), np.float32), RADIUS, 8)
    planes = planes_of((4, 5))
    assert (walk(planes, still, 8) == planes).all()


@given(SIZES, st.integers(0, 99), st.integers(0, 8))
@settings(deadline=None, suppress_health_check=FIXTURE, max_examples=30)
def test_the_walk_equals_the_dense_power(size, start, t):
    affinity, planes = affinities(size, start), planes_of(size)
    matrix = dense(affinity, 8)
    power = np.linalg.matrix_power(matrix / matrix.sum(0), 2**t)
    expected = (planes.reshape(3, -1).astype(np.float64) @ power).reshape(planes.shape)
    found = walk(planes, transition(affinity, RADIUS, 8), t)
    assert found.dtype == np.float32 and found.shape == planes.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_uniform_affinity_tends_to_the_degree_weighted_mean():
    size = (6, 9)
    uniform = np.full((34, *size), 0.9, np.float32)
    degree = dense(uniform, 8).sum(0).reshape(size)
    assert degree.max() > 1.5 * degree.min(), "or the plain mean would do as well"
    planes = planes_of(size)
    expected = (planes * degree).sum((1, 2)) / degree.sum()
    found = walk(planes, transition(uniform, RADIUS, 8), 10)
    np.testing.assert_allclose(found, np.broadcast_to(expected[:, None, None], found.shape), 1e-4)
    assert np.abs(expected - planes.mean((1, 2))).min() > 1e-3


def test_regions_without_mutual_affinity_exchange_nothing():
    size = (7, 8)
    region = np.arange(56).reshape(size) % 8 >= 3
    affinity = affinities(size, low=0.5)
    for p, (dy, dx) in enumerate(half_disc(RADIUS)):
        for y in range(7):
            for x in range(8):
                if y + dy < 7 and 0 <= x + dx < 8 and region[y, x] != region[y + dy, x + dx]:
                    affinity[p, y, x] = 0
    planes = planes_of(size)
    moves = transition(affinity, RADIUS, 8)
    both = walk(planes, moves, 8)
    for inside in (region, ~region):
        alone = walk(planes * inside, moves, 8)
        assert (alone[:, ~inside] == 0).all()
        assert (alone[:, inside] == both[:, inside]).all()
    # Within each region all is mixed.
    assert np.ptp(both[:, region], axis=1).max() < 0.1 * np.ptp(planes[:, region], axis=1).min()


@given(st.integers(0, 99))
@settings(deadline=None, suppress_health_check=FIXTURE, max_examples=20)
def test_values_stay_within_those_of_the_planes(start):
    planes = planes_of((6, 7), start=start)
    found = walk(planes, transition(affinities((6, 7), start), RADIUS, 8), 8)
    assert found.min() >= planes.min() - 1e-5 and found.max() <= planes.max() + 1e-5


def test_planes_walk_apart():
    moves, planes = transition(affinities((5, 6)), RADIUS, 8), planes_of((5, 6))
    together = walk(planes, moves, 6)
    for plane, expected in zip(planes, together, strict=True):
        assert (walk(plane[None], moves, 6)[0] == expected).all()
    assert walk(planes[:0], moves, 6).shape == (0, 5, 6)


@pytest.mark.parametrize("stride", [8, 4])
def test_an_image_of_500x500_needs_less_than_200_megabytes(stride):
    side = -(-500 // stride)
    affinity = affinities((side, side))
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


class TestBackground:
    def test_is_high_where_every_cam_is_low(self):
        cam = np.float32([[[0.0, 0.5, 1.0]], [[0.0, 0.1, 0.2]]])
        found = background_plane(cam, 16)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, [[1, 0.5**16, 0]], rtol=1e-6)

    def test_is_one_without_classes(self):
        assert (background_plane(np.zeros((0, 2, 3), np.float32), 16) == np.ones((2, 3))).all()


class TestResize:
    def test_shrinks_to_the_mean_of_the_area(self):
        planes = planes_of((8, 12))
        expected = planes.reshape(3, 2, 4, 3, 4).mean((2, 4))
        np.testing.assert_allclose(resize(planes, (2, 3)), expected, rtol=1e-5)

    def test_grows_between_the_centres_of_pixels(self):
        found = resize(np.float32([[[0, 1]]]), (2, 8))
        expected = [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]
        np.testing.assert_allclose(found, [[expected, expected]], atol=1e-6)

    def test_to_its_own_size_is_nothing(self):
        planes = planes_of((5, 7))
        assert (resize(planes, (5, 7)) == planes).all()
        assert resize(planes[:0], (9, 9)).shape == (0, 9, 9)


class TestLabelMap:
    def test_a_constant_is_compared_with_planes_of_maximum_one(self):
        walked = np.float32([[[0.20, 0.07, 0.05, 0.0]], [[0.0, 0.0, 0.01, 0.02]]])
        # 0.05 / 0.20 is below 0.3, 0.01 / 0.02 above.
        found = label_map(walked, np.array([4, 9]), (1, 4), 0.3)
        assert found.dtype == np.uint8 and found.tolist() == [[4, 4, 9, 9]]
        assert label_map(walked, np.array([4, 9]), (1, 4), 0.6).tolist() == [[4, 0, 0, 9]]

    def test_a_walked_background_is_compared_as_it_is(self):
        walked = np.float32([[[0.20, 0.07, 0.05, 0.0]], [[0.0, 0.0, 0.01, 0.02]]])
        background = np.float32([[0.1, 0.07, 0.0, 0.03]])
        found = label_map(walked, np.array([4, 9]), (1, 4), background)
        assert found.dtype == np.uint8 and found.tolist() == [[4, 0, 4, 0]]

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


def test_a_seed_of_a_part_grows_to_its_object():
    """What the walk is for: the CAM finds a tenth of the object, affinity ends at its border."""
    truth = np.zeros((20, 24), bool)
    truth[4:16, 6:18] = True
    affinity = np.zeros((34, 20, 24), np.float32)
    for p, (dy, dx) in enumerate(half_disc(RADIUS)):
        for y in range(20):
            for x in range(24):
                if y + dy < 20 and 0 <= x + dx < 24:
                    affinity[p, y, x] = 0.95 if truth[y, x] == truth[y + dy, x + dx] else 0.3
    # Faint on the object, faintly over its border; high on a part.
    cam = np.zeros((1, 20, 24), np.float32)
    cam[0, 3:17, 5:19] = 0.2
    cam[0, 5:9, 7:11] = 1
    assert (((cam[0] > 0.3) != truth).mean()) > 0.25
    moves = transition(affinity, RADIUS, 8)
    for background in (0.3, walk(background_plane(cam, 16)[None], moves, 5)[0]):
        found = label_map(walk(cam, moves, 5), np.array([3]), (20, 24), background)
        assert ((found == 3) == truth).all()
