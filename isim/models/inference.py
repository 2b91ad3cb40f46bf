"""CAMs and class probabilities over several scales and flips (paper 4.1; spec 4, 7)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from isim.models.cam import CamConfig, CamNetwork
from isim.models.common import normalize
from isim.models.segmenter import SegmenterConfig


@torch.inference_mode()
def multi_scale_cams(
    network: CamNetwork,
    config: CamConfig,
    images: Tensor,
    class_ids: Sequence[Tensor],
    *,
    scales: Sequence[float],
    flip: bool,
) -> list[Tensor]:
    """CAMs (K'_i, H, W) float32 in [0, 1] of images of one size, each divided by its maximum.

    For each scale, a factor of the size: the unpadded images and, with `flip`, their mirror images
    in one batch, ReLU of the 1x1 convolution's map, the mirrored map added, bilinear upsampling to
    the image's size. The scales are summed. Planes of full size are made of the labelled classes
    alone.

    With `decoder_labels` a plane is p_k / (p_k + p_0), averaged over scales and flips, p being the
    decoder's softmax over the background and the image's classes: above 0.5 the class is likelier.

    The network is in evaluation mode, images are (B, 3, H, W) uint8 RGB on its device, and
    `class_ids` (K'_i,) int64 labels 1..K of each; an image may have none.
    """
    if config.decoder_labels:
        return _decoder_planes(network, config, images, class_ids, scales=scales, flip=flip)
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
        size = [max(32, round(side * scale)) for side in (height, width)]
        # (B or 2 B, present, h, w)
        maps = network.cam(_views(images, size, config, flip), present).relu()
        summed = maps[:count] + maps[count:].flip(-1) if flip else maps
        planes = summed[rows, columns][None]  # (1, sum of K'_i, h, w)
        total += F.interpolate(planes, (height, width), mode="bilinear", align_corners=False)[0]
    total /= total.amax((1, 2), keepdim=True) + 1e-5
    return list(total.split(numbers))


def _decoder_planes(
    network: CamNetwork,
    config: CamConfig,
    images: Tensor,
    class_ids: Sequence[Tensor],
    *,
    scales: Sequence[float],
    flip: bool,
) -> list[Tensor]:
    count, _, height, width = images.shape
    ids = [each.to(images.device) for each in class_ids]
    totals = [torch.zeros(len(each), height, width, device=images.device) for each in ids]
    for scale in scales:
        size = [max(32, round(side * scale)) for side in (height, width)]
        segmentation = network(_views(images, size, config, flip), True)[1]
        if segmentation is None:
            raise ValueError("a network without a decoder has no labels of it")
        for place, logits in enumerate(segmentation.float()):  # (L, H', W')
            total, own = totals[place % count], ids[place % count]
            odds = (logits[own] - logits[:1]).sigmoid()  # (K', H', W')
            odds = odds.flip(-1) if place >= count else odds
            if len(own):
                total += F.interpolate(odds[None], (height, width), mode="bilinear")[0]
    return [total.div_(len(scales) * (1 + flip)) for total in totals]


def _views(
    images: Tensor, size: list[int], config: CamConfig | SegmenterConfig, flip: bool
) -> Tensor:
    """Resize and normalise (B, 3, H, W) uint8; with `flip`, the mirror images follow."""
    views = normalize(TF.resize(images, size, antialias=True), config.mean, config.std)
    views = torch.cat([views, views.flip(-1)]) if flip else views
    return views.contiguous(memory_format=torch.channels_last)


def upsample(
    logits: Tensor, stride: int, size: Sequence[int], target: Sequence[int] | None = None
) -> Tensor:
    """Bring a map of an image, padded at the right and bottom, to pixels without the padding.

    A pixel of the map covers exactly `stride` pixels of the padded image (bilinear, half-pixel
    centres), whatever the image's size.

    Logits (B, L, ceil(H / stride), ceil(W / stride)) of an image of `size` (H, W) become
    (B, L, *target) float32. `target` is `size` if not given: resizing the image on the way costs
    one interpolation instead of two.
    """
    target = target or size
    # Rounded up, since a last row is lost when the product falls short of it by a rounding error.
    factors = [
        math.nextafter(stride * wanted / side, math.inf)
        for wanted, side in zip(target, size, strict=True)
    ]
    pixels = F.interpolate(logits.float(), scale_factor=factors, mode="bilinear")
    return pixels[..., : target[0], : target[1]]


@torch.inference_mode()
def multi_scale_probabilities(
    network: nn.Module,
    config: SegmenterConfig,
    image: Tensor,
    *,
    scales: Sequence[float],
    flip: bool,
) -> Tensor:
    """Class probabilities (L, H, W) float32, averaged over scales and flips (spec 7).

    For each scale, a factor of the size (0.5, 0.75 .. 1.75 in the paper): the image and, with
    `flip`, its mirror image in one batch, bilinear upsampling of the logits to the image's size,
    softmax. Each map is added to the mean as soon as it is there, so that the memory does not grow
    with the number of scales.

    The network, in evaluation mode, gives logits at the output stride, as a `Segmenter`; the image
    is (3, H, W) uint8 RGB on its device.
    """
    height, width = image.shape[-2:]
    total = torch.zeros(len(config.classes) + 1, height, width, device=image.device)
    for scale in scales:
        size = [max(1, round(side * scale)) for side in (height, width)]
        views = _views(image[None], size, config, flip)
        for mirrored, logits in enumerate(network(views)):  # (L, h, w)
            # One at a time: at full size a view's planes are larger than all else.
            pixels = upsample(logits[None], config.output_stride, size, (height, width))[0]
            total += pixels.flip(-1).softmax(0) if mirrored else pixels.softmax(0)
    return total.div_(len(scales) * (1 + flip))
