"""Splits inside other splits, whose figures are reported apart (spec 8), as train in trainaug."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from isim.data.dataset import Item

# Image ids by the name of a split, and counts by the name of what was scored.
Parts = dict[str, frozenset[str]]
Confusions = dict[str, NDArray[np.int64]]


def members(splits: Mapping[str, Sequence[Item]]) -> Parts:
    """Image ids of each split."""
    return {name: frozenset(item.id for item in items) for name, items in splits.items()}


def inside(ids: frozenset[str], known: Parts) -> Parts:
    """Those of the `known` splits that are a part of `ids`, and neither empty nor all of it."""
    return {name: part for name, part in known.items() if part and part < ids}


def parts(scored: Iterable[str], known: Parts) -> dict[str, Parts]:
    """What to report of each split that is scored: itself, then the splits inside it.

    Args:
        scored: Names of splits.
        known: The image ids of all splits, of `members`.

    Returns:
        By the scored split, the parts to count. A part occurs once only: not inside a split where
        it is scored itself, nor in a second split that it is inside, too.
    """
    names = list(scored)
    taken, found = set(names), {}
    for name in names:
        inner = {n: ids for n, ids in inside(known[name], known).items() if n not in taken}
        taken |= inner.keys()
        found[name] = {name: known[name], **inner}
    return found


def add(totals: Confusions, counted: Parts, id_: str, counts: NDArray[np.int64]) -> None:
    """Add an image's counts to the totals of the parts that it belongs to.

    Args:
        totals: By the part's name, an array of the shape of `counts`; added to in place.
        counted: The parts.
        id_: The image.
        counts: Of any shape.
    """
    for name, ids in counted.items():
        if id_ in ids:
            totals[name] += counts
