"""CAMs and class probabilities over several scales and flips (paper 4.1; spec 4, 7)."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from isim.models.cam import CamConfig, CamNetwork


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale (B, 3, H, W) uint8 images to [0, 1], subtract `mean`, divide by `std`: float32."""
    mean_ = torch.tensor(mean, device=images.device).view(1, 3, 1, 1)
    std_ = torch.tensor(std, device=images.device).view(1, 3, 1, 1)
    return (images.float() / 255 - mean_) / std_


def multi_scale_cam(
    network: CamNetwork,
    config: CamConfig,
    image: Tensor,
    class_ids: Tensor,
    scales: Sequence[float],
    flip: bool,
) -> Tensor:
    """`multi_scale_cams` of one image: (3, H, W) and (K',) to (K', H, W)."""
    return multi_scale_cams(network, config, image[None], [class_ids], scales, flip)[0]


@torch.inference_mode()
def multi_scale_cams(
    network: CamNetwork,
    config: CamConfig,
    images: Tensor,
    class_ids: Sequence[Tensor],
    scales: Sequence[float],
    flip: bool,
) -> list[Tensor]:
    """CAMs of the labelled classes of images of one size, each divided by its maximum.

    For each scale: the unpadded images and their mirror images in one batch, ReLU of the 1x1
    convolution's map, the mirrored map added, bilinear upsampling to the image's size. The
    scales are summed. Planes of full size are made of the labelled classes alone.

    Args:
        network: In evaluation mode.
        config: Gives the normalisation.
        images: (B, 3, H, W) uint8 RGB on the network's device.
        class_ids: (K'_i,) int64 labels 1..K of each image; may be empty.
        scales: Factors of the images' size.
        flip: Add the mirror images.

    Returns:
        (K'_i, H, W) float32 in [0, 1] for each image.
    """
    count, _, height, width = images.shape
    numbers = [len(ids) for ids in class_ids]
    present, columns = torch.cat(list(class_ids)).cpu().unique(return_inverse=True)
    total = torch.zeros(len(columns), height, width, device=images.device)  # all images' planes
    if len(columns) == 0:
        return list(total.split(numbers))
    rows = torch.arange(count).repeat_interleave(torch.tensor(numbers))
    present, rows, columns = (index.to(images.device) for index in (present, rows, columns))
    for scale in scales:
        # A very small image must still cover one pixel of the encoder's map.
        size = [max(32, round(height * scale)), max(32, round(width * scale))]
        views = normalize(TF.resize(images, size, antialias=True), config.mean, config.std)
        views = torch.cat([views, views.flip(-1)]) if flip else views
        views = views.contiguous(memory_format=torch.channels_last)
        maps = network.cam(views, present).relu()  # (B or 2 B, present, h, w)
        summed = maps[:count] + maps[count:].flip(-1) if flip else maps
        planes = summed[rows, columns][None]  # (1, sum of K'_i, h, w)
        total += F.interpolate(planes, (height, width), mode="bilinear", align_corners=False)[0]
    total /= total.amax((1, 2), keepdim=True) + 1e-5
    return list(total.split(numbers))


def upsample(
    logits: Tensor, stride: int, size: Sequence[int], target: Sequence[int] | None = None
) -> Tensor:
    """Bring a map of an image, padded at the right and bottom, to pixels without the padding.

    A pixel of the map covers exactly `stride` pixels of the padded image (bilinear, half-pixel
    centres), whatever the image's size.

    Args:
        logits: (B, L, h, w) with h = ceil(H / stride) and w likewise.
        stride: Of the map, in pixels.
        size: H and W of the image without padding.
        target: Height and width wanted of the image, `size` if not given: resizing the image
            on the way costs one interpolation instead of two.

    Returns:
        (B, L, *target) float32.
    """
    target = target or size
    # Rounded up, since a last row is lost when the product falls short of it by a rounding error.
    factors = [
        math.nextafter(stride * wanted / side, math.inf)
        for wanted, side in zip(target, size, strict=True)
    ]
    pixels = F.interpolate(logits.float(), scale_factor=factors, mode="bilinear")
    return pixels[..., : target[0], : target[1]]


class SegmenterLike(Protocol):
    """What `multi_scale_probabilities` must know of a network: `SegmenterConfig` has it."""

    @property
    def output_stride(self) -> int:
        """Stride of the network's logits."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The K foreground names."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of the images in [0, 1]."""

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of the images in [0, 1]."""


@torch.inference_mode()
def multi_scale_probabilities(
    network: nn.Module,
    config: SegmenterLike,
    image: Tensor,
    scales: Sequence[float],
    flip: bool,
) -> Tensor:
    """Class probabilities of a segmenter, averaged over scales and flips (spec 7).

    For each scale: the image and its mirror image in one batch, bilinear upsampling of the
    logits to the image's size, softmax. Each map is added to the mean as soon as it is there,
    so that the memory does not grow with the number of scales.

    Args:
        network: In evaluation mode; images to logits at the output stride, as a `Segmenter`.
        config: Of the network.
        image: (3, H, W) uint8 RGB on the network's device.
        scales: Factors of the image's size; 0.5, 0.75 .. 1.75 in the paper's test.
        flip: Add the mirror image.

    Returns:
        (L, H, W) float32 that sum to 1 over L.
    """
    height, width = image.shape[-2:]
    total = torch.zeros(len(config.classes) + 1, height, width, device=image.device)
    for scale in scales:
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        views = normalize(TF.resize(image[None], size, antialias=True), config.mean, config.std)
        views = torch.cat([views, views.flip(-1)]) if flip else views
        views = views.contiguous(memory_format=torch.channels_last)
        for mirrored, logits in enumerate(network(views)):  # (L, h, w)
            # One at a time: at full size a view's planes are larger than all else.
            pixels = upsample(logits[None], config.output_stride, size, (height, width))[0]
            total += pixels.flip(-1).softmax(0) if mirrored else pixels.softmax(0)
    return total.div_(len(scales) * (1 + flip))
