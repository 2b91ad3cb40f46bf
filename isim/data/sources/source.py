"""The form that every data source is read into, and its check against the files (spec 2)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from isim.data.files import read_image, read_label_map
from isim.errors import UserError
from isim.metrics import IGNORE
from isim.runtime.helpers import in_threads
from isim.runtime.identity import md5

MAX_PROBLEMS_SHOWN = 50


@dataclass(frozen=True)
class Entry:
    """One image: its files, its label names (None: unknown), and the faults of the latter."""

    image: Path
    mask: Path | None
    labels: tuple[str, ...] | None
    problems: tuple[str, ...] = ()


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
    """

    classes: tuple[str, ...]
    entries: dict[str, Entry]
    splits: dict[str, tuple[str, ...]]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class Checked:
    """Findings in one entry: the faults that make it unusable, (path, bytes, md5) of its files.

    `pixels` are (K+1,) int64, of each class in the mask; None without a mask. The last two count
    labelled classes that the mask does not show, and shown ones that are not labelled.
    """

    problems: list[str]
    files: list[tuple[Path, int, str]] = field(default_factory=list)
    pixels: np.ndarray | None = None
    labels_without_pixels: int = 0
    pixels_without_label: int = 0


def check_labels(labels: Sequence[str], classes: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Find the problems of one image's label names; `where` names the file they stand in."""
    if not labels:
        return (f"{where} names no class: an image without a label",)
    unknown = sorted(set(labels) - set(classes))
    return tuple(f"{where}: unknown class '{name}'" for name in unknown)


def verify(source: Source) -> dict[str, Checked]:
    """Read every image and mask once; return the findings by id, in the order of the entries.

    Raises:
        UserError: The data is inconsistent. The first line counts the problems, one line each
            (at most 50) follows.
    """
    problems = list(source.problems)
    problems += [f"split '{name}' is empty" for name, ids in source.splits.items() if not ids]
    check, entries = partial(_check, source.classes), list(source.entries.values())
    results = dict(zip(source.entries, in_threads(check, entries, "check"), strict=True))
    problems += [problem for result in results.values() for problem in result.problems]
    if problems:
        count, shown = len(problems), problems[:MAX_PROBLEMS_SHOWN]
        plural = "s" if count > 1 else ""
        head = f"the data has {count} problem{plural}; mend it and run `isim prepare` again"
        more = [f"and {count - len(shown)} more"] if count > len(shown) else []
        raise UserError("\n  ".join([head, *shown, *more]))
    return results


def _check(classes: tuple[str, ...], entry: Entry) -> Checked:
    result = Checked(list(entry.problems))
    arrays: dict[Path | None, np.ndarray] = {}
    for path, read in ((entry.image, read_image), (entry.mask, read_label_map)):
        if path is None:
            continue
        try:
            if not path.exists():
                raise UserError(f"{path} is missing")
            arrays[path] = read(path)
            result.files.append((path, path.stat().st_size, md5(path)))
        except UserError as error:
            result.problems.append(str(error))
    image, mask = arrays.get(entry.image), arrays.get(entry.mask)
    if mask is None:
        return result
    if image is not None and mask.shape != image.shape[:2]:
        result.problems.append(
            f"mask {entry.mask} is {mask.shape[1]}x{mask.shape[0]} pixels, its image "
            f"{entry.image.name} {image.shape[1]}x{image.shape[0]}"
        )
    counts = np.bincount(mask.ravel(), minlength=256)
    limit = len(classes)
    wrong = [str(value) for value in np.flatnonzero(counts[:IGNORE]) if value > limit]
    if wrong:
        result.problems.append(
            f"mask {entry.mask} has values outside 0..{limit} and {IGNORE}: {', '.join(wrong)}"
        )
        return result
    result.pixels = counts[: limit + 1]
    if entry.labels is not None:
        shown = {classes[index - 1] for index in np.flatnonzero(result.pixels) if index}
        result.labels_without_pixels = len(set(entry.labels) - shown)
        result.pixels_without_label = len(shown - set(entry.labels))
    return result
