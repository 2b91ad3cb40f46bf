"""Several processes of one run: who does what, and what they tell each other.

torchrun starts them, on one host or several. In a run of one process everything here does
nothing and torch.distributed is never initialised. A disk is what some hosts share: the first
process of each disk, its writer, keeps the files there, so that every disk holds all of them.

torch is imported inside functions only: tracking asks for the rank, and not every stage needs
torch.
"""

import contextlib
import ctypes
import datetime
import io
import json
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from isim import atomic
from isim.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# Exit code of a process that another one has left alone.
LOST = 3
# Longest wait for another process. One that died is noticed at once, by its host; only a host
# that vanishes from the network is not.
TIMEOUT = datetime.timedelta(hours=2)
# Seconds that a failing process waits for others, which may fail for the same reason.
TOGETHER_SECONDS = 2.0
# Numbers of a gradient bucket, and bytes of files sent at once.
BUCKET, CHUNK = 2**25, 2**26
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class _Group:
    """This process among the others; `writers` are the ranks that write, one for each disk."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    writers: tuple[int, ...] = (0,)
    disks: Any = None


_group = _Group()


def by_torchrun() -> bool:
    """Tell whether torchrun has started this process."""
    return "LOCAL_RANK" in os.environ


def rank() -> int:
    """Number of this process among all, from 0."""
    return _group.rank


def world() -> int:
    """Number of processes."""
    return _group.world


def local_rank() -> int:
    """Number of this process among those of its host."""
    return _group.local_rank


def local_world() -> int:
    """Number of processes on this host."""
    return _group.local_world


def is_main() -> bool:
    """Tell whether this is rank 0, which alone prints and tracks."""
    return _group.rank == 0


def is_writer() -> bool:
    """Tell whether this is the process that writes what is common on its disk."""
    return _group.rank in _group.writers


@contextlib.contextmanager
def started(folder: Path) -> Iterator[None]:
    """Join the processes that torchrun has started, for the block; otherwise do nothing.

    A UserError that all processes of a host meet is raised in one of them only; the others leave
    with exit code 2. One whose partner is gone leaves with exit code `LOST`.

    Args:
        folder: A folder of this run; where it is the same one for two hosts, they share a disk.
    """
    global _group
    if not by_torchrun() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    # Of several hosts' C++ code; what matters arrives as an exception. Read by torch's import.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch
    import torch.distributed as dist

    own, local, locals_ = (int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    # A launcher that is killed must not leave its processes behind.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGINT, _interrupt)
    if not _threads_are_set():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // locals_))
    if own:
        _be_quiet()
    store, own, total_ = next(iter(dist.rendezvous("env://")))
    # Communication of CPU tensors and, where there are GPUs, of theirs.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, world_size=total_, rank=own, store=store)
    _group = _Group(own, total_, local, locals_)
    try:
        writers = _writers(folder)
        disks = dist.new_group(writers, backend="gloo")
        _group = _Group(own, total_, local, locals_, writers, disks)
        yield
        # Whoever is done must not look lost to those who are not.
        barrier()
    except UserError:
        if not _is_first_to_fail(store):
            raise SystemExit(2) from None
        raise
    dist.destroy_process_group()
    _group = _Group()


def mine(things: Sequence[T]) -> Sequence[T]:
    """Every world-th of them, from the rank-th on: each belongs to exactly one process."""
    return things[_group.rank :: _group.world]


def barrier() -> None:
    """Wait for all processes."""
    gather(None)


def gather_bytes(data: bytes) -> list[bytes]:
    """What each process has called this with, by rank."""
    if _group.world == 1:
        return [data]
    import torch
    import torch.distributed as dist

    with _together():
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(_group.world)]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        # All of one length: NCCL and gloo alike know no other gathering.
        length = max(1, *(int(size) for size in sizes))
        parts = [torch.zeros(length, dtype=torch.uint8) for _ in sizes]
        own = torch.frombuffer(bytearray(data.ljust(length)), dtype=torch.uint8)
        dist.all_gather(parts, own)
    return [part[: int(n)].numpy().tobytes() for part, n in zip(parts, sizes, strict=True)]


def gather(value: T) -> list[T]:
    """What each process has called this with, by rank; anything that JSON can hold."""
    if _group.world == 1:
        return [value]
    return [json.loads(part) for part in gather_bytes(json.dumps(value).encode())]


def broadcast(value: T) -> T:
    """What rank 0 has called this with; anything that JSON can hold."""
    return gather(value if is_main() else None)[0]  # type: ignore[return-value]


def gather_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The (n_r, K) rows of every process one after the other, by rank: (sum of n_r, K)."""
    parts = gather_bytes(np.ascontiguousarray(rows).tobytes())
    return np.concatenate([np.frombuffer(p, rows.dtype).reshape(-1, rows.shape[1]) for p in parts])


def sum_array(array: NDArray[Any]) -> NDArray[Any]:
    """The sum over all processes of an array of one shape."""
    if _group.world == 1:
        return array
    import torch

    return total(torch.from_numpy(np.ascontiguousarray(array))).numpy()


def sum_figures(figures: dict[str, float]) -> dict[str, float]:
    """The sum over all processes of each figure."""
    sums = sum_array(np.array(list(figures.values()), np.float64))
    return dict(zip(figures, sums.tolist(), strict=True))


