"""Splits of a person's own images: as lists tell them, or drawn by a hash of each id."""

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from isim.data.formats import tagged
from isim.data.formats.listing import Names
from isim.data.problems import Problem
from isim.errors import UserError
from isim.runtime.identity import sha256

TRAIN, VAL, TEST, UNLABELLED = "train", "val", "test", "unlabelled"
# Folders of lists, below the root: a person's own, and VOC's.
_FOLDERS = (".", "ImageSets/Segmentation", "ImageSets/Main")
_HEX = 13


def draw(
    labels: Mapping[str, Collection[str]], masked: Collection[str], fraction: float, seed: int
) -> set[str]:
    """Draw the share `fraction` of the images as val: those of a low hash of seed and id.

    If any are `masked`, of these. Further images take none of them out of val, therefore. Train has
    an image of every class: that of the highest hash, so that it may go to val once there are
    others. And val has one: of the lowest hash that train can spare.

    Args:
        labels: Class names of each image, by its id.
        masked: Ids of the images that have a mask.
        fraction: Share, 0 for none.
        seed: Another one draws others.
    """
    if not fraction or len(labels) < 2:
        return set()
    places = {id_: _place(id_, seed) for id_ in labels}
    wanted = set(masked or labels)
    order = sorted(labels, key=lambda id_: (places[id_], id_))
    val: set[str] = set()
    classes: set[str] = set()
    for id_ in reversed(order):
        if id_ in wanted and places[id_] < fraction and classes.issuperset(labels[id_]):
            val.add(id_)
        classes.update(labels[id_])
    if len(val) == len(labels):
        val.remove(order[-1])
    # Images of train, by class.
    left = Counter(name for id_ in labels.keys() - val for name in labels[id_])
    if not val and len(labels) - len(val) > 1:
        spare = (id_ for id_ in order if id_ in wanted and all(left[n] > 1 for n in labels[id_]))
        val.update(itertools.islice(spare, 1))
    return val


def _place(id_: str, seed: int) -> float:
    """Number in [0, 1) of an id."""
    return int(sha256(f"{seed} {id_}".encode())[:_HEX], 16) / float(16**_HEX)


def lists(root: Path, names: Names, problems: list[Problem]) -> dict[str, dict[str, str]]:
    """Read the lists train.txt, val.txt and test.txt: by split, where each id is listed.

    A line is the name of an image. What cannot be used, also a list that is unreadable, is added to
    `problems`.
    """
    for folder in _FOLDERS:
        paths = [root / folder / f"{split}.txt" for split in (TRAIN, VAL, TEST)]
        if found := [path for path in paths if path.is_file()]:
            read = {path.stem: _listed(path, names, problems) for path in found}
            return {split: ids for split, ids in read.items() if ids is not None}
    return {}


def _listed(path: Path, names: Names, problems: list[Problem]) -> dict[str, str] | None:
    found: dict[str, str] = {}
    try:
        lines = tagged.lines_of(path)
    except UserError as error:
        problems.append(Problem("unreadable list", str(error), str(path)))
        return None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        ids = names.find(line)
        if len(ids) != 1:
            what = f"{where}: '{line.strip()[:80]}' is {'no image' if not ids else 'not clear'}"
            problems.append(Problem("list names no image", f"{what}; mend the list", str(path)))
        for id_ in ids if len(ids) == 1 else ():
            if id_ in found:
                what = f"{where}: {id_} is listed in {found[id_]}, too; list it once"
                problems.append(Problem("listed twice", what, str(path)))
            found.setdefault(id_, where)
    return found


def by_lists(
    ids: Sequence[str], listed: Mapping[str, Mapping[str, str]], problems: list[Problem]
) -> dict[str, str]:
    """Choose the split of each id by the lists; ids that are left out have none.

    With one list alone, of train or of what is held out, the other split is the rest.
    """
    chosen: dict[str, str] = {}
    for split, entries in listed.items():
        for id_, where in entries.items():
            if (other := chosen.setdefault(id_, split)) != split:
                what = f"{where}: {id_} is in {other}.txt, too; list it once"
                problems.append(Problem("image in two lists", what, where))
    rest = ""
    if TRAIN not in listed:
        rest = TRAIN
    elif set(listed) == {TRAIN}:
        rest = VAL
    if rest:
        chosen = {id_: chosen.get(id_, rest) for id_ in ids}
    return chosen
