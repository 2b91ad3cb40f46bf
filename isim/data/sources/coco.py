"""COCO 2014 by the protocol of weakly supervised segmentation (80 classes)."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from isim.data.files import write_label_map
from isim.data.formats import instances
from isim.data.formats.instances import Instances, class_ids
from isim.data.problems import Problem
from isim.data.sources.source import MAX_CLASSES, Entry, Source
from isim.errors import UserError
from isim.params import Prepare
from isim.runtime.helpers import in_threads

SPLITS = {"train": "train2014", "val": "val2014"}
# `train` and the images of its list that show no object.
WITH_NEGATIVES = "train_all"


def read(params: Prepare, root: Path, out: Path) -> Source:
    """Read `annotations/instances_{train,val}2014.json`; draw the masks in `out`/masks.

    Splits `train` and `val` are the images with an annotated object, 82,081 and 40,137 of the
    official lists, on which results are published. Those of train without any, which are negatives,
    are in `train_all`, too; those of val are left out. Classes are the 80 categories in the file's
    order. Crowds are tags, too; in the masks they are 255 where no object is, as their outlines are
    rough, and smaller objects lie on larger ones.

    Raises:
        UserError: A file is missing or of another form.
    """
    splits: dict[str, tuple[str, ...]] = {}
    entries: dict[str, Entry] = {}
    problems: list[Problem] = []
    notes: list[str] = []
    classes: tuple[str, ...] = ()
    for split, name in SPLITS.items():
        given = instances.read(_there(root, f"annotations/instances_{name}.json"))
        if classes and given.classes != classes:
            raise UserError(
                f"{given.path} has other categories than that of train; use one release"
            )
        classes = given.classes
        found, faults = _entries(given, _folder(root, name), out / "masks")
        problems += faults
        entries |= found
        splits[split] = tuple(id_ for id_, entry in found.items() if entry.labels)
        negatives = len(found) - len(splits[split])
        if split == "train" and negatives:
            splits[WITH_NEGATIVES] = tuple(found)
            notes.append(f"{WITH_NEGATIVES}: train and {negatives} images without an object")
        elif negatives:
            entries = {id_: e for id_, e in entries.items() if e.labels or id_ not in found}
            notes.append(f"{split}: {negatives} images without an object; left out")
    if not 0 < len(classes) <= MAX_CLASSES:
        raise UserError(f"{root} has {len(classes)} categories; 1 to {MAX_CLASSES} are possible")
    return Source(classes, entries, splits, tuple(problems), tuple(notes))


def _there(root: Path, name: str) -> Path:
    path = root / name
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; put COCO 2014 there (train2014/, val2014/ and annotations/, "
            "from cocodataset.org), or point prepare.root to it"
        )
    return path


def _folder(root: Path, name: str) -> Path:
    places = (root / name, root / "images" / name)
    return next((place for place in places if place.is_dir()), places[0])


def _entries(given: Instances, images: Path, masks: Path) -> tuple[dict[str, Entry], list[Problem]]:
    """Describe the images of a list, in the order of their names, and draw their masks."""
    numbers = sorted(given.images, key=lambda number: given.images[number][0])
    draw = partial(_drawn, given, class_ids(given.classes), masks)
    tags = {row.image: row.labels for row in given.tags().rows}
    entries: dict[str, Entry] = {}
    problems: list[Problem] = []
    drawn = in_threads(draw, numbers, f"masks of {images.name}")
    for number, mask in zip(numbers, drawn, strict=True):
        name = given.images[number][0]
        if isinstance(mask, Problem):
            problems.append(mask)
        elif _id(name) in entries:
            what = f"{given.path}: two images are called {name}"
            problems.append(Problem("two files of one id", what, name))
        else:
            entries[_id(name)] = Entry(images / PurePosixPath(name).name, mask, tags[name])
    return entries, problems


def _drawn(given: Instances, ids: Mapping[str, int], folder: Path, number: int) -> Path | Problem:
    path = folder / f"{_id(given.images[number][0])}.png"
    try:
        write_label_map(path, given.mask(number, ids))
    except UserError as error:
        return Problem("unusable outline", str(error), str(given.path))
    return path


def _id(name: str) -> str:
    return PurePosixPath(name).stem
