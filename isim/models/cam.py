"""Networks of the ISIM loop: encoder, classification branch, optional decoder (paper 3.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.base.initialization import initialize_head
from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3Decoder
from torch import Tensor, nn

from isim.errors import UserError
from isim.models import common, frozen, vit
from isim.models import encoder as encoders
from isim.models.frozen import FrozenNetwork
from isim.models.unet import UNetDecoder, Upsampling, bilinear, transposed
from isim.params import TrainCam

# Architectures of segmentation-models-pytorch, and those whose decoders double the map at every
# step, as if no encoder were dilated.
DOUBLING = {"UnetPlusPlus", "MAnet", "Linknet", "FPN"}
SERVING = (
    *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet"),
    *("DeepLabV3", "DeepLabV3Plus", "PAN", "UPerNet", "Segformer"),
)
UNFIT = {"DPT": "it reads a plain vision transformer's tokens, which have no stages"}
# An encoder gives the image and five maps.
LEVELS = 6


@dataclass(frozen=True)
class CamConfig(common.Config):
    """Facts that a network is rebuilt from.

    `classes` are the K foreground names; `mean` and `std` are what images in [0, 1] are
    normalised by.
    """

    key: ClassVar[str] = "cam_config"
    stage: ClassVar[str] = "train_cam"

    method: str
    encoder: str
    output_stride: int
    encoder_norm: str
    atrous_rates: tuple[int, ...]
    decoder_channels: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # Method frozen: its features, its head and the walk of its planes; see `models.frozen`.
    sides: tuple[int, ...] = ()
    feature_scales: tuple[float, ...] = (1.0,)
    stages: int = 0
    head_kind: str = "none"
    head_width: int = 0
    pooling: str = "gap"
    affinity: str = "none"
    tau: float = 0.0
    beta: float = 1.0
    temperature: float = 1.0
    steps: int = 0
    # Labels come from the decoder, restricted to the image's classes, not from the classifier.
    decoder_labels: bool = False
    # Background plane that the last round's labels were cut at, given or chosen.
    threshold: float = 0.3


@dataclass(frozen=True)
class Frame:
    """Fits the feature maps of an image of any size to what a decoder takes.

    The encoder sees the image as it is (spec 4). Where the image is no multiple of `stride`, the
    encoder's, its maps repeat their last row and column up to the next multiple, or to a last map
    of `least` pixels a side; what the decoder makes of that is cropped away.

    With `doubling` the decoder doubles every map, and the maps of a dilated encoder are pooled to
    the strides 2, 4, ... 32 that it counts on. The CAM keeps the encoder's stride. With `plain` all
    of the encoder's maps have its stride.
    """

    stride: int
    doubling: bool = False
    least: int = 1
    plain: bool = False

    @property
    def reductions(self) -> tuple[int, ...]:
        """Strides of the encoder's maps, the first that of the image."""
        if self.plain:
            return (1, *[self.stride] * (LEVELS - 1))
        return tuple(min(2**level, self.stride) for level in range(LEVELS))

    def fit(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Extend and pool maps (B, C_i, H / r_i, W / r_i), rounded up or down, the first the image.

        The result is (B, C_i, H' / r_i, W' / r_i) with H' >= H and W' >= W multiples of the stride.
        """
        multiple = 2 ** (LEVELS - 1) if self.doubling else self.stride
        height, width = (
            max(self.least * self.stride, -(-side // multiple) * multiple)
            for side in features[0].shape[-2:]
        )
        fitted = []
        for level, (feature, stride) in enumerate(zip(features, self.reductions, strict=True)):
            feature = _extend(feature, height // stride, width // stride)
            if self.doubling and stride < 2**level:
                feature = F.avg_pool2d(feature, 2**level // stride)
            fitted.append(feature)
        return fitted


def _extend(feature: Tensor, height: int, width: int) -> Tensor:
    # Not F.pad: its backward pass is not deterministic on GPUs, and it takes no empty maps.
    below, beside = height - feature.shape[-2], width - feature.shape[-1]
    if below:
        feature = torch.cat([feature, feature[..., -1:, :].expand(-1, -1, below, -1)], dim=-2)
    if beside:
        feature = torch.cat([feature, feature[..., -1:].expand(-1, -1, -1, beside)], dim=-1)
    return feature


# Encoder, decoder and its head (both None without one), and what fits the maps to them.
Parts = tuple[encoders.Encoder, nn.Module | None, nn.Module | None, Frame]


class CamNetwork(encoders.EncoderNetwork):
    """Encoder with a bias-free 1x1 classification branch and, if given, a decoder.

    Without a bias the map of class scores, averaged over its pixels, is the logit: the CAM is
    linear in the features. `frame` fits the feature maps to the decoder, whose map `head` turns
    into (B, L, H', W'), H' and W' being the sides of the fitted image.
    """

    def __init__(
        self,
        encoder: nn.Module,
        classifier: nn.Conv2d,
        decoder: nn.Module | None,
        head: nn.Module | None,
        *,
        frame: Frame,
        freeze_encoder_norm: bool,
    ) -> None:
        """Hold the parts; `build` makes them."""
        super().__init__(encoder, freeze_encoder_norm)
        self.classifier = classifier
        self.decoder = decoder
        self.head = head
        self.frame = frame

    def forward(self, images: Tensor, segment: bool) -> tuple[Tensor, Tensor | None]:
        """Classify normalised images (B, 3, H, W) of any size and, with `segment`, segment them.

        Returns logits (B, K), which the decoder does not change, and segmentation logits
        (B, L, H, W), or None without a decoder.
        """
        features = self.encoder(images)
        # Pooling first is the same sum in another order, on K times fewer numbers.
        pooled = F.adaptive_avg_pool2d(features[-1], 1)  # (B, C, 1, 1)
        logits = self.classifier(pooled).flatten(1)  # (B, K)
        if not segment or self.decoder is None or self.head is None:
            return logits, None
        decoded = self.decoder(self.frame.fit(features))
        # The loss wants fp32: on the small map that costs less than on the upsampled one.
        with common.full_precision(images.device):
            segmentation = self.head(decoded.float())  # (B, L, H', W')
        return logits, segmentation[..., : images.shape[-2], : images.shape[-1]]

    def cam(self, images: Tensor, class_ids: Tensor) -> Tensor:
        """Class activation maps (B, K', h, w) float32, before ReLU and scaling, of any images.

        `class_ids` are (K',) int64 labels 1..K of the wanted classes.
        """
        features = self.encoder(images)[-1]
        weight = self.classifier.weight[class_ids - 1]  # (K', C, 1, 1)
        with common.full_precision(images.device):
            return F.conv2d(features.float(), weight.float())


def build(config: CamConfig) -> CamNetwork | FrozenNetwork:
    """Assemble the network of `config` with random weights; the method `frozen` has its own kind.

    Raises UserError where the encoder is unknown to timm, cannot have the output stride or does
    not take images of any size, and where the method is unknown or does not go with the encoder.
    """
    if config.method == "frozen":
        network = frozen.build(config)
        if config.affinity == "attention":
            # Not only when all features are computed.
            frozen.require_attention(network.encoder, config)
        return network
    if config.method not in METHODS:
        name = config.method.removeprefix("smp:")
        why = f"{name} cannot serve: {UNFIT[name]}" if name in UNFIT else "no such method"
        raise UserError(
            f"train_cam.method: {config.method}: {why}; choose one of frozen, {', '.join(METHODS)}"
        )
    if config.method == "cam":
        with encoders.must_serve(config):
            trained = _assembled(config)
        return trained
    try:
        return _assembled(config)
    except Exception as error:  # smp raises whatever its code meets
        build(replace(config, method="cam"))  # Raises if the encoder alone is to blame.
        raise UserError(
            f"train_cam.method: {config.method} does not go with encoder '{config.encoder}', "
            f"output_stride {config.output_stride} and decoder_channels {config.decoder_channels} "
            f"({common.reason(error)}); choose other values of these, or deeplabcam with "
            "output_stride: 16"
        ) from error


def _assembled(config: CamConfig) -> CamNetwork:
    """Make the network and try it out; whatever timm, smp and `_check` raise passes."""
    encoder, decoder, head, frame = METHODS[config.method](config)
    classifier = nn.Conv2d(encoder.out_channels[-1], len(config.classes), 1, bias=False)
    # From the seed alone, not after the decoder's draws: with one seed all methods then share
    # their warm-up. Small, since random class scores would first teach the encoder noise.
    start = torch.Generator().manual_seed(torch.initial_seed())
    nn.init.normal_(classifier.weight, std=0.01, generator=start)
    keeps = config.encoder_norm == "frozen"
    network = CamNetwork(encoder, classifier, decoder, head, frame=frame, freeze_encoder_norm=keeps)
    common.try_out(network, partial(_check, network))
    return network


def _check(network: CamNetwork, images: Tensor) -> None:
    """Raise ValueError where an image of an odd size has not the maps and scores that it should."""
    sizes = [tuple(feature.shape[-2:]) for feature in network.encoder(images)]
    whole = all(
        found in (side // stride, -(-side // stride))
        for size, stride in zip(sizes, network.frame.reductions, strict=False)
        for found, side in zip(size, common.PROBE, strict=True)
    )
    if not whole or len(sizes) != LEVELS:
        raise ValueError(f"maps of {sizes} from an image of {common.PROBE}")
    segmentation = network(images, True)[1]
    if segmentation is not None and segmentation.shape[-2:] != images.shape[-2:]:
        raise ValueError(f"scores of {tuple(segmentation.shape)} for an image of {common.PROBE}")


def _encoder_alone(config: CamConfig) -> Parts:
    encoder = encoders.build(config)
    frame = Frame(config.output_stride, plain=isinstance(encoder, vit.PlainViT))
    return encoder, None, None, frame


def _deeplabcam(config: CamConfig) -> Parts:
    encoder, _, _, frame = _encoder_alone(config)
    channels, rates = config.decoder_channels, config.atrous_rates
    decoder = DeepLabV3Decoder(
        encoder.out_channels[-1], channels, rates, aspp_separable=False, aspp_dropout=0.5
    )
    head = SegmentationHead(
        channels, len(config.classes) + 1, kernel_size=1, upsampling=config.output_stride
    )
    return encoder, decoder, head, frame


def _unet(upsampling: Upsampling, config: CamConfig) -> Parts:
    encoder, _, _, frame = _encoder_alone(config)
    if frame.plain:
        raise ValueError(vit.ONE_STRIDE)
    channels = _halved(config.decoder_channels)
    decoder = UNetDecoder(encoder.out_channels, frame.reductions, channels, upsampling)
    head = SegmentationHead(channels[-1], len(config.classes) + 1, kernel_size=3)
    initialize_head(head)
    return encoder, decoder, head, frame


def _of_the_library(name: str, config: CamConfig) -> Parts:
    if vit.is_plain(config.encoder):
        raise ValueError(vit.ONE_STRIDE)
    options = {"encoder_weights": None, "classes": len(config.classes) + 1}
    model = getattr(smp, name)(f"tu-{config.encoder}", **options, **_arguments(name, config))
    # PAN's pyramid halves the last map three times.
    least = 8 if name == "PAN" else 1
    frame = Frame(config.output_stride, doubling=name in DOUBLING, least=least)
    return model.encoder, model.decoder, model.segmentation_head, frame


# A method is what makes the encoder, the decoder and its head (paper 3.2.1, Table 3); the baseline
# has no decoder. `isim.params` knows the names, too.
METHODS: dict[str, Callable[[CamConfig], Parts]] = {
    "cam": _encoder_alone,
    "deeplabcam": _deeplabcam,
    "unetcam_learnable": partial(_unet, transposed),
    "unetcam_bilinear": partial(_unet, bilinear),
    **{f"smp:{name}": partial(_of_the_library, name) for name in SERVING},
}


def _halved(channels: int) -> tuple[int, ...]:
    return tuple(max(channels >> step, 1) for step in range(LEVELS - 1))


def _arguments(name: str, config: CamConfig) -> dict[str, Any]:
    """Arguments of an architecture's constructor, in the library's own proportions.

    `decoder_channels` is the width of the decoder's widest map. Linknet's follows from its
    encoder.
    """
    stride, channels = config.output_stride, config.decoder_channels
    if name in {"DeepLabV3", "DeepLabV3Plus", "PAN"}:
        rates = {} if name == "PAN" else {"decoder_atrous_rates": config.atrous_rates}
        return {"encoder_output_stride": stride, "decoder_channels": channels} | rates
    narrow = {"decoder_segmentation_channels": channels // 2}
    own: dict[str, dict[str, Any]] = {
        "Linknet": {},
        "FPN": {"decoder_pyramid_channels": channels} | narrow,
        # Its default of three stages would end the encoder at stride 8, below the CAM's map.
        "PSPNet": {"encoder_depth": LEVELS - 1, "psp_out_channels": channels, "upsampling": stride},
        "UPerNet": {"decoder_channels": channels},
        "Segformer": {"decoder_segmentation_channels": channels},
    }
    return {"output_stride": stride} | own.get(name, {"decoder_channels": _halved(channels)})


def configure(params: TrainCam, classes: tuple[str, ...]) -> CamConfig:
    """Describe the network that a section asks for; errors as of `encoder.configure`.

    The frozen one is that before the first round: it has no head yet.
    """
    own: dict[str, Any] = {}
    if params.method == "frozen":
        own = {**params.features.facts(), **params.dense_walk.model_dump()}
        own |= {"affinity": params.frozen.affinity, "pooling": params.frozen.pooling}
        own["head_width"] = params.frozen.head.width
    config = encoders.configure(CamConfig, params, classes=classes, **own)
    # One that is chosen comes with the first round.
    return replace(config, threshold=CamConfig.threshold) if params.threshold == "auto" else config


def load(path: Path) -> tuple[CamNetwork | FrozenNetwork, CamConfig]:
    """Rebuild a network from a checkpoint of `train_cam`; see `common.load`."""
    return common.load(path, CamConfig, build)
