"""Random walk that carries CAMs along affinities (paper 4.1.6; spec 6)."""

import cv2
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from isim.labels import seeds
from isim.pairs import half_disc, overlap


def transition(affinity: NDArray[np.float32], radius: int, beta: float) -> sp.csc_array:
    """Transition matrix of the walk: column-normalised affinity^beta.

    The affinity matrix is symmetric with ones on its diagonal: each half-disc pair counts in
    both directions, and every pixel is wholly alike to itself.

    Args:
        affinity: (P, h, w) in [0, 1]: plane p at (y, x) is the affinity of that pixel and its
            neighbour at the p-th offset of `half_disc(radius)`. What is outside is not read.
        radius: Of the half disc in pixels of the map.
        beta: Exponent; 8 in PSA. Higher makes weak links weaker.

    Returns:
        (N, N) float64 in compressed columns, N = h * w; each column sums to 1.
    """
    height, width = affinity.shape[1:]
    number = np.arange(height * width, dtype=np.int32).reshape(height, width)
    every = number.ravel()
    rows, columns, values = [every], [every], [np.ones(number.size)]
    for plane, offset in zip(affinity, half_disc(radius), strict=True):
        here, there = overlap(offset, height, width)
        value = plane[here].ravel().astype(np.float64) ** beta
        rows += [number[here].ravel(), number[there].ravel()]
        columns += [number[there].ravel(), number[here].ravel()]
        values += [value, value]
    places = (np.concatenate(rows), np.concatenate(columns))
    matrix = sp.coo_array((np.concatenate(values), places), (number.size, number.size)).tocsc()
    # No column is empty, as reduceat needs it: each holds its diagonal.
    sums = np.add.reduceat(matrix.data, matrix.indptr[:-1])
    matrix.data /= np.repeat(sums, np.diff(matrix.indptr))
    return matrix


def walk(planes: NDArray[np.float32], transition: sp.csc_array, t: int) -> NDArray[np.float32]:
    """Take 2^t steps: planes @ transition^(2^t), planes as row vectors.

    PSA squares the matrix t times, which fills it (0.06 GB an image at stride 8, 1 GB at 4). The
    product is linear in the planes, so that here each step multiplies them by the sparse matrix.
    All in double precision: 256 steps add up what each column's sum differs from 1.

    Args:
        planes: (M, h, w) CAMs of the labelled classes, and the background plane if it walks;
            float32, M may be 0.
        transition: (N, N) of `transition`, N = h * w.
        t: Logarithm of the number of steps; 8 in PSA.

    Returns:
        (M, h, w) float32.
    """
    # Row vectors times compressed columns are compressed rows times column vectors. One vector
    # after the other, as scipy multiplies a few together more slowly.
    backwards = transition.T
    walked = np.empty(planes.shape, np.float32)
    for source, target in zip(planes, walked, strict=True):
        vector = source.ravel()
        for _ in range(2**t):
            vector = backwards @ vector
        target[...] = vector.reshape(target.shape)
    return walked


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
