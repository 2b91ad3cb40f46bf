"""A user's own folder: images/, labels.csv, optional masks/ and classes.txt (spec 2)."""

import csv
from pathlib import Path

import numpy as np

from isim.data.sources.source import Entry, Source, check_labels
from isim.errors import UserError
from isim.params import Prepare

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
# Ids 1..254: 0 is the background, 255 means ignore.
MAX_CLASSES = 254


def read(params: Prepare, root: Path, out: Path) -> Source:
    """Read `labels.csv` and the names of images and masks; no image is opened.

    Class ids in masks are 1 + the position in `classes.txt` (one name a line), without that file
    1 + the position among the sorted label names. Ids and seed alone decide which images are `val`.

    Raises:
        UserError: A file or folder is missing or not of the described form.
    """
    if not (root / "images").is_dir():
        raise UserError(f"{root / 'images'} does not exist; put the images there or mend the root")
    rows = _read_labels(root / "labels.csv")
    named = tuple(sorted({label for _, labels in rows for label in labels}))
    classes = _read_classes(root / "classes.txt") or named
    if not 0 < len(classes) <= MAX_CLASSES:
        raise UserError(f"{root} has {len(classes)} classes; 1 to {MAX_CLASSES} are possible")
    problems: list[str] = []
    images = _by_stem(root / "images", SUFFIXES, problems)
    masks = _by_stem(root / "masks", {".png"}, problems)
    by_name = images | {path.name: path for path in images.values()}
    entries: dict[str, Entry] = {}
    for name, labels in rows:
        problems += check_labels(labels, classes, f"labels.csv, {name}")
        path = by_name.get(name)
        if path is None:
            problems.append(f"{root / 'images' / name} is missing")
        elif path.stem in entries:
            problems.append(f"labels.csv, {name}: this image has more than one row")
        else:
            entries[path.stem] = Entry(path, masks.get(path.stem), labels)
    for stem in sorted(images.keys() - entries.keys()):
        problems.append(f"{images[stem]} has no row in labels.csv: an image without a label")
    for stem in sorted(masks.keys() - images.keys()):
        problems.append(f"{masks[stem]} is the mask of no image")
    splits = split_ids(sorted(entries), params.val_fraction, params.seed)
    return Source(classes, entries, splits, tuple(problems))


def split_ids(ids: list[str], val_fraction: float, seed: int) -> dict[str, tuple[str, ...]]:
    """Draw the share `val` out of `ids`; both splits keep their order and, if possible, get one."""
    count = min(max(1, round(val_fraction * len(ids))), max(0, len(ids) - 1))
    drawn = np.random.default_rng(seed).permutation(len(ids))
    parts = {"train": sorted(drawn[count:]), "val": sorted(drawn[:count])}
    return {split: tuple(ids[index] for index in part) for split, part in parts.items()}


def _read_labels(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Read (image, sorted distinct label names) of each row."""
    try:
        # Spreadsheets put a byte-order mark before the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            if not {"image", "labels"} <= set(reader.fieldnames or ()):
                raise UserError(f"{path} must begin with the header image,labels; add it")
            rows = [(row["image"] or "", row["labels"] or "") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        advice = "write one with the columns image,labels in UTF-8"
        raise UserError(f"cannot read {path} ({error}); {advice}") from error
    split = [(image.strip(), {name.strip() for name in names.split(";")}) for image, names in rows]
    return [(image, tuple(sorted(names - {""}))) for image, names in split]


def _read_classes(path: Path) -> tuple[str, ...] | None:
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    wrong = sorted({name for name in names if ";" in name or names.count(name) > 1})
    if wrong or "background" in names:
        raise UserError(
            f"{path} must name each class once, without `;` and without background (class 0); "
            f"mend {', '.join(wrong) or 'background'}"
        )
    return tuple(names)


def _by_stem(folder: Path, suffixes: set[str], problems: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        wanted = path.suffix.lower() in suffixes and not path.name.startswith(".")
        if wanted and found.setdefault(path.stem, path) is not path:
            problems.append(f"{path} and {found[path.stem].name} share one id; rename one")
    return found
