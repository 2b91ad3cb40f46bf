"""Seeds of CAMs on the CAMs' device: `labels.seeds` in PyTorch (spec 5)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def peak(cam: Tensor, class_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Find the highest CAM of each pixel, the first of equals.

    Args:
        cam: (K', H, W) CAMs of the labelled classes, in [0, 1]; K' may be 0.
        class_ids: (K',) label of each plane, 1..K, on any device.

    Returns:
        (H, W) uint8 label of the highest plane (0 when there is none) and (H, W) its height.
    """
    if len(class_ids) == 0:
        blank = cam.new_zeros(cam.shape[1:])
        return blank.to(torch.uint8), blank
    height, best = cam.max(0)
    return class_ids.to(cam.device, torch.uint8)[best], height


def cut(best: Tensor, height: Tensor, threshold: float) -> Tensor:
    """Set what does not rise above the background plane to background.

    Args:
        best: (H, W) label of the highest CAM, of `peak`.
        height: (H, W) value of that CAM.
        threshold: Height of the background plane; a tie is background.

    Returns:
        (H, W) uint8 labels, 0 = background.
    """
    return best * (height > threshold)


def levels(height: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Count the thresholds that each pixel rises above: as exact as its height, for a sweep.

    Args:
        height: (H, W) of `peak`.
        thresholds: (T,) ascending, at most 255.

    Returns:
        (H, W) uint8, 0..T.
    """
    bounds = torch.tensor(thresholds, dtype=height.dtype, device=height.device)
    return torch.bucketize(height, bounds).to(torch.uint8)
