"""timm encoders: building them, what they expect, their weights, and those that cannot serve.

Weights bring in what they learned from (`supervision`): labels, texts or nothing but images. What
learned from masks is refused, in an encoder as in a decoder (spec 7).

Each error names the parameter of that section of `params.yaml` which a configuration is of.
"""

import contextlib
import difflib
import re
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeAlias, TypeVar

import segmentation_models_pytorch as smp
import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn

from isim import errors
from isim.errors import UserError
from isim.models import common, vit
from isim.params import TrainAffinity, TrainCam, TrainSegmenter
from isim.runtime import checkpoint

_Config = TypeVar("_Config", bound=common.Config)
Encoder: TypeAlias = smp.encoders.TimmUniversalEncoder | vit.PlainViT

# What names of a decoder's tensors hold, here and in other libraries.
DECODER_MARKS = (
    *("decoder", "aspp", "segmentation", ".convs.", "conv2d_list"),
    *("head.branches.", "head.classifier."),
)

PIXELS, UNKNOWN = "masks", "unknown"
SELF_SUPERVISED, RANDOM = "none (self-supervised)", "none (random)"
# What weights learned from, by timm's names of an architecture and its weights: "name.tag".
_PIXELS = re.compile(
    # Segment Anything 1 and 2; PaliGemma and Florence-2, whose tasks have masks; networks that
    # were taught by SAM (Perception Encoder, RADIO).
    r"samvit|sa1b|sam2_|\.pali|florence2|pe_spatial|radio"
)
_SUPERVISION = {
    # CLIP, SigLIP and others of images with texts, and those that such a network has taught.
    "text (CLIP, SigLIP)": re.compile(
        r"clip|\.openai|laion|webli|\.dfn|datacomp|merged2b|yfcc15m|cc12m"
        r"|pe_core|pe_lang|^aimv2|^beit3|^beitv2|^eva"
    ),
    "hashtags": re.compile(r"ig1b|\.swag"),
    # Not where the images alone were used.
    "ImageNet labels": re.compile(r"(?<!mim_)(in(1|12|21|22)k|inw21k)(?!_ijepa)|\.imagenet"),
}
_SELF_SUPERVISED = re.compile(
    r"\.(fb_)?dino|\.lvd\d+m|\.sat493m|\.(fc)?mae$|_ijepa|\.seer$"  # DINO to DINOv3, MAE, ...
)


class _Configured(Protocol):
    """Configuration of a network on an encoder."""

    stage: ClassVar[str]

    @property
    def encoder(self) -> str: ...
    @property
    def output_stride(self) -> int: ...


class EncoderNetwork(nn.Module):
    """A network on an encoder: images (B, 3, H, W) to a list of feature maps.

    With `freeze_encoder_norm` the encoder's normalisation keeps its running statistics.
    """

    def __init__(self, encoder: nn.Module, freeze_encoder_norm: bool) -> None:
        """Hold the encoder."""
        super().__init__()
        self.encoder = encoder
        self.freeze_encoder_norm = freeze_encoder_norm

    def train(self, mode: bool = True) -> Self:
        """Switch the mode; frozen normalisation layers stay in evaluation mode."""
        super().train(mode)
        if self.freeze_encoder_norm:
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def build(config: _Configured) -> Encoder:
    """Make an encoder with random weights; whatever timm's code meets is raised.

    It turns images into six maps, the first the images; a plain vision transformer's have all one
    stride, the others' that of their level up to the output stride.
    """
    if vit.is_plain(config.encoder):
        return vit.PlainViT(config.encoder, config.output_stride)
    return smp.encoders.get_encoder(
        f"tu-{config.encoder}", weights=None, output_stride=config.output_stride
    )


@contextlib.contextmanager
def must_serve(config: _Configured) -> Iterator[None]:
    """Turn any error of building a network and trying it out into that of its encoder."""
    try:
        yield
    except Exception as error:  # timm and smp raise whatever their code meets
        coarser = " (some serve at output_stride: 32 alone)"
        raise UserError(
            f"{config.stage}.encoder: timm encoder '{config.encoder}' at output_stride "
            f"{config.output_stride} cannot serve ({errors.cut(common.reason(error), 80)}); choose "
            f"one with strided features{coarser if config.output_stride < 32 else ''}, such as "
            "resnet50.tv_in1k or mobilenetv2_100"
        ) from error


def configure(
    kind: type[_Config],
    params: TrainCam | TrainAffinity | TrainSegmenter,
    **others: Any,  # noqa: ANN401 - the configuration's own types
) -> _Config:
    """Describe the network that a section asks for; `others` are values that it does not have.

    Images in [0, 1] are normalised by the encoder's own mean and std, or not at all (spec 3.5).
    Raises UserError where timm does not know the encoder.
    """
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    if params.input_norm == "encoder":
        known = _known(kind.stage, params.encoder)
        mean, std = tuple(known.mean), tuple(known.std)
    shared = {f.name: getattr(params, f.name) for f in fields(kind) if hasattr(params, f.name)}
    return kind(**shared, **{"mean": mean, "std": std}, **others)


def _known(stage: str, encoder: str) -> PretrainedCfg:
    """Return what timm knows of an encoder; raises UserError where that is nothing."""
    name, _, tag = encoder.partition(".")
    with contextlib.suppress(RuntimeError):  # no such tag
        known = timm.get_pretrained_cfg(encoder)
        if known is not None:
            return known
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{name}.*")] if tag else []
    close = [f"{name}.{each}" for each in difflib.get_close_matches(tag, tags, n=3, cutoff=0)]
    close = close or difflib.get_close_matches(name, timm.list_models(), n=5)
    hint = f"; similar: {', '.join(close)}" if close else ""
    raise UserError(f"{stage}.encoder: timm has no encoder '{encoder}'{hint}")


