"""Networks of the ISIM loop: encoder, classification branch, optional decoder (paper 3.2).

`cam` has no decoder (the baseline); `deeplabcam` adds the one of DeepLabv3, `unetcam_learnable`
and `unetcam_bilinear` a U-Net's (paper 3.2.1, Table 3), `smp:<Name>` that of any architecture of
segmentation-models-pytorch which can serve.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.base.initialization import initialize_head
from torch import Tensor, nn

from isim.errors import UserError
from isim.models import common
from isim.models.unet import UNetDecoder, bilinear, transposed
from isim.params import TrainCam

UNETS = {"unetcam_learnable": transposed, "unetcam_bilinear": bilinear}
# Architectures of segmentation-models-pytorch whose decoders double the map at every step, as if
# no encoder were dilated.
DOUBLING = {"UnetPlusPlus", "MAnet", "Linknet", "FPN"}
SERVING = (
    *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet"),
    *("DeepLabV3", "DeepLabV3Plus", "PAN", "UPerNet", "Segformer"),
)
UNFIT = {
    "DPT": "it reads a plain vision transformer's tokens, which have no stages to take CAMs from"
}
# An encoder gives the image and five maps.
LEVELS = 6


@dataclass(frozen=True)
class CamConfig(common.Config):
    """All that is needed to rebuild a network from its checkpoint.

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


