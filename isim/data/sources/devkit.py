"""Folders laid out as VOC's devkits, whole or any part of one (spec 2)."""

from collections import Counter
from pathlib import Path

from isim.data.formats import annotation, tagged
from isim.data.prepared import split_fault
from isim.data.problems import Problem
from isim.data.sources.source import Entry, Source, check_labels
from isim.errors import UserError

# The lists that are read. The masks and classes of `test` are the server's secret: the XML files
# that come with its images serve other tasks and name persons to look at, not what is there.
SPLITS = ("train", "val", "test")


def read_devkit(devkit: Path, classes: tuple[str, ...]) -> Source:
    """Read the lists, annotations and names of masks of a devkit; no image is opened.

    The images of `test` are an archive of their own: those that are not there are left out of the
    split, with a note, and without any there is no such split. Their labels are unknown.

    Raises:
        UserError: The devkit has no list of a known split.
    """
    lists, images = devkit / "ImageSets" / "Segmentation", devkit / "JPEGImages"
    splits: dict[str, tuple[str, ...]] = {}
    entries: dict[str, Entry] = {}
    problems: list[Problem] = []
    notes: list[str] = []
    for split in SPLITS:
        path = lists / f"{split}.txt"
        if not path.exists():
            continue
        lines = tagged.lines_of(path)
        listed = Counter(name for line in lines for name in line.split())
        # Outputs are named after the id.
        odd = [name for name in listed if name.startswith(".") or split_fault(name)]
        problems += [
            Problem("list names no image", f"{path}: '{name}' is no plain image id", str(path))
            for name in odd
        ]
        there = tuple(name for name in listed if name not in odd)
        if split == "test":
            there = tuple(name for name in listed if (images / f"{name}.jpg").exists())
            if lacking := len(listed) - len(there):
                notes.append(
                    f"test: {lacking} of its {len(listed)} images are not in {images}; left out"
                )
            if lacking and not there:
                continue
        splits[split] = there
        for name in there:
            entries.setdefault(name, read_entry(devkit, name, classes, split != "test"))
        problems += [
            Problem("listed twice", f"{path}: {name} is listed more than once", str(path))
            for name, count in listed.items()
            if count > 1
        ]
    if not splits:
        raise UserError(
            f"{lists} holds none of {', '.join(SPLITS)} (.txt) with images; add the lists of ids"
        )
    return Source(classes, entries, splits, tuple(problems), tuple(notes))


def read_entry(devkit: Path, name: str, classes: tuple[str, ...], labelled: bool) -> Entry:
    """Describe the image `name`, whose labels are unknown unless it is `labelled` by its XML."""
    mask = devkit / "SegmentationClass" / f"{name}.png"
    annotation = devkit / "Annotations" / f"{name}.xml"
    labels, problems = _labels(annotation, classes) if labelled else (None, ())
    image = devkit / "JPEGImages" / f"{name}.jpg"
    return Entry(image, mask if mask.exists() else None, labels, problems)


def _labels(
    path: Path, classes: tuple[str, ...]
) -> tuple[tuple[str, ...] | None, tuple[Problem, ...]]:
    """Read the sorted names of objects, and what is wrong."""
    if not path.exists():
        what = f"{path} is missing: an image without a label"
        return None, (Problem("image without a label", what, str(path)),)
    try:
        labels, _ = annotation.names(path)
    except UserError as error:
        return None, (Problem("unreadable annotation", str(error), str(path)),)
    return labels, check_labels(labels, classes, str(path))
