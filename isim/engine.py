"""Device, precision, seeding, poly learning rate, saving and resuming a training run."""

import contextlib
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from isim import atomic, distributed
from isim.errors import UserError

# Numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_keeps_memory = False
# What autocast computes in, by resolved precision.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def default_device() -> torch.device:
    """`$ISIM_DEVICE` if set, else the first CUDA device, else the CPU.

    Of several processes on a host each has the CUDA device of its number there.

    Raises:
        UserError: `$ISIM_DEVICE` names a device that torch cannot use, or there are more
            processes than CUDA devices.
    """
    name = os.environ.get("ISIM_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and distributed.world() > 1:
        name = f"cuda:{distributed.local_rank()}"
        if distributed.local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"{distributed.local_world()} processes on a host with "
                f"{torch.cuda.device_count()} GPUs; start one for each GPU (ISIM_PROCESSES), or "
                "set ISIM_DEVICE to cpu"
            )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"ISIM_DEVICE: torch cannot use '{name}' here; unset it or set it to cpu"
        ) from error
    if device.index is not None and os.environ.get("ISIM_DEVICE") == name:
        if distributed.local_world() > 1:
            raise UserError(
                f"ISIM_DEVICE: '{name}' is one device for {distributed.local_world()} processes; "
                "set it to cuda, and CUDA_VISIBLE_DEVICES to the devices to use"
            )
    if device.type == "cuda" and distributed.world() > 1:
        # Where NCCL communicates; otherwise all would take memory of the first device.
        torch.cuda.set_device(device)
    return device


def place(network: nn.Module, device: torch.device) -> None:
    """Move a network to `device`, its convolutions channels-last (faster on every device)."""
    network.to(device)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@contextlib.contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Inside the block glibc keeps what is freed for the next step; without glibc do nothing.

    Otherwise every large activation is given back to the kernel and cleared again when the next
    step asks for it: about a seventh of a training step's CPU time, a fifth of a CAM's. Around a
    whole training run: its steps are alike, so that the heap is as large as it gets after the
    first ones. Threads started in the block share one heap, since others are given back in any
    case. Blocks may be nested.
    """
    global _keeps_memory
    libc = ctypes.CDLL(None)
    if _keeps_memory or not hasattr(libc, "mallopt"):
        yield
        return
    _keeps_memory = True
    libc.mallopt(_M_ARENA_MAX, 1)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        # glibc's own values.
        libc.mallopt(_M_MMAP_MAX, 65536)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)
        _keeps_memory = False


def trim_freed_memory() -> None:
    """Give what is free back to the kernel; without glibc do nothing.

    Images of many sizes leave holes all over the heap, which would grow for as long as new sizes
    come.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block ends: around what forks processes.

    Python drops what a signal's handler raises within the hooks of a fork, and the run would go
    on. Processes forked inside have handlers that do nothing; `start_loader` gives them others.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for caught in received:
            signal.raise_signal(caught)


def start_loader(_: int) -> None:
    """Prepare a forked loader process: Ctrl-C is the parent's to handle, SIGTERM ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def worker_count() -> int:
    """Helpers of this process: `$ISIM_WORKERS`, else its share of the usable CPU cores.

    Raises:
        UserError: `$ISIM_WORKERS` is no number of at least 0.
    """
    text = os.environ.get("ISIM_WORKERS")
    if text is None:
        return max(1, len(os.sched_getaffinity(0)) // distributed.local_world())
    if not text.isdigit():
        raise UserError(f"ISIM_WORKERS: expected a number such as 2, got '{text}'")
    return int(text)


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
    """Autocast context of a resolved precision; a no-op for fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def compiled(function: Callable[..., Any], wanted: bool) -> Callable[..., Any]:
    """`function`, compiled by torch if `wanted` when it is first called with tensors of a shape.

    The modules behind it stay what they are, and so do the names in their checkpoints. Another
    call with the same function compiles nothing again.
    """
    return torch.compile(function, dynamic=False) if wanted else function


