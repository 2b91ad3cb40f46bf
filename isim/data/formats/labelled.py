"""Images with label maps that are to be written in another format."""

import logging
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from isim import errors
from isim.data import files, label_sets, prepared
from isim.data.formats import listing
from isim.errors import UserError
from isim.metrics import IGNORE
from isim.params import label_set_path
from isim.runtime import atomic, progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labelled:
    """An image with its label map.

    `id` is a relative path without suffix, `split` may be empty; `shown` is the range of an image
    of more than 8 bits; `count` is the number of labels, 0..L-1, that have a name.
    """

    id: str
    image: Path
    path: Path
    split: str
    shown: Sequence[float] | None = None
    count: int = IGNORE

    @cached_property
    def unusual(self) -> str:
        """`files.unusual` of the image, which is opened once for it."""
        return files.unusual(self.image)

    def read(self) -> NDArray[np.uint8]:
        """Read the (H, W, 3) uint8 RGB image; errors as `files.read_image`."""
        return files.read_photograph(self.image, self.shown)

    def label(self) -> NDArray[np.uint8]:
        """Read the (H, W) uint8 label map, 255 = ignore; of the image's size, labels 0..L-1.

        Raises UserError for another one.
        """
        label = files.read_label_map(self.path)
        size = files.image_size(self.image)
        if label.shape != size:
            raise UserError(
                f"{self.path} is {label.shape[1]}x{label.shape[0]} pixels, {self.image} "
                f"{size[1]}x{size[0]}; make the label maps again, or name the images they are of"
            )
        if (other := label[(label >= self.count) & (label != IGNORE)]).size:
            raise UserError(
                f"{self.path} holds label {other.max()}, classes.json names 0..{self.count - 1}; "
                "make the label maps again, or name all classes there"
            )
        return label


@dataclass(frozen=True)
class LabelledSet:
    """Images with label maps, and the names of labels 0..L-1, the background's first."""

    names: tuple[str, ...]
    entries: tuple[Labelled, ...]

    def told(self, what: str, entries: Sequence[Labelled] | None = None) -> Iterator[Labelled]:
        """Yield the entries, or some of them, telling how far it is."""
        yield from progress.track(self.entries if entries is None else entries, what)

    def splits(self) -> dict[str, list[Labelled]]:
        """Group the entries by split; all are `train` where there are none."""
        found: dict[str, list[Labelled]] = {}
        for entry in self.entries:
            found.setdefault(entry.split or "train", []).append(entry)
        return found

    def flat_ids(self) -> dict[str, str]:
        """Name each entry for a format without subfolders: `/` becomes `__`, by its id.

        Raises UserError where two become one.
        """
        flat = {entry.id: entry.id.replace("/", "__") for entry in self.entries}
        if len(set(flat.values())) < len(flat):
            twice = next(name for name in flat.values() if [*flat.values()].count(name) > 1)
            raise UserError(f"two images would both be named {twice}; rename one of them")
        return flat


def put_image(entry: Labelled, folder: Path, name: str, *, copy: bool) -> Path:
    """Put an image at `<folder>/<name><suffix>`, a link to it, or a copy; returns the path.

    One that many readers do not read as its label map lies (`files.unusual`: turned by EXIF, more
    than 8 bits, HEIC, GIF, ...) is written anew: upright, 8-bit, as JPEG where its own format loses
    detail, too, else as PNG. Raises UserError for an unreadable image, or a failed write.
    """
    atomic.make_directory((folder / name).parent)
    if entry.unusual:
        suffix = ".jpg" if files.is_lossy(entry.image) else ".png"
        path = folder / f"{name}{suffix}"
        with atomic.atomic_path(path) as temporary:
            form = "JPEG" if suffix == ".jpg" else "PNG"
            Image.fromarray(entry.read()).save(temporary, format=form, quality=95)
        return path
    path = folder / f"{name}{entry.image.suffix}"
    if copy:
        shutil.copyfile(entry.image, path)
    else:
        path.symlink_to(entry.image.resolve())
    return path


def written_anew(data: LabelledSet) -> str:
    """Tell how many images `put_image` writes anew, and why, in words; empty for none."""
    reasons = Counter(filter(None, (entry.unusual for entry in data.entries)))
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    count = sum(reasons.values())
    plural = "s are" if count > 1 else " is"
    return f"{count} image{plural} written anew, upright and 8-bit ({why})" if count else ""


def collect(
    source: str, images: Path | None, root: Path, shown: Sequence[float] | None = None
) -> LabelledSet:
    """Find label maps and their images.

    Args:
        source: A folder of label maps `<id>.png`, such as data/masks or what `isim predict` wrote,
            or the name of a label set.
        images: Folder of the images; None: those of the project.
        root: Project folder.
        shown: Range of images of more than 8 bits below `images`; None: they are refused.

    Raises:
        UserError: No such folder or label set, no label map, a label map without an image, no
            names of classes.
    """
    folder = root / source
    splits = _splits(root) if images is None else {"": _below(images, folder)}
    if label_set_path(source) is not None and not folder.is_dir():
        data = prepared.load(root)
        stored = label_sets.available(source, data.splits, root)
        if source == "seeds":
            raise UserError("label set seeds holds CAMs, not label maps; choose another one")
        names = ("background", *data.classes)
    elif folder.is_dir():
        stored = dict(listing.images(folder, read={".png"}).images)
        names = _names(folder, root)
    else:
        raise UserError(
            f"{source} is neither a folder nor a label set; give data/masks, a folder of label "
            "maps or a name such as last_round"
        )
    if not stored:
        raise UserError(f"{folder} holds no label maps (*.png); run `isim masks` first")
    found = {
        id_: Labelled(id_, path, stored[id_], split, shown, len(names))
        for split, paths in splits.items()
        for id_, path in paths.items()
        if id_ in stored
    }
    without = sorted(stored.keys() - found.keys())
    if without:
        raise UserError(
            f"{len(without)} of {len(stored)} label maps have no image, such as {without[0]}.png; "
            "name the folder of the images by --images"
        )
    return LabelledSet(names, tuple(found[id_] for id_ in sorted(found)))


def images_below(folder: Path, aside: Collection[Path] = ()) -> Mapping[str, Path]:
    """List the images of a folder by id; warns of files in formats that are not read.

    Subfolders `aside` are passed over. Raises UserError for two files of one id, and a name that is
    not UTF-8.
    """
    found = listing.images(folder, aside)
    for problem in found.problems:
        raise UserError(problem.what)
    for problem in listing.passed_over(found):
        logger.warning(problem.what)
    return found.images


def _below(folder: Path, label_maps: Path) -> Mapping[str, Path]:
    if not folder.is_dir():
        raise UserError(f"--images: {folder} is no folder; name that of the images")
    return images_below(folder, [label_maps])


def _splits(root: Path) -> Mapping[str, Mapping[str, Path]]:
    """Images of the project by split and id; one that is in several splits is in the first."""
    found: dict[str, Mapping[str, Path]] = {}
    seen: set[str] = set()
    for split, items in prepared.load(root).splits.items():
        found[split] = {item.id: item.image for item in items if item.id not in seen}
        seen |= found[split].keys()
    return found


def _names(folder: Path, root: Path) -> tuple[str, ...]:
    path = folder / "classes.json"
    if not path.exists():
        return ("background", *prepared.load(root).classes)
    with errors.reading(path, "make the label maps again", "is no list of classes"):
        names = tuple(entry["name"] for entry in errors.json_of(path))
        if fault := next(filter(None, map(prepared.class_fault, names)), None):
            raise ValueError(f"a class is called {fault}")
        return names
