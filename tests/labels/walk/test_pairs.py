"""Half discs: the count of PSA, one of each opposite two, and where they fit."""

import pytest

from isim.labels.walk.pairs import half_disc, overlap


@pytest.mark.parametrize(("radius", "count"), [(1, 0), (2, 4), (3, 12), (5, 34)])
def test_the_half_disc_has_its_offsets(radius, count):
    assert len(half_disc(radius)) == count


@pytest.mark.parametrize("radius", range(1, 8))
def test_a_half_disc_and_its_opposite_are_the_disc_without_its_centre(radius):
    half = half_disc(radius)
    found = half + [(-dy, -dx) for dy, dx in half]
    reach = range(-radius, radius + 1)
    disc = {(y, x) for y in reach for x in reach if 0 < y * y + x * x < radius**2}
    assert len(found) == len(disc) and set(found) == disc


@pytest.mark.parametrize("size", [(6, 9), (1, 1), (2, 7), (7, 2), (4, 4)])
def test_the_overlap_holds_each_pair_inside_the_map_once(size):
    height, width = size
    for dy, dx in half_disc(5):
        here, there = overlap((dy, dx), height, width)
        pixels = [
            [(y, x) for y in range(height)[rows] for x in range(width)[columns]]
            for rows, columns in (here, there)
        ]
        expected = [
            (y, x)
            for y in range(height)
            for x in range(width)
            if y + dy < height and 0 <= x + dx < width
        ]
        assert pixels[0] == expected
        assert pixels[1] == [(y + dy, x + dx) for y, x in expected]