def supervision(encoder: str, weights: str = "imagenet") -> str:
    """Name what weights have learned from, besides images.

    Args:
        encoder: timm's name, with or without the weights' tag.
        weights: As for `load`. A file that is called `<architecture>.<tag>.<suffix>`, as timm's
            are here, is believed to be that.

    Returns:
        `ImageNet labels`, `text (CLIP, SigLIP)`, `hashtags` or several of these; `none
        (self-supervised)` or `none (random)`; `masks`, which `load` refuses; or `unknown`.
    """
    if weights == "none":
        return RANDOM
    architecture, _, tag = encoder.partition(".")
    if weights != "imagenet":
        tag = Path(weights).stem.removeprefix(f"{architecture}.")
    elif not tag:
        tag = getattr(timm.get_pretrained_cfg(architecture), "tag", "")
    name = f"{architecture}.{tag}"
    if _PIXELS.search(name):
        return PIXELS
    if weights != "imagenet" and tag == Path(weights).stem:
        return UNKNOWN
    found = [words for words, pattern in _SUPERVISION.items() if pattern.search(name)]
    if not found and _SELF_SUPERVISED.search(name):
        return SELF_SUPERVISED
    return ", ".join(found) or UNKNOWN


def load(network: nn.Module, config: _Configured, weights: str, path: Path) -> None:
    """Fill the encoder with ImageNet weights; the rest keeps its random start.

    Args:
        network: Its `encoder` is changed in place, and not at all when an error is raised.
        config: Its configuration.
        weights: `none`, `imagenet` (downloaded by timm) or anything else for `path`.
        path: A file for `read` with timm's keys.

    Raises:
        UserError: No network, no such file, another architecture, or weights that learned from
            masks, or keys of a decoder, which would bring in pixel supervision (spec 7).
    """
    if supervision(config.encoder, weights) == PIXELS:
        raise UserError(
            f"{config.stage}.weights: {weights} of {config.encoder} has learned from masks, that "
            "is pixel supervision; use weights that saw labels, texts or images alone, such as "
            "those of resnet50.tv_in1k or vit_base_patch14_dinov2.lvd142m"
        )
    if weights == "imagenet":
        try:
            state = timm.create_model(config.encoder, pretrained=True).state_dict()
        except Exception as error:  # the hub client has many kinds of network errors
            raise UserError(
                f"{config.stage}.weights: cannot fetch ImageNet weights of {config.encoder} "
                f"({common.reason(error)[:120]}); check the network, or give the path of a "
                "safetensors file"
            ) from error
        fill(network, config, weights, state)
    elif weights != "none":
        fill(network, config, weights, read(path, config))


def fill(network: nn.Module, config: _Configured, weights: str, state: dict[str, Tensor]) -> None:
    """Fill the encoder with tensors that have timm's names; otherwise as `load`."""
    model = network.get_submodule("encoder.model")
    own = model.state_dict()
    # Some of timm's feature extractors name `stages.0` `stages_0`.
    flat = {key: key.replace(".", "_", 1) for key in state}
    state = {flat[key] if flat[key] in own else key: value for key, value in state.items()}
    with torch.device("meta"):
        whole = timm.create_model(config.encoder.split(".")[0]).state_dict()
    foreign = [key for key in state if key not in own and key not in whole]
    decoder = [key for key in foreign if any(mark in key for mark in DECODER_MARKS)]
    if decoder:
        allow = f", or set {config.stage}.allow_decoder_weights: true"
        raise UserError(
            f"{config.stage}.weights: {weights} holds decoder keys ({errors.cut(decoder[0], 40)}): "
            "pixel supervision; use an encoder's weights"
            f"{allow if config.stage == 'train_segmenter' else ''}"
        )
    missing = [key for key in own if key not in state]
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or wrong or foreign:
        example = (missing or wrong or foreign)[0]
        raise UserError(
            f"{config.stage}.weights: {weights} is of another architecture than {config.encoder}: "
            f"{len(missing)} keys missing, {len(wrong)} of another shape, {len(foreign)} "
            f"unknown (e.g. {example}); set {config.stage}.encoder to the file's architecture"
        )
    model.load_state_dict(state, strict=False)


def read(path: Path, config: _Configured) -> dict[str, Tensor]:
    """Tensors, on the CPU, of a safetensors file or a legacy `.pth`, which is not unpickled.

    Raises UserError where there is no such file, or no plain mapping of names to tensors in it.
    """
    if not path.exists():
        raise UserError(
            f"{config.stage}.weights: no file {path}; give imagenet, none or an existing file"
        )
    try:
        if path.suffix not in {".pth", ".pt"}:
            return checkpoint.load_tensors(path)
        size = errors.regular(path).st_size
        _require_unpacked(path)
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("no plain mapping of names to tensors")
        # A tensor may stand for more values than it holds.
        if any(value.numel() * value.element_size() > size for value in state.values()):
            raise ValueError("a tensor is larger than the file")
        checkpoint.require_weights(state)
    except UserError:
        raise
    except Exception as error:  # both libraries raise whatever their code meets
        raise UserError(
            f"{config.stage}.weights: {path} is not a readable file of weights (safetensors, or a "
            f".pth of names and tensors alone): {errors.cut(errors.reason(error), 60)}; fetch it "
            "again"
        ) from error
    return state


def _require_unpacked(path: Path) -> None:
    """Raise ValueError for a `.pth` whose parts are packed: torch packs none, bombs are."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("a part of it is packed")
