"""Geometry of the pixel pairs that affinity is about (spec 6): offsets and where they fit."""


def half_disc(radius: int) -> list[tuple[int, int]]:
    """Offsets (dy, dx) of the neighbours nearer than `radius`, one of each opposite two.

    Their order is that of the planes of an affinity array. PSA's radius of 5 pixels of the map
    gives 34; the other half is the same pairs, as affinity is symmetric.
    """
    return [
        (dy, dx)
        for dy in range(radius)
        for dx in range(-radius + 1, radius)
        if dy * dy + dx * dx < radius * radius and (dy > 0 or dx > 0)
    ]


def overlap(
    offset: tuple[int, int], height: int, width: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Rows and columns of the pixels whose neighbour at `offset` is inside, and of the neighbours.

    `offset` is (dy, dx) with dy >= 0. Both are empty when the map is smaller than the offset.
    """
    dy, dx = offset
    rows, columns = max(height - dy, 0), max(width - abs(dx), 0)
    left, right = max(-dx, 0), max(dx, 0)
    here = slice(0, rows), slice(left, left + columns)
    there = slice(dy, dy + rows), slice(right, right + columns)
    return here, there
