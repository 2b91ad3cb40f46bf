"""Prepared data: the items of each split and the classes, as `isim prepare` wrote them."""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from isim.errors import UserError
from isim.runtime.paths import resolve_path

# Folder below the project, the layout of its files, and the prefix of paths that lie inside it.
FOLDER = "data/prepared"
FORMAT = 1
INSIDE = "prepared:"


@dataclass(frozen=True)
class Item:
    """One image of a split.

    Attributes:
        id: Name, unique in the data set; outputs are named after it.
        image: Path of the RGB image.
        mask: Path of the ground truth, None where there is none.
        image_label: (K,) float32 multi-hot over the foreground classes; None where it is
            unknown, as in VOC's test set.
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
        """(K',) int64 labels 1..K of the image, ascending; UserError where they are unknown."""
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
                "(train_cam.eval_split may also be none)"
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
        about = json.loads((folder / "dataset.json").read_text())
        if about.get("format") != FORMAT:
            raise UserError(
                f"{folder} has format {about.get('format')}, this version reads {FORMAT}; "
                "run `isim prepare` again"
            )
        data = folder if about["root"] == INSIDE else resolve_path(about["root"], root)
        classes = tuple(about["classes"])
        rows = _rows(folder / "labels.csv")
        labels = {row["id"]: _multi_hot(row["labels"], classes) for row in rows}

        def item(row: dict[str, str]) -> Item:
            image, mask = (
                folder / text.removeprefix(INSIDE) if text.startswith(INSIDE) else data / text
                for text in (row["image"], row["mask"])
            )
            return Item(row["id"], image, mask if row["mask"] else None, labels[row["id"]])

        splits = {
            split: tuple(map(item, _rows(folder / f"{split}.csv"))) for split in about["splits"]
        }
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing; run `isim prepare` first") from error
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is damaged ({error}); run `isim prepare` again") from error
    return Prepared(classes, splits)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _multi_hot(text: str, classes: tuple[str, ...]) -> np.ndarray | None:
    if not text:
        return None
    label = np.zeros(len(classes), np.float32)
    label[[classes.index(name) for name in text.split(";")]] = 1
    label.flags.writeable = False
    return label
