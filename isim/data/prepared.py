"""Prepared data: the items of each split and the classes, as `isim prepare` wrote them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isim.errors import UserError
from isim.runtime import identity
from isim.runtime.atomic import read_csv, write_json
from isim.runtime.paths import home, resolve_path

# Folder below the project, the layout of its files, and the prefix of paths that lie inside it.
FOLDER = "data/prepared"
FORMAT = 2
INSIDE = "prepared:"
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
    try:
        about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        if about.get("format") != FORMAT:
            raise UserError(
                f"{folder} has format {about.get('format')}, this version reads {FORMAT}; "
                "run `isim prepare` again"
            )
        data = folder if about["root"] == INSIDE else resolve_path(about["root"], root)
        classes = tuple(about["classes"])
        rows = read_csv(folder / "labels.csv")
        labels = {row["id"]: _multi_hot(row, classes) for row in rows}

        def item(row: dict[str, str]) -> Item:
            image, mask = (
                folder / text.removeprefix(INSIDE) if text.startswith(INSIDE) else data / text
                for text in (row["image"], row["mask"])
            )
            return Item(row["id"], image, mask if row["mask"] else None, labels[row["id"]])

        splits = {
            split: tuple(map(item, read_csv(folder / f"{split}.csv"))) for split in about["splits"]
        }
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing; run `isim prepare` first") from error
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is damaged ({error}); run `isim prepare` again") from error
    return Prepared(classes, splits)


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
    try:
        about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        data = folder if about["root"] == INSIDE else resolve_path(about["root"], root)
        return {
            folder / row["path"].removeprefix(INSIDE)
            if row["path"].startswith(INSIDE)
            else data / row["path"]: (int(row["bytes"]), row["md5"])
            for row in read_csv(folder / "manifest.csv")
        }
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is damaged ({error}); run `isim prepare` again") from error


def _record(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _multi_hot(row: dict[str, str], classes: tuple[str, ...]) -> np.ndarray | None:
    if row["known"] == "0":
        return None
    label = np.zeros(len(classes), np.float32)
    label[[classes.index(name) for name in row["labels"].split(";") if name]] = 1
    label.flags.writeable = False
    return label
