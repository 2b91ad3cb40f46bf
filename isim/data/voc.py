"""VOC 2012 devkits, whole or any part of one (spec 2)."""

import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from isim.data.download import Archive, obtain
from isim.data.source import Entry, Source, check_labels
from isim.errors import UserError

CLASSES: tuple[str, ...] = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
ARCHIVE = Archive(
    # The long-term address; host.robots.ox.ac.uk, which papers name, redirects there.
    url="https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    md5="6cd6e144f989b92b3379bac3b3de84fd",
    folder="VOCdevkit/VOC2012",
)
# The lists that are read. The masks and classes of `test` are the server's secret: the XML files
# that come with its images serve other tasks and name persons to look at, not what is there.
SPLITS = ("train", "val", "test")


def find_devkit(root: Path, download: bool) -> Path:
    """Locate the folder VOC2012: below `root`, `root` itself, or out of the official archive.

    Raises:
        UserError: There is none and none can be fetched; see `download.obtain`.
    """
    for folder in (root / "VOCdevkit" / "VOC2012", root / "VOC2012", root):
        if (folder / "JPEGImages").is_dir():
            return folder
    return obtain(ARCHIVE, root, download)


def read_devkit(devkit: Path, classes: tuple[str, ...]) -> Source:
    """Read the lists, annotations and names of masks of a devkit; no image is opened.

    The images of `test` are an archive of their own: those that are not there are left out of the
    split, with a note, and without any there is no such split. Their labels are unknown.

    Args:
        devkit: Folder that holds JPEGImages, Annotations and ImageSets/Segmentation.
        classes: K foreground names in order.

    Raises:
        UserError: The devkit has no list of a known split.
    """
    lists = devkit / "ImageSets" / "Segmentation"
    splits: dict[str, tuple[str, ...]] = {}
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    notes: list[str] = []
    for split in SPLITS:
        path = lists / f"{split}.txt"
        if not path.exists():
            continue
        ids = path.read_text(encoding="utf-8", errors="replace").split()
        listed = tuple(dict.fromkeys(ids))
        there = listed
        if split == "test":
            images = devkit / "JPEGImages"
            there = tuple(name for name in listed if (images / f"{name}.jpg").exists())
            if lacking := len(listed) - len(there):
                notes.append(
                    f"test: {lacking} of its {len(listed)} images are not in {images}; left out"
                )
            if lacking and not there:
                continue
        splits[split] = there
        for name in splits[split]:
            # Outputs are named after the id.
            if Path(name).name != name or name.startswith("."):
                problems.append(f"{path}: '{name}' is no plain image id")
            else:
                entries.setdefault(name, read_entry(devkit, name, classes, split != "test"))
        repeated = [name for name, count in Counter(ids).items() if count > 1]
        problems += [f"{path}: {name} is listed more than once" for name in repeated]
    if not splits:
        raise UserError(
            f"{lists} holds none of {', '.join(SPLITS)} (.txt) with images; add the lists of ids"
        )
    return Source(classes, entries, splits, tuple(problems), tuple(notes))


def read_entry(devkit: Path, name: str, classes: tuple[str, ...], labelled: bool) -> Entry:
    """Describe the image `name`: its labels are the object names of its XML, difficult included.

    Args:
        devkit: As in `read_devkit`.
        name: Image id.
        classes: Known names; others are problems of the entry.
        labelled: Whether it has an annotation; without one its labels are unknown.
    """
    mask = devkit / "SegmentationClass" / f"{name}.png"
    annotation = devkit / "Annotations" / f"{name}.xml"
    labels: tuple[str, ...] | None = None
    problems: tuple[str, ...] = ()
    if labelled and not annotation.exists():
        problems = (f"{annotation} is missing: an image without a label",)
    elif labelled:
        try:
            labels = read_annotation(annotation)
        except UserError as error:
            problems = (str(error),)
        else:
            problems = check_labels(labels, classes, str(annotation))
    image = devkit / "JPEGImages" / f"{name}.jpg"
    return Entry(image, mask if mask.exists() else None, labels, problems)


def read_annotation(path: Path) -> tuple[str, ...]:
    """Distinct names of the objects (not of their parts) in a VOC annotation, sorted.

    Raises:
        UserError: The file is unreadable, not XML, or declares entities.
    """
    try:
        text = path.read_bytes()
        # VOC needs no DTD; entities are how XML files exhaust memory.
        if b"<!DOCTYPE" in text:
            raise UserError(f"{path} declares a DOCTYPE; remove it")
        tree = ElementTree.fromstring(text)
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"{path} is not a readable annotation ({error}); replace it") from error
    return tuple(sorted({(node.findtext("name") or "").strip() for node in tree.iter("object")}))
