"""Cleaning of label maps where they leave the house: specks and holes.

A part is a connected set of pixels of one class, neighbours at a corner included; parts of the
background are connected by sides alone, so that a closed line of pixels parts it. Pixels to ignore
are no part, and stay.
"""

from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from isim.metrics import BACKGROUND, IGNORE

Label = NDArray[np.uint8]
_RING = np.ones((3, 3), np.uint8)


def clean(label: Label, least_area: float, fill_holes: float) -> Label:
    """Remove the specks of a label map, then fill its holes.

    A speck is a part of a class, not of the background, below `least_area`; a hole is a part of the
    background that does not touch the border, up to `fill_holes`. Both take the label that most of
    the pixels around them have. A class keeps its largest part, however small.

    Args:
        label: (H, W) class ids, 255 = ignore.
        least_area: Share of the image's area; 0: nothing is removed.
        fill_holes: Share of the image's area; 0: nothing is filled.

    Returns:
        (H, W) label map; `label` stays as it is.
    """
    found = label.copy()
    specks = np.zeros(label.shape, np.uint8)
    for number, areas in _parts(label):
        small = areas < least_area * label.size
        small[areas.argmax()] = False
        # Number 0 is all that is not of the class.
        specks |= np.concatenate([[False], small])[number].astype(np.uint8)
    _surround(found, specks, 8)
    if fill_holes:
        _surround(found, _holes(found, fill_holes * label.size), 4)
    return found


def count_parts(label: Label) -> int:
    """Count the parts of all classes of an (H, W) label map, the background's not included."""
    return sum(len(areas) for _, areas in _parts(label))


def _parts(label: Label) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Yield, for each class that occurs, the (H, W) numbers 1.. of its parts and their areas."""
    for value in np.flatnonzero(np.bincount(label.ravel(), minlength=256)):
        if value in (BACKGROUND, IGNORE):
            continue
        plane = (label == value).astype(np.uint8)
        _, number, stats, _ = cv2.connectedComponentsWithStats(plane, connectivity=8)
        yield number, stats[1:, cv2.CC_STAT_AREA]


def _holes(label: Label, largest: float) -> Label:
    """(H, W) uint8: 1 where the background is a hole of at most `largest` pixels."""
    plane = (label == BACKGROUND).astype(np.uint8)
    _, number, stats, _ = cv2.connectedComponentsWithStats(plane, connectivity=4)
    height, width = label.shape
    left, top, wide, high, area = stats.T
    inside = (left > 0) & (top > 0) & (left + wide < width) & (top + high < height)
    chosen = inside & (area <= largest)
    chosen[0] = False
    found: Label = chosen[number].astype(np.uint8)
    return found


def _surround(label: Label, chosen: Label, connectivity: int) -> None:
    """Give each connected set of chosen pixels the most frequent label around it, in place."""
    _, number, stats, _ = cv2.connectedComponentsWithStats(chosen, connectivity=connectivity)
    for part, (left, top, wide, high, _) in enumerate(stats[1:], start=1):
        rows = slice(max(top - 1, 0), top + high + 1)
        columns = slice(max(left - 1, 0), left + wide + 1)
        own = number[rows, columns] == part
        ring = cv2.dilate(own.astype(np.uint8), _RING).astype(bool) & (chosen[rows, columns] == 0)
        around = np.bincount(label[rows, columns][ring], minlength=256)
        around[IGNORE] = 0
        if around.any():
            label[rows, columns][own] = around.argmax()