@dataclass(frozen=True)
class Frame:
    """Fits the feature maps of an image of any size to what a decoder takes.

    The encoder sees the image as it is (spec 4). Where the image is no multiple of the stride,
    its maps repeat their last row and column up to the next multiple; what the decoder makes of
    that is cropped away. With whole multiples nothing changes.

    Args:
        stride: Output stride of the encoder.
        doubling: The decoder doubles every map, so that maps of a dilated encoder are pooled to
            the strides 2, 4, ... 32 that it counts on. The CAM keeps the encoder's stride.
        least: Least sides of the last map.
    """

    stride: int
    doubling: bool = False
    least: int = 1

    @property
    def reductions(self) -> tuple[int, ...]:
        """Strides of the encoder's maps, the first that of the image."""
        return tuple(min(2**level, self.stride) for level in range(LEVELS))

    def fit(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Extend and pool the maps.

        Args:
            features: The image (B, 3, H, W) or a map of its size, then (B, C_i, h_i, w_i), where
                h_i is H / r_i, rounded up or down.

        Returns:
            (B, C_i, H' / r_i, W' / r_i) with H' >= H and W' >= W multiples of the stride.
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


class CamNetwork(nn.Module):
    """Encoder with a bias-free 1x1 classification branch and, if given, a decoder.

    Args:
        encoder: Images (B, 3, H, W) to a list of feature maps, the last (B, C, h, w).
        classifier: 1x1 convolution C to K without bias, so that the map of class scores
            averaged over its pixels is the logit: the CAM is linear in the features.
        decoder: Feature maps, fitted by `frame`, to a map of decoder channels, or None.
        head: Decoder map to (B, L, H', W'), H' and W' being the sides of the fitted image, or
            None.
        frame: Fits the feature maps to the decoder.
        freeze_encoder_norm: Keep the encoder's running normalisation statistics.
    """

    def __init__(
        self,
        encoder: nn.Module,
        classifier: nn.Conv2d,
        decoder: nn.Module | None,
        head: nn.Module | None,
        frame: Frame,
        freeze_encoder_norm: bool,
    ) -> None:
        """Hold the parts; `build` makes them."""
        super().__init__()
        self.encoder = encoder
        self.classifier = classifier
        self.decoder = decoder
        self.head = head
        self.frame = frame
        self.freeze_encoder_norm = freeze_encoder_norm

    def train(self, mode: bool = True) -> Self:
        """Switch the mode; frozen normalisation layers stay in evaluation mode."""
        super().train(mode)
        if self.freeze_encoder_norm:
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor, segment: bool) -> tuple[Tensor, Tensor | None]:
        """Classify and, when asked to, segment.

        Args:
            images: (B, 3, H, W), normalised, any size.
            segment: Run the decoder, too; it does not change the logits.

        Returns:
            Logits (B, K) and segmentation logits (B, L, H, W), or None without a decoder.
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
        """Class activation maps before ReLU and scaling.

        Args:
            images: (B, 3, H, W), normalised, any size: the decoder is not run.
            class_ids: (K',) int64 labels 1..K of the wanted classes.

        Returns:
            (B, K', h, w) float32.
        """
        features = self.encoder(images)[-1]
        weight = self.classifier.weight[class_ids - 1]  # (K', C, 1, 1)
        with common.full_precision(images.device):
            return F.conv2d(features.float(), weight.float())


def build(config: CamConfig) -> CamNetwork:
    """Assemble the network of `config` with random weights.

    Raises:
        UserError: The encoder is unknown to timm, cannot have the output stride or does not take
            images of any size; the method is unknown or does not go with the encoder.
    """
    stride = config.output_stride
    frame = Frame(stride)
    decoder: nn.Module | None = None
    head: nn.Module | None = None
    if config.method == "cam":
        encoder = _encoder(config)
    elif config.method in UNETS:
        encoder = _encoder(config)
        channels = _halved(config.decoder_channels)
        decoder = UNetDecoder(
            encoder.out_channels, frame.reductions, channels, UNETS[config.method]
        )
        head = SegmentationHead(channels[-1], len(config.classes) + 1, kernel_size=3)
        initialize_head(head)
    else:
        name = _architecture(config.method)
        try:
            model = getattr(smp, name)(
                f"tu-{config.encoder}",
                encoder_weights=None,
                classes=len(config.classes) + 1,
                **_arguments(name, config),
            )
        except Exception as error:  # smp raises whatever its code meets
            _encoder(config)  # Raises if the encoder alone is to blame.
            raise _does_not_go(config, error) from error
        encoder, decoder, head = model.encoder, model.decoder, model.segmentation_head
        # PAN's pyramid halves the last map three times.
        frame = Frame(stride, doubling=name in DOUBLING, least=8 if name == "PAN" else 1)
    classifier = nn.Conv2d(encoder.out_channels[-1], len(config.classes), 1, bias=False)
    # From the seed alone, not after the decoder's draws: with one seed all methods then share
    # their warm-up. Small, since random class scores would first teach the encoder noise.
    start = torch.Generator().manual_seed(torch.initial_seed())
    nn.init.normal_(classifier.weight, std=0.01, generator=start)
    frozen = config.encoder_norm == "frozen"
    network = CamNetwork(encoder, classifier, decoder, head, frame, frozen)
    common.try_out(network, partial(_serve, network, config))
    return network


def _encoder(config: CamConfig) -> smp.encoders.TimmUniversalEncoder:
    try:
        return smp.encoders.get_encoder(
            f"tu-{config.encoder}", weights=None, output_stride=config.output_stride
        )
    except Exception as error:  # timm raises whatever its code meets
        raise _unfit_encoder(config, "cannot be built", common.reason(error)) from error


def _halved(channels: int) -> tuple[int, ...]:
    return tuple(max(channels >> step, 1) for step in range(LEVELS - 1))


def _architecture(method: str) -> str:
    """Name of a method's class in segmentation-models-pytorch."""
    if method == "deeplabcam":
        return "DeepLabV3"
    kind, _, name = method.partition(":")
    if kind == "smp" and name in SERVING:
        return name
    why = f"{name} cannot serve: {UNFIT[name]}" if name in UNFIT else "no such method"
    known = ", ".join(("cam", "deeplabcam", *UNETS, *(f"smp:{name}" for name in SERVING)))
    raise UserError(f"train_cam.method: {method}: {why}; choose one of {known}")


def _arguments(name: str, config: CamConfig) -> dict[str, Any]:
    """What an architecture's constructor takes, in the library's own proportions.

    `decoder_channels` is the width of the decoder's widest map. Linknet's follows from its
    encoder.
    """
    stride, channels = config.output_stride, config.decoder_channels
    if name in {"DeepLabV3", "DeepLabV3Plus"}:
        return {
            "encoder_output_stride": stride,
            "decoder_channels": channels,
            "decoder_atrous_rates": config.atrous_rates,
        }
    if name == "PAN":
        return {"encoder_output_stride": stride, "decoder_channels": channels}
    own: dict[str, dict[str, Any]] = {
        "Linknet": {},
        "FPN": {
            "decoder_pyramid_channels": channels,
            "decoder_segmentation_channels": channels // 2,
        },
        # Its default of three stages would end the encoder at stride 8, below the CAM's map.
        "PSPNet": {"encoder_depth": LEVELS - 1, "psp_out_channels": channels, "upsampling": stride},
        "UPerNet": {"decoder_channels": channels},
        "Segformer": {"decoder_segmentation_channels": channels},
    }
    return {"output_stride": stride} | own.get(name, {"decoder_channels": _halved(channels)})


def _serve(network: CamNetwork, config: CamConfig, images: Tensor) -> None:
    """Check what the network makes of an image of an odd size."""
    try:
        features = network.encoder(images)
    except Exception as error:
        why = f"needs images of a certain size ({common.reason(error)})"
        raise _unfit_encoder(config, "cannot make CAMs of whole images", why) from error
    sizes = [tuple(feature.shape[-2:]) for feature in features]
    for size, stride in zip(sizes, network.frame.reductions, strict=False):
        whole = all(
            found in (side // stride, -(-side // stride))
            for found, side in zip(size, common.PROBE, strict=True)
        )
        if not whole or len(sizes) != LEVELS:
            why = f"makes maps of {sizes} from an image of {common.PROBE}"
            raise _unfit_encoder(config, "has no map at every stride", why)
    try:
        segmentation = network(images, True)[1]
        if segmentation is not None and segmentation.shape[-2:] != images.shape[-2:]:
            size = tuple(segmentation.shape)
            raise ValueError(f"scores of {size} for an image of {common.PROBE}")
    except Exception as error:
        raise _does_not_go(config, error) from error


def _unfit_encoder(config: CamConfig, what: str, why: str) -> UserError:
    coarser = "" if config.output_stride == 32 else ", or try output_stride: 32 (not deeplabcam)"
    return UserError(
        f"train_cam.encoder: timm encoder '{config.encoder}' at output_stride "
        f"{config.output_stride} {what} ({why}); choose one that has strided features, "
        f"such as resnet50.tv_in1k or mobilenetv2_100{coarser}"
    )


def _does_not_go(config: CamConfig, error: Exception) -> UserError:
    return UserError(
        f"train_cam.method: {config.method} does not go with encoder '{config.encoder}', "
        f"output_stride {config.output_stride} and decoder_channels {config.decoder_channels} "
        f"({common.reason(error)}); choose other values of these, or deeplabcam with "
        "output_stride: 16"
    )


def configure(params: TrainCam, classes: tuple[str, ...]) -> CamConfig:
    """Configuration of the network that a section asks for.

    Raises:
        UserError: An encoder that timm does not know.
    """
    mean, std = normalization(params.encoder, params.input_norm)
    return CamConfig(
        method=params.method,
        encoder=params.encoder,
        output_stride=params.output_stride,
        encoder_norm=params.encoder_norm,
        atrous_rates=params.atrous_rates,
        decoder_channels=params.decoder_channels,
        classes=classes,
        mean=mean,
        std=std,
    )


def normalization(encoder: str, kind: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the images in [0, 1] that an encoder expects (spec 3.5).

    Args:
        encoder: timm name.
        kind: `encoder` for the encoder's own, `unit` for the paper's 0..1.

    Raises:
        UserError: An encoder that timm does not know.
    """
    if kind == "unit":
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    config = timm.get_pretrained_cfg(encoder)
    if config is None:
        close = difflib.get_close_matches(encoder.split(".")[0], timm.list_models(), n=5)
        hint = f"; similar: {', '.join(close)}" if close else ""
        raise UserError(f"train_cam.encoder: timm has no encoder '{encoder}'{hint}")
    return tuple(config.mean), tuple(config.std)


def load_encoder_weights(network: nn.Module, encoder: str, weights: str, path: Path) -> None:
    """Fill the encoder with ImageNet weights; the rest keeps its random start.

    Args:
        network: Its `encoder` is changed in place.
        encoder: timm name, for the ImageNet download and to know its head's keys.
        weights: `none`, `imagenet` (downloaded by timm) or anything else for `path`.
        path: A safetensors file with timm's keys; a legacy `.pth` is read without unpickling.

    Raises:
        UserError: No network, no such file, another architecture, or keys of a decoder,
            which would bring in pixel supervision (spec 7).
    """
    if weights == "none":
        return
    state = _imagenet_state(encoder) if weights == "imagenet" else read_weights(path)
    model = network.get_submodule("encoder.model")
    with torch.device("meta"):
        full = set(timm.create_model(encoder.split(".")[0]).state_dict())
    own = model.state_dict()
    # Some of timm's feature extractors name `stages.0` `stages_0`.
    flat = {key: key.replace(".", "_", 1) for key in state}
    state = {key if key in own or flat[key] not in own else flat[key]: state[key] for key in state}
    foreign = [key for key in state if key not in own and key not in full]
    if any("decoder" in k or "aspp" in k or "segmentation" in k or ".convs." in k for k in foreign):
        raise UserError(
            f"train_cam.weights: {weights} holds decoder keys such as {foreign[0]}, that is "
            "pixel supervision; use ImageNet weights of the encoder alone"
        )
    missing = [key for key in own if key not in state]
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or wrong or foreign:
        example = (missing or wrong or foreign)[0]
        raise UserError(
            f"train_cam.weights: {weights} is of another architecture than {encoder}: "
            f"{len(missing)} keys missing, {len(wrong)} of another shape, {len(foreign)} "
            f"unknown (e.g. {example}); set train_cam.encoder to the file's architecture"
        )
    model.load_state_dict(state, strict=False)


def _imagenet_state(encoder: str) -> dict[str, Tensor]:
    try:
        return timm.create_model(encoder, pretrained=True).state_dict()
    except Exception as error:  # the hub client has many kinds of network errors
        raise UserError(
            f"train_cam.weights: cannot fetch ImageNet weights of {encoder} "
            f"({str(error).splitlines()[0][:120] if str(error) else type(error).__name__}); "
            "check the network, or give the path of a safetensors file"
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a file of weights by their names in it, on the CPU.

    Args:
        path: A safetensors file; a legacy `.pth` is read without unpickling.

    Raises:
        UserError: No such file, or no plain mapping of names to tensors.
    """
    if not path.is_file():
        raise UserError(
            f"train_cam.weights: no file {path}; give imagenet, none or an existing file"
        )
    try:
        if path.suffix not in {".pth", ".pt"}:
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("no plain mapping of names to tensors")
    except Exception as error:  # both libraries raise whatever their code meets
        raise UserError(
            f"train_cam.weights: {path} is not a readable file of weights (safetensors, or a "
            ".pth that holds names and tensors alone); fetch it again"
        ) from error
    return state


def load(path: Path) -> tuple[CamNetwork, CamConfig]:
    """Rebuild a network from a checkpoint of `train_cam`.

    Returns:
        The network in evaluation mode and its configuration.

    Raises:
        UserError: The file is missing or of another kind.
    """
    return common.load(path, CamConfig, build)
