"""The device that networks run on, what they compute in there, and their random numbers."""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from isim.errors import UserError
from isim.runtime import processes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def default() -> torch.device:
    """Return `$ISIM_DEVICE` if set, else the CUDA device of this process's number, else the CPU.

    Raises UserError when torch cannot use `$ISIM_DEVICE`, or each process has no GPU of its own.
    """
    chosen = os.environ.get("ISIM_DEVICE")
    if chosen == "meta":
        raise UserError(
            "ISIM_DEVICE: on device meta nothing is computed; unset it or set it to cpu"
        )
    name = chosen or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and processes.world() > 1:
        name = f"cuda:{processes.local_rank()}"
        if processes.local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"{processes.local_world()} processes on a host with {torch.cuda.device_count()} "
                "GPUs; start one for each GPU (ISIM_PROCESSES), or set ISIM_DEVICE to cpu"
            )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        told = f"ISIM_DEVICE: torch cannot use '{name}' here; unset it or set it to cpu"
        raise UserError(told) from error
    if name == chosen and device.index is not None and processes.local_world() > 1:
        raise UserError(
            f"ISIM_DEVICE: '{name}' is one device for {processes.local_world()} processes; "
            "set it to cuda, and CUDA_VISIBLE_DEVICES to the devices to use"
        )
    if device.type == "cuda" and processes.world() > 1:
        # Where NCCL communicates; otherwise all would take memory of the first device.
        torch.cuda.set_device(device)
    return device


def kind(device: torch.device) -> str:
    """Name what a result depends on besides code and data: torch, and the model of the device."""
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{torch.__version__} {model}"


def place(network: nn.Module, device: torch.device) -> None:
    """Move a network to `device`, its convolutions channels-last (faster on every device)."""
    network.to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def resolve_precision(precision: str, device: torch.device) -> str:
    """Turn `auto` into bf16 where the device computes it natively, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context of a resolved precision; a no-op for fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def torch_compiled(function: Callable[..., Any], wanted: bool) -> Callable[..., Any]:
    """Return `function`, or, if wanted, what torch compiles of it, once for each shape.

    The modules behind it stay what they are, and so do the names in their checkpoints.
    """
    return torch.compile(function, dynamic=False) if wanted else function


def seed_all(*parts: int) -> None:
    """Seed Python, NumPy and torch by numbers such as an epoch's: a resumed run draws alike."""
    value = int(np.random.SeedSequence(parts).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@contextlib.contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Use `count` CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
