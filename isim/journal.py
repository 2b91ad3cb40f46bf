"""A file of finished images, so that an interrupted pass goes on where it stopped."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from isim import atomic


class Journal:
    """One JSON line an image, appended as it is finished and readable after kill -9.

    Args:
        path: The file; its folder must exist. Lines of an earlier pass are read back.

    Attributes:
        lines: What is known, by image id.

    Raises:
        UserError: Opening or appending fails: a full disk, or a folder without permission.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there and open the file for more."""
        self.lines: dict[str, dict[str, Any]] = {}
        self._path = path
        try:
            with contextlib.suppress(FileNotFoundError):
                text = path.read_text()
                # A kill in the middle of a write leaves a last line without its end: cut it off.
                whole = text[: text.rfind("\n") + 1]
                if whole != text:
                    os.truncate(path, len(whole.encode()))
                self.lines = {line["id"]: line for line in map(json.loads, whole.splitlines())}
            # Unbuffered: nothing is left to be written, and to fail, when it is closed.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise atomic.unwritable(path, error) from error

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

    def keep(self, finished: Iterator[str]) -> None:
        """Forget the lines of images that are not in `finished` (their outputs are gone)."""
        names = set(finished)
        self.lines = {name: line for name, line in self.lines.items() if name in names}
