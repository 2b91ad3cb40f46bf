"""Prepared data: the items of each split and the classes, as `isim prepare` wrote them."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isim import errors
from isim.errors import UserError, cut, json_of
from isim.runtime import identity
from isim.runtime.atomic import read_csv, write_json
from isim.runtime.paths import home, resolve_path

# Folder below the project, the layout of its files, and the prefix of paths that lie inside it.
FOLDER = "data/prepared"
FORMAT = 2
INSIDE = "prepared:"
# Bytes of a part of an id, and characters of an id and of a class's name.
_LONGEST_PART, _LONGEST_ID, _LONGEST_CLASS = 200, 1000, 100
# Below `FOLDER`, all that stages depend on which read images of known labels alone: further images
# without labels leave it as it is, and DVC does not run these stages again.
LABELLED = "labelled.json"
# Below `home`: sizes and times of the files that were prepared; it may be deleted at any time.
_RECORD = ".isim/prepared_files.json"
# Likewise, the splits of images; DVC removes those in `FOLDER` before they are made anew.
_SPLITS = ".isim/prepared_splits.json"


@dataclass(frozen=True)
class Item:
    """One image of a split.

    Attributes:
        id: Name, unique in the data set; outputs are named after it.
        image: Path of the RGB image.
        mask: Path of the ground truth, None where there is none.
        image_label: (K,) float32 multi-hot over the foreground classes, zeros where the image
            shows none of them; None where it is unknown, as in VOC's test set.
    """

    id: str
    image: Path
    mask: Path | None
    image_label: np.ndarray | None

    @property
    def known_label(self) -> np.ndarray:
        """`image_label`; UserError where it is unknown."""
        if self.image_label is None:
            raise UserError(f"the classes of image {self.id} are unknown; use a labelled split")
        return self.image_label

    @property
    def class_ids(self) -> np.ndarray:
        """(K',) int64 labels 1..K of the image, ascending, maybe none; UserError if unknown."""
        return np.flatnonzero(self.known_label) + 1


@dataclass(frozen=True)
class Prepared:
    """Output of `isim prepare`: the K foreground classes in order, and the splits."""

    classes: tuple[str, ...]
    splits: dict[str, tuple[Item, ...]]

    def split(self, name: str, labelled: bool = True) -> tuple[Item, ...]:
        """Return the items of a split, in the order of its list.

        Raises:
            UserError: The split is unknown (the message names the known ones), empty or, where
                they must be `labelled`, has images of unknown labels.
        """
        items = self.splits.get(name)
        if items is None:
            raise UserError(
                f"no split '{name}' in the prepared data; use one of {', '.join(self.splits)} "
                "(train_cam.eval_split may also be none; with prepare.val_fraction 0 there is no "
                "val)"
            )
        if not items:
            raise UserError(f"split '{name}' is empty; add images to it and run `isim prepare`")
        unknown = sum(item.image_label is None for item in items)
        if labelled and unknown:
            raise UserError(
                f"the image labels of split '{name}' are unknown ({unknown} of {len(items)} "
                "images), but needed here; name a labelled split. Only train_segmenter.eval_splits "
                "can do without labels"
            )
        return items


def mask_folders(items: Iterable[Item]) -> dict[str, Path]:
    """Folders that the masks of items lie in, by a name for each."""
    folders = sorted({item.mask.parent for item in items if item.mask is not None})
    return {f"masks {number}": folder for number, folder in enumerate(folders, start=1)}


def load(root: Path) -> Prepared:
    """Load the lists that `isim prepare` wrote in the project `root`; no image is opened.

    Raises:
        UserError: The folder is missing, incomplete or of another format.
    """
    folder = root / FOLDER
    with _reading(folder):
        about, data = _about(root)
        classes, names = about["classes"], [*about["splits"]]
        _require_names("class", classes, class_fault)
        _require_names("split", names, split_fault)
        rows = read_csv(folder / "labels.csv")
        _require_names("image", [row["id"] for row in rows], id_fault)
        labels = {row["id"]: _multi_hot(row, tuple(classes)) for row in rows}

        def item(row: dict[str, str]) -> Item:
            image, mask = (_below(folder, data, row[name]) for name in ("image", "mask"))
            return Item(row["id"], image, mask if row["mask"] else None, labels[row["id"]])

        splits: dict[str, tuple[Item, ...]] = {}
        for split in names:
            rows = read_csv(folder / f"{split}.csv")
            _require_names(f"image of {split}", [row["id"] for row in rows], id_fault)
            if len(rows) != (images := about["splits"][split]):
                # A list that lost its end at a line's end reads well.
                raise ValueError(f"{split}.csv lists {len(rows)} images of {images}")
            splits[split] = tuple(map(item, rows))
        return Prepared(tuple(classes), splits)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    with errors.reading(folder, "run `isim prepare` again", "is damaged"):
        try:
            yield
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} is missing; run `isim prepare` first") from error


def _about(root: Path) -> tuple[dict[str, Any], Path]:
    """Read dataset.json: its content, and the folder of the data. UserError for another format."""
    folder = root / FOLDER
    about = json_of(folder / "dataset.json")
    if about.get("format") != FORMAT:
        raise UserError(
            f"{folder} has format {about.get('format')}, this version reads {FORMAT}; "
            "run `isim prepare` again"
        )
    return about, folder if about["root"] == INSIDE else resolve_path(about["root"], root)


def _below(folder: Path, data: Path, text: str) -> Path:
    """Find a file that is named relative to the data, or to `folder`. ValueError if outside."""
    inside = text.startswith(INSIDE)
    name = text.removeprefix(INSIDE)
    if name and (fault := id_fault(name)):
        raise ValueError(f"a file {fault}")
    return (folder if inside else data) / name


