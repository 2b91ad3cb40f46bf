"""Outs of a stage that has ended: put in their places together, and kept until DVC records them.

A resume folder with a mark holds outs that are complete. The mark says `placing` while they are put
in their places, and a start of any stage finishes that after a kill. Under DVC it says `settled`
then: should DVC die before it has written `dvc.lock`, the same command publishes the same files
again. They are hard links where the file system has such, and cost no space beside what stands.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from isim import errors
from isim.errors import UserError
from isim.runtime import atomic, checkpoint, identity, progress

_MARK = "finished.json"


@dataclass
class Finished:
    """State of a stage whose outs are complete.

    Attributes:
        root: Project folder.
        outs: Out below the root -> what it is made of, below the resume folder.
        gone: Files and folders below the root that the outs take the place of.
        held: Files outside of the folder that a run of this identity needs, removed with it.
        settled: All is in its place, and tracked.
        digests: md5 of each out, as DVC gives it; when settled.
        stage: Name of the stage in dvc.lock; empty without DVC.
        entry: Digest of its entry there, as it was before DVC could record the outs.
    """

    root: str
    outs: dict[str, str]
    gone: list[str]
    held: list[str]
    settled: bool = False
    digests: dict[str, str] | None = None
    stage: str = ""
    entry: str = ""

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the mark of a resume folder; None where there is none that can be read."""
        try:
            return cls(**errors.json_of(folder / _MARK))
        except (OSError, TypeError, ValueError, RecursionError, UserError):
            return None

    def write(self, folder: Path) -> None:
        """Write the mark, for good. Raises UserError as `atomic.write_bytes`."""
        data = json.dumps(asdict(self), indent=2).encode() + b"\n"
        atomic.write_bytes(folder / _MARK, data, durable=True)

    def publish(self, folder: Path) -> None:
        """Put all outs in their places, or none of them. Raises UserError when one cannot be."""
        before = self.read(folder)
        if before is None:
            # What the mark promises must outlive a loss of power.
            with progress.task("waits for the disk"):
                atomic.sync(folder)
            self.write(folder)
        try:
            _place(
                Path(self.root), {out: folder / made for out, made in self.outs.items()}, self.gone
            )
        except BaseException:
            # Nothing has changed. What a kill left mixed stays to be finished.
            if before is None:
                unmark(folder)
            raise

    def settle(self, folder: Path) -> None:
        """Keep the outs, and nothing else of the folder, until DVC has recorded them.

        Raises UserError when the mark cannot be written.
        """
        # As `dvc repro` and `dvc exp run` name it: maybe with the path of another dvc.yaml.
        self.stage = os.environ["DVC_STAGE"].rpartition(":")[2]
        self.entry = identity.digest({"entry": _entry(Path(self.root), self.stage)})
        if not self.settled:
            with progress.task("digests of its outs"):
                self.digests = {out: identity.md5(folder / m) for out, m in self.outs.items()}
        self.settled = True
        self.write(folder)
        wanted = {_MARK, *(Path(made).parts[0] for made in self.outs.values())}
        for path in folder.iterdir():
            if path.name not in wanted:
                _delete(path)

    def is_whole(self, folder: Path) -> bool:
        """Tell whether the outs of a settled state are still what they were."""
        digests = self.digests or {}
        try:
            return all(identity.md5(folder / made) == digests[o] for o, made in self.outs.items())
        except OSError:
            return False

    def is_recorded(self) -> bool:
        """Tell whether dvc.lock has come to hold the outs of a settled state."""
        entry = _entry(Path(self.root), self.stage)
        if not entry or identity.digest({"entry": entry}) == self.entry:
            return False
        found = {out.get("path"): out.get("md5") for out in entry.get("outs", ())}
        digests = self.digests or {}
        return all(digests.get(out, md5) == md5 for out, md5 in found.items())

    def remove(self, folder: Path) -> None:
        """Remove the state and what was held for it. Raises UserError as `checkpoint.remove`."""
        checkpoint.discard(folder)
        for path in self.held:
            Path(path).unlink(missing_ok=True)


def unmark(folder: Path) -> None:
    """Promise nothing more: a run goes on in the folder."""
    (folder / _MARK).unlink(missing_ok=True)


def under_dvc() -> bool:
    """Tell whether DVC runs this stage, and will record its outs."""
    return "DVC_STAGE" in os.environ


