"""Atomic writes: a file is either complete under its name or absent."""

import contextlib
import csv
import ctypes
import errno
import io
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from isim import errors
from isim.errors import UserError

# What spreadsheets take for the beginning of a formula. Apostrophes before it belong to it: a text
# that has some gets one more, and so comes back as it was.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
# What an error says that no space or permission mends.
_AWAY = "; move it away"


@contextlib.contextmanager
def atomic_path(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` when the block succeeds.

    It has the suffix of `path`, whose folder is created when missing. After an error nothing is
    left behind. A `durable` file is the old or the new one after a loss of power, too; that takes
    milliseconds. Raises UserError when `path` is a folder, its folder cannot be written or the disk
    is full.
    """
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}{path.suffix}")
    try:
        if path.is_dir():
            raise IsADirectoryError
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            sync_one(temporary)
        temporary.replace(path)
        if durable:
            sync_one(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; put it in the place of `path` when the block succeeds.

    Its parent is created when missing. After an error nothing is left behind. Raises UserError
    when the folder cannot be written or the disk is full.
    """
    building, old = (path.with_name(f".{word}-{path.name}") for word in ("tmp", "old"))
    try:
        # A killed process leaves its folder behind: same name, so that it is cleared here.
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        yield building
        require_folder(path)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            # What cannot be deleted whole must not stand as a part.
            path.rename(old)
        building.replace(path)
    except OSError as error:  # also shutil.Error
        if old.exists() and not path.exists():
            old.rename(path)
        raise unwritable(path, error) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def require_folder(path: Path) -> None:
    """Check that a folder may come to `path`. Raises OSError for a link or a file there."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
        what = "a link" if path.is_symlink() else "a file"
        raise NotADirectoryError(errno.ENOTDIR, f"it is {what}, no folder{_AWAY}")


def sync_one(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; OSError passes."""
    with _descriptor(path) as number:
        os.fsync(number)


def sync(path: Path) -> None:
    """Wait until all that was written to the file system of `path` is on the disk.

    Once for thousands of files; without glibc for all file systems.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "syncfs"):
        os.sync()
        return
    with _descriptor(path) as number:
        libc.syncfs(number)


@contextlib.contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    # `open` takes no folder.
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield number
    finally:
        os.close(number)


def make_directory(path: Path) -> None:
    """Create `path` with its parents unless it is there. Raises UserError if it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> UserError:
    """Return the error, one line, that tells of a failed write."""
    if isinstance(error, IsADirectoryError):
        return UserError(
            f"cannot write {path}: it is a folder; choose the name of a file, or move it away"
        )
    told, remedy = (
        str(error.strerror or error),
        f"free space or fix the permissions of {path.parent}",
    )
    if error.errno == errno.EBUSY:
        remedy = f"a disk may be mounted there: mount it at {path.parent}, or elsewhere,"
    elif told.endswith(_AWAY):
        told, remedy = told.removesuffix(_AWAY), _AWAY.removeprefix("; ")
    return UserError(f"cannot write {path}: {told}; {remedy} and run the same command again")


def write_bytes(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write `data` to `path` atomically. Raises UserError as `atomic_path` does."""
    with atomic_path(path, durable=durable) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path` atomically. Raises UserError as `atomic_path` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Write `value` as indented JSON with a trailing newline, atomically; nan becomes null."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    # JSON has no nan: browsers and other languages would refuse the whole file.
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write rows as CSV, atomically; all have the keys of the first, in its order.

    `columns` names them where there may be no row. What is no finite number is an empty cell: not
    known, rather than a word that programs take for a value. A text that a spreadsheet would run as
    a formula is marked by an apostrophe, which `read_csv` takes off.
    """
    write_text(path, csv_text(rows, columns))


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Return the CSV that `write_csv` writes."""
    lines: list[str] = []
    # The module quotes a line's end in a cell only if it is a character of its own.
    file = SimpleNamespace(write=lines.append)
    writer = csv.DictWriter(file, list(columns) or list(rows[0]), lineterminator="\r\n")
    writer.writeheader()
    writer.writerows({name: _marked(value) for name, value in row.items()} for row in rows)
    return "".join(line[:-2] + "\n" for line in lines)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a file of `write_csv`, its texts as they were.

    Raises csv.Error or ValueError for another one, UserError as `errors.contents`, and OSError.
    """
    return parse_csv(errors.contents(path, errors.TABLE).decode("utf-8"))


def parse_csv(text: str) -> list[dict[str, str]]:
    """Read the rows of `csv_text`; csv.Error, or ValueError for a row that is no cell a column."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows = []
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has not a cell for each column")
        rows.append({name: _unmarked(value) for name, value in row.items()})
    return rows


def _marked(value: Any) -> Any:  # noqa: ANN401 - any cell
    if not isinstance(value, str):
        return "" if _finite(value) is None else value
    return f"'{value}" if _FORMULA.match(value) and not _is_number(value) else value


def _unmarked(text: str) -> str:
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
