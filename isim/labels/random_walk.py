"""Random walk that carries CAMs along affinities (paper 4.1.6; spec 6)."""

import ctypes
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from isim import compiled
from isim.labels import seeds
from isim.pairs import half_disc, overlap

Float = TypeVar("Float", np.float32, np.float64)

# Values that the kernel may read behind a map: eight vectors of eight.
_BEHIND = 64


@dataclass(frozen=True)
class Transition:
    """Column-normalised affinity^beta of an h x w map, N = h * w, as a stencil.

    The N x N matrix is W / (column sums of W), with W symmetric and ones on its diagonal; each
    pair of pixels is stored once. Maps are padded and flat (`padded`), so that a pixel's neighbour
    at an offset is the same distance away everywhere.

    Attributes:
        weights: (P, length) float32 affinity^beta of each pixel and its neighbour at an offset of
            `half_disc(radius)`; 0 outside.
        scale: (length,) float64, 1 / column sums; 0 outside.
        distances: (P,) int64 how far the neighbours are.
        size: (h, w).
        radius: Of the half disc in pixels of the map.
    """

    weights: NDArray[np.float32]
    scale: NDArray[np.float64]
    distances: NDArray[np.int64]
    size: tuple[int, int]
    radius: int

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
    """Transition matrix of the walk: column-normalised affinity^beta.

    The affinity matrix is symmetric with ones on its diagonal: each half-disc pair counts in
    both directions, and every pixel is wholly alike to itself.

    Args:
        affinity: (P, h, w) in [0, 1]: plane p at (y, x) is the affinity of that pixel and its
            neighbour at the p-th offset of `half_disc(radius)`. What is outside is not read.
        radius: Of the half disc in pixels of the map.
        beta: Exponent; 8 in PSA. Higher makes weak links weaker.
    """
    height, width = affinity.shape[1:]
    inside = np.zeros(affinity.shape, np.float32)
    for plane, target, offset in zip(affinity, inside, half_disc(radius), strict=True):
        here, _ = overlap(offset, height, width)
        target[here] = plane[here].astype(np.float64) ** beta
    distances = [dy * (width + radius) + dx for dy, dx in half_disc(radius)]
    ones = padded(np.ones((1, height, width)), radius)
    still = Transition(
        padded(inside, radius), ones[0], np.array(distances, np.int64), (height, width), radius
    )
    sums = still.spread(ones)[0]
    scale = np.divide(1, sums, out=np.zeros_like(sums), where=sums > 0)
    return replace(still, scale=scale)


def padded(planes: NDArray[Float], radius: int) -> NDArray[Float]:
    """Flatten planes with zeros around and between their rows.

    Args:
        planes: (M, h, w).
        radius: No neighbour is that many pixels away.

    Returns:
        (M, length): `radius` rows, those of the planes followed by `radius` zeros each, `radius`
        rows, and a few more values.
    """
    count, height, width = planes.shape
    rows, stride = height + 2 * radius, width + radius
    flat = np.zeros((count, rows * stride + _BEHIND), planes.dtype)
    _inside(flat, (height, width), radius)[...] = planes
    return flat


def _inside(flat: NDArray[Float], size: tuple[int, int], radius: int) -> NDArray[Float]:
    """(M, h, w) view of padded planes."""
    height, width = size
    rows = flat[:, : (height + 2 * radius) * (width + radius)]
    rows = rows.reshape(len(flat), height + 2 * radius, width + radius)
    return rows[:, radius : radius + height, :width]