def states(base: Path) -> Iterator[tuple[Path, Finished]]:
    """Yield resume folders below `base` that have a mark, with their states."""
    # A stage's folder, maybe one of a label set in it, and the run's.
    for levels in ("*", "*/*", "*/*/*"):
        for path in sorted(base.glob(f"{levels}/{_MARK}")):
            # Folders that are being removed begin with a dot.
            seen = not path.parent.name.startswith(".")
            if seen and (state := Finished.read(path.parent)) is not None:
                yield path.parent, state


def look_after(base: Path, root: Path, lock: Callable[[Path], bool]) -> None:
    """Finish what a killed stage of this project was publishing; drop what DVC has recorded.

    `lock` tells whether the stage of a folder of runs is this process's to touch. Raises UserError
    when an out cannot be put in its place.
    """
    for folder, state in states(base):
        # Experiments run in copies of the project, which are deleted when they have ended.
        gone = not Path(state.root).exists()
        if not (gone or Path(state.root) == root.resolve()) or not lock(folder.parent):
            continue
        if gone:
            state.remove(folder) if state.settled else unmark(folder)
            continue
        if not state.settled:
            progress.tell(f"{folder.parent.name}: publishes the rest of what a killed run computed")
            state.publish(folder)
            # Once: what another run publishes later must stay.
            unmark(folder)
        elif state.is_recorded():
            state.remove(folder)


def drop_others(base: Path, root: Path, key: str) -> None:
    """Remove the states of other runs than `key` of this project from a stage's folder of runs."""
    for folder, state in states(base):
        own = folder.parent == base and Path(state.root) == root.resolve()
        if own and folder.name != key and state.settled:
            state.remove(folder)


class _Place(NamedTuple):
    """Place of an out: what it is made of (None: it goes), and names beside it for both states."""

    path: Path
    made: Path | None
    new: Path
    old: Path


def _place(root: Path, outs: Mapping[str, Path], gone: Sequence[str]) -> None:
    """Replace outs by what they are made of, and remove others: all together, by renames."""
    wanted = [*outs.items(), *((out, None) for out in gone)]
    places = []
    for out, made in wanted:
        path = root / out
        places.append(_Place(path, made, _beside(path, "tmp"), _beside(path, "old")))
    try:
        for place in places:
            with _telling(place.path):
                _prepare(place)
        _swap(places)
    finally:
        for place in places:
            _delete(place.new)
            _delete(place.old)


def _swap(places: Sequence[_Place]) -> None:
    """Rename what is prepared to its places; an error or a signal undoes it."""
    try:
        for place in places:
            with _telling(place.path):
                if os.path.lexists(place.path):
                    place.path.replace(place.old)
                if place.made:
                    place.new.replace(place.path)
    except BaseException:
        for place in places:
            if os.path.lexists(place.old) or (place.made and not os.path.lexists(place.new)):
                _delete(place.path)
            if os.path.lexists(place.old):
                place.old.replace(place.path)
        raise
    for folder in {place.path.parent for place in places if place.made}:
        # Some file systems cannot, and all is in its place.
        with contextlib.suppress(OSError):
            atomic.sync_one(folder)


def _beside(path: Path, word: str) -> Path:
    return path.with_name(f".{word}-{path.name}")


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # also shutil.Error
        raise atomic.unwritable(path, error) from error


def _prepare(place: _Place) -> None:
    """Make the new out beside its place, and clear up what a kill has left there."""
    _delete(place.new)
    if os.path.lexists(place.old):
        if os.path.lexists(place.path):
            _delete(place.old)
        else:
            place.old.replace(place.path)
    if place.made is None:
        return
    place.path.parent.mkdir(parents=True, exist_ok=True)
    if not place.made.is_dir():
        if place.path.is_dir():
            raise IsADirectoryError
        _link(str(place.made), str(place.new))
        return
    atomic.require_folder(place.path)
    with progress.task(f"publishes {place.path.name}", unit="file") as copied:

        def copy(source: str, target: str) -> None:
            _link(source, target)
            copied.add()

        shutil.copytree(place.made, place.new, copy_function=copy)


def _link(source: str, target: str) -> None:
    """Give a file a second name; a copy where the file system knows no such, or two are involved.

    Nobody writes into outs or states in place: both are replaced by renames.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def stages_of(path: Path) -> dict[str, Any]:
    """Read the stages of dvc.yaml or dvc.lock; none where there are none, or others' damage."""
    try:
        return dict(YAML(typ="safe").load(errors.text(path))["stages"])
    except (OSError, YAMLError, KeyError, TypeError, ValueError, RecursionError, UserError):
        return {}


def _entry(root: Path, stage: str) -> dict[str, Any]:
    """Read a stage's entry of dvc.lock; empty where there is none."""
    found = stages_of(root / "dvc.lock").get(stage)
    return found if isinstance(found, dict) else {}
