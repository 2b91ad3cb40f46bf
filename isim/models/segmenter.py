"""Segmenters of paper 4.1.7 (spec 7): DeepLabv2 and DeepLabv3 on any timm encoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3Decoder
from torch import Tensor, nn

from isim.errors import UserError
from isim.models import common, frozen
from isim.models import encoder as encoders
from isim.models.frozen import FrozenNetwork
from isim.params import TrainSegmenter

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


@dataclass(frozen=True)
class SegmenterConfig(common.Config):
    """Facts that a segmenter is rebuilt from.

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
    # Method frozen: its features and head (`models.frozen`).
    sides: tuple[int, ...] = ()
    feature_scales: tuple[float, ...] = (1.0,)
    stages: int = 0
    head_kind: str = "none"
    head_width: int = 0


class DeepLabV2Head(nn.Module):
    """Sum of 3x3 convolutions to the classes dilated by `rates`: ASPP-L (arXiv 1606.00915, 3.2)."""

    def __init__(self, channels: int, labels: int, rates: tuple[int, ...]) -> None:
        """Build the branches: weights N(0, 0.01), biases 0."""
        super().__init__()
        branches = [nn.Conv2d(channels, labels, 3, padding=r, dilation=r) for r in rates]
        self.branches = nn.ModuleList(branches)
        for branch in branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.get_parameter("bias"))

    def forward(self, features: Tensor) -> Tensor:
        """Turn features (B, C, h, w) into logits (B, L, h, w) float32."""
        # The branches in the precision of the step, their sum in fp32: bf16 would round it again.
        return torch.stack([branch(features).float() for branch in self.branches]).sum(0)


class DeepLabV3Head(nn.Module):
    """DeepLabv3's decoder (arXiv 1706.05587), to (B, D, h, w), and a 1x1 convolution D to L."""

    def __init__(self, decoder: nn.Module, classifier: nn.Module) -> None:
        """Hold the parts; `build` makes them."""
        super().__init__()
        self.decoder = decoder
        self.classifier = classifier

    def forward(self, features: Tensor) -> Tensor:
        """Turn features (B, C, h, w) into logits (B, L, h, w) float32."""
        decoded = self.decoder([features])  # (B, D, h, w)
        with common.full_precision(features.device):
            logits: Tensor = self.classifier(decoded.float())
        return logits


class Segmenter(encoders.EncoderNetwork):
    """Encoder and head, which hold all parameters, for a rate each.

    The head turns the encoder's last map, at `output_stride`, into logits (B, L, h, w).
    """

    def __init__(
        self, encoder: nn.Module, head: nn.Module, output_stride: int, freeze_encoder_norm: bool
    ) -> None:
        """Hold the parts; `build` makes them."""
        super().__init__(encoder, freeze_encoder_norm)
        self.head = head
        self.output_stride = output_stride

    def forward(self, images: Tensor) -> Tensor:
        """Turn normalised images (B, 3, H, W) into logits (B, L, ceil(H / s), ceil(W / s)) float32.

        The image is padded with zeros (the mean colour) at the right and at the bottom to a
        multiple of the stride s, so that a pixel of the map covers s pixels of any image. Hence
        `inference.upsample(logits, s, (H, W))` is what brings the logits to the input's pixels
        and crops the padding away; stretching the map to (H, W) would be off by up to s - 1.
        """
        height, width = images.shape[-2:]
        stride = self.output_stride
        if height % stride or width % stride:
            images = F.pad(images, (0, -width % stride, 0, -height % stride))
        logits: Tensor = self.head(self.encoder(images)[-1])
        return logits


