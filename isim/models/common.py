"""What networks share: checkpoints, a first try with an odd image, the end in full precision."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from isim.errors import UserError

_Result = TypeVar("_Result")
_Config = TypeVar("_Config", bound="Config")
_Network = TypeVar("_Network", bound=nn.Module)

# Odd at every stride: what a network cannot compute here, it cannot for a data set's images.
PROBE = (45, 77)


@dataclass(frozen=True)
class Config:
    """What a network is rebuilt from, kept in the header of its checkpoint.

    `key` is its name there, `stage` the stage that writes such checkpoints.
    """

    key: ClassVar[str]
    stage: ClassVar[str]

    def to_metadata(self) -> dict[str, str]:
        """Return the string map that a safetensors header holds."""
        return {self.key: json.dumps(asdict(self))}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str] | None) -> Self:
        """Undo `to_metadata`. Raises KeyError when `metadata` is of another file."""
        fields = json.loads((metadata or {})[cls.key])
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return cls(**values)


def load(
    path: Path, kind: type[_Config], build: Callable[[_Config], _Network]
) -> tuple[_Network, _Config]:
    """Rebuild a network from a checkpoint.

    Args:
        path: The safetensors file.
        kind: Class of its configuration.
        build: Makes the network of a configuration.

    Returns:
        The network in evaluation mode and its configuration.

    Raises:
        UserError: The file is missing or of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            config = kind.from_metadata(file.metadata())
        state = load_file(path)
    except (OSError, KeyError, SafetensorError) as error:
        command = f"isim {kind.stage.replace('_', '-')}"
        raise UserError(
            f"{path} is not a checkpoint of {kind.stage}; run `{command}` first"
        ) from error
    network = build(config)
    network.load_state_dict(state)
    return network.eval(), config


@torch.no_grad()
def try_out(network: nn.Module, run: Callable[[Tensor], _Result]) -> _Result:
    """Hand an odd image to a fresh network, so that what cannot serve fails at once.

    In evaluation mode: running statistics and the generators' states stay as they are.

    Args:
        network: In training mode, which it is left in; may be on the meta device.
        run: Called with images (1, 3, *PROBE) on the network's device, channels-last
            as all images are.

    Returns:
        What `run` returned; its errors pass.
    """
    device = next(network.parameters()).device
    images = torch.zeros(1, 3, *PROBE, device=device).contiguous(memory_format=torch.channels_last)
    network.eval()
    result = run(images)
    network.train()
    return result


def reason(error: Exception) -> str:
    """What went wrong, in one line: the error's first one, or its kind."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which nothing is computed in bf16."""
    # The meta device, where networks are only checked, has no autocast.
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
