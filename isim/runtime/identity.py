"""Digests of files, of parameters, and of the code that a stage's result depends on."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isim import errors
from isim.runtime import progress

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = Path(__file__).parent.parent
# Nothing that a stage makes depends on how commands are read, nor on what is compared.
_ASIDE = {"api.py", "cli.py", "__main__.py", "experiments", "project"}
# How results are shown changes none of them: an interrupted stage goes on. Pages are made anew.
_SHOWN = "reporting"
_CODE, _TEMPLATES = {".py", ".cpp"}, {".j2", ".js", ".css"}


def sha256(data: bytes) -> str:
    """Return the hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def md5_of(data: bytes) -> str:
    """Return the hex md5 of `data`, DVC's key of a file that holds it."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def md5(path: Path) -> str:
    """Return the md5 that DVC gives a file or a folder (`.dir` appended); OSError passes.

    Raises UserError for what is neither, such as a named pipe.
    """
    if not path.is_dir():
        with errors.opened(path) as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    names = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    listing = [
        {"md5": md5(path / name), "relpath": name.as_posix()}
        for name in progress.track(names, f"digest of {path.name}", unit="file")
        if "__pycache__" not in name.parts
    ]
    listing.sort(key=lambda entry: entry["relpath"])
    return md5_of(json.dumps(listing, sort_keys=True).encode()) + ".dir"


def of_inputs(places: Mapping[str, Path]) -> dict[str, str]:
    """Return the md5 of each of the files and folders that there are, by name; errors of `md5`."""
    return {name: md5(path) for name, path in places.items() if path.exists()}


def of_times(places: Iterable[Path]) -> str:
    """Return 12 hex digits that change with any name, size or time of change of files in places.

    These are files and folders; no file is opened, and a link counts as what it leads to.
    """
    total = hashlib.sha256()
    seen: set[tuple[int, int]] = set()
    with progress.task("looks at the times of its files", unit="file") as looked:
        folders = list(places)
        while folders:
            path = folders.pop()
            total.update(os.fsencode(path))
            try:
                status = path.stat()
                total.update(f" {status.st_size} {status.st_ctime_ns}\0".encode())
                looked.add()
                # Links can lead around in circles.
                if path.is_dir() and (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    folders += (path / name for name in sorted(os.listdir(path)))
            except OSError as error:
                total.update(f" {error.errno}\0".encode())
    return total.hexdigest()[:12]


def of_tensors(tensors: Mapping[str, "Tensor"]) -> str:
    """Return 12 hex digits of the SHA-256 of tensors, with their names, shapes and types."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        array = tensor.detach().cpu().contiguous().numpy()
        total.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return total.hexdigest()[:12]


def digest(tree: Mapping[str, Any]) -> str:
    """Return 12 hex digits of the SHA-256 of a tree's canonical JSON."""
    return sha256(json.dumps(tree, sort_keys=True).encode())[:12]


def code_files(stage: str | None = None) -> list[Path]:
    """Return the source files that a stage's figures depend on; of all stages, what they show, too.

    A stage depends on none of the other stages and, but for `prepare`, on no reader of sources.
    """
    wanted = _CODE if stage else _CODE | _TEMPLATES
    found = []
    for path in sorted(path for path in PACKAGE.rglob("*") if path.suffix in wanted):
        parts = path.relative_to(PACKAGE).parts
        other_stage = parts[0] == "stages" and path.stem not in (stage, "__init__")
        source = parts[:2] == ("data", "sources") and stage != "prepare"
        other = other_stage or source or parts[0] == _SHOWN
        if parts[0] not in _ASIDE and (stage is None or not other):
            found.append(path)
    return found


def of_code(stage: str | None = None) -> str:
    """Return the digest of the names and contents of `code_files`."""
    return digest({str(path.relative_to(PACKAGE)): md5(path) for path in code_files(stage)})
