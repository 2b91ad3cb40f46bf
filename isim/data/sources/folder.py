"""A person's own images: a folder of photographs, with labels and masks of any usual form."""

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from isim.data.files import write_label_map
from isim.data.formats import labels as label_files
from isim.data.formats import listing as listings
from isim.data.formats import masks as mask_files
from isim.data.formats import tagged
from isim.data.formats.instances import Instances, class_ids
from isim.data.formats.labels import Read
from isim.data.formats.listing import Listing, Names
from isim.data.formats.tagged import BACKGROUND_NAME, NO_NAMES, NONE_NAME, Tagged
from isim.data.problems import Problem
from isim.data.sources import splits
from isim.data.sources.source import MAX_CLASSES, Entry, Source, label_problems
from isim.errors import UserError
from isim.params import Prepare
from isim.runtime.helpers import in_threads

# Names of the folders of images and masks: a person's own, and VOC's.
_IMAGES, _MASKS = ("images", "JPEGImages"), ("masks", "SegmentationClass")
_ANNOTATIONS = ("Annotations", "annotations")
# Masks of VOC that nothing here reads.
_OBJECTS = "SegmentationObject"
_CLASSES = "classes.txt"
# Labels that tell whether something is there, and not what.
_ANSWERS = {"0", "1", "0.0", "1.0", "true", "false", "yes", "no", "y", "n"}


@dataclass
class _Found:
    """Findings so far: by id, but for `missing`, by what is told of it.

    `strict`: images that cannot be read are errors. `folder`: the name of that of the images.
    `listed`: the classes of `classes.txt`, if there is one. `none`: the number of rows whose label
    says that there is none.
    """

    strict: bool
    folder: str
    listed: tuple[str, ...] | None = None
    none: int = 0
    labels: dict[str, tuple[str, ...] | None] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    missing: dict[str, Problem] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(params: Prepare, root: Path, out: Path) -> Source:
    """Read labels and the names of images and masks; no image is opened.

    docs/formats.md lists the forms that are read. Masks that are drawn from COCO's outlines, of the
    images that have no file of a mask, go to `out`/masks. Class ids are 1 + the position in
    `classes.txt` (one name a line), without that file among the label names in natural order. An
    image without labels is none of `train` and `val`, but `unlabelled`.

    Raises:
        UserError: A file or folder is missing or not of a form that is known.
    """
    if not root.is_dir():
        raise UserError(f"{root} does not exist; put the images there, or mend prepare.root")
    images, masks = (_first(root, names) for names in (_IMAGES, _MASKS))
    images = images or root
    aside = [path for path in (masks, *(root / name for name in _ANNOTATIONS)) if path]
    listing = listings.images(images, aside)
    if not listing.images:
        told = [problem.what for problem in listings.passed_over(listing)[:1]]
        raise UserError(
            f"{images} holds no image that can be read; {told[0] if told else 'put some there'}"
        )
    found = _Found(params.unreadable == "error", images.name or images.resolve().name)
    found.listed = _listed(root / _CLASSES, found.problems)
    names = Names(listing)
    found.problems += [*listing.problems, *listings.passed_over(listing)]
    found.problems += _elsewhere(root, images, masks)
    given = label_files.read(params.labels, root, images, listing)
    if not given.tags.rows and not any(problem.error for problem in given.tags.problems):
        raise UserError(f"{root}: {given.form} names no image; write a row for each image")
    if given.copies:
        single = {id_: path for id_, path in listing.images.items() if id_ not in given.copies}
        listing = replace(listing, images=single)
        names = Names(listing)
    if params.labels == label_files.AUTO and given.path and not given.path.is_relative_to(root):
        what = f"{given.path} lies outside {root}; name it in prepare.labels, so that DVC sees it"
        found.problems.append(Problem("labels beside the images", what, error=False))
    found.problems += given.tags.problems
    found.notes += [f"labels: {given.form}", *given.tags.notes]
    for row in given.tags.rows:
        _add_row(row, names, found)
    if found.none:
        found.notes.append(f"labels: `{NONE_NAME}`, none of the classes, in {found.none} rows")
    _tell_names(names, found)
    classes = _classes(root, found, given.instances)
    entries = {
        id_: Entry(
            path,
            None,
            found.labels.get(id_),
            label_problems(found.labels.get(id_) or (), classes, found.where.get(id_, id_)),
        )
        for id_, path in listing.images.items()
    }
    scheme = mask_files.scheme(classes, params.mask_values, root, found.problems)
    if masks:
        entries = _with_masks(entries, masks, listing, given, found=found)
    if given.instances:
        entries = _with_outlines(entries, given.instances, names, classes, out=out, found=found)
    chosen = _splits(params, root, entries, names, found=found)
    kept = {id_: entry for id_, entry in entries.items() if id_ in chosen}
    parts = {
        split: tuple(id_ for id_ in kept if chosen[id_] == split)
        for split in (splits.TRAIN, splits.VAL, splits.UNLABELLED)
    }
    # A split may be there without an image only where an error tells so.
    there = {name: ids for name, ids in parts.items() if ids or name == splits.TRAIN}
    problems = (*found.problems, *found.missing.values())
    notes = tuple(found.notes)
    return Source(classes, kept, there, problems, notes, scheme=scheme, labels=given.path)