def walk(planes: NDArray[np.float32], transition: Transition, t: int) -> NDArray[np.float32]:
    """Take 2^t steps: planes @ transition^(2^t), planes as row vectors.

    PSA squares the matrix t times, which fills it (0.06 GB an image at stride 8, 1 GB at 4). The
    product is linear in the planes, so that here each step multiplies them by the stencil. The
    planes are in double precision, as 256 steps add up what each column's sum differs from 1; the
    weights need not be, as the sums are theirs. Where there is no C++ compiler, numpy takes the
    steps, many times more slowly.

    Args:
        planes: (M, h, w) CAMs of the labelled classes, and the background plane if it walks;
            float32, M may be 0.
        transition: Of the same size.
        t: Logarithm of the number of steps; 8 in PSA.

    Returns:
        (M, h, w) float32.
    """
    flat = padded(planes.astype(np.float64), transition.radius)
    kernel = _kernel()
    if kernel is None:
        for _ in range(2**t):
            flat = transition.spread(flat) * transition.scale
    else:
        kernel(
            *(transition.weights, transition.scale, transition.distances),
            *(len(transition.weights), flat.shape[1], *transition.pixels, 2**t, len(flat)),
            *(flat, np.zeros((4, flat.shape[1]))),
        )
    return _inside(flat, transition.size, transition.radius).astype(np.float32)


@functools.cache
def _kernel() -> Callable[..., None] | None:
    """The compiled steps; None where there is no compiler."""
    try:
        kernel = compiled.library("random_walk").walk
    except compiled.Unavailable as error:
        warnings.warn(f"the random walk is computed by numpy, slowly: {error}", stacklevel=2)
        return None
    doubles = np.ctypeslib.ndpointer(np.float64, flags="C_CONTIGUOUS")
    floats = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")
    distances = np.ctypeslib.ndpointer(np.int64, flags="C_CONTIGUOUS")
    kernel.argtypes = [floats, doubles, distances, *6 * [ctypes.c_int64], doubles, doubles]
    kernel.restype = None
    return kernel


def background_plane(cam: NDArray[np.float32], alpha: float) -> NDArray[np.float32]:
    """Background as PSA has it: (1 - max CAM)^alpha, high where every CAM is low.

    Taken before the walk, and walked like one more class. After the walk it would be a
    decreasing function of the highest CAM alone, which is the same as a constant plane.

    Args:
        cam: (K', h, w) CAMs of the labelled classes, in [0, 1]; K' may be 0.
        alpha: Exponent; 16 in PSA's walk.

    Returns:
        (h, w) in [0, 1].
    """
    return (1 - cam.max(0, initial=0)) ** np.float32(alpha)


def resize(planes: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize planes: mean of the area where they shrink, bilinear where they grow.

    Args:
        planes: (M, h, w); M may be 0.
        size: (H, W) wanted.

    Returns:
        (M, H, W) float32.
    """
    height, width = size
    shrinks = height <= planes.shape[1] and width <= planes.shape[2]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = np.empty((len(planes), height, width), np.float32)
    for source, target in zip(planes, resized, strict=True):
        target[...] = cv2.resize(source, (width, height), interpolation=method)
    return resized


def label_map(
    walked: NDArray[np.float32],
    class_ids: NDArray[np.int64],
    size: tuple[int, int],
    background: float | NDArray[np.float32],
) -> NDArray[np.uint8]:
    """Labels of the image from walked CAMs: upsample, set against the background, argmax.

    Args:
        walked: (K', h, w) of `walk`; K' may be 0.
        class_ids: (K',) label of each plane, 1..K.
        size: (H, W) of the image in pixels.
        background: A constant: each plane is first divided by its maximum (+1e-5, spec 4), as
            walking levels them. Or the walked (h, w) `background_plane`, which has been levelled
            alike: the planes stay as they are.

    Returns:
        (H, W) labels, 0 = background, which wins ties.
    """
    planes = resize(walked, size)
    if isinstance(background, np.ndarray):
        labels, height = seeds.peak(planes, class_ids)
        labels[height <= resize(background[None], size)[0]] = seeds.BACKGROUND
        return labels
    planes /= planes.max((1, 2), keepdims=True, initial=0) + np.float32(1e-5)
    return seeds.seed(planes, class_ids, background)
