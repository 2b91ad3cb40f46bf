"""A folder a class: an image's label is the folder that it lies in."""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from isim.data.formats.tagged import BACKGROUND_NAME, NONE_NAME, SPLITS, Tagged, Tags
from isim.data.problems import Problem
from isim.runtime.identity import md5


def copies(images: Mapping[str, Path]) -> dict[str, str]:
    """Find files of one name and content in several folders: the id of each but the first to its.

    An image of several classes is in the folder of each.
    """
    alike: dict[tuple[str, int], list[str]] = {}
    for id_ in sorted(images):
        if images[id_].is_file():
            size = images[id_].stat().st_size
            alike.setdefault((images[id_].name, size), []).append(id_)
    found: dict[str, str] = {}
    for ids in alike.values():
        firsts: dict[str, str] = {}
        for id_ in ids if len(ids) > 1 else ():
            first = firsts.setdefault(md5(images[id_]), id_)
            if first != id_:
                found[id_] = first
    return found


def read(ids: Iterable[str]) -> Tags:
    """Read the tags off ids, which are paths: the first folder of each is its class.

    Folders train, val and test, if there are no others, are splits, and the next ones classes; two
    of them beside others are a problem, as is one whose folders seem to be classes. Images in the
    folder `none` show none of the classes; one that lies in no class's folder has no row: its tags
    are unknown.
    """
    paths = [(name, PurePosixPath(name).parts[:-1]) for name in ids]
    firsts = {folders[0] for _, folders in paths if folders}
    by_split = bool(firsts) and all(name.lower() in SPLITS for name in firsts)
    rows, problems, notes = [], [], []
    if by_split:
        notes.append(f"the folders {', '.join(sorted(firsts))} are splits")
    named = sorted(name for name in firsts if name.lower() in SPLITS)
    others = sorted(firsts.difference(named))
    # A vehicle may be the class `train`, but its folders are then like those of the other classes.
    below: dict[str, set[str]] = {name: set() for name in firsts}
    for _, folders in paths:
        if len(folders) > 1:
            below[folders[0]].add(folders[1])
    inside = {folder for name in named for folder in below[name]}
    above = inside and (not inside.isdisjoint(others) or not any(below[name] for name in others))
    if not by_split and (len({SPLITS[name.lower()] for name in named}) > 1 or above):
        are = "folders {} are splits" if len(named) > 1 else "folder {} is a split"
        what = (
            f"the {are.format(', '.join(named))} only if there are no others, such as "
            f"{others[0]}; move the others elsewhere, or name a label file in prepare.labels"
        )
        problems.append(Problem("splits beside other folders", what, others[0]))
    negatives, deeper = 0, []
    for name, folders in paths:
        split = SPLITS[folders[0].lower()] if by_split and folders else ""
        classes = folders[1:] if by_split else folders
        if not classes:
            continue
        label = classes[0]
        deeper += ["/".join(folders)] if len(classes) > 1 else []
        if label.lower() == BACKGROUND_NAME:
            what = (
                f"folder {'/'.join(folders)}: `{label}` is no class; call it `{NONE_NAME}` if its "
                "images show none of the classes"
            )
            problems.append(Problem("background as a class", what, name))
            continue
        none = label.lower() == NONE_NAME
        negatives += none
        rows.append(Tagged(name, () if none else (label,), f"folder {label}", split))
    if deeper and not problems:
        what = (
            f"{len(deeper)} images lie in further folders, such as {deeper[0]}: their class is the "
            "first folder; if it is the last one, move those folders up"
        )
        problems.append(Problem("folders in those of classes", what, deeper[0], error=False))
    if negatives:
        notes.append(f"folder {NONE_NAME}: {negatives} images that show none of the classes")
    return Tags(tuple(rows), tuple(problems), tuple(notes))