def labels_beside(root: Path) -> Path | None:
    """Find the label file that `labels: auto` takes from beside the root, where there is one."""
    if not root.is_dir():
        return None
    found = label_files.candidates(root, _first(root, _IMAGES) or root)
    return next((path for path in found if not path.is_relative_to(root)), None)


def _first(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _elsewhere(root: Path, images: Path, masks: Path | None) -> Iterator[Problem]:
    """Tell of images beside the folder of images, or in those of annotations: none is read."""
    folders = [path for name in _ANNOTATIONS if (path := root / name).is_dir()]
    if images != root:
        below = sorted(path for path in root.iterdir() if path.is_dir() and path.name != _OBJECTS)
        folders = [root, *below]
    taken = {path.resolve() for path in (images, masks) if path}
    found = {
        path.resolve(): path
        for folder in folders
        if folder.resolve() not in taken and not folder.name.startswith(".")
        for _, _, files in itertools.islice(os.walk(folder), 1)
        for path in sorted(folder / name for name in files)
        if path.suffix.lower() in listings.suffixes() and not path.name.startswith(".")
    }
    if found:
        first = next(iter(found.values()))
        what = (
            f"{len(found)} images, such as {first}, do not lie in {images}: they are not read; "
            "move them there if they belong to the data"
        )
        if images == root:
            what = (
                f"{len(found)} images, such as {first}, lie in a folder of annotations: they are "
                "not read; rename the folder if it is a class"
            )
        yield Problem("images that are not read", what, str(first), error=False)


def _add_row(row: Tagged, names: Names, found: _Found) -> None:
    """Add what a label file tells of an image to what earlier rows told."""
    name = row.image
    ids = names.find(name)
    if not ids and row.otherwise:
        ids, name = names.find(row.otherwise), _beside(row)
    if not row.image:
        return
    if len(ids) != 1:
        other = None if ids else names.other(row.image)
        if ids:
            kind, why = "name that is not clear", "is the name of several images; write its folder"
        elif other:
            kind, why = "format that is not read", listings.why_not(other)
        else:
            near = names.find(row.image.rpartition(".")[0])
            hint = f"; is {sorted(near)[0]} with another suffix meant?" if near else ""
            kind, why = "missing image", f"is missing{hint}"
        what = f"{row.where}: {row.image} {why}"
        error = found.strict or bool(ids)
        found.missing.setdefault(what, Problem(kind, what, row.image, error=error))
        return
    (id_,) = ids
    known = found.labels.get(id_)
    if not listings.may_be_one(found.names.setdefault(id_, name), name, found.folder):
        what = (
            f"{row.where}: {found.names[id_]} and {name} would both be image {id_}; is one of "
            "them missing?"
        )
        found.problems.append(Problem("two names of one image", what, row.image))
    elif row.otherwise and id_ in found.where:
        what = (
            f"{row.where} and {found.where[id_]} are both of image {id_}, which has the labels of "
            "both; is another image missing?"
        )
        found.problems.append(Problem("two annotations of one image", what, row.image, error=False))
    if row.split and found.splits.setdefault(id_, row.split) != row.split:
        what = f"{row.where}: {id_} is of split {found.splits[id_]} in {found.where[id_]}"
        found.problems.append(Problem("image in two splits", what, row.image))
    labels = _meant(row, found)
    if labels is not None:
        if known is not None and bool(known) != bool(labels):
            what = f"{row.where}: {id_} has a row without labels and one with; it has those"
            found.problems.append(Problem("rows that disagree", what, row.image, error=False))
        found.labels[id_] = tagged.distinct((*(known or ()), *labels))
    found.where.setdefault(id_, row.where)


def _beside(row: Tagged) -> str:
    """Return the other name of a row's image; without a folder it lies in that of its first one."""
    other = row.otherwise.replace("\\", "/")
    return other if "/" in other else f"{row.image.rpartition('/')[0]}/{other}"


def _meant(row: Tagged, found: _Found) -> tuple[str, ...] | None:
    """Return a row's labels without what names no class: `none`, and what may mean `unknown`."""
    if row.labels is None or row.objects:
        return row.labels
    odd = [name for name in row.labels if name not in (found.listed or ())]
    none = [name for name in odd if name.lower() == NONE_NAME]
    nothing = [name for name in odd if name.lower() in NO_NAMES]
    if none and len(none) < len(row.labels):
        what = f"{row.where}: `{none[0]}` stands beside other labels; leave it out"
        found.problems.append(Problem("none beside other labels", what, row.image))
    elif none:
        found.none += 1
    for name in nothing:
        what = (
            f"{row.where}: is `{name}` a class? Leave the labels empty where an image shows none "
            f"of the classes, drop the row where they are unknown, or list it in {_CLASSES}"
        )
        found.problems.append(Problem("labels that name nothing", what, row.image))
    return tuple(name for name in row.labels if name not in (*none, *nothing))


def _tell_names(names: Names, found: _Found) -> None:
    for id_, written in names.by_case.items():
        what = f"label file: {written} is taken for {id_}, whose name differs in case or blanks"
        found.problems.append(Problem("names that differ in case", what, id_, error=False))


def _classes(root: Path, found: _Found, given: Instances | None) -> tuple[str, ...]:
    """Find the classes; `background`, and categories `given` without an object, are told."""
    for id_, labels in found.labels.items():
        for name in labels or ():
            if name.lower() == BACKGROUND_NAME:
                what = (
                    f"{found.where[id_]}: `{name}` is no class; leave the cell empty where an "
                    "image shows none of the classes"
                )
                found.problems.append(Problem("background as a class", what, id_))
    own = {name for labels in found.labels.values() for name in labels or ()}
    named = sorted((n for n in own if n.lower() != BACKGROUND_NAME), key=tagged.natural)
    folded: dict[str, str] = {}
    for name in named:
        if (other := folded.setdefault(name.casefold(), name)) != name:
            what = f"the labels '{other}' and '{name}' differ in case only; they are two classes"
            found.problems.append(Problem("labels that differ in case", what, error=False))
    classes = found.listed or tuple(named)
    found.problems += [
        Problem(
            "names with a comma",
            f"the class '{name}' has a comma in its name; are these two labels?",
            error=False,
        )
        for name in classes
        if "," in name
    ]
    found.problems += _odd_classes(classes)
    known = {*classes}
    if given and (unused := [name for name in given.unused() if name not in known]):
        note = f"{len(unused)} categories without an object are no classes, such as {unused[0]}"
        found.notes.append(f"{given.path.name}: {note}")
    if not 0 < len(classes) <= MAX_CLASSES:
        what = f"{root} has {len(classes)} classes; 1 to {MAX_CLASSES} are possible"
        found.problems.append(Problem("number of classes", what))
    return classes


def _odd_classes(classes: tuple[str, ...]) -> Iterator[Problem]:
    """Tell of names that seem to be several classes, or an answer instead of a class."""
    if not 0 < len(classes) <= MAX_CLASSES:
        return
    known = {*classes}
    for name in classes:
        parts = [part.strip() for part in re.split(r"[^\w-]+|_", name) if part.strip()]
        if len(parts) > 1 and set(parts) <= known:
            what = f"the class '{name}' is made of the names of others; part labels by `;`"
            yield Problem("classes made of others", what, error=False)
    if {name.lower() for name in known} <= _ANSWERS:
        what = (
            f"the classes are {', '.join(classes)}; if these are answers to one question, name the "
            "column by what is asked, such as `image,defect`, instead of `labels`"
        )
        yield Problem("classes that are answers", what, error=False)


def _listed(path: Path, problems: list[Problem]) -> tuple[str, ...] | None:
    """Read the classes of `classes.txt`, None without one; faults are added to `problems`.

    Labels are then held against what a faulty file seems to mean.
    """
    if not path.exists():
        return None
    try:
        names = [tagged.class_name(line) for line in tagged.lines_of(path) if line.strip()]
    except UserError as error:
        problems.append(Problem("list of classes", str(error), str(path)))
        return None
    wrong = sorted({name for name in names if ";" in name or names.count(name) > 1})
    wrong += [name for name in names if name.lower() == BACKGROUND_NAME]
    if not wrong:
        return tuple(names)
    what = (
        f"{path} must name each class once, without `;` and without background (class 0); "
        f"mend {', '.join(wrong)[:100]}"
    )
    problems.append(Problem("list of classes", what, str(path)))
    meant = [part.strip() for name in names for part in name.split(";")]
    return tuple(dict.fromkeys(part for part in meant if part.lower() not in ("", BACKGROUND_NAME)))


def _with_masks(
    entries: Mapping[str, Entry], folder: Path, listing: Listing, given: Read, *, found: _Found
) -> dict[str, Entry]:
    """Give entries the masks of a folder that have their ids."""
    masks = listings.images(folder, read=mask_files.SUFFIXES)
    others = [path for path in masks.others.values() if path.suffix.lower() in listings.suffixes()]
    if given.form == label_files.FOLDERS and not masks.images.keys() & entries.keys():
        if count := len(masks.images) + len(others):
            what = (
                f"{folder} is taken for the folder of masks, but none of its {count} files has the "
                "name of an image; rename the folder if it is a class"
            )
            found.problems.append(Problem("folder of masks of no image", what, str(folder)))
        return dict(entries)
    found.problems += masks.problems
    for name, path in masks.others.items():
        stem = name[: len(name) - len(path.suffix)]
        if stem in listing.images or path.suffix.lower() in listings.suffixes():
            what = f"mask {path} is in a format that is not read; save it as PNG"
            found.problems.append(Problem("mask in a format that is not read", what, str(path)))
    masked = dict(entries)
    for id_, path in masks.images.items():
        if id_ in masked:
            masked[id_] = replace(masked[id_], mask=path)
        else:
            what = f"{path} is the mask of no image"
            found.problems.append(Problem("mask without an image", what, str(path)))
    return masked


def _with_outlines(
    entries: Mapping[str, Entry],
    given: Instances,
    names: Names,
    classes: tuple[str, ...],
    *,
    out: Path,
    found: _Found,
) -> dict[str, Entry]:
    """Draw masks of COCO's outlines for the images whose objects all have one, and no file.

    Two entries of one image, whose masks would take each other's place, are a problem.
    """
    ids = class_ids(classes)
    there = {
        number: next(iter(names.find(name)))
        for number, (name, _, _) in given.images.items()
        if number in given.objects and len(names.find(name)) == 1
    }
    numbers: dict[str, list[int]] = {}
    for number, id_ in there.items():
        numbers.setdefault(id_, []).append(number)
    outlined = {number: id_ for number, id_ in there.items() if given.outlined(number)}
    wanted = {number: id_ for number, id_ in outlined.items() if entries[id_].mask is None}
    for id_ in dict.fromkeys(wanted.values()):
        if len(numbers[id_]) > 1:
            what = (
                f"{given.path}: images {numbers[id_][0]} and {numbers[id_][1]} are both {id_}, of "
                "which one mask is drawn; give their objects one image_id"
            )
            found.problems.append(Problem("two entries of one image", what, id_))
    wanted = {number: id_ for number, id_ in wanted.items() if len(numbers[id_]) == 1}
    draw = partial(_outlined, given, ids, out / "masks")
    drawn = dict(entries)
    for (_, id_), told in zip(
        wanted.items(), in_threads(draw, wanted.items(), "outlines"), strict=True
    ):
        if isinstance(told, Problem):
            found.problems.append(told)
        else:
            drawn[id_] = replace(drawn[id_], mask=told)
    if outlined:
        note = f"masks: {len(wanted)}, drawn from the outlines in {given.path.name}"
        if files := len(outlined) - len(wanted):
            note += f"; {files} others have a file, which counts instead of their outlines"
        found.notes.append(note)
    return drawn


def _outlined(
    given: Instances, ids: Mapping[str, int], folder: Path, task: tuple[int, str]
) -> Path | Problem:
    number, id_ = task
    try:
        mask = given.mask(number, ids)
    except (UserError, KeyError) as error:
        return Problem("unusable outline", str(error), str(given.path))
    write_label_map(folder / f"{id_}.png", mask)
    return folder / f"{id_}.png"


def _splits(
    params: Prepare, root: Path, entries: Mapping[str, Entry], names: Names, *, found: _Found
) -> dict[str, str]:
    """Choose the split of each image; those of unknown labels are unlabelled."""
    known = {id_: entry.labels for id_, entry in entries.items() if entry.labels is not None}
    unlabelled = dict.fromkeys(entries.keys() - known.keys(), splits.UNLABELLED)
    told = {id_: split for id_, split in found.splits.items() if id_ in known}
    listed = {} if told else splits.lists(root, names, found.problems)
    if listed:
        told = splits.by_lists(list(known), listed, found.problems)
        told = {id_: split for id_, split in told.items() if id_ in known}
        missed = f"is in none of the lists {', '.join(sorted(listed))}: left out"
        found.problems += [
            Problem("image in no list", f"{id_} {missed}", id_, error=False)
            for id_ in sorted(known.keys() - told.keys())
        ]
    elif told:
        rest = known.keys() - told.keys()
        if rest:
            found.notes.append(f"split: {len(rest)} labelled images have none, and are in train")
        told |= dict.fromkeys(rest, splits.TRAIN)
    else:
        masked = {id_ for id_ in known if entries[id_].mask is not None}
        labels = {id_: labels or () for id_, labels in known.items()}
        val = splits.draw(labels, masked, params.val_fraction, params.seed)
        if val:
            held = f", {len(val & masked)} of the {len(masked)} with masks" if masked else ""
            found.notes.append(f"val: {len(val)} images, drawn by their ids{held}")
        told = {id_: splits.VAL if id_ in val else splits.TRAIN for id_ in known}
    if tested := [id_ for id_, split in told.items() if split == splits.TEST]:
        found.notes.append(f"split test: its {len(tested)} images count as val")
        told |= dict.fromkeys(tested, splits.VAL)
    return told | unlabelled
