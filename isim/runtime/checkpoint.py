"""Safetensors files, and the folder of what an interrupted run goes on from; torch comes lazily."""

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from isim import errors
from isim.errors import UserError
from isim.runtime import atomic, processes

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

_STATE = "state.safetensors"


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: dict[str, str]) -> None:
    """Write a safetensors file, in the first process. Raises UserError as `write_bytes` does."""
    from safetensors.torch import save

    if processes.is_main():
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        atomic.write_bytes(path, save(plain, metadata), durable=True)


def load_tensors(path: Path) -> dict[str, "Tensor"]:
    """Read a safetensors file of weights, on the CPU.

    Raises ValueError for weights that are none: complex, true or false, NaN or infinite; UserError
    if it is no regular file, and what the library raises if it is damaged.
    """
    from safetensors.torch import load_file

    # The library checks what a header asks for against the file's size.
    errors.regular(path)
    tensors = load_file(path)
    require_weights(tensors)
    return tensors


def require_weights(tensors: Mapping[str, "Tensor"]) -> None:
    """Check that tensors are numbers, and finite. Raises ValueError if not."""
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_complex() or kind == "bool":
            raise ValueError(f"{name} is {kind}, no weights")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are NaN or infinite")


def save_state(
    resume: Path, network: "nn.Module", optimizer: "Optimizer", progress: dict[str, Any]
) -> None:
    """Write weights, optimizer buffers, JSON progress. Raises UserError as `save_tensors` does."""
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    for index, buffers in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in buffers.items()}
    header = {"digest": resume.name, "progress": json.dumps(progress)}
    save_tensors(resume / _STATE, tensors, header)


def restore(resume: Path, network: "nn.Module", optimizer: "Optimizer") -> dict[str, Any]:
    """Undo `save_state` in place (the network keeps its memory format), if there is a state.

    Returns the saved progress, or `{"epochs": []}`. Raises UserError when another host still sees
    an older state.
    """
    remedy = f"delete {resume} to start the stage over"
    with errors.reading(resume / _STATE, remedy, "is damaged"):
        return _restored(resume, network, optimizer)


def _restored(resume: Path, network: "nn.Module", optimizer: "Optimizer") -> dict[str, Any]:
    from safetensors.torch import load_file

    progress = _progress(resume) or {"epochs": []}
    if len(set(processes.gather(len(progress["epochs"])))) > 1:
        # Network file systems cache names for up to a minute.
        raise UserError(
            f"the hosts of this run see different states in {resume}; wait a minute and run the "
            "same command again"
        )
    if progress["epochs"]:
        weights: dict[str, Tensor] = {}
        buffers: dict[int, dict[str, Tensor]] = {}
        for key, tensor in load_file(resume / _STATE).items():
            kind, name = key.split(".", 1)
            if kind == "network":
                weights[name] = tensor
            else:
                index, name = name.split(".", 1)
                buffers.setdefault(int(index), {})[name] = tensor
        network.load_state_dict(weights)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": buffers})
    return progress


def resume_folder(base: Path, digest: str) -> Path:
    """Make the folder of the run `digest` below `base`, or clear up what a killed run left there.

    A state that cannot be read, or of another run, is removed with all beside it. The latest of the
    other interrupted runs stays, to go on from. Raises UserError when the folder cannot be made.
    """
    folder = base / digest
    if processes.is_main():
        for leftover in base.glob(".removing-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        others = [path for path in base.glob("[!.]*") if path != folder]
        for path in sorted(others, key=lambda path: path.stat().st_mtime)[:-1]:
            _remove(path)
        if (folder / _STATE).exists() and _progress(folder) is None:
            _remove(folder)
        atomic.make_directory(folder)
        # Else half a file could be published.
        for leftover in [*folder.rglob(".tmp-*"), *folder.rglob(".old-*")]:
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
    processes.barrier()
    return folder


def pin(kept: Path, key: str) -> Path | None:
    """Copy a file for the run `key`, which goes on with this copy when it was interrupted.

    Whatever has taken the place of `kept` since, the run finds what it began with; None where
    there was nothing. `unpin` ends that. The copy of the latest of the other interrupted runs
    stays, as its folder does (`resume_folder`). Raises UserError when it cannot be written.
    """
    copy = pinned(kept, key)
    if processes.is_main():
        others = [path for path in kept.parent.glob(pinned(kept, "*").name) if path != copy]
        for path in sorted(others, key=lambda path: path.stat().st_mtime)[:-1]:
            path.unlink()
        if not copy.exists():
            with atomic.atomic_path(copy) as temporary:
                # An empty file tells that the run began without.
                temporary.touch()
                if kept.exists():
                    shutil.copyfile(kept, temporary)
    processes.barrier()
    return copy if copy.stat().st_size else None


def unpin(kept: Path, key: str) -> None:
    """Remove the copy that a run began with: it has ended."""
    processes.barrier()
    if processes.is_main():
        pinned(kept, key).unlink(missing_ok=True)


def pinned(kept: Path, key: str) -> Path:
    """Return the path of the copy that the run `key` goes on with."""
    return kept.with_name(f"began-{key}{kept.suffix}")


def remove(folder: Path) -> None:
    """Remove a finished run's folder, and the one above it when no other run is in it.

    Raises UserError when it cannot be renamed.
    """
    # Some process may still read there.
    processes.barrier()
    if processes.is_main():
        discard(folder)


def discard(folder: Path) -> None:
    """Remove a folder as `remove` does, whatever other processes do."""
    _remove(folder)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def _remove(folder: Path) -> None:
    """Rename before deleting: what a kill leaves must not pass for a state to go on from."""
    removing = folder.with_name(f".removing-{folder.name}")
    shutil.rmtree(removing, ignore_errors=True)
    try:
        folder.rename(removing)
    except OSError as error:
        raise atomic.unwritable(folder, error) from error
    # Files that another host has open stay; the next `resume_folder` deletes them.
    shutil.rmtree(removing, ignore_errors=True)


def _progress(resume: Path) -> dict[str, Any] | None:
    """Read the progress of a saved state; None when this run has saved none that is readable."""
    try:
        errors.regular(resume / _STATE)
        with safe_open(resume / _STATE, "np") as file:
            header = file.metadata()
        return json.loads(header["progress"]) if header["digest"] == resume.name else None
    except (OSError, KeyError, TypeError, ValueError, SafetensorError, UserError):
        return None
