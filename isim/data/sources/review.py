"""Oddities of a data set that can be read: warnings, and one thing that cannot be learnt."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isim.data.problems import Problem
from isim.data.sources.source import Checked, Source

# Training images below which a class is told to have few.
FEW = 5
# Factor between an image's longer side and the median one from which their sizes are far apart.
FAR = 4


def review(source: Source, results: Mapping[str, Checked]) -> list[Problem]:
    """Look at splits, labels and the findings in all files.

    The labels of the split `train`, or of the first one, are what is learnt from.
    """
    return [
        *_names(source),
        *_labels(source),
        *_contradictions(source, results),
        *_sizes(results),
        *_copies(results),
    ]


def _names(source: Source) -> Iterator[Problem]:
    folded: dict[str, str] = {}
    for id_ in source.entries:
        other = folded.setdefault(id_.casefold(), id_)
        if other != id_:
            what = (
                f"the images {other} and {id_} differ in case only; on some disks one replaces the "
                "other"
            )
            yield Problem("names that differ in case", what, id_, error=False)
        if "," in id_:
            what = f"the image {id_} has a comma in its name; it must be quoted in tables"
            yield Problem("names with a comma", what, id_, error=False)


def _learnt(source: Source) -> tuple[str, NDArray[np.bool_]]:
    """Name of the split that is learnt from, and (N, K) which classes its N images have."""
    split = "train" if "train" in source.splits else next(iter(source.splits), "")
    ids = source.splits.get(split, ())
    known = [labels for id_ in ids if (labels := source.entries[id_].labels) is not None]
    found = np.zeros((len(known), len(source.classes)), np.bool_)
    for row, labels in zip(found, known, strict=True):
        row[[source.classes.index(name) for name in labels if name in source.classes]] = True
    return split, found


def _labels(source: Source) -> Iterator[Problem]:
    """Classes that cannot be learnt, or not told apart."""
    split, found = _learnt(source)
    if not len(found):
        return
    counts = found.sum(0)
    if len(source.classes) == 1:
        if counts[0] == len(found):
            what = (
                f"every image of {split} shows '{source.classes[0]}', the only class: nothing can "
                "be learnt; add images without it (an empty cell of labels)"
            )
            yield Problem("one class without negatives", what)
        return
    for place, name in enumerate(source.classes):
        if not counts[place]:
            what = f"class '{name}' has no image in {split}"
            yield Problem("classes without a training image", what, error=False)
        elif counts[place] < FEW:
            plural = "s" if counts[place] > 1 else ""
            what = f"class '{name}' has {counts[place]} image{plural} in {split}"
            yield Problem("classes with few training images", what, error=False)
        if counts[place] == len(found):
            what = f"every image of {split} has the tag '{name}': it cannot be told what it is"
            yield Problem("tags that never differ", what, error=False)
    # (K, K): images of the row's class that have the column's class, too.
    together = found.T.astype(np.int64) @ found
    for place, other in zip(*np.nonzero(together == counts[:, None]), strict=True):
        # What every image has, and what is seen once, is told above.
        if place != other and counts[place] > 1 and counts[other] < len(found):
            what = (
                f"class '{source.classes[place]}' never occurs without "
                f"'{source.classes[other]}' in {split}: a CAM cannot tell them apart"
            )
            yield Problem("classes that always occur together", what, error=False)


def _contradictions(source: Source, results: Mapping[str, Checked]) -> Iterator[Problem]:
    for id_, result in results.items():
        if result.bare or result.more:
            bare = f"without a pixel in the mask: {', '.join(result.bare)}" if result.bare else ""
            more = f"in the mask without a tag: {', '.join(result.more)}" if result.more else ""
            what = f"{id_}: {'; '.join(filter(None, (bare, more)))}"
            yield Problem(
                "tags that a mask contradicts", what[:280], _file(result.mask), error=False
            )


def _sizes(results: Mapping[str, Checked]) -> Iterator[Problem]:
    sides = {id_: max(result.size) for id_, result in results.items() if result.size is not None}
    if not sides:
        return
    middle = float(np.median(list(sides.values())))
    for id_, side in sides.items():
        if side * FAR <= middle or side >= middle * FAR:
            what = f"the longer side of {id_} is {side} pixels, of half of the images {middle:.0f}"
            yield Problem("sizes far apart", what, _file(results[id_].image), error=False)


def _copies(results: Mapping[str, Checked]) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for id_, result in results.items():
        # The image comes first, if it could be read.
        digest = result.files[0][2] if result.size is not None and result.files else id_
        other = first.setdefault(digest, id_)
        if other != id_:
            what = f"the images {other} and {id_} have the same content"
            yield Problem("images of the same content", what, _file(result.image), error=False)


def _file(path: Path | None) -> str:
    return str(path or "")
