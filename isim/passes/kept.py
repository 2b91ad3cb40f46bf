"""Results of passes, kept and found again by content: data that grow compute what is new alone.

A label map is a function of an image, a network and parameters. It lies, with its figures, in
`results/<what a pass depends on>/<what the image's own result depends on>`, one file a result. All
of them together take `LIMIT` bytes at most after a pass: those that were used least recently are
deleted. Any of them may be deleted at any time, and what is missing or damaged is computed again.
"""

import contextlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from pydantic import BaseModel

from isim import errors
from isim.data.prepared import Item
from isim.errors import UserError
from isim.passes import each
from isim.passes.journal import Line
from isim.runtime import atomic, identity, processes, progress
from isim.runtime.here import Here

if TYPE_CHECKING:
    from isim.passes.stream import Array, Compute, OnGroup

LIMIT = 4 << 30
# Another version of these may compute other last bits.
_LIBRARIES = ("numpy", "opencv-python-headless", "pillow", "timm", "torch", "torchvision")

# Folder -> suffix of a result's files, as of `each.image`.
Outs = Mapping[Path, str]


class _Result(NamedTuple):
    """Figures of an image, and the contents of its files in the order of `Outs`."""

    line: Line
    files: list[bytes]


@dataclass(frozen=True)
class Kept:
    """Results of one kind: all are by the same code, network and parameters.

    Attributes:
        here: The stage.
        depends: Digest of all that they depend on, beside what is an image's own.
        digests: md5 of images and masks by path, where they are known.
        own: Digest of what else an image's result depends on.
    """

    here: Here
    depends: str
    digests: Mapping[Path, str]
    own: Callable[[Item], str] | None = None

    @classmethod
    def on(
        cls,
        here: Here,
        params: BaseModel,
        aside: set[str],
        *,
        digests: Mapping[Path, str],
        own: Callable[[Item], str] | None = None,
        **inputs: object,
    ) -> Self:
        """Describe results of a stage: its code, its section but for `aside`, and `inputs`.

        What computes them counts as it does when an interrupted stage goes on, and so do versions
        of the libraries.
        """
        told = {
            "code": identity.of_code(here.name.split()[0]),
            "libraries": {name: version(name) for name in _LIBRARIES},
            "params": params.model_dump(mode="json", exclude=aside),
            "machine": here.machine,
            "inputs": inputs,
        }
        return cls(here, identity.digest(told), digests, own)

    @property
    def _base(self) -> Path:
        return self.here.cache / "results"

    def image(
        self,
        items: Sequence[Item],
        finish: Callable[..., Line],
        *,
        name: str,
        outs: Outs,
        compute: "Compute | None" = None,
        on_group: "OnGroup | None" = None,
    ) -> each.Passed:
        """Map every image once, as `each.image` does, but for those whose results are kept.

        Tells how many these are; `Passed` counts the others. Raises UserError as `each.image`.
        """
        if not items:
            return each.Passed([], 0, 0.0)
        found = self._found(items, outs)
        known = [item for item in items if item.id in found]

        unwritten: list[str] = []

        def restore(item: Item) -> Line:
            try:
                result = self._read(item, len(outs))
            except (OSError, ValueError):
                result = None
            if result is None:
                raise UserError(
                    f"{self._path(item)} was deleted or changed meanwhile; run the same command "
                    "again"
                )
            for (folder, suffix), content in zip(outs.items(), result.files, strict=True):
                atomic.write_bytes(folder / f"{item.id}{suffix}", content)
            return result.line

        def make(item: Item, *arrays: "Array | None") -> Line:
            line = finish(item, *arrays)
            files = [(out / f"{item.id}{suffix}").read_bytes() for out, suffix in outs.items()]
            try:
                self._write(item, _Result(line, files))
            except UserError as error:
                # The result itself is there: what is kept is a convenience.
                unwritten.append(str(error))
            return line

        again = 0
        if known:
            again = each.image(self.here, known, restore, name=name, outs=outs).computed
        passed = each.image(
            self.here, items, make, name=name, outs=outs, compute=compute, on_group=on_group
        )
        progress.tell(
            f"{self.here.name}: {again} of {len(items)} label maps ({name}) as before, "
            f"{passed.computed} computed now; {self._bounded() / 1e9:.2f} GB are kept in "
            f"{self._base} (may be deleted at any time)"
        )
        if unwritten:
            progress.tell(f"{self.here.name}: {len(unwritten)} are not kept: {unwritten[0]}")
        return passed

    def _found(self, items: Sequence[Item], outs: Outs) -> set[str]:
        """Ids of the images whose results are there and whole; damaged ones are told."""
        found: list[str] = []
        damaged = 0
        for item in progress.track(items, "results of before"):
            try:
                if self._read(item, len(outs)) is not None:
                    # The least recently used ones are deleted first.
                    os.utime(self._path(item))
                    found.append(item.id)
            except ValueError:
                damaged += 1
            except OSError:
                continue
        if damaged:
            progress.tell(f"{self.here.name}: {damaged} damaged results are computed again")
        # The first process's list: all must leave out the same.
        return set(processes.broadcast(found))

    def _path(self, item: Item) -> Path:
        """Path of an image's result."""
        mask, label = item.mask, item.image_label
        told = {
            "image": self._digest(item.image),
            "mask": None if mask is None else self._digest(mask),
            "label": None if label is None else label.tolist(),
            "own": None if self.own is None else self.own(item),
        }
        key = identity.sha256(json.dumps(told, sort_keys=True).encode())
        return self._base / self.depends / key

    def _digest(self, path: Path) -> str:
        return self.digests.get(path) or identity.md5(path)

    def _read(self, item: Item, count: int) -> _Result | None:
        """Read an image's result of `count` files, if there is one. ValueError if damaged."""
        path = self._path(item)
        try:
            content = errors.contents(path, LIMIT)
        except FileNotFoundError:
            return None
        checked, _, body = content.partition(b"\n")
        # The name belongs to what is checked: a file in another's place is none.
        if checked != _check(path, body):
            raise ValueError(f"{path} is damaged")
        head, _, rest = body.partition(b"\n")
        told = json.loads(head)
        files = []
        for size in told["sizes"]:
            files.append(rest[:size])
            rest = rest[size:]
        if len(files) != count:
            raise ValueError(f"{path} has another number of files")
        return _Result(told["line"], files)

    def _write(self, item: Item, result: _Result) -> None:
        path = self._path(item)
        head = {"line": result.line, "sizes": [len(content) for content in result.files]}
        body = json.dumps(head).encode() + b"\n" + b"".join(result.files)
        atomic.write_bytes(path, _check(path, body) + b"\n" + body)

    def _bounded(self) -> int:
        """Delete the least recently used results of all kinds above `LIMIT`: bytes that stay."""
        found = []
        for path in self._base.rglob("*"):
            try:
                status = path.stat()
            except OSError:
                # Another stage deletes, too.
                continue
            if path.is_file():
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= LIMIT:
                break
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.parent.rmdir()
            total -= size
        return total


def _check(path: Path, body: bytes) -> bytes:
    return identity.sha256(path.parent.name.encode() + path.name.encode() + body).encode()
