"""A person's own images: a folder of photographs, with labels and masks of any usual form."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from isim.data.files import write_label_map
from isim.data.formats import labels as label_files
from isim.data.formats import listing as listings
from isim.data.formats import masks as mask_files
from isim.data.formats import tagged
from isim.data.formats.instances import Instances, class_ids
from isim.data.formats.listing import Listing, Names
from isim.data.formats.tagged import BACKGROUND_NAME, Tagged
from isim.data.problems import Problem
from isim.data.sources import splits
from isim.data.sources.source import MAX_CLASSES, Entry, Source, label_problems
from isim.errors import UserError
from isim.params import Prepare
from isim.runtime.helpers import in_threads

# Names of the folders of images and masks: a person's own, and VOC's.
_IMAGES, _MASKS = ("images", "JPEGImages"), ("masks", "SegmentationClass")
_CLASSES = "classes.txt"


@dataclass
class _Found:
    """Findings so far: by id, but for `missing`, by what is told of it.

    `strict`: images that cannot be read are errors.
    """

    strict: bool
    labels: dict[str, tuple[str, ...] | None] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    missing: dict[str, Problem] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(params: Prepare, root: Path, out: Path) -> Source:
    """Read labels and the names of images and masks; no image is opened.

    docs/formats.md lists the forms that are read. Masks that are drawn from COCO's outlines go to
    `out`/masks. Class ids are 1 + the position in `classes.txt` (one name a line), without that
    file among the label names in natural order. An image without labels is none of `train` and
    `val`, but `unlabelled`.

    Raises:
        UserError: A file or folder is missing or not of a form that is known.
    """
    if not root.is_dir():
        raise UserError(f"{root} does not exist; put the images there, or mend prepare.root")
    images, masks = (_first(root, names) for names in (_IMAGES, _MASKS))
    images = images or root
    aside = [path for path in (masks, root / "Annotations", root / "annotations") if path]
    listing = listings.images(images, aside)
    if not listing.images:
        told = [problem.what for problem in listings.passed_over(listing)[:1]]
        raise UserError(
            f"{images} holds no image that can be read; {told[0] if told else 'put some there'}"
        )
    found, names = _Found(params.unreadable == "error"), Names(listing)
    found.problems += [*listing.problems, *listings.passed_over(listing)]
    given = label_files.read(params.labels, root, images, listing)
    found.problems += given.tags.problems
    found.notes += [f"labels: {given.form}", *given.tags.notes]
    for row in given.tags.rows:
        _add_row(row, names, found)
    _tell_names(names, found)
    classes = _classes(root, found)
    entries = {
        id_: Entry(
            path,
            None,
            found.labels.get(id_),
            label_problems(found.labels.get(id_) or (), classes, found.where.get(id_, id_)),
        )
        for id_, path in listing.images.items()
    }
    scheme = mask_files.scheme(classes, params.mask_values, root)
    if masks:
        entries = _with_masks(entries, masks, listing, found)
    elif given.instances:
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
    return Source(classes, kept, there, problems, tuple(found.notes), scheme=scheme)


def _first(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _add_row(row: Tagged, names: Names, found: _Found) -> None:
    """Add what a label file tells of an image to what earlier rows told."""
    ids = names.find(row.image) or (names.find(row.otherwise) if row.otherwise else set())
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
    if row.split and found.splits.setdefault(id_, row.split) != row.split:
        what = f"{row.where}: {id_} is of split {found.splits[id_]} in {found.where[id_]}"
        found.problems.append(Problem("image in two splits", what, row.image))
    if row.labels is not None:
        if known is not None and bool(known) != bool(row.labels):
            what = f"{row.where}: {id_} has a row without labels and one with; it has those"
            found.problems.append(Problem("rows that disagree", what, row.image, error=False))
        found.labels[id_] = tagged.distinct((*(known or ()), *row.labels))
    found.where.setdefault(id_, row.where)


def _tell_names(names: Names, found: _Found) -> None:
    for id_, written in names.by_case.items():
        what = f"label file: {written} is taken for {id_}, whose name differs in case"
        found.problems.append(Problem("names that differ in case", what, id_, error=False))


def _classes(root: Path, found: _Found) -> tuple[str, ...]:
    """Find the classes, and take `background` out of the labels, with a problem."""
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
        if ";" in name or "\n" in name:
            what = f"the label '{name[:40]}' has a `;` in it; rename the class"
            found.problems.append(Problem("unusable label", what))
    classes = _listed(root / _CLASSES) or tuple(named)
    found.problems += [
        Problem(
            "names with a comma",
            f"the class '{name}' has a comma in its name; are these two labels?",
            error=False,
        )
        for name in classes
        if "," in name
    ]
    if not 0 < len(classes) <= MAX_CLASSES and not found.problems:
        raise UserError(f"{root} has {len(classes)} classes; 1 to {MAX_CLASSES} are possible")
    if len(classes) > MAX_CLASSES or not classes:
        what = f"there are {len(classes)} classes; 1 to {MAX_CLASSES} are possible"
        found.problems.append(Problem("number of classes", what))
    return classes


def _listed(path: Path) -> tuple[str, ...] | None:
    if not path.exists():
        return None
    try:
        lines = tagged.text_of(path).split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); write it in UTF-8") from error
    names = [line.strip() for line in lines if line.strip()]
    wrong = sorted({name for name in names if ";" in name or names.count(name) > 1})
    wrong += [name for name in names if name.lower() == BACKGROUND_NAME]
    if wrong:
        raise UserError(
            f"{path} must name each class once, without `;` and without background (class 0); "
            f"mend {', '.join(wrong)[:100]}"
        )
    return tuple(names)


def _with_masks(
    entries: Mapping[str, Entry], folder: Path, listing: Listing, found: _Found
) -> dict[str, Entry]:
    """Give entries the masks of a folder that have their ids."""
    masks = listings.images(folder, read=mask_files.SUFFIXES)
    found.problems += masks.problems
    for name, path in masks.others.items():
        stem = name[: len(name) - len(path.suffix)]
        if stem in listing.images or path.suffix.lower() in listings.suffixes():
            what = f"mask {path} is in a format that is not read; save it as PNG"
            found.problems.append(Problem("mask in a format that is not read", what, str(path)))
    given = dict(entries)
    for id_, path in masks.images.items():
        if id_ in given:
            given[id_] = replace(given[id_], mask=path)
        else:
            what = f"{path} is the mask of no image"
            found.problems.append(Problem("mask without an image", what, str(path)))
    return given


def _with_outlines(
    entries: Mapping[str, Entry],
    given: Instances,
    names: Names,
    classes: tuple[str, ...],
    *,
    out: Path,
    found: _Found,
) -> dict[str, Entry]:
    """Draw masks of COCO's outlines for the images whose objects all have one."""
    ids = class_ids(classes)
    wanted = {
        number: next(iter(names.find(name)))
        for number, (name, _, _) in given.images.items()
        if number in given.objects and given.outlined(number) and len(names.find(name)) == 1
    }
    draw = partial(_outlined, given, ids, out / "masks")
    drawn = dict(entries)
    for (_, id_), told in zip(
        wanted.items(), in_threads(draw, wanted.items(), "outlines"), strict=True
    ):
        if isinstance(told, Problem):
            found.problems.append(told)
        else:
            drawn[id_] = replace(drawn[id_], mask=told)
    if drawn != entries:
        found.notes.append(f"masks: {len(wanted)}, drawn from the outlines in {given.path.name}")
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
        among = f"the {len(masked)} images with masks" if masked else "all images"
        if val:
            found.notes.append(f"val: {len(val)} images, drawn among {among}")
        told = {id_: splits.VAL if id_ in val else splits.TRAIN for id_ in known}
    if tested := [id_ for id_, split in told.items() if split == splits.TEST]:
        found.notes.append(f"split test: its {len(tested)} images count as val")
        told |= dict.fromkeys(tested, splits.VAL)
    return told | unlabelled
