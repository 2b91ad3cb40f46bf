"""Fully connected CRF on a hard label map (paper 4.1; spec 5, set `labels`)."""

import numpy as np
import pydensecrf.densecrf as densecrf
from numpy.typing import NDArray
from pydensecrf.utils import unary_from_labels

from isim.params import Crf


def refine(
    image: NDArray[np.uint8],
    seed: NDArray[np.uint8],
    class_ids: NDArray[np.int64],
    settings: Crf,
) -> NDArray[np.uint8]:
    """Refine a seed along the image's edges by mean-field inference.

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
    height, width = seed.shape
    labels = np.concatenate([[0], np.sort(class_ids)]).astype(np.uint8)
    compact = np.searchsorted(labels, seed)
    unary = unary_from_labels(compact, len(labels), settings.gt_prob, zero_unsure=False)
    field = densecrf.DenseCRF2D(width, height, len(labels))
    field.setUnaryEnergy(unary)
    field.addPairwiseGaussian(sxy=settings.gaussian_sxy, compat=settings.gaussian_compat)
    field.addPairwiseBilateral(
        sxy=settings.bilateral_sxy,
        srgb=settings.bilateral_srgb,
        rgbim=np.ascontiguousarray(image),
        compat=settings.bilateral_compat,
    )
    marginals = np.asarray(field.inference(settings.steps))
    return labels[marginals.argmax(0)].reshape(height, width)
