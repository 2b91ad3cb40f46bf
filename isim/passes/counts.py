"""Confusion matrices of images: as journals keep them, and summed over splits (spec 8).

A split that lies inside another one, as train in trainaug, is reported apart, too.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isim import metrics
from isim.data import files
from isim.data.prepared import Item

# Image ids by the name of a split, and counts by the name of what was scored.
Parts = dict[str, frozenset[str]]
Confusions = dict[str, NDArray[np.int64]]
# (H, W) label maps by the name of what made them.
Labels = Mapping[str, NDArray[np.uint8]]
# Non-zero counts of an array: flat place and number.
Counts = list[tuple[int, int]]
# Seeds at T ascending thresholds: `best` and `levels` of `metrics.level_confusion`, and T.
Sweep = tuple[NDArray[np.uint8], NDArray[np.integer[Any]], int]

# Columns of `per_class`, where there may be no rows.
PER_CLASS = ("source", "class", "iou")


def members(splits: Mapping[str, Sequence[Item]]) -> Parts:
    """Return the image ids of each split."""
    return {name: frozenset(item.id for item in items) for name, items in splits.items()}


def inside(ids: frozenset[str], known: Parts) -> Parts:
    """Choose the `known` splits that are a part of `ids`, and neither empty nor all of it."""
    return {name: part for name, part in known.items() if part and part < ids}


def parts(scored: Iterable[str], known: Parts) -> dict[str, Parts]:
    """Choose what to report of each scored split: itself, then the `known` splits inside it.

    A part occurs once only: not inside a split where it is scored itself, nor in a second split
    that it is inside, too.
    """
    names = list(scored)
    taken, found = set(names), {}
    for name in names:
        inner = {n: ids for n, ids in inside(known[name], known).items() if n not in taken}
        taken |= inner.keys()
        found[name] = {name: known[name], **inner}
    return found


def sparse(counts: NDArray[np.int64]) -> Counts:
    """Return the non-zero counts of an array of any shape, for a journal's line."""
    flat = counts.ravel()
    return [(int(place), int(flat[place])) for place in np.flatnonzero(flat)]


def total(lines: Iterable[Mapping[str, Any]], key: str, shape: Sequence[int]) -> NDArray[np.int64]:
    """Sum the sparse counts under `key` of all lines to an array of `shape`."""
    counts = np.zeros(shape, np.int64)
    for line in lines:
        for place, number in line[key]:
            counts.flat[place] += number
    return counts


def totals(
    lines: Sequence[Mapping[str, Any]], key: str, shape: Sequence[int], parts: Parts
) -> Confusions:
    """Sum as `total` does, for the images of each of `parts`."""
    return {
        name: total((line for line in lines if line["id"] in ids), key, shape)
        for name, ids in parts.items()
    }


def interval(
    prefix: str, lines: Iterable[Mapping[str, Any]], key: str, num_labels: int
) -> dict[str, float]:
    """Bound the mIoU of the images that are scored (`metrics.miou_interval`).

    Returns `<prefix>miou_low` and `<prefix>miou_high`; nothing for fewer than two images.
    """
    square = (num_labels, num_labels)
    low, high = metrics.miou_interval(total([line], key, square) for line in lines if line[key])
    bounds = {"low": low, "high": high} if math.isfinite(low) else {}
    return {f"{prefix}miou_{name}": value for name, value in bounds.items()}


def coverage(lines: Iterable[Mapping[str, Any]], name: str) -> float:
    """Return the mean share of the images that a label map gives to an object, masks or not."""
    return statistics.mean(float(line["covered"][name]) for line in lines)


def per_class(confusions: Confusions, names: Sequence[str]) -> list[dict[str, Any]]:
    """List the IoU of each label of each source: rows of `source`, `class` and `iou`.

    A source of which nothing was counted has no rows.
    """
    return [
        {"source": source, **row}
        for source, confusion in counted(confusions).items()
        for row in metrics.iou_table(names, {"iou": confusion})
    ]


def counted(confusions: Confusions) -> Confusions:
    """Choose the confusion matrices that have a pixel: the others have nothing to show."""
    return {name: confusion for name, confusion in confusions.items() if confusion.any()}


def scored(
    item: Item, labels: Labels, num_labels: int, sweep: Sweep | None = None
) -> dict[str, Any]:
    """Score an image's label maps: the counts of an (L, L) confusion matrix for each name.

    The counts of a sweep, (T, L, L), are named `sweep`. All are empty without a ground truth; what
    needs none is `covered`: the share of the image that each label map gives to an object. Raises
    UserError when it cannot be read or does not fit.
    """
    covered = {name: float((label > 0).mean()) for name, label in labels.items()}
    if item.mask is None:
        return {"covered": covered, **{name: [] for name in (*labels, "sweep")}}
    truth = files.read_truth(item.mask, next(iter(labels.values())).shape, num_labels)
    found = {
        name: metrics.confusion_matrix(truth, label, num_labels) for name, label in labels.items()
    }
    if sweep is not None:
        best, levels, count = sweep
        found["sweep"] = metrics.level_confusion(
            truth, best, levels, num_thresholds=count, num_labels=num_labels
        )
    return {"covered": covered, **{name: sparse(confusion) for name, confusion in found.items()}}


def scored_and_written(
    item: Item, labels: Labels, folders: Mapping[str, Path], num_labels: int
) -> dict[str, Any]:
    """Score an image's label maps as `scored`, then write each to the folder of its name.

    Raises UserError as `scored`, and when a write fails.
    """
    counts = scored(item, labels, num_labels)
    # Written last: PNGs that are there have been scored.
    for name, label in labels.items():
        files.write_label_map(folders[name] / f"{item.id}.png", label)
    return counts
