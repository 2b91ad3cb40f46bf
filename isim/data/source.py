"""What every data source is read into, and the check of it against the files (spec 2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from isim.data.files import IGNORE, file_md5, read_image, read_label_map
from isim.data.threads import in_threads
from isim.errors import UserError

MAX_PROBLEMS_SHOWN = 50


@dataclass(frozen=True)
class Entry:
    """One image: its files, its label names (None: unknown), and what is wrong with the latter."""

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
        notes: What the user should know of the lists and need not mend.
    """

    classes: tuple[str, ...]
    entries: dict[str, Entry]
    splits: dict[str, tuple[str, ...]]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Checked:
    """What the files of one entry hold.

    Attributes:
        problems: Faults that make the entry unusable, one line each.
        files: (path, bytes, md5) of the image and, if there is one, the mask.
        pixels: (K+1,) int64 pixels of each class in the mask, None without a mask.
        labels_without_pixels: Labelled classes that the mask does not show; 0 without labels.
        pixels_without_label: Classes in the mask that are not labelled; 0 without labels.
    """

    problems: list[str]
    files: list[tuple[Path, int, str]] = field(default_factory=list)
    pixels: np.ndarray | None = None
    labels_without_pixels: int = 0
    pixels_without_label: int = 0


def check_labels(labels: Sequence[str], classes: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Problems of one image's label names; `where` names the file that they stand in."""
    if not labels:
        return (f"{where} names no class: an image without a label",)
    unknown = sorted(set(labels) - set(classes))
    return tuple(f"{where}: unknown class '{name}'" for name in unknown)


def verify(source: Source) -> dict[str, Checked]:
    """Read every image and mask once and hold them against the labels.

    Returns:
        The figures of each id, in the order of `source.entries`.

    Raises:
        UserError: The data is inconsistent. The first line counts the problems, one line each
            (at most 50) follows.
    """
    problems = list(source.problems)
    problems += [f"split '{name}' is empty" for name, ids in source.splits.items() if not ids]
    check = partial(_check, source.classes)
    entries = list(source.entries.values())
    results = dict(zip(source.entries, in_threads(check, entries, "check"), strict=True))
    for result in results.values():
        problems += result.problems
    if problems:
        raise UserError(_summary(problems))
    return results


def _summary(problems: list[str]) -> str:
    count = len(problems)
    head = f"the data has {count} problem{'s' * (count > 1)}; mend it and run `isim prepare` again"
    shown = problems[:MAX_PROBLEMS_SHOWN]
    more = [f"and {count - len(shown)} more"] if count > len(shown) else []
    return "\n  ".join([head, *shown, *more])


def _check(classes: tuple[str, ...], entry: Entry) -> Checked:
    result = Checked(list(entry.problems))
    image = _read(result, read_image, entry.image)
    if entry.mask is None:
        return result
    mask = _read(result, read_label_map, entry.mask)
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
    if entry.labels is None:
        return result
    shown = {classes[index - 1] for index in np.flatnonzero(result.pixels) if index}
    result.labels_without_pixels = len(set(entry.labels) - shown)
    result.pixels_without_label = len(shown - set(entry.labels))
    return result


def _read(result: Checked, read: Callable[[Path], np.ndarray], path: Path) -> np.ndarray | None:
    if not path.exists():
        result.problems.append(f"{path} is missing")
        return None
    try:
        array = read(path)
    except UserError as error:
        result.problems.append(str(error))
        return None
    result.files.append((path, path.stat().st_size, file_md5(path)))
    return array
