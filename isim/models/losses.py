"""Losses of the ISIM loop (paper 3.2, Eq. 2-3) and of the segmenters (paper 4.1.7).

A mean is over what counts in the batch of all processes, each of which returns its part of it:
the loss is the sum over the processes, and so are its gradients.
"""

import torch.nn.functional as F
from torch import Tensor

from isim.metrics import IGNORE
from isim.models.inference import upsample
from isim.runtime import processes


def modified_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel cross-entropy that leaves out crops without any foreground pixel (Eq. 2-3).

    IGNORE does not count as foreground. The mean is over the pixels that count; without any
    the loss is 0 and so is every gradient.

    Args:
        logits: (B, L, H, W).
        labels: (B, H, W) int64, 0 background, 255 ignored.

    Returns:
        The loss, a scalar, and the number of crops left out, an int64 scalar.
    """
    foreground = ((labels > 0) & (labels != IGNORE)).flatten(1).any(1)  # (B,)
    labels = labels.masked_fill(~foreground[:, None, None], IGNORE)
    return _mean_over_pixels(logits, labels), (~foreground).sum()


def pixel_cross_entropy(logits: Tensor, labels: Tensor, stride: int) -> Tensor:
    """Mean cross-entropy, a scalar, over the pixels that are not IGNORE; 0 without any (spec 7).

    The logits are upsampled to the labels, in fp32: labels reduced to the map would drop
    objects thinner than its stride and decide each border by the pixel that happens to be hit.

    Args:
        logits: (B, L, ceil(H / stride), ceil(W / stride)) of a `Segmenter`.
        labels: (B, H, W) int64, 0 background, 255 ignored.
        stride: Pixels that a pixel of the map covers.
    """
    return _mean_over_pixels(upsample(logits, stride, labels.shape[-2:]), labels)


def _mean_over_pixels(logits: Tensor, labels: Tensor) -> Tensor:
    # Channels last, this is a view, and a softmax over neighbouring numbers is twice as fast.
    pixels = logits.permute(0, 2, 3, 1).flatten(0, 2)  # (B * H * W, L)
    total = F.cross_entropy(pixels, labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / processes.total((labels != IGNORE).sum()).clamp(min=1)
