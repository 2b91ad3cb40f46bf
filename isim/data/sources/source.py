"""The form that every data source is read into, and its check against the files (spec 2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from isim.data import files, problems
from isim.data.formats import masks
from isim.data.formats.tagged import BACKGROUND_NAME
from isim.data.prepared import class_fault, id_fault
from isim.data.problems import Problem
from isim.errors import UserError
from isim.metrics import IGNORE
from isim.runtime.atomic import atomic_path
from isim.runtime.helpers import in_threads
from isim.runtime.identity import md5

# Ids 1..254: 0 is the background, 255 means ignore.
MAX_CLASSES = 254


@dataclass(frozen=True)
class Entry:
    """One image: its files, its label names, and the faults of the latter.

    Labels are none where the image shows none of the classes, and None where they are unknown.
    """

    image: Path
    mask: Path | None
    labels: tuple[str, ...] | None
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Source:
    """A data set as its reader found it.

    Attributes:
        classes: K foreground names in order: class id = 1 + index.
        entries: Every image by id.
        splits: Ids of each split, in the order of its list.
        problems: Faults of the lists; those of an image's labels are in its entry.
        notes: Lines on the lists that the user should know and need not mend.
        figures: Further figures of the report, by name.
        scheme: What values in masks mean; None: they are 8-bit PNGs of class ids.
        labels: The label file that was read, where it is one.
    """

    classes: tuple[str, ...]
    entries: dict[str, Entry]
    splits: dict[str, tuple[str, ...]]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)
    scheme: masks.Scheme | None = None
    labels: Path | None = None


@dataclass(frozen=True)
class Treatment:
    """Treatment of images and masks that are out of the ordinary.

    Attributes:
        out: Folder of converted ones; None: they are problems.
        skip: Files that cannot be read are left out, with a warning.
        shown: Range of 16-bit images that becomes 0..255; None: they are problems.
    """

    out: Path | None = None
    skip: bool = False
    shown: tuple[float, float] | None = None


@dataclass
class Checked:
    """Findings in one entry, and the files that its image and mask are to be read from.

    `files` are (path, bytes, md5) of the files as they were found. `size` is (H, W) in pixels,
    `pixels` (K+1,) int64, of each class in the mask; None without one. `bare` are labelled classes
    that the mask does not show, `more` shown ones that are not labelled. `ignored` tells that a
    mask of the person's own holds 255, `black_and_white` that it holds no class beside.
    """

    image: Path
    mask: Path | None
    problems: list[Problem]
    files: list[tuple[Path, int, str]] = field(default_factory=list)
    size: tuple[int, int] | None = None
    pixels: np.ndarray | None = None
    bare: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    ignored: bool = False
    black_and_white: bool = False


@dataclass(frozen=True)
class Examined:
    """A source without the entries that were left out, findings by id, and all problems."""

    source: Source
    results: dict[str, Checked]
    problems: tuple[Problem, ...]


def label_problems(
    labels: Sequence[str], classes: tuple[str, ...], where: str
) -> tuple[Problem, ...]:
    """Find the label names of one image that are no class; `where` names what they stand in."""
    # `background` is told by who reads the labels.
    unknown = sorted(name for name in {*labels} - {*classes} if name.lower() != BACKGROUND_NAME)
    folded = {name.casefold(): name for name in classes}
    found = []
    for name in unknown:
        near = folded.get(name.casefold())
        hint = f"; did you mean '{near}'?" if near else ""
        found.append(Problem("unknown class", f"{where}: unknown class '{name}'{hint}", where))
    return tuple(found)


def check_labels(
    labels: Sequence[str], classes: tuple[str, ...], where: str
) -> tuple[Problem, ...]:
    """Find problems as `label_problems`, in a source in which every image has a class."""
    if not labels:
        what = f"{where} names no class: an image without a label"
        return (Problem("image without a label", what, where),)
    return label_problems(labels, classes, where)


def verify(source: Source) -> dict[str, Checked]:
    """Examine a source of which nothing needs to be converted; return the findings by id.

    Raises:
        UserError: The data is inconsistent, as `problems.refuse` tells.
    """
    examined = examine(source, Treatment())
    problems.refuse(examined.problems)
    return examined.results


def examine(source: Source, treatment: Treatment) -> Examined:
    """Read every image and mask once, in the order of the entries.

    Masks that are no 8-bit PNGs of class ids are written as such to `masks` of the folder `out`,
    16-bit images as 8-bit PNGs to `images`. Raises UserError when they cannot be written.
    """
    found = list(source.problems)
    found += [
        Problem("empty split", f"split '{name}' is empty", name)
        for name, ids in source.splits.items()
        if not ids
    ]
    found += [
        Problem("unusable class", f"a class is called {fault}; rename it")
        for fault in map(class_fault, source.classes)
        if fault
    ]
    for id_ in source.entries:
        if fault := id_fault(id_):
            where = str(source.entries[id_].image)
            found.append(Problem("unusable name", f"an image is called {fault}; rename it", where))
    if any(problem.kind == "unusable name" and problem.error for problem in found):
        # Files of outs cannot have these names.
        return Examined(source, {}, tuple(found))
    check = partial(_check, source, treatment)
    results = dict(
        zip(source.entries, in_threads(check, source.entries.items(), "check"), strict=True)
    )
    found += [problem for result in results.values() for problem in result.problems]
    found += _black_and_white(source, results)
    if treatment.skip:
        left_out = {id_ for id_, result in results.items() if result.size is None}
        source = _without(source, left_out)
        results = {id_: result for id_, result in results.items() if id_ not in left_out}
    return Examined(source, results, tuple(found))


def _without(source: Source, ids: set[str]) -> Source:
    entries = {id_: entry for id_, entry in source.entries.items() if id_ not in ids}
    splits = {
        name: tuple(id_ for id_ in split if id_ not in ids) for name, split in source.splits.items()
    }
    return replace(source, entries=entries, splits=splits)


def _black_and_white(source: Source, results: Mapping[str, Checked]) -> list[Problem]:
    """Tell of masks of 0 and 255 alone, which may be objects, or what nothing is known of.

    They are refused where most masks that hold 255 hold no class: few objects are ignored whole.
    """
    given = source.scheme
    found = [id_ for id_, result in results.items() if result.black_and_white]
    if given is None or given.values or not found:
        return []
    most = 2 * len(found) > sum(result.ignored for result in results.values())
    names = f"one of {', '.join(source.classes)}" if len(source.classes) > 1 else source.classes[0]
    what = (
        f"masks have the values 0 and 255 alone ({len(found)}, such as "
        f"{source.entries[found[0]].mask}); if 255 is {names[:80]}, set prepare.mask_values: "
        f"{{255: {source.classes[0]}}}; 255 means ignored otherwise"
    )
    return [Problem("masks of 0 and 255", what, str(source.entries[found[0]].mask), error=most)]


def _check(source: Source, treatment: Treatment, task: tuple[str, Entry]) -> Checked:
    id_, entry = task
    result = Checked(entry.image, entry.mask, list(entry.problems))
    _check_image(result, id_, treatment)
    mask = _mask_of(result, source, treatment)
    if mask is None:
        return result
    if result.size is not None and mask.shape != result.size:
        height, width = result.size
        what = (
            f"mask {entry.mask} is {mask.shape[1]}x{mask.shape[0]} pixels, its image "
            f"{entry.image.name} {width}x{height}"
        )
        if _made(entry.mask, treatment):
            what = (
                f"the outlines of {entry.image.name} are of {mask.shape[1]}x{mask.shape[0]}, the "
                f"image of {width}x{height} pixels; mend its width and height in the label file"
            )
        if mask.shape == (width, height) and files.orientation(entry.image) > 1:
            what += "; the image is turned by its EXIF orientation, turn the mask, too"
        result.problems.append(Problem("mask of another size", what, str(entry.mask)))
    if source.scheme is not None and not source.scheme.complete:
        return result
    counts = np.bincount(mask.ravel(), minlength=256)
    limit = len(source.classes)
    wrong = [str(value) for value in np.flatnonzero(counts[:IGNORE]) if value > limit]
    if wrong:
        what = f"mask {entry.mask} has values outside 0..{limit} and {IGNORE}: {', '.join(wrong)}"
        result.problems.append(Problem("mask of other values", what[:280], str(entry.mask)))
        return result
    result.pixels = counts[: limit + 1]
    result.ignored = bool(counts[IGNORE]) and not _made(entry.mask, treatment)
    result.black_and_white = result.ignored and not result.pixels[1:].any()
    if entry.labels is not None:
        shown = [source.classes[index - 1] for index in np.flatnonzero(result.pixels) if index]
        result.bare = tuple(name for name in entry.labels if name not in shown)
        result.more = tuple(name for name in shown if name not in entry.labels)
    if treatment.out is not None and result.mask is None:
        result.mask = treatment.out / "masks" / f"{id_}.png"
        files.write_label_map(result.mask, mask)
    return result


def _check_image(result: Checked, id_: str, treatment: Treatment) -> None:
    """Read the image: its size, and a place for a converted one."""
    path = result.image
    try:
        if not path.exists():
            raise UserError(f"{path} is missing")
        if treatment.shown is not None and treatment.out is not None and files.is_deep(path):
            pixels = files.read_deep_image(path, treatment.shown)
            result.image = treatment.out / "images" / f"{id_}.png"
            with atomic_path(result.image) as temporary:
                Image.fromarray(pixels).save(temporary, format="PNG")
        else:
            pixels = files.read_image(path)
        result.size = (pixels.shape[0], pixels.shape[1])
        result.files.append((path, path.stat().st_size, md5(path)))
    except UserError as error:
        told = f"{error}; left out" if treatment.skip else str(error)
        problem = Problem("unreadable image", told, str(path), error=not treatment.skip)
        result.problems.append(problem)


def _mask_of(result: Checked, source: Source, treatment: Treatment) -> np.ndarray | None:
    """Read the mask (H, W); its place becomes None where it must be converted."""
    path = result.mask
    if path is None:
        return None
    try:
        if not path.exists():
            raise UserError(f"{path} is missing")
        # A reader's own have class ids, whatever those of the person have.
        if source.scheme is None or _made(path, treatment):
            mask, simple = files.read_label_map(path), True
        else:
            mask, simple = masks.read(path, source.scheme)
        result.files.append((path, path.stat().st_size, md5(path)))
    except UserError as error:
        result.mask = None
        told = f"{error}; left out" if treatment.skip else str(error)
        problem = Problem("unreadable mask", told, str(path), error=not treatment.skip)
        result.problems.append(problem)
        return None
    if not simple and treatment.out is not None:
        result.mask = None
    return mask


def _made(path: Path | None, treatment: Treatment) -> bool:
    """Tell whether a mask was made by the reader, which puts it below the folder `out`."""
    return path is not None and treatment.out is not None and path.is_relative_to(treatment.out)