def total(tensor: "Tensor") -> "Tensor":
    """The sum over all processes of a tensor of one shape, without a gradient."""
    if _group.world == 1:
        return tensor.detach()
    import torch
    import torch.distributed as dist

    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    with _together():
        dist.all_reduce(result)
    return result


def sum_gradients(parameters: Iterable["Tensor"]) -> None:
    """Replace each gradient by its sum over all processes.

    A sum, since every process divides its part of a loss by the count of all. Not
    DistributedDataParallel: parts of a network without a gradient (the decoder, in the warm-up)
    need no care here, checkpoints keep their names, and what overlapping it with the backward
    pass would save is a few milliseconds of a step.
    """
    if _group.world == 1:
        return
    buckets: list[list[Tensor]] = []
    space = 0
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.numel() > space or gradient.dtype != buckets[-1][0].dtype:
            buckets.append([])
            space = BUCKET
        buckets[-1].append(gradient)
        space -= gradient.numel()
    for bucket in buckets:
        _put_back(bucket, total(_flat(bucket)))


def equalise(tensors: Iterable["Tensor"]) -> None:
    """Give every process the values that rank 0 has, in place."""
    if _group.world == 1:
        return
    import torch.distributed as dist

    with _together():
        for tensor in tensors:
            flat = _flat([tensor])
            dist.broadcast(flat, 0)
            _put_back([tensor], flat)


def once(record: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns in rank 0, or what it did when `record` was written.

    Args:
        record: JSON file that keeps it; nan stays nan.
        make: Called by all processes, unless there is a record.
    """
    found = broadcast(json.loads(record.read_text()) if is_main() and record.exists() else None)
    if found is None:
        found = broadcast(make())
        if is_writer():
            # Not write_json: nan must come back as nan.
            atomic.write_text(record, json.dumps(found))
    return found


def share(folder: Path, pattern: str = "**/*") -> None:
    """Put every file of a folder that is on one disk on all of them, and wait for all processes.

    Files of one name are taken for the same; journals, which every process keeps for itself,
    and temporary files stay where they are.

    Args:
        folder: The same one of every process's own project.
        pattern: Of the files inside it.
    """
    writers = _group.writers
    if len(writers) == 1 or not is_writer():
        if len(writers) > 1:
            gather({})
        barrier()
        return
    import torch
    import torch.distributed as dist

    sizes = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.glob(pattern))
        if path.is_file() and not path.name.startswith(".tmp-") and ".jsonl" not in path.name
    }
    everywhere = gather(sizes)
    known: set[str] = set()
    for source in writers:
        sent = [
            name
            for name in everywhere[source]
            if name not in known and any(name not in everywhere[other] for other in writers)
        ]
        known |= everywhere[source].keys()
        for names in _chunks(sent, everywhere[source]):
            if _group.rank == source:
                data = bytearray(b"".join((folder / name).read_bytes() for name in names))
            else:
                data = bytearray(sum(everywhere[source][name] for name in names))
            # An empty buffer cannot be sent.
            data.append(0)
            with _together():
                dist.broadcast(
                    torch.frombuffer(data, dtype=torch.uint8), source, group=_group.disks
                )
            start = 0
            for name in names:
                end = start + everywhere[source][name]
                if name not in sizes:
                    atomic.write_bytes(folder / name, bytes(data[start:end]))
                start = end
    barrier()


def _chunks(names: Sequence[str], sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names in groups of about `CHUNK` bytes; a larger file is a group of its own."""
    group: list[str] = []
    for name in names:
        if group and sum(sizes[n] for n in group) + sizes[name] > CHUNK:
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def _writers(folder: Path) -> tuple[int, ...]:
    """First rank of each disk, found by files that each host writes and all look for."""
    token = folder / "hosts" / uuid.uuid4().hex
    if _group.local_rank == 0:
        atomic.write_text(token, "")
    names = gather(token.name if _group.local_rank == 0 else "")
    first = min(n for n, name in enumerate(names) if name and token.with_name(name).exists())
    writers = tuple(sorted(set(gather(first))))
    if _group.local_rank == 0:
        token.unlink()
    return writers


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Leave quietly when another process is gone: what it met is told there or by the launcher."""
    try:
        yield
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
    """Tell whether the user has chosen the number of threads.

    torchrun sets it to 1 where it is not; the environment that torchrun itself got tells.
    """
    try:
        entries = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return any(entry.startswith(b"OMP_NUM_THREADS=") for entry in entries)


class _NoTerminal(io.TextIOWrapper):
    """Standard error, on which nothing draws progress bars."""

    def isatty(self) -> bool:
        """Say no."""
        return False


def _be_quiet() -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    sys.stderr = _NoTerminal(sys.stderr.buffer, line_buffering=True)


def _flat(tensors: Sequence["Tensor"]) -> "Tensor":
    import torch

    # In the order of the indices, whatever the memory format is.
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _put_back(tensors: Sequence["Tensor"], flat: "Tensor") -> None:
    pieces = flat.split([tensor.numel() for tensor in tensors])
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.detach().copy_(piece.view(tensor.shape))
