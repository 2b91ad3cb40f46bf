"""Several processes of one run: who does what, and what they tell each other.

torchrun starts them, on one host or on several that share the project folder. All must call what
communicates (`barrier` to `equalise`), in the same order; one process alone never loads torch here.
"""

import contextlib
import ctypes
import datetime
import json
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from isim.errors import UserError
from isim.runtime import atomic, paths

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

LOST = 3  # Exit code of a process that another one has left alone.
# Longest wait for another process. One that died is noticed at once, a host that vanished is not.
TIMEOUT = datetime.timedelta(hours=2)
TOGETHER_SECONDS = 2.0  # That a failing process waits for others, which may fail alike.
VISIBLE_SECONDS = 10.0  # That a file may take to appear on another host (folders are cached).
_PR_SET_PDEATHSIG = 1


class _Group(NamedTuple):
    """This process among the others."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


_group = _Group()


def rank() -> int:
    """Return the number of this process among all, from 0."""
    return _group.rank


def world() -> int:
    """Return the number of processes."""
    return _group.world


def local_rank() -> int:
    """Return the number of this process among those of its host, from 0."""
    return _group.local_rank


def local_world() -> int:
    """Return the number of processes on this host."""
    return _group.local_world


def is_main() -> bool:
    """Tell whether this is the first process, which alone prints, tracks and writes for all."""
    return _group.rank == 0


@contextlib.contextmanager
def started(folder: Path) -> Iterator[None]:
    """Join the processes that torchrun has started, for the block; otherwise do nothing.

    A UserError that all processes of a host meet is raised in one of them only; the others leave
    with exit code 2. One whose partner is gone leaves with exit code `LOST`. Raises UserError when
    the hosts do not share `folder`, that of the project's own state (`.isim`).
    """
    global _group
    if "LOCAL_RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
        yield
        return
    # Read by torch's import. Warnings of its C++ code: what matters arrives as an exception.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    numbers = [paths.number_of(name, 0, 1_000_000) for name in names]
    if None in numbers:
        raise UserError(
            "LOCAL_RANK is set, which torchrun sets with "
            f"{names[numbers.index(None)]}, which is not; unset it, or start by ISIM_PROCESSES"
        )
    group = _Group(*(number or 0 for number in numbers))
    # A launcher that is killed must not leave its processes behind.
    end_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGINT, _interrupt)
    if not _threads_are_set():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // group.local_world))
    if group.rank:
        # One process speaks for all; without a terminal nothing draws progress bars.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        sys.stderr.isatty = lambda: False  # type: ignore[method-assign]
    # For tensors of the CPU and, where there are GPUs, for theirs.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, world = next(iter(rendezvous("env://")))
    dist.init_process_group(backend, timeout=TIMEOUT, world_size=world, rank=rank, store=store)
    _group = group
    try:
        _require_shared(folder)
        yield
        # Whoever is done must not look lost to those who are not.
        barrier()
    except UserError:
        if not _is_first_to_fail(store):
            raise SystemExit(2) from None
        raise
    dist.destroy_process_group()
    _group = _Group()


def end_with_parent(number: signal.Signals) -> None:
    """Let the system send this process a signal when its parent is gone; only Linux can."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, number)


def mine(things: Sequence[T]) -> Sequence[T]:
    """Return this process's part, every `world`-th thing: each is in exactly one part."""
    return things[_group.rank :: _group.world]


def own_seed() -> tuple[int, ...]:
    """Return numbers that tell this process's random draws from those of the others."""
    return (_group.rank,) if _group.rank else ()


def barrier() -> None:
    """Wait for all processes."""
    gather(None)


def gather(value: T) -> list[T]:
    """Return the values of all processes, by rank; anything that JSON can hold."""
    if _group.world == 1:
        return [value]
    import torch

    data = json.dumps(value).encode()
    with _together() as dist:
        # All of one length: NCCL and gloo alike know no other gathering.
        length = torch.tensor(len(data))
        dist.all_reduce(length, dist.ReduceOp.MAX)
        own = torch.frombuffer(bytearray(data.ljust(int(length))), dtype=torch.uint8)
        parts = [torch.empty_like(own) for _ in range(_group.world)]
        dist.all_gather(parts, own)
    return [json.loads(part.numpy().tobytes()) for part in parts]


