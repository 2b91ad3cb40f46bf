"""Seed: the hard label map of CAMs by a threshold, before any refinement (spec 5)."""

import cv2
import numpy as np
from numpy.typing import NDArray

BACKGROUND = 0


def peak(
    cam: NDArray[np.float32], class_ids: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Find the highest CAM of each pixel.

    Args:
        cam: (K', H, W) CAMs of the labelled classes, in [0, 1]; K' may be 0.
        class_ids: (K',) label of each plane, 1..K.

    Returns:
        (H, W) label of the highest plane (0 when there is none) and (H, W) its height.
    """
    if len(class_ids) == 0:
        return np.zeros(cam.shape[1:], np.uint8), np.zeros(cam.shape[1:], np.float32)
    best = cam.argmax(0)
    height = np.take_along_axis(cam, best[None], 0)[0]
    return np.asarray(class_ids, np.uint8)[best], height


def seed(
    cam: NDArray[np.float32], class_ids: NDArray[np.int64], threshold: float
) -> NDArray[np.uint8]:
    """Put a constant background plane above the CAM planes and take the argmax.

    Args:
        cam: (K', H, W) CAMs of the labelled classes, in [0, 1]; K' may be 0.
        class_ids: (K',) label of each plane, 1..K.
        threshold: Height of the background plane, as in `cut`.

    Returns:
        (H, W) labels, 0 = background.
    """
    return cut(*peak(cam, class_ids), threshold)


def cut(
    best: NDArray[np.uint8], height: NDArray[np.float32], threshold: float
) -> NDArray[np.uint8]:
    """Set what does not rise above the background plane to background.

    Args:
        best: (H, W) label of the highest CAM, of `peak`.
        height: (H, W) value of that CAM.
        threshold: Height of the background plane (0.3 in the paper, 4.1). A CAM must rise
            above it: a tie is background.

    Returns:
        (H, W) labels, 0 = background.
    """
    return np.where(height > threshold, best, np.uint8(BACKGROUND))


def grow(planes: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Bring stored CAMs (K', h, w) to an image's size (H, W): (K', H, W), bilinear."""
    height, width = size
    grown = np.zeros((len(planes), height, width), np.float32)
    for plane, out in zip(planes, grown, strict=True):
        cv2.resize(plane, (width, height), out, interpolation=cv2.INTER_LINEAR)
    return grown
