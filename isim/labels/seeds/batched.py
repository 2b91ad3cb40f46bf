"""Seeds in PyTorch, on the device of the CAMs: `seeds.py` for tensors (spec 5)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def peak(cam: Tensor, class_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Find each pixel's highest CAM: (H, W) uint8 label and (H, W) height, as `seeds.peak` does.

    `class_ids` may be on any device.
    """
    if len(class_ids) == 0:
        blank = cam.new_zeros(cam.shape[1:])
        return blank.to(torch.uint8), blank
    height, best = cam.max(0)
    return class_ids.to(cam.device, torch.uint8)[best], height


def cut(best: Tensor, height: Tensor, threshold: float) -> Tensor:
    """Set what does not rise above the background plane to background, as `seeds.cut` does."""
    return best * (height > threshold)


def levels(height: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Count, of T ascending thresholds, those that each pixel's height is above: (H, W) uint8.

    For a sweep that is as exact as the heights; T is at most 255.
    """
    bounds = torch.tensor(thresholds, dtype=height.dtype, device=height.device)
    return torch.bucketize(height, bounds).to(torch.uint8)
