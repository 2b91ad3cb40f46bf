"""A file of finished images, so that an interrupted pass goes on where it stopped."""

import errno
import json
import os
from pathlib import Path
from typing import Any, Self

from isim import errors
from isim.runtime import atomic

Line = dict[str, Any]
_MOST_BYTES = 8 << 30


class Journal:
    """One JSON line an image, appended as it is finished and readable after kill -9.

    Each of several processes appends to a file of its own, process r > 0 to `<path>.<r>`; the
    first one reads all files, however many processes there were before. Raises UserError when
    opening or appending fails: no folder or permission, a full disk.
    """

    def __init__(self, path: Path, number: int = 0) -> None:
        """Open the file of process `number` for more; nothing is read."""
        self._base = path
        self._path = path.with_name(f"{path.name}.{number}") if number else path
        try:
            if self._path.exists():
                errors.regular(self._path)
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

    def add(self, line: Line) -> None:
        """Append one image's line; its `id` must be set."""
        data = json.dumps(line).encode() + b"\n"
        try:
            # A disk that fills up takes a part of the line without an error.
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise atomic.unwritable(self._path, error) from error

    def read(self) -> dict[str, Line]:
        """Read the lines of all processes' files, by image id."""
        lines: dict[str, Line] = {}
        for path in [self._base, *sorted(self._base.parent.glob(f"{self._base.name}.*"))]:
            remedy = f"delete {path.parent}: the stage begins anew"
            with errors.reading(path, remedy, "is damaged"):
                data = errors.contents(path, _MOST_BYTES)
                # A kill in the middle of a write leaves a last line without its end: cut it off.
                whole = data[: data.rfind(b"\n") + 1]
                if whole != data:
                    os.truncate(path, len(whole))
                lines |= {line["id"]: line for line in map(json.loads, whole.splitlines())}
        return lines
