"""Fully connected CRF on a hard label map or on class probabilities (paper 4.1; spec 5)."""

import numpy as np
import pydensecrf.densecrf as densecrf
from numpy.typing import NDArray
from pydensecrf.utils import unary_from_labels, unary_from_softmax

from isim.params import Crf


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
        settings: Kernel widths (pixels, 8-bit levels), weights, steps, `gt_prob`.

    Returns:
        (H, W) labels of the same label set.
    """
    if len(class_ids) == 0:
        # One label only: its unary would be log(1 - p) / 0, and nothing is left to decide.
        return np.zeros_like(seed)
    labels = np.concatenate([[0], np.sort(class_ids)]).astype(np.uint8)
    compact = np.searchsorted(labels, seed)
    unary = unary_from_labels(compact, len(labels), settings.gt_prob, zero_unsure=False)
    return labels[_infer(image, unary, settings)]


def refine_soft(
    image: NDArray[np.uint8], probabilities: NDArray[np.float32], settings: Crf
) -> NDArray[np.uint8]:
    """Refine class probabilities along the image's edges (spec 5, sets `soft` and `segmenter`).

    All L labels take part, however improbable: the result is exact, and its time and memory
    grow with L.

    Args:
        image: (H, W, 3) RGB.
        probabilities: (L, H, W), a softmax over L; below 1e-5 they count as 1e-5.
        settings: Kernel widths (pixels, 8-bit levels), weights, steps; `gt_prob` is not used.

    Returns:
        (H, W) labels 0..L-1, indices of the planes.
    """
    if len(probabilities) == 1:
        # Nothing is to be decided.
        return np.zeros(probabilities.shape[1:], np.uint8)
    return _infer(image, unary_from_softmax(probabilities), settings).astype(np.uint8)


def _infer(
    image: NDArray[np.uint8], unary: NDArray[np.float32], settings: Crf
) -> NDArray[np.int64]:
    """(H, W) most probable of the labels that `unary` (labels, H * W) has energies of."""
    height, width = image.shape[:2]
    field = densecrf.DenseCRF2D(width, height, len(unary))
    field.setUnaryEnergy(np.ascontiguousarray(unary))
    field.addPairwiseGaussian(sxy=settings.gaussian_sxy, compat=settings.gaussian_compat)
    field.addPairwiseBilateral(
        sxy=settings.bilateral_sxy,
        srgb=settings.bilateral_srgb,
        rgbim=np.ascontiguousarray(image),
        compat=settings.bilateral_compat,
    )
    marginals = np.asarray(field.inference(settings.steps))
    return marginals.argmax(0).reshape(height, width)
