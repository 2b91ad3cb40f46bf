"""Geometry of the pixel pairs that affinity is about (spec 6): offsets and where they fit."""


def half_disc(radius: int) -> list[tuple[int, int]]:
    """Offsets of the neighbours nearer than `radius`, one of each opposite two.

    The other half is the same pairs seen from their other end, as affinity is symmetric.

    Args:
        radius: In pixels of the map; 5 in PSA, which gives 34 offsets.

    Returns:
        (dy, dx) in a fixed order: the index is the plane of an affinity array.
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

    Args:
        offset: (dy, dx) with dy >= 0.
        height: Of the map in pixels.
        width: Of the map in pixels.

    Returns:
        Two index pairs of equal shape; empty when the map is smaller than the offset.
    """
    dy, dx = offset
    rows, columns = max(height - dy, 0), max(width - abs(dx), 0)
    left, right = max(-dx, 0), max(dx, 0)
    here = slice(0, rows), slice(left, left + columns)
    there = slice(dy, dy + rows), slice(right, right + columns)
    return here, there