def _require_names(what: str, names: Sequence[str], fault_of: Callable[[str], str | None]) -> None:
    """Check names of the prepared data. Raises ValueError for one that cannot be, or is twice."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"no list of names ({what})")
    if fault := next(filter(None, map(fault_of, names)), None):
        raise ValueError(f"{what} {fault}")
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"{what} {twice} is there twice")


def id_fault(name: str) -> str | None:
    """Say why a name cannot be an id, that is a path of files below folders of outs; None: it can.

    Ids come from whoever made the data, or pushed a folder of prepared ones.
    """
    shown = repr(cut(name, 60))
    parts = name.split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        return f"{shown}, which is no relative path of a file"
    try:
        longest = max(len(part.encode()) for part in parts)
    except UnicodeEncodeError:
        return f"{shown}, which is not UTF-8"
    # A suffix such as .npz is added, and a file is written under a temporary name beside.
    if longest > _LONGEST_PART or len(name) > _LONGEST_ID:
        return f"{shown}, which is too long for the name of a file"
    return None


def split_fault(name: str) -> str | None:
    """Say why a name cannot be that of a split, which names a file and a folder; None: it can."""
    if "/" in name:
        return f"{cut(name, 60)!r}, which is the path of a file"
    return id_fault(name)


def class_fault(name: object) -> str | None:
    """Say why a value cannot be the name of a class; None: it can."""
    if not isinstance(name, str) or not name or name != name.strip():
        return f"{cut(repr(name), 60)}, which is no name, or has blanks around it"
    if not name.isprintable():
        return f"{cut(name, 60)!r}, which has control characters"
    if len(name) > _LONGEST_CLASS or ";" in name:
        return f"{cut(name, 60)!r}, which is too long, or has a `;`"
    return None


def remember(base: Path, files: Mapping[Path, str]) -> None:
    """Keep how files were found whose md5 is known, so that only changed ones are read again.

    `base` is `runtime.paths.home`. Raises UserError when the record cannot be written.
    """
    record = {
        str(path): [(status := path.stat()).st_size, status.st_mtime_ns, md5]
        for path, md5 in files.items()
    }
    write_json(base / _RECORD, record)


def remember_splits(base: Path, splits: Mapping[str, Sequence[str]]) -> None:
    """Keep the ids of each split, for `moved`; `base` is `runtime.paths.home`.

    Raises UserError when the record cannot be written.
    """
    write_json(base / _SPLITS, {name: list(ids) for name, ids in splits.items()})


def moved(base: Path, splits: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str]]:
    """List the ids that went from val to train, and from train to val, since they were kept."""
    before = _record(base / _SPLITS)

    def went(old: str, new: str) -> list[str]:
        ids = set(before.get(old, ()))
        # Splits of a devkit may share images.
        ids -= set(before.get(new, ()))
        return [id_ for id_ in splits.get(new, ()) if id_ in ids and id_ not in splits.get(old, ())]

    return went("val", "train"), went("train", "val")


def require_unchanged(root: Path) -> None:
    """Check that the images and masks outside the project's data are those that were prepared.

    Size and time of change are looked at first; files are read only where they differ from what
    is remembered.

    Raises:
        UserError: One has another content or is missing; or as `load`.
    """
    folder, base = root / FOLDER, home(root)
    manifest = _manifest(root)
    known = {path: file for path, file in manifest.items() if not path.is_relative_to(folder)}
    record = _record(base / _RECORD)
    wrong: list[str] = []
    seen: dict[Path, str] = {}
    for path, (size, md5) in known.items():
        try:
            status = path.stat()
            now = [status.st_size, status.st_mtime_ns, md5]
            if status.st_size != size or (
                record.get(str(path)) != now and identity.md5(path) != md5
            ):
                wrong.append(f"{path} has changed")
            elif record.get(str(path)) != now:
                seen[path] = md5
        except OSError:
            wrong.append(f"{path} is missing")
    if wrong:
        more = f", and {len(wrong) - 1} more files" if len(wrong) > 1 else ""
        raise UserError(f"{wrong[0]} since `isim prepare`{more}; run `isim prepare` again")
    if seen:
        remember(base, {path: md5 for path, (_, md5) in known.items()})


def digests(root: Path) -> dict[Path, str]:
    """md5 of each image and mask, by its path, as it was prepared; UserError as `load`."""
    return {path: md5 for path, (_, md5) in _manifest(root).items()}


def _manifest(root: Path) -> dict[Path, tuple[int, str]]:
    """Read size and md5 of each prepared file."""
    folder = root / FOLDER
    with _reading(folder):
        _, data = _about(root)
        return {
            _below(folder, data, row["path"]): (int(row["bytes"]), row["md5"])
            for row in read_csv(folder / "manifest.csv")
        }


def _record(path: Path) -> dict[str, Any]:
    try:
        found = json_of(path, errors.TABLE)
    except (OSError, ValueError, RecursionError, UserError):
        return {}
    return found if isinstance(found, dict) else {}


def _multi_hot(row: dict[str, str], classes: tuple[str, ...]) -> np.ndarray | None:
    if row["known"] not in ("0", "1"):
        raise ValueError(f"image {row['id']} is known: {row['known']}")
    if row["known"] == "0":
        return None
    label = np.zeros(len(classes), np.float32)
    label[[classes.index(name) for name in row["labels"].split(";") if name]] = 1
    label.flags.writeable = False
    return label
