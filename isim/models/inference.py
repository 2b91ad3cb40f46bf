"""CAMs over several scales and flips (paper 4.1; spec 4)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from isim.models.cam import CamConfig, CamNetwork


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale (B, 3, H, W) uint8 images to [0, 1], subtract `mean`, divide by `std`: float32."""
    mean_ = torch.tensor(mean, device=images.device).view(1, 3, 1, 1)
    std_ = torch.tensor(std, device=images.device).view(1, 3, 1, 1)
    return (images.float() / 255 - mean_) / std_


@torch.inference_mode()
def multi_scale_cam(
    network: CamNetwork,
    config: CamConfig,
    image: Tensor,
    class_ids: Tensor,
    scales: Sequence[float],
    flip: bool,
) -> Tensor:
    """CAMs of the labelled classes, each divided by its maximum.

    For each scale: the unpadded image and its mirror image in one batch, ReLU of the 1x1
    convolution's map, the mirrored map added, bilinear upsampling to the image's size. The
    scales are summed.

    Args:
        network: In evaluation mode.
        config: Gives the normalisation.
        image: (3, H, W) uint8 RGB on the network's device.
        class_ids: (K',) int64 labels 1..K; may be empty.
        scales: Factors of the image's size.
        flip: Add the mirror image.

    Returns:
        (K', H, W) float32 in [0, 1].
    """
    height, width = image.shape[-2:]
    total = torch.zeros(len(class_ids), height, width, device=image.device)
    if len(class_ids) == 0:
        return total
    for scale in scales:
        # A very small image must still cover one pixel of the encoder's map.
        size = [max(32, round(height * scale)), max(32, round(width * scale))]
        scaled = TF.resize(image, size, antialias=True)
        views = torch.stack([scaled, scaled.flip(-1)] if flip else [scaled])
        views = normalize(views, config.mean, config.std)
        views = views.contiguous(memory_format=torch.channels_last)
        maps = network.cam(views, class_ids).relu()  # (1 or 2, K', h, w)
        summed = maps[:1] + maps[1:].flip(-1) if flip else maps
        total += F.interpolate(summed, (height, width), mode="bilinear", align_corners=False)[0]
    return total / (total.amax((1, 2), keepdim=True) + 1e-5)
