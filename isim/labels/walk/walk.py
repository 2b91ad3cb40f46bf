"""Random walk that carries CAMs along affinities (paper 4.1.6; spec 6)."""

from dataclasses import dataclass, replace
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from isim.labels.seeds import seeds
from isim.labels.walk import kernel
from isim.labels.walk.pairs import half_disc, overlap
from isim.metrics import BACKGROUND
from isim.runtime import kernels

Float = TypeVar("Float", np.float32, np.float64)


@dataclass(frozen=True)
class Transition:
    """Column-normalised affinity^beta of an h x w map, N = h * w, as a stencil.

    The N x N matrix is W / (column sums of W), with W symmetric and ones on its diagonal; each
    pair of pixels is stored once. Maps are padded and flat (`padded`), so that a pixel's neighbour
    at an offset of `half_disc(radius)` is the same distance away everywhere.
    """

    weights: NDArray[np.float32]  # (P, length) affinity^beta of pixel and neighbour; 0 outside
    scale: NDArray[np.float64]  # (length,) 1 / column sums; 0 outside
    distances: NDArray[np.int64]  # (P,) how far the neighbours are
    size: tuple[int, int]  # (h, w)
    radius: int  # pixels of the map

    @property
    def pixels(self) -> tuple[int, int]:
        """First flat place of a pixel, and the one behind the last."""
        stride = self.size[1] + self.radius
        return self.radius * stride, (self.radius + self.size[0]) * stride

    def spread(self, planes: NDArray[Float]) -> NDArray[Float]:
        """Multiply (M, length) planes, as row vectors, by W."""
        begin, end = self.pixels
        total = planes.copy()
        for weights, d in zip(self.weights, self.distances, strict=True):
            # Each pair counts from both of its ends.
            total[:, begin:end] += weights[begin:end] * planes[:, begin + d : end + d]
            before = slice(begin - d, end - d)
            total[:, begin:end] += weights[before] * planes[:, before]
        return total


def transition(affinity: NDArray[np.float32], radius: int, beta: float) -> Transition:
    """Make the transition matrix of the walk: column-normalised affinity^beta.

    Args:
        affinity: (P, h, w) in [0, 1]: plane p at (y, x) is the affinity of that pixel and its
            neighbour at the p-th offset of `half_disc(radius)`. What is outside is not read.
        radius: Pixels of the map.
        beta: Exponent; 8 in PSA. Higher makes weak links weaker.
    """
    height, width = affinity.shape[1:]
    inside = np.zeros(affinity.shape, np.float32)
    for plane, target, offset in zip(affinity, inside, half_disc(radius), strict=True):
        here, _ = overlap(offset, height, width)
        target[here] = plane[here].astype(np.float64) ** beta
    distances = np.array([dy * (width + radius) + dx for dy, dx in half_disc(radius)], np.int64)
    ones = padded(np.ones((1, height, width)), radius)
    weights = padded(inside, radius)
    still = Transition(weights, ones[0], distances, (height, width), radius)
    sums = still.spread(ones)[0]
    return replace(still, scale=np.divide(1, sums, out=np.zeros_like(sums), where=sums > 0))


def padded(planes: NDArray[Float], radius: int) -> NDArray[Float]:
    """Flatten (M, h, w) planes to (M, length), with zeros around and between their rows.

    They are `radius` rows, those of the planes with `radius` zeros behind each, `radius` rows,
    and a few more values.
    """
    count, height, width = planes.shape
    rows, stride = height + 2 * radius, width + radius
    flat = np.zeros((count, rows * stride + kernel.BEHIND), planes.dtype)
    _inside(flat, (height, width), radius)[...] = planes
    return flat


def _inside(flat: NDArray[Float], size: tuple[int, int], radius: int) -> NDArray[Float]:
    """View the (M, h, w) pixels of padded planes."""
    height, width = size
    rows = flat[:, : (height + 2 * radius) * (width + radius)]
    rows = rows.reshape(len(flat), height + 2 * radius, width + radius)
    return rows[:, radius : radius + height, :width]


def walk(planes: NDArray[np.float32], transition: Transition, t: int) -> NDArray[np.float32]:
    """Take 2^t steps: planes @ transition^(2^t), planes as row vectors.

    PSA squares the matrix t times, which fills it (0.06 GB an image at stride 8, 1 GB at 4). The
    product is linear in the planes, so that here each step multiplies them by the stencil: in
    double precision, as 256 steps add up what each column's sum differs from 1.

    Args:
        planes: (M, h, w) float32 CAMs of the labelled classes, and the background plane if it
            walks; M may be 0.
        transition: That of a map of this size.
        t: Logarithm of the number of steps; 8 in PSA.

    Returns:
        (M, h, w) float32.
    """
    flat = padded(planes.astype(np.float64), transition.radius)
    if kernels.available("walk", "the random walk is computed by numpy, slowly"):
        weights, (count, length) = transition.weights, flat.shape
        sizes = len(weights), length, *transition.pixels, 2**t, count
        moves = weights, transition.scale, transition.distances
        kernel.steps()(*moves, *sizes, flat, np.zeros((4, length)))
    else:
        for _ in range(2**t):
            flat = transition.spread(flat) * transition.scale
    return _inside(flat, transition.size, transition.radius).astype(np.float32)


def background_plane(cam: NDArray[np.float32], alpha: float) -> NDArray[np.float32]:
    """Make PSA's background plane (h, w) of (K', h, w) CAMs in [0, 1]: (1 - max CAM)^alpha.

    It walks like one more class (alpha 16 in PSA): made after the walk it would be a decreasing
    function of the highest CAM alone, which is the same as a constant plane.
    """
    plane: NDArray[np.float32] = (1 - cam.max(0, initial=0)) ** np.float32(alpha)
    return plane


def resize(planes: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize (M, h, w) planes to (M, H, W) float32: area means if they shrink, else bilinear."""
    if size[0] > planes.shape[1] or size[1] > planes.shape[2]:
        return seeds.grow(planes, size)
    shrunk = np.empty((len(planes), *size), np.float32)
    for source, target in zip(planes, shrunk, strict=True):
        target[...] = cv2.resize(source, size[::-1], interpolation=cv2.INTER_AREA)
    return shrunk


def label_map(
    walked: NDArray[np.float32],
    class_ids: NDArray[np.int64],
    size: tuple[int, int],
    background: float | NDArray[np.float32],
) -> NDArray[np.uint8]:
    """Make an image's labels of walked CAMs: upsample, set against the background, argmax.

    Args:
        walked: (K', h, w) of `walk`; K' may be 0.
        class_ids: (K',) label of each plane, 1..K.
        size: (H, W) of the image in pixels.
        background: A constant: each plane is first divided by its maximum (+1e-5, spec 4), as
            walking levels them. Or the walked (h, w) `background_plane`, levelled alike.

    Returns:
        (H, W) labels, 0 = background, which wins ties.
    """
    planes = resize(walked, size)
    if isinstance(background, np.ndarray):
        labels, height = seeds.peak(planes, class_ids)
        labels[height <= resize(background[None], size)[0]] = BACKGROUND
        return labels
    planes /= planes.max((1, 2), keepdims=True, initial=0) + np.float32(1e-5)
    return seeds.seed(planes, class_ids, background)
