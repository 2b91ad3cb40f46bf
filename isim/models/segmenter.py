"""Segmenters of paper 4.1.7 (spec 7): DeepLabv2 and DeepLabv3 on any timm encoder.

DeepLabv2 (arXiv 1606.00915, section 3.2: the large field-of-view ASPP) sums four dilated
convolutions to the classes; DeepLabv3 (arXiv 1706.05587) projects its branches first.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isim.errors import UserError, renamed
from isim.models import cam, common

ATROUS_RATES: dict[str, dict[int, tuple[int, ...]]] = {
    "deeplabv2": {8: (6, 12, 18, 24), 16: (6, 12, 18, 24)},
    # The same field of view in the image at either stride.
    "deeplabv3": {8: (12, 24, 36), 16: (6, 12, 18)},
}

# How whole-network files name the parts that are called `encoder.model` and `head` here.
_OTHER_NAMES = {
    # torchvision
    "backbone.": "encoder.model.",
    "classifier.0.": "head.decoder.aspp.",
    "classifier.1.": "head.decoder.conv.",
    "classifier.2.": "head.decoder.bn.",
    "classifier.4.": "head.classifier.",
    # segmentation_models_pytorch
    "decoder.": "head.decoder.",
    "segmentation_head.0.": "head.classifier.",
}
# Their size is the number of classes, which a file may have another one of.
_CLASS_LAYERS = ("head.branches.", "head.classifier.")
_DECODER_MARKS = (*_CLASS_LAYERS, "decoder", "aspp", "segmentation", ".convs.", "conv2d_list")


@dataclass(frozen=True)
class SegmenterConfig(common.Config):
    """All that is needed to rebuild a segmenter from its checkpoint.

    `classes` are the K foreground names, the network has L = K + 1 outputs; `mean` and `std`
    are what images in [0, 1] are normalised by; `decoder_channels` is DeepLabv3's.
    """

    key: ClassVar[str] = "segmenter_config"
    stage: ClassVar[str] = "train_segmenter"

    method: str
    encoder: str
    output_stride: int
    encoder_norm: str
    decoder_channels: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class DeepLabV2Head(nn.Module):
    """Four parallel dilated 3x3 convolutions to the classes, summed (DeepLabv2, ASPP-L).

    Args:
        channels: Of the encoder's last feature map.
        labels: L, background included.
        rates: Dilation of each branch, in pixels of the feature map.
    """

    def __init__(self, channels: int, labels: int, rates: tuple[int, ...]) -> None:
        """Build the branches: weights N(0, 0.01), biases 0."""
        super().__init__()
        self.branches = nn.ModuleList()
        for rate in rates:
            self.branches.append(nn.Conv2d(channels, labels, 3, padding=rate, dilation=rate))
        for name, parameter in self.branches.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.01)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) features to (B, L, h, w) float32 logits."""
        # The branches in the precision of the step, their sum in fp32: bf16 would round it again.
        return torch.stack([branch(features).float() for branch in self.branches]).sum(0)


class DeepLabV3Head(nn.Module):
    """The decoder of DeepLabv3 and a 1x1 convolution to the classes.

    Args:
        decoder: List of feature maps, of which it uses the last, to (B, D, h, w).
        classifier: 1x1 convolution D to L.
    """

    def __init__(self, decoder: nn.Module, classifier: nn.Module) -> None:
        """Hold the parts; `build` makes them."""
        super().__init__()
        self.decoder = decoder
        self.classifier = classifier

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) features to (B, L, h, w) float32 logits."""
        decoded = self.decoder([features])  # (B, D, h, w)
        with common.full_precision(features.device):
            return self.classifier(decoded.float())


class Segmenter(nn.Module):
    """Encoder and head; `encoder` and `head` hold all parameters, for a rate each.

    Args:
        encoder: Images (B, 3, H, W) to a list of feature maps, the last (B, C, h, w).
        head: (B, C, h, w) to logits (B, L, h, w).
        output_stride: Of the encoder's last feature map.
        freeze_encoder_norm: Keep the encoder's running normalisation statistics.
    """

    def __init__(
        self, encoder: nn.Module, head: nn.Module, output_stride: int, freeze_encoder_norm: bool
    ) -> None:
        """Hold the parts; `build` makes them."""
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.output_stride = output_stride
        self.freeze_encoder_norm = freeze_encoder_norm

    def train(self, mode: bool = True) -> Self:
        """Switch the mode; frozen normalisation layers stay in evaluation mode."""
        super().train(mode)
        if self.freeze_encoder_norm:
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits at the output stride s.

        The image is padded with zeros (the mean colour) at the right and at the bottom to a
        multiple of s, so that a pixel of the map covers s pixels of any image. Hence
        `inference.upsample(logits, s, (H, W))` is what brings the logits to the input's pixels
        and crops the padding away; stretching the map to (H, W) would be off by up to s - 1.

        Args:
            images: (B, 3, H, W), normalised, any size.

        Returns:
            (B, L, ceil(H / s), ceil(W / s)) float32.
        """
        height, width = images.shape[-2:]
        stride = self.output_stride
        if height % stride or width % stride:
            images = F.pad(images, (0, -width % stride, 0, -height % stride))
        return self.head(self.encoder(images)[-1])


