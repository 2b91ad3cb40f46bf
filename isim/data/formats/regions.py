"""Regions of a label map: connected parts or whole classes, as planes and as polygons.

A polygon has one ring. Holes are cut into it by bridges, ways of no width there and back: filled by
the even-odd rule it covers the region without its holes.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from isim.metrics import BACKGROUND, IGNORE

Instances = Literal["parts", "classes"]
Ring = NDArray[np.float64]


class Region(NamedTuple):
    """A connected part, or all pixels, of a class: its (h, w) uint8 plane from (top, left) on."""

    class_id: int
    top: int
    left: int
    plane: NDArray[np.uint8]

    @property
    def area(self) -> int:
        """Number of pixels."""
        return int(self.plane.sum())

    def whole(self, size: tuple[int, ...]) -> NDArray[np.uint8]:
        """(H, W) uint8 plane of an image of `size`."""
        found = np.zeros(size, np.uint8)
        height, width = self.plane.shape
        found[self.top : self.top + height, self.left : self.left + width] = self.plane
        return found


def regions(label: NDArray[np.uint8], instances: Instances) -> Iterator[Region]:
    """Yield the regions of an (H, W) label map, by class; not the background, nor what is ignored.

    Parts are connected at corners, too.
    """
    for value in np.flatnonzero(np.bincount(label.ravel(), minlength=256)):
        if value in (BACKGROUND, IGNORE):
            continue
        plane = (label == value).astype(np.uint8)
        if instances == "classes":
            left, top, width, height = cv2.boundingRect(plane)
            cut = plane[top : top + height, left : left + width]
            yield Region(int(value), top, left, cut)
            continue
        _, number, stats, _ = cv2.connectedComponentsWithStats(plane, connectivity=8)
        for part, (left, top, width, height, _) in enumerate(stats[1:], start=1):
            own = number[top : top + height, left : left + width] == part
            yield Region(int(value), int(top), int(left), own.astype(np.uint8))


def edge_polygons(region: Region) -> list[Ring]:
    """Polygons (N, 2) of x, y along the edges of pixels, one for each connected part.

    The pixel in column x covers x to x + 1.
    """
    # Each pixel as 2 x 2: a contour's points tell then on which side of a pixel they are.
    doubled = region.plane.repeat(2, 0).repeat(2, 1)
    return [
        _simple((ring + 1) // 2 + np.array([region.left, region.top])).astype(np.float64)
        for ring in _rings(doubled)
    ]


def centre_polygons(region: Region) -> list[Ring]:
    """Polygons (N, 2) of x, y through the centres of border pixels, one for each connected part.

    The pixel in column x has its centre at x + 0.5, of which a little is taken off: readers that
    round and those that cut then find the same pixel. Filled with their border, as OpenCV does,
    they cover the region. A ring has at least 3 points, which may be equal.
    """
    found: list[Ring] = []
    for ring in _rings(region.plane):
        simple = _simple(ring + np.array([region.left, region.top]))
        simple = np.concatenate([simple, simple[-1:].repeat(max(0, 3 - len(simple)), 0)])
        found.append(simple.astype(np.float64) + 0.48)
    return found


def _rings(plane: NDArray[np.uint8]) -> list[NDArray[np.int64]]:
    """Contours (N, 2) of the parts of a plane, with their holes."""
    contours, tree = cv2.findContours(plane, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    rings = {}
    for number, (*_, parent) in enumerate(tree[0] if tree is not None else ()):
        if parent < 0:
            rings[number] = contours[number][:, 0].astype(np.int64)
    holes: list[tuple[int, NDArray[np.int64]]] = []
    for number, (*_, parent) in enumerate(tree[0] if tree is not None else ()):
        if parent >= 0:
            holes.append((int(parent), contours[number][:, 0].astype(np.int64)))
    # From the left: what lies between a hole and the ring has been cut in before.
    for parent, hole in sorted(holes, key=lambda pair: int(pair[1][:, 0].min())):
        rings[parent] = _bridged(rings[parent], hole)
    return list(rings.values())


def _bridged(ring: NDArray[np.int64], hole: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cut a hole into a ring, from its leftmost point to the ring's nearest."""
    start = int(hole[:, 0].argmin())
    place = int(((ring - hole[start]) ** 2).sum(1).argmin())
    around = np.concatenate([hole[start:], hole[: start + 1]])
    return np.concatenate([ring[: place + 1], around, ring[place:]])


def _simple(ring: NDArray[np.int64]) -> NDArray[np.int64]:
    """Drop points that repeat the one before or lie on a straight way on."""
    moved = (ring != np.roll(ring, 1, 0)).any(1)
    ring = ring[moved] if moved.any() else ring[:1]
    if len(ring) < 3:
        return ring
    before, after = ring - np.roll(ring, 1, 0), np.roll(ring, -1, 0) - ring
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    back = (before * after).sum(1) < 0
    kept = turns | back
    return ring[kept] if kept.any() else ring[:1]
