"""Networks of the ISIM loop: encoder, classification branch, optional decoder (paper 3.2).

`cam` has no decoder (the baseline); `deeplabcam` adds the one of DeepLabv3 (paper 3.2.1).
"""

import difflib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from isim.errors import UserError
from isim.params import TrainCam


@dataclass(frozen=True)
class CamConfig:
    """All that is needed to rebuild a network from its checkpoint.

    `classes` are the K foreground names; `mean` and `std` are what images in [0, 1] are
    normalised by.
    """

    method: str
    encoder: str
    output_stride: int
    encoder_norm: str
    atrous_rates: tuple[int, ...]
    decoder_channels: int
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_metadata(self) -> dict[str, str]:
        """Return the string map that a safetensors header holds."""
        return {"cam_config": json.dumps(asdict(self))}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str] | None) -> Self:
        """Undo `to_metadata`. Raises KeyError when `metadata` is of another file."""
        fields = json.loads((metadata or {})["cam_config"])
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return cls(**values)


class CamNetwork(nn.Module):
    """Encoder with a bias-free 1x1 classification branch and, if given, a decoder.

    Args:
        encoder: Images (B, 3, H, W) to a list of feature maps, the last (B, C, h, w).
        classifier: 1x1 convolution C to K without bias, so that the map of class scores
            averaged over its pixels is the logit: the CAM is linear in the features.
        decoder: Feature maps to a map of decoder channels, or None.
        head: Decoder map to (B, L, H, W), or None.
        freeze_encoder_norm: Keep the encoder's running normalisation statistics.
    """

    def __init__(
        self,
        encoder: nn.Module,
        classifier: nn.Conv2d,
        decoder: nn.Module | None,
        head: nn.Module | None,
        freeze_encoder_norm: bool,
    ) -> None:
        """Hold the parts; `build` makes them."""
        super().__init__()
        self.encoder = encoder
        self.classifier = classifier
        self.decoder = decoder
        self.head = head
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
            images: (B, 3, H, W), normalised; H and W multiples of the output stride when
                `segment` is set.
            segment: Run the decoder, too.

        Returns:
            Logits (B, K) and segmentation logits (B, L, H, W), or None without a decoder.
        """
        features = self.encoder(images)
        # Pooling first is the same sum in another order, on K times fewer numbers.
        pooled = F.adaptive_avg_pool2d(features[-1], 1)  # (B, C, 1, 1)
        logits = self.classifier(pooled).flatten(1)  # (B, K)
        if not segment or self.decoder is None or self.head is None:
            return logits, None
        decoded = self.decoder(features)
        # The loss wants fp32: on the small map that costs less than on the upsampled one.
        with torch.autocast(images.device.type, enabled=False):
            return logits, self.head(decoded.float())

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
        with torch.autocast(images.device.type, enabled=False):
            return F.conv2d(features.float(), weight.float())


def build(config: CamConfig) -> CamNetwork:
    """Assemble the network of `config` with random weights.

    Raises:
        UserError: The encoder is unknown to timm or cannot have the output stride.
    """
    stride = config.output_stride
    try:
        if config.method == "cam":
            encoder = smp.encoders.get_encoder(
                f"tu-{config.encoder}", weights=None, output_stride=stride
            )
            decoder, head = None, None
        else:
            model = smp.DeepLabV3(
                f"tu-{config.encoder}",
                encoder_weights=None,
                encoder_output_stride=stride,
                decoder_channels=config.decoder_channels,
                decoder_atrous_rates=config.atrous_rates,
                classes=len(config.classes) + 1,
            )
            encoder, decoder, head = model.encoder, model.decoder, model.segmentation_head
    except Exception as error:  # timm and smp raise whatever their code meets
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"train_cam.encoder: timm encoder '{config.encoder}' at output_stride {stride} "
            f"cannot be built ({reason}); choose one that has strided features, "
            "such as resnet50.tv_in1k or mobilenetv2_100"
        ) from error
    classifier = nn.Conv2d(encoder.out_channels[-1], len(config.classes), 1, bias=False)
    # From the seed alone, not after the decoder's draws: with one seed all methods then share
    # their warm-up. Small, since random class scores would first teach the encoder noise.
    start = torch.Generator().manual_seed(torch.initial_seed())
    nn.init.normal_(classifier.weight, std=0.01, generator=start)
    frozen = config.encoder_norm == "frozen"
    return CamNetwork(encoder, classifier, decoder, head, frozen)


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
    state = _imagenet_state(encoder) if weights == "imagenet" else _file_state(path)
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


def _file_state(path: Path) -> dict[str, Tensor]:
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
    try:
        with safe_open(path, "pt") as file:
            config = CamConfig.from_metadata(file.metadata())
        state = load_file(path)
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{path} is not a checkpoint of train_cam; run `isim train-cam` first"
        ) from error
    network = build(config)
    network.load_state_dict(state)
    return network.eval(), config