def build(config: SegmenterConfig) -> Segmenter:
    """Assemble the segmenter of `config` with random weights.

    Raises:
        UserError: The method does not go with the output stride; the encoder is unknown to timm,
            cannot have the output stride or does not take images of any size.
    """
    stride = config.output_stride
    strides = ATROUS_RATES[config.method]
    if stride not in strides:
        raise UserError(
            f"train_segmenter.output_stride: {config.method} has no atrous rates for {stride}; "
            f"use {' or '.join(map(str, strides))}"
        )
    labels = len(config.classes) + 1
    head: nn.Module
    try:
        if config.method == "deeplabv2":
            encoder = smp.encoders.get_encoder(
                f"tu-{config.encoder}", weights=None, output_stride=stride
            )
            head = DeepLabV2Head(encoder.out_channels[-1], labels, strides[stride])
        else:
            model = smp.DeepLabV3(
                f"tu-{config.encoder}",
                encoder_weights=None,
                encoder_output_stride=stride,
                decoder_channels=config.decoder_channels,
                decoder_atrous_rates=strides[stride],
                classes=labels,
            )
            encoder = model.encoder
            # Without the upsampling that follows it.
            head = DeepLabV3Head(model.decoder, model.segmentation_head[0])
        network = Segmenter(encoder, head, stride, config.encoder_norm == "frozen")
        _require_whole_map(common.try_out(network, network), stride)
    except Exception as error:  # timm and smp raise whatever their code meets
        raise UserError(
            f"train_segmenter.encoder: timm encoder '{config.encoder}' at output_stride {stride} "
            f"cannot be built or does not take images of any size ({common.reason(error)}); "
            "choose one that has strided features, such as resnet101.tv_in1k or mobilenetv2_100"
        ) from error
    return network


def _require_whole_map(logits: Tensor, stride: int) -> None:
    """Raise ValueError unless the logits of the odd image have the output stride."""
    if logits.shape[-2:] != tuple(-(-side // stride) for side in common.PROBE):
        size = tuple(logits.shape[-2:])
        raise ValueError(f"scores of {size} for an image of {common.PROBE}")


def normalization(encoder: str, kind: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the images in [0, 1], as `cam.normalization` has them.

    Raises:
        UserError: An encoder that timm does not know.
    """
    with renamed("train_cam", "train_segmenter", "encoder", "weights"):
        return cam.normalization(encoder, kind)


@dataclass(frozen=True)
class DecoderWeights:
    """What a whole-network weights file left open, for the record (spec 7).

    Attributes:
        missing: Names of this network that keep their random start: only layers whose size is
            the number of classes, which the file has another one of.
        unexpected: Names of the file that this network has no use for.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_weights(
    network: Segmenter, encoder: str, weights: str, path: Path, allow_decoder_weights: bool
) -> DecoderWeights | None:
    """Fill the encoder with ImageNet weights or, if allowed, the whole network from a file.

    A file with decoder keys, such as a DeepLab trained on COCO or VOC, brings in pixel
    supervision (spec 7), its encoder too. Files of this stage, of segmentation_models_pytorch
    and of torchvision are understood. Their classes must be in the order of this data set:
    that cannot be checked.

    Args:
        network: Changed in place, and not at all when an error is raised.
        encoder: timm name.
        weights: `none`, `imagenet` (downloaded by timm) or anything else for `path`.
        path: A safetensors file; a legacy `.pth` is read without unpickling.
        allow_decoder_weights: Take a file with decoder keys.

    Returns:
        None unless decoder weights were loaded: then what the caller must record.

    Raises:
        UserError: As `cam.load_encoder_weights`; decoder keys that are not allowed, or of a
            network of another architecture.
    """
    with renamed("train_cam", "train_segmenter", "encoder", "weights"):
        if weights in {"none", "imagenet"}:
            cam.load_encoder_weights(network, encoder, weights, path)
            return None
        state = cam.read_weights(path)
        own = network.state_dict()
        names = {key: _own_name(key, own) for key in state}
        with torch.device("meta"):
            of_classification = set(timm.create_model(encoder.split(".")[0]).state_dict())
        decoder = [
            key
            for key, name in names.items()
            if not (name.startswith("encoder.model.") or key in of_classification)
            and any(mark in name for mark in _DECODER_MARKS)
        ]
        if not decoder:
            cam.load_encoder_weights(network, encoder, weights, path)
            return None
    if not allow_decoder_weights:
        raise UserError(
            f"train_segmenter.weights: {weights} holds decoder keys such as {decoder[0]}, that "
            "is pixel supervision; use ImageNet weights of the encoder alone, or set "
            "train_segmenter.allow_decoder_weights: true, which the results then record"
        )
    given = {names[key]: value for key, value in state.items()}
    fitting = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
    other_classes = [
        key
        for key in own
        if key.startswith(_CLASS_LAYERS)
        and key in given
        and given[key].shape[1:] == own[key].shape[1:]
        and given[key].shape != own[key].shape
    ]
    absent = [key for key in own if key not in fitting and key not in other_classes]
    if absent:
        raise UserError(
            f"train_segmenter.weights: {weights} is of another architecture than this "
            f"segmenter with {encoder}: {len(absent)} keys missing or of another shape (e.g. "
            f"{absent[0]}); set train_segmenter.method and encoder to the file's, or use imagenet"
        )
    network.load_state_dict(fitting, strict=False)
    return DecoderWeights(tuple(other_classes), tuple(k for k in given if k not in own))


def _own_name(key: str, own: dict[str, Tensor]) -> str:
    """Name that `key` of a weights file has here, or `key` itself where there is none."""
    others = [
        new + key.removeprefix(old) for old, new in _OTHER_NAMES.items() if key.startswith(old)
    ]
    # Last, files whose encoder has no prefix or smp's for encoders of its own.
    others += [f"encoder.model.{key}", f"encoder.model.{key.removeprefix('encoder.')}"]
    return next((name for name in [key, *others] if name in own), key)


def load(path: Path) -> tuple[Segmenter, SegmenterConfig]:
    """Rebuild a segmenter from a checkpoint of `train_segmenter`.

    Returns:
        The network in evaluation mode and its configuration.

    Raises:
        UserError: The file is missing or of another kind.
    """
    return common.load(path, SegmenterConfig, build)