def broadcast(value: T) -> T:
    """Return the first process's value; anything that JSON can hold."""
    return gather(value if is_main() else None)[0]  # type: ignore[return-value]


def sum_figures(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the sum over all processes of each figure."""
    told = gather(figures)
    return {name: sum(figures[name] for figures in told) for name in figures}


def total(tensor: "Tensor") -> "Tensor":
    """Return the sum over all processes of a tensor of one shape, without a gradient."""
    if _group.world == 1:
        return tensor.detach()
    result = tensor.detach().contiguous().clone()
    with _together() as dist:
        dist.all_reduce(result)
    return result


def sum_gradients(parameters: Iterable["Tensor"]) -> None:
    """Replace each gradient by its sum: every process divides its part of a loss by all's count.

    DistributedDataParallel would save a few milliseconds of a step, but rename what checkpoints
    hold, and need care for parts of a network without a gradient (the decoder, in the warm-up).
    """
    if _group.world == 1:
        return
    import torch

    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    with _together() as dist:
        dist.all_reduce(flat)
    pieces = flat.split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view(gradient.shape))


def equalise(tensors: Iterable["Tensor"]) -> None:
    """Give every process the values that the first has, in place."""
    if _group.world == 1:
        return
    with _together() as dist:
        for tensor in tensors:
            # In the order of the indices, whatever the memory format is.
            values = tensor.detach().contiguous().clone()
            dist.broadcast(values, 0)
            tensor.detach().copy_(values)


def _require_shared(folder: Path) -> None:
    """Check that every host sees a file that the first process writes."""
    if _group.local_world == _group.world:
        return
    path = folder / broadcast(f".hosts-{uuid.uuid4().hex}")
    if is_main():
        atomic.write_text(path, "")
    barrier()
    end = time.monotonic() + VISIBLE_SECONDS
    while not (seen := path.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    everywhere = all(gather(seen))
    if is_main():
        path.unlink()
    if not everywhere:
        raise UserError(
            f"the hosts of this run do not share the project folder {folder.parent}; start them "
            "in one folder that all of them mount"
        )


@contextlib.contextmanager
def _together() -> Iterator[Any]:
    """Lend torch.distributed; leave quietly when another process is gone, which has told why."""
    import torch.distributed as dist

    try:
        yield dist
    except RuntimeError as error:
        if re.search(r"onnection|[Tt]imed? ?out|[Pp]eer|Broken pipe|remote process", str(error)):
            raise SystemExit(LOST) from None
        raise


def _is_first_to_fail(store: Any) -> bool:  # noqa: ANN401 - torch is not imported yet
    """Tell whether no other process of this host has failed before."""
    key = f"isim/failures/{os.environ.get('GROUP_RANK', '0')}"
    # The store is another host's, which may be gone.
    with contextlib.suppress(RuntimeError):
        if store.add(key, 1) > 1:
            # torchrun ends all when one ends, and that must be the one that tells.
            time.sleep(3 * TOGETHER_SECONDS)
            return False
        end = time.monotonic() + TOGETHER_SECONDS
        # The others may be closing what they have open.
        while store.add(key, 0) < _group.local_world and time.monotonic() < end:
            time.sleep(0.05)
    return True


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    # The terminal sends Ctrl-C to all processes, and so does the launcher: one is enough.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _group.rank:
        raise SystemExit(128 + number)
    raise KeyboardInterrupt


def _threads_are_set() -> bool:
    """Tell whether the user has chosen the number of threads; else torchrun has set it to 1."""
    with contextlib.suppress(OSError):
        # The environment that torchrun itself got.
        environment = Path(f"/proc/{os.getppid()}/environ").read_bytes()
        return b"\0OMP_NUM_THREADS=" in b"\0" + environment
    return True
