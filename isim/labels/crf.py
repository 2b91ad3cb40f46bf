"""Fully connected CRF on a hard label map or on class probabilities (paper 4.1; spec 5).

Backends: pydensecrf is the reference; `compiled` computes the same several times faster. On a GPU
`isim.gpu.crf` does, with whole batches.
"""

import math
import warnings

import numpy as np
import pydensecrf.densecrf as densecrf
from numpy.typing import NDArray
from pydensecrf.utils import unary_from_labels, unary_from_softmax

from isim.labels import crf_compiled
from isim.params import Crf

# Probabilities below count as this (as in pydensecrf).
LEAST_PROBABILITY = 1e-5


def refine(
    image: NDArray[np.uint8],
    seed: NDArray[np.uint8],
    class_ids: NDArray[np.int64],
    settings: Crf,
) -> NDArray[np.uint8]:
    """Refine a seed along the image's edges by mean-field inference (spec 5, set `labels`).

    Labels are the background and `class_ids` only: other classes cannot appear.

    Args:
        image: (H, W, 3) RGB.
        seed: (H, W) labels out of 0 and `class_ids`.
        class_ids: (K',) labelled classes of the image, 1..K; may be empty.
        settings: Backend, kernel widths (pixels, 8-bit levels), weights, steps, `gt_prob`.

    Returns:
        (H, W) labels of the same label set.

    Raises:
        UserError: `compiled` is asked for and cannot be had, or the kernels are too narrow.
    """
    if len(class_ids) == 0:
        # One label only: its unary would be log(1 - p) / 0, and nothing is left to decide.
        return np.zeros_like(seed)
    labels = np.concatenate([[0], np.sort(class_ids)]).astype(np.uint8)
    places = np.zeros(256, np.uint8)
    places[labels] = np.arange(len(labels))
    compact = places[seed]
    if in_threads(settings):
        # Energies of a label of the seed and of the others: -log p and -log((1 - p) / (n - 1)).
        own = math.log(settings.gt_prob * len(class_ids) / (1 - settings.gt_prob))
        best = crf_compiled.best(image, compact, len(labels), own, settings)
    else:
        unary = unary_from_labels(compact, len(labels), settings.gt_prob, zero_unsure=False)
        best = _reference(image, unary, settings).argmax(0).reshape(seed.shape)
    return labels[best]


def refine_soft(
    image: NDArray[np.uint8], probabilities: NDArray[np.float32], settings: Crf
) -> NDArray[np.uint8]:
    """Refine class probabilities along the image's edges (spec 5, sets `soft` and `segmenter`).

    All L labels take part, however improbable: the result is exact, and its time and memory
    grow with L.

    Args:
        image: (H, W, 3) RGB.
        probabilities: (L, H, W), a softmax over L; below 1e-5 they count as 1e-5.
        settings: Backend, kernel widths (pixels, 8-bit levels), weights, steps; `gt_prob` is not
            used.

    Returns:
        (H, W) labels 0..L-1, indices of the planes.

    Raises:
        UserError: As `refine`.
    """
    size = probabilities.shape[1:]
    if len(probabilities) == 1:
        # Nothing is to be decided.
        return np.zeros(size, np.uint8)
    if in_threads(settings):
        unary = -np.log(np.maximum(probabilities, LEAST_PROBABILITY))
        return crf_compiled.best_of(image, unary.reshape(len(unary), -1), settings)
    unary = unary_from_softmax(probabilities, clip=LEAST_PROBABILITY)
    return _reference(image, unary, settings).argmax(0).reshape(size).astype(np.uint8)


def marginals(
    image: NDArray[np.uint8], unary: NDArray[np.float32], settings: Crf
) -> NDArray[np.float32]:
    """Probabilities that mean-field inference ends with.

    Args:
        image: (H, W, 3) RGB.
        unary: (L, H * W) energies; L at least 2.
        settings: Backend, kernel widths (pixels, 8-bit levels), weights and steps.

    Returns:
        (L, H * W), summing to 1 over L; after 0 steps the softmax of -unary.

    Raises:
        UserError: As `refine`.
    """
    if in_threads(settings):
        return crf_compiled.marginals(image, unary, settings)
    return _reference(image, unary, settings)


def in_threads(settings: Crf) -> bool:
    """Tell whether the backend releases the GIL, so that threads do; the reference never does.

    That is `compiled`, which `auto` stands for where there is a compiler; `torch`, of which
    nothing is left to do where there is no GPU, as well.
    """
    if settings.backend in ("auto", "torch") and (obstacle := crf_compiled.obstacle()):
        warnings.warn(f"the dCRF is computed by pydensecrf, slower: {obstacle}", stacklevel=2)
        return False
    return settings.backend != "pydensecrf"


def _reference(
    image: NDArray[np.uint8], unary: NDArray[np.float32], settings: Crf
) -> NDArray[np.float32]:
    """(L, H * W) probabilities by pydensecrf, for energies of the same shape."""
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
