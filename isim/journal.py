"""A file of finished images, so that an interrupted pass goes on where it stopped."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from isim import atomic, distributed


class Named(Protocol):
    """What a pass goes through: images."""

    @property
    def id(self) -> str:
        """Name that lines know it by."""


T = TypeVar("T", bound=Named)


class Journal:
    """One JSON line an image, appended as it is finished and readable after kill -9.

    Of several processes each appends to a file of its own; all files are read back, whatever
    the number of processes was before.

    Args:
        path: The file; its folder must exist. Lines of an earlier pass are read back. That of
            rank r > 0 is `<path>.<r>`.

    Attributes:
        lines: What is known, by image id. After `share_out` and `collect` all processes know the
            same.

    Raises:
        UserError: Opening or appending fails: a full disk, or a folder without permission.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there and open the file for more."""
        self.lines: dict[str, dict[str, Any]] = {}
        self._added: list[dict[str, Any]] = []
        rank = distributed.rank()
        self._path = path if rank == 0 else path.with_name(f"{path.name}.{rank}")
        try:
            if distributed.is_writer():
                for file in [path, *sorted(path.parent.glob(f"{path.name}.*"))]:
                    self._read(file)
            # Unbuffered: nothing is left to be written, and to fail, when it is closed.
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise atomic.unwritable(self._path, error) from error

    def __enter__(self) -> Self:
        """Return the journal; the file is closed with the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()

    def add(self, line: dict[str, Any]) -> None:
        """Append one image's line; its `id` must be set."""
        data = json.dumps(line).encode() + b"\n"
        try:
            # A disk that fills up takes a part of the line without an error.
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise atomic.unwritable(self._path, error) from error
        self.lines[line["id"]] = line
        self._added.append(line)

    def keep(self, finished: Iterator[str]) -> None:
        """Forget the lines of images that are not in `finished` (their outputs are gone)."""
        names = set(finished)
        self.lines = {name: line for name, line in self.lines.items() if name in names}

    def share_out(self, items: Sequence[T]) -> tuple[list[T], int]:
        """This process's share of the items that have no line, and how many they all have."""
        self._tell(list(self.lines.values()))
        missing = [item for item in items if item.id not in self.lines]
        return list(distributed.mine(missing)), len(missing)

    def collect(self, items: Sequence[T]) -> list[dict[str, Any]]:
        """Lines of all items, when all processes have finished their shares."""
        self._tell(self._added)
        return [self.lines[item.id] for item in items]

    def _tell(self, lines: list[dict[str, Any]]) -> None:
        for told in distributed.gather(lines):
            self.lines |= {line["id"]: line for line in told}

    def _read(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            text = path.read_text()
            # A kill in the middle of a write leaves a last line without its end: cut it off.
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                os.truncate(path, len(whole.encode()))
            self.lines |= {line["id"]: line for line in map(json.loads, whole.splitlines())}
