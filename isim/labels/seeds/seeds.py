"""Seed: the hard label map of CAMs by a threshold, before any refinement (spec 5)."""

import cv2
import numpy as np
from numpy.typing import NDArray

from isim.metrics import BACKGROUND, IGNORE

# Bins of the heights that a threshold is chosen from.
BINS = 256


def peak(
    cam: NDArray[np.float32], class_ids: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Find each pixel's highest of (K', H, W) CAMs in [0, 1], which are of `class_ids` (K',).

    Returns:
        (H, W) label of the highest plane, the first of equals, and (H, W) its height; 0 for K' = 0.
    """
    if len(class_ids) == 0:
        return np.zeros(cam.shape[1:], np.uint8), np.zeros(cam.shape[1:], np.float32)
    best = cam.argmax(0)
    height = np.take_along_axis(cam, best[None], 0)[0]
    return np.asarray(class_ids, np.uint8)[best], height


def seed(
    cam: NDArray[np.float32], class_ids: NDArray[np.int64], threshold: float
) -> NDArray[np.uint8]:
    """Make the (H, W) labels of CAMs: `cut` what `peak` finds."""
    return cut(*peak(cam, class_ids), threshold)


def cut(
    best: NDArray[np.uint8], height: NDArray[np.float32], threshold: float
) -> NDArray[np.uint8]:
    """Set the labels (H, W) of `peak` to background, 0, where their height is not above a plane's.

    The background plane is at `threshold` (0.3 in the paper, 4.1); a tie is background.
    """
    return np.where(height > threshold, best, np.uint8(BACKGROUND))


def grow(planes: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize stored CAMs (K', h, w) to an image's size (H, W), bilinear: (K', H, W) float32."""
    height, width = size
    grown = np.zeros((len(planes), height, width), np.float32)
    for plane, out in zip(planes, grown, strict=True):
        cv2.resize(plane, (width, height), out, interpolation=cv2.INTER_LINEAR)
    return grown


def otsu(heights: NDArray[np.float32]) -> float:
    """Choose the threshold (N. Otsu, 1979) that parts heights in [0, 1] into two classes best.

    It maximises the variance between the classes of their `histogram`; 0.5 for heights that are all
    of one bin.
    """
    return otsu_of(histogram(heights))


def histogram(heights: NDArray[np.float32]) -> NDArray[np.int64]:
    """Count heights in [0, 1] in 256 bins; counts of several images may be added."""
    return np.histogram(heights, BINS, (0, 1))[0]


def otsu_of(counts: NDArray[np.int64]) -> float:
    """Choose the threshold of `otsu` by a `histogram`."""
    edges = np.linspace(0, 1, BINS + 1)
    below = np.cumsum(counts)[:-1].astype(np.float64)
    above = counts.sum() - below
    sums = np.cumsum(counts * (edges[:-1] + edges[1:]) / 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    if not np.isfinite(apart).any():
        return 0.5
    return float(edges[1:-1][np.nanargmax(apart)])


def reduced(label: NDArray[np.uint8], size: tuple[int, int], share: float) -> NDArray[np.uint8]:
    """Reduce a label map (H, W) to the patches of a grid `size` (h, w): (h * w,) uint8.

    A patch gets the label that covers more than `share` of it, and IGNORE where none does.
    """
    best = np.full(size, IGNORE, np.uint8)
    most = np.full(size, share, np.float32)
    for value in np.unique(label[label != IGNORE]):
        plane = (label == value).astype(np.float32)
        covered = cv2.resize(plane, size[::-1], interpolation=cv2.INTER_AREA)
        best[covered > most] = value
        most = np.maximum(most, covered)
    return best.ravel()
