"""Fully connected CRF on a hard label map or on class probabilities (paper 4.1; spec 5).

`$ISIM_CRF` chooses (`kernels.crf_backend`): the reference pydensecrf, or the faster C++ kernel.
"""

import math
from typing import Any

import cv2
import numpy as np
import pydensecrf.densecrf as densecrf
from numpy.typing import NDArray
from pydensecrf.utils import unary_from_labels, unary_from_softmax

from isim.labels.crf import kernel
from isim.params import Crf
from isim.runtime import kernels

# Pixels of an image above which its dCRF is computed on a smaller copy: of 24 million pixels the
# lattices alone would take many gigabytes, and the kernels' widths are meant for VOC's images.
LARGEST = 2_000_000
# Probabilities below count as this, as in pydensecrf.
LEAST_PROBABILITY = 1e-5


def refine(
    image: NDArray[np.uint8],
    seed: NDArray[np.uint8],
    class_ids: NDArray[np.int64],
    settings: Crf,
) -> NDArray[np.uint8]:
    """Refine a seed along the image's edges by mean-field inference (spec 5, set `labels`).

    An image of more than `LARGEST` pixels is refined at that size.

    Args:
        image: (H, W, 3) RGB.
        seed: (H, W) labels out of 0 and `class_ids`.
        class_ids: (K',) labelled classes of the image, 1..K; may be empty.
        settings: All of them.

    Returns:
        (H, W) labels out of 0 and `class_ids`: other classes cannot appear.

    Raises:
        UserError: `$ISIM_CRF` is unknown, or `compiled` without a compiler; or the kernels are too
            narrow for the image.
    """
    if len(class_ids) == 0:
        # One label only: its unary would be log(1 - p) / 0, and nothing is left to decide.
        return np.zeros_like(seed)
    if (small := working_size(*seed.shape)) != seed.shape:
        reduced = _grown(seed, small)
        refined = refine(_reduced(image, small), reduced, class_ids, settings)
        return _grown(refined, seed.shape)
    labels = np.concatenate([[0], np.sort(class_ids)]).astype(np.uint8)
    # Other labels come out of range, and are refused.
    places = np.full(256, 255, np.uint8)
    places[labels] = np.arange(len(labels))
    compact = places[seed]
    if uses_kernel():
        # Energies of a label of the seed and of the others: -log p and -log((1 - p) / (n - 1)).
        own = math.log(settings.gt_prob * len(class_ids) / (1 - settings.gt_prob))
        best = np.empty(seed.shape, np.uint8)
        kernel.infer(image, settings, best, seed=compact, count=len(labels), own=own)
    else:
        unary = unary_from_labels(compact, len(labels), settings.gt_prob, zero_unsure=False)
        best = _most_probable(_reference(image, unary, settings), seed.shape)
    return labels[best]


def refine_soft(
    image: NDArray[np.uint8], probabilities: NDArray[np.float32], settings: Crf
) -> NDArray[np.uint8]:
    """Refine class probabilities along the image's edges (spec 5, sets `soft` and `segmenter`).

    All L labels take part, however improbable. Large images and errors are as of `refine`.

    Args:
        image: (H, W, 3) RGB.
        probabilities: (L, H, W), a softmax over L; below 1e-5 they count as 1e-5.
        settings: All but `gt_prob`.

    Returns:
        (H, W) labels 0..L-1, indices of the planes.
    """
    size = probabilities.shape[1:]
    if len(probabilities) == 1:
        return np.zeros(size, np.uint8)
    if (small := working_size(*size)) != size:
        planes = np.stack([_reduced(plane, small) for plane in probabilities])
        return _grown(refine_soft(_reduced(image, small), planes, settings), size)
    if uses_kernel():
        unary = -np.log(np.maximum(probabilities, LEAST_PROBABILITY))
        unary = unary.reshape(len(unary), -1)
        return kernel.infer(image, settings, np.empty(size, np.uint8), unary=unary)
    unary = unary_from_softmax(probabilities, clip=LEAST_PROBABILITY)
    return _most_probable(_reference(image, unary, settings), size)


def working_size(height: int, width: int) -> tuple[int, int]:
    """Size in pixels that a dCRF of an image of (H, W) is computed at."""
    factor = math.sqrt(min(1.0, LARGEST / (height * width)))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _reduced(pixels: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    return np.asarray(cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA))


def _grown(label: NDArray[np.uint8], size: tuple[int, ...]) -> NDArray[np.uint8]:
    height, width = size
    return np.asarray(cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST))


def marginals(
    image: NDArray[np.uint8], unary: NDArray[np.float32], settings: Crf
) -> NDArray[np.float32]:
    """Compute the probabilities (L, H * W) that mean-field inference ends with.

    It starts from energies (L, H * W), L at least 2; after 0 steps they are the softmax of -unary.
    Errors are those of `refine`.
    """
    if uses_kernel():
        return kernel.infer(image, settings, np.empty(unary.shape, np.float32), unary=unary)
    return _reference(image, unary, settings)


def label_energies(label: NDArray[np.integer], count: int, gt_prob: float) -> NDArray[np.float32]:
    """Make the energies (L, H, W) of hard labels (H, W) in 0 .. count - 1.

    A label is right with probability `gt_prob`; where it is beyond (255) it is not known, and all
    energies are equal.
    """
    if count == 1:
        return np.zeros((1, *label.shape), np.float32)
    own, other = -math.log(gt_prob), -math.log((1 - gt_prob) / (count - 1))
    planes = label == np.arange(count).reshape(-1, 1, 1)
    return np.where(planes | (label >= count), np.float32(own), np.float32(other))


def uses_kernel() -> bool:
    """Tell whether the C++ kernel computes, and not pydensecrf: also beside a GPU (`torch`)."""
    return kernels.crf_used("cpu") == "compiled"


def _most_probable(probabilities: NDArray[np.float32], size: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.reshape(probabilities.argmax(0), size).astype(np.uint8)


def _reference(
    image: NDArray[np.uint8], unary: NDArray[np.float32], settings: Crf
) -> NDArray[np.float32]:
    """Compute (L, H * W) probabilities by pydensecrf, for energies of the same shape."""
    height, width = image.shape[:2]
    field = densecrf.DenseCRF2D(width, height, len(unary))
    field.setUnaryEnergy(np.ascontiguousarray(unary, np.float32))
    field.addPairwiseGaussian(sxy=settings.gaussian_sxy, compat=settings.gaussian_compat)
    field.addPairwiseBilateral(
        sxy=settings.bilateral_sxy,
        srgb=settings.bilateral_srgb,
        rgbim=np.ascontiguousarray(image),
        compat=settings.bilateral_compat,
    )
    return np.asarray(field.inference(settings.steps))
