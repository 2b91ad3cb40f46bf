"""Tools of all networks: checkpoints, a first try with an odd image, the end in fp32."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_origin, get_type_hints

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from isim import errors
from isim.data.prepared import class_fault
from isim.errors import cut
from isim.runtime import checkpoint

_Result = TypeVar("_Result")
_Config = TypeVar("_Config", bound="Config")
_Network = TypeVar("_Network", bound=nn.Module)

# No network has larger numbers: a damaged one would ask for all the memory there is.
_LARGEST = 1 << 16

# Odd at every stride: what a network cannot compute here, it cannot for a data set's images.
PROBE = (45, 77)


@dataclass(frozen=True)
class Config:
    """Facts that a network is rebuilt from, under the name `key` in its checkpoint's header.

    `stage` is the stage that writes such checkpoints and the section that errors speak of.
    """

    key: ClassVar[str]
    stage: ClassVar[str]


def save(path: Path, network: nn.Module, config: Config, **about: str) -> None:
    """Write a checkpoint that `load` reads, in the first process of a run.

    `about` are further entries of its header.
    """
    header = {config.key: json.dumps(asdict(config)), **about}
    checkpoint.save_tensors(path, network.state_dict(), header)


def load(
    path: Path, kind: type[_Config], build: Callable[[_Config], _Network]
) -> tuple[_Network, _Config]:
    """Rebuild a network, in evaluation mode, and its configuration from a checkpoint.

    Raises UserError where the file is missing or not of this kind.
    """
    config = read_config(path, kind)
    command = f"isim {kind.stage.replace('_', '-')}"
    with errors.reading(path, f"run `{command}` again", "is damaged, or of another isim"):
        tensors = checkpoint.load_tensors(path)
        network = build(config)
        for name, own in network.state_dict().items():
            # torch would round the one to the other.
            if name in tensors and tensors[name].is_floating_point() != own.is_floating_point():
                raise TypeError(f"{name} is {tensors[name].dtype}, not {own.dtype}")
        network.load_state_dict(tensors)
    return network.eval(), config


def read_config(path: Path, kind: type[_Config]) -> _Config:
    """Read a checkpoint's configuration from its header alone; errors as of `load`."""
    command = f"isim {kind.stage.replace('_', '-')}"
    remedy, none = f"run `{command}` first", f"is not a checkpoint of {kind.stage}"
    with errors.reading(path, remedy, none):
        errors.regular(path)
        with safe_open(path, "pt") as file:
            fields = json.loads((file.metadata() or {})[kind.key])
        config = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        _require_sound(config)
    return config


def _require_sound(config: Config) -> None:
    """Raise ValueError for values that no configuration has, as those of a damaged header."""
    hints = get_type_hints(type(config))
    for name, value in vars(config).items():
        kind = get_origin(hints[name]) or hints[name]
        fits = isinstance(value, float | int if kind is float else kind)
        if not fits or isinstance(value, bool) != (kind is bool):
            raise TypeError(f"{name} is {cut(repr(value), 40)}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and not abs(number) <= _LARGEST:
                raise ValueError(f"{name} is {number}")
    scales = getattr(config, "feature_scales", (1.0,))
    if not scales or min(scales) <= 0:
        raise ValueError(f"feature_scales is {scales}")
    names = getattr(config, "classes", ())
    if fault := next(filter(None, map(class_fault, names)), None):
        raise ValueError(f"a class {fault}")
    if len(set(names)) < len(names):
        raise ValueError("a class is named twice")


@torch.no_grad()
def try_out(network: nn.Module, run: Callable[[Tensor], _Result]) -> _Result:
    """Hand an odd image to a fresh network, so that what cannot serve fails at once.

    `run` is called with images (1, 3, *PROBE), channels-last as all images are, on the network's
    device, which may be meta; its errors pass. The network is in evaluation mode meanwhile:
    running statistics and the generators' states stay as they are.
    """
    device = next(network.parameters()).device
    images = torch.zeros(1, 3, *PROBE, device=device).contiguous(memory_format=torch.channels_last)
    network.eval()
    result = run(images)
    network.train()
    return result


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale (B, 3, H, W) uint8 images to [0, 1], subtract `mean`, divide by `std`: float32."""
    normalized: Tensor = TF.normalize(images.float() / 255, list(mean), list(std))
    return normalized


def reason(error: Exception) -> str:
    """Say what went wrong in one line: the error's first one, or its kind."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which nothing is computed in bf16."""
    # The meta device, where networks are only checked, has no autocast.
    if not torch.amp.autocast_mode.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
