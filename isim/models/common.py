"""What all networks share: a first try with an odd image, and the end in full precision."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_Result = TypeVar("_Result")

# Odd at every stride: what a network cannot compute here, it cannot for a data set's images.
PROBE = (45, 77)


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