def build(config: SegmenterConfig) -> Segmenter | FrozenNetwork:
    """Assemble the segmenter of `config` with random weights; method `frozen` has its own kind.

    Raises UserError where the method does not go with the output stride, or where the encoder is
    unknown to timm, cannot have the output stride or does not take images of any size.
    """
    if config.method == "frozen":
        return frozen.build(config)
    stride = config.output_stride
    strides = ATROUS_RATES[config.method]
    if stride not in strides:
        raise UserError(
            f"train_segmenter.output_stride: {config.method} has no atrous rates for {stride}; "
            f"use {' or '.join(map(str, strides))}"
        )
    labels = len(config.classes) + 1
    head: nn.Module
    with encoders.must_serve(config):
        encoder = encoders.build(config)
        channels, rates = encoder.out_channels[-1], strides[stride]
        if config.method == "deeplabv2":
            head = DeepLabV2Head(channels, labels, rates)
        else:
            width = config.decoder_channels
            decoder = DeepLabV3Decoder(
                channels, width, rates, aspp_separable=False, aspp_dropout=0.5
            )
            head = DeepLabV3Head(decoder, nn.Conv2d(width, labels, 1))
        network = Segmenter(encoder, head, stride, config.encoder_norm == "frozen")
        size = tuple(common.try_out(network, network).shape[-2:])
        if size != tuple(-(-side // stride) for side in common.PROBE):
            raise ValueError(f"scores of {size} for an image of {common.PROBE}")
    return network


def configure(params: TrainSegmenter, classes: tuple[str, ...]) -> SegmenterConfig:
    """Describe the segmenter that a section asks for; errors as of `encoder.configure`."""
    own: dict[str, Any] = {}
    if params.method == "frozen":
        own = params.features.facts()
        own |= {"head_kind": params.head.kind, "head_width": params.head.width}
    return encoders.configure(SegmenterConfig, params, classes=classes, **own)


def load_weights(
    network: Segmenter | FrozenNetwork,
    config: SegmenterConfig,
    weights: str,
    path: Path,
    *,
    allow_decoder_weights: bool,
) -> dict[str, list[str]] | None:
    """Fill the encoder with ImageNet weights or, if allowed, the whole network from a file.

    A file with decoder keys, such as a DeepLab trained on COCO or VOC, brings in pixel
    supervision (spec 7), its encoder too. Files of this stage, of segmentation_models_pytorch
    and of torchvision are understood. Their classes must be in the order of this data set:
    that cannot be checked. Arguments and errors are those of `encoder.load`.

    Returns:
        None unless decoder weights were loaded; then the names left open, for the record:
        `missing`, layers here that keep their random start, since the file has another number of
        classes, and `unexpected`, those of the file that this network has no use for.
    """
    if weights in {"none", "imagenet"} or not allow_decoder_weights:
        encoders.load(network, config, weights, path)
        return None
    state, own = encoders.read(path, config), network.state_dict()
    given = {_own_name(key, own): value for key, value in state.items()}
    others = [name for name in given if not name.startswith("encoder.model.")]
    if not any(mark in name for name in others for mark in encoders.DECODER_MARKS):
        encoders.fill(network, config, weights, state)
        return None
    fitting = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
    unlike = [key for key in own if key not in fitting]
    missing = [key for key in unlike if key in given and key.startswith(_CLASS_LAYERS)]
    absent = [key for key in unlike if key not in missing]
    if absent:
        raise UserError(
            f"train_segmenter.weights: {weights} is of another architecture than this segmenter "
            f"with {config.encoder}: {len(absent)} keys missing or of another shape (e.g. "
            f"{absent[0]}); set train_segmenter.method and encoder to the file's, or use imagenet"
        )
    network.load_state_dict(fitting, strict=False)
    return {"missing": missing, "unexpected": [key for key in given if key not in own]}


def _own_name(key: str, own: dict[str, Tensor]) -> str:
    """Name that `key` of a weights file has here, or `key` itself where there is none."""
    others = [
        new + key.removeprefix(old) for old, new in _OTHER_NAMES.items() if key.startswith(old)
    ]
    # Last, files whose encoder has no prefix or smp's for encoders of its own.
    others += [f"encoder.model.{key}", f"encoder.model.{key.removeprefix('encoder.')}"]
    return next((name for name in [key, *others] if name in own), key)


def load(path: Path) -> tuple[Segmenter | FrozenNetwork, SegmenterConfig]:
    """Rebuild a segmenter from a checkpoint of `train_segmenter`; see `common.load`."""
    return common.load(path, SegmenterConfig, build)