def seed_all(*parts: int) -> None:
    """Seed Python, NumPy and torch from integers, e.g. the run's seed and the epoch.

    Seeding anew every epoch makes a resumed run draw what an unbroken one draws.
    """
    value = int(np.random.SeedSequence(parts).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def poly_factor(step: int, horizon: int, power: float) -> float:
    """Factor of the learning rate, (1 - t/T)^power; constant after the horizon (spec 3.4)."""
    return (1 - min(step, horizon - 1) / horizon) ** power


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its `initial_lr` times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def sgd(
    groups: Sequence[tuple[nn.Module, float]], momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """SGD over modules with a rate each; the rates are kept as `initial_lr`.

    A step goes by the gradients' sums over all processes.
    """
    optimizer = torch.optim.SGD(
        [
            {"params": list(module.parameters()), "lr": rate, "initial_lr": rate}
            for module, rate in groups
        ],
        lr=0.0,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.register_step_pre_hook(lambda *_: distributed.sum_gradients(parameters))
    return optimizer


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically; `metadata` goes into its header.

    Of several processes one for each disk writes it.
    """
    if not distributed.is_writer():
        return
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic.write_bytes(path, save(plain, metadata))


def save_state(
    path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    """Write what a run needs to go on: weights, optimizer buffers, JSON progress."""
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    for index, buffers in optimizer.state_dict()["state"].items():
        for name, value in buffers.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
    save_tensors(path, tensors, {"progress": json.dumps(progress)})


def read_progress(path: Path, digest: str) -> dict[str, Any] | None:
    """Progress of a saved state, or None when there is none of the same `digest`."""
    try:
        with safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
    except (OSError, KeyError, TypeError, ValueError, SafetensorError):
        return None
    return progress if progress.get("digest") == digest else None


def load_state(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Undo `save_state` in place (the networks' memory format is kept)."""
    weights: dict[str, Tensor] = {}
    buffers: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            kind, name = key.split(".", 1)
            if kind == "network":
                weights[name] = file.get_tensor(key)
            else:
                index, name = name.split(".", 1)
                buffers.setdefault(int(index), {})[name] = file.get_tensor(key)
    network.load_state_dict(weights)
    state = optimizer.state_dict()
    state["state"] = buffers
    optimizer.load_state_dict(state)


def restore(
    resume: Path, digest: str, network: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Go on from `resume/state.safetensors`, or clear `resume` and start anew.

    Args:
        resume: The run's folder.
        digest: Of `run_digest`.
        network: Gets the saved weights, if there are any.
        optimizer: Likewise its buffers.

    Returns:
        The progress: `digest` and the rows of the finished `epochs`.
    """
    progress = latest_progress(resume, digest)
    if progress is None:
        if distributed.is_writer():
            shutil.rmtree(resume, ignore_errors=True)
        distributed.barrier()
        return {"digest": digest, "epochs": []}
    load_state(resume / "state.safetensors", network, optimizer)
    return progress


def latest_progress(resume: Path, digest: str) -> dict[str, Any] | None:
    """Progress of the state in `resume`, or None when there is none of the same `digest`.

    Temporary files of a killed process are removed. Where processes have several disks, the
    state that is furthest and all other files are then on each of them.
    """
    state = resume / "state.safetensors"
    own = read_progress(state, digest) if distributed.is_writer() else None
    if distributed.is_writer():
        # A kill in the middle of a write leaves its temporary file, which must not be published.
        for leftover in resume.rglob(".tmp-*"):
            leftover.unlink()
    found = [progress for progress in distributed.gather(own) if progress is not None]
    furthest = max(found, key=lambda progress: len(progress["epochs"]), default=None)
    if distributed.is_writer() and furthest is not None:
        if own is None or len(own["epochs"]) < len(furthest["epochs"]):
            state.unlink(missing_ok=True)
    distributed.share(resume)
    return furthest


def resume_folder(base: Path, digest: str) -> Path:
    """The folder of the interrupted run `digest` below `base`; older ones but one are removed.

    So an interrupted run is still there after another one was tried.
    """
    if not distributed.is_writer():
        return base / digest
    others = [path for path in base.glob("*") if path.name != digest]
    others.sort(key=lambda path: path.stat().st_mtime)
    for path in others[:-1]:
        shutil.rmtree(path, ignore_errors=True)
    return base / digest


def remove_resume_folder(folder: Path) -> None:
    """Remove a finished run's folder, and the one above it when no other run is in it.

    When no process needs it any more.
    """
    distributed.barrier()
    if not distributed.is_writer():
        return
    # First: what a kill leaves of the folder must not pass for a state to go on from.
    (folder / "state.safetensors").unlink(missing_ok=True)
    shutil.rmtree(folder)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def run_digest(
    section_digest: str,
    inputs: Sequence[Path],
    code: Sequence[Path],
    device: torch.device,
    precision: str,
) -> str:
    """Digest of what a run depends on: parameters, inputs, code and what computes it.

    Args:
        section_digest: Digest of the stage's parameters.
        inputs: Files or folders whose contents count.
        code: Source files.
        device: What the run computes on. Of GPUs the model counts, not the number.
        precision: Resolved: what `auto` stands for on another machine may differ.

    Returns:
        16 hex digits. A saved state of another digest is not resumed.

    Raises:
        UserError: Hosts of this run differ in any of these.
    """
    total = hashlib.sha256(section_digest.encode())
    # Hashing is for one process of a disk.
    for path in [*inputs, *code] if distributed.is_writer() else ():
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                total.update(file.name.encode())
                total.update(hashlib.sha256(file.read_bytes()).digest())
    # Another torch or kind of device computes another result. Numbers of threads and processes
    # change the last bits of it alone, so that a run may go on with others.
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    total.update(f"{torch.__version__} {kind} {precision}".encode())
    own = total.hexdigest()[:16] if distributed.is_writer() else None
    found = {found for found in distributed.gather(own) if found}
    if len(found) > 1:
        raise UserError(
            "the hosts of this run differ in params.yaml, code, inputs (data/, models/), torch or "
            "kind of device; bring them to the same state (`git pull`, `dvc pull`)"
        )
    return found.pop()


def code_files(stage: str) -> list[Path]:
    """Source files that a stage's result may depend on.

    Not: the command line and what only it uses, MLflow, drawing and the other stages.
    """
    package = Path(__file__).parent
    aside = {"cli.py", "curves.py", "paper.py", "preset.py", "results.py", "runs.py"}
    aside |= {"launcher.py", "server.py", "tables.py", "tracking.py", "viz.py", "__main__.py"}
    return [
        path
        for path in sorted([*package.rglob("*.py"), *package.rglob("*.cpp")])
        if path.name not in aside and (path.parent.name != "stages" or path.stem == stage)
    ]


@contextlib.contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Use `count` CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
