"""Labels of a folder of images: which file or form they have, and reading them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from isim import errors
from isim.data.formats import annotation, class_folders, instances, json_files, tables
from isim.data.formats.instances import Instances
from isim.data.formats.listing import Listing
from isim.data.formats.tagged import Tags
from isim.errors import UserError

AUTO = "auto"
# The form of labels that are the folders of the images.
FOLDERS = "a folder for each class"
# Names of label files that are taken before others.
_USUAL = ("labels", "tags")
_JSON = {".json", *json_files.LINES}
_TABLES = tables.SUFFIXES - {".txt"}
_XML = "[!.]*.[xX][mM][lL]"
_XML_FOLDERS = ("Annotations", "annotations")


class Read(NamedTuple):
    """Tags of a folder; where they are COCO's instances, these too; and what was read, in words.

    `copies` are ids of images that are the same as another one, which has their tags, too; `path`
    is that of a label file.
    """

    tags: Tags
    instances: Instances | None
    form: str
    copies: Mapping[str, str] = {}
    path: Path | None = None


def read(wanted: str, root: Path, images: Path, listing: Listing) -> Read:
    """Read the labels of the images that `listing` has in the folder `images`.

    `wanted` is a label file, a folder of VOC's annotations or one of a folder a class, absolute or
    below `root`; or `auto`: a table or JSON in `root`, then annotations, then a folder a class.

    Raises:
        UserError: There are no labels, several files that may be them, or one that is unreadable.
    """
    if wanted != AUTO:
        path = root / wanted
        if not path.exists():
            raise UserError(f"prepare.labels: {path} does not exist; name the label file, or auto")
        return _folder(path, images, listing) if path.is_dir() else of_file(path)
    for look in (_file_of, _annotations_of, _folders_of):
        if found := look(root, images, listing):
            return found
    raise UserError(
        f"{root} has no labels: neither a file such as labels.csv, nor a folder for each class, "
        "nor annotations in XML; add one, or name it in prepare.labels"
    )


def of_file(path: Path) -> Read:
    """Read a label file: a table, JSON, JSON lines or COCO's instances. UserError as its reader."""
    with errors.reading(path, "docs/formats.md shows the forms of labels that are read"):
        if path.suffix.lower() not in _JSON:
            return Read(tables.read(path), None, f"the table {path.name}", path=path)
        content = json_files.load(path)
        if instances.is_instances(content):
            found = instances.read(path, content)
            return Read(found.tags(), found, f"the COCO file {path.name}", path=path)
        tags = json_files.read(path, content)
        return Read(tags, None, f"the JSON file {path.name}", path=path)


def _folder(path: Path, images: Path, listing: Listing) -> Read:
    paths = sorted(path.rglob(_XML))
    if paths:
        return Read(annotation.read(path, paths), None, f"annotations in {path.name}")
    if path.resolve() == images.resolve():
        return Read(class_folders.read(listing.images), None, FOLDERS)
    raise UserError(
        f"prepare.labels: the folder {path} holds no annotations (.xml), and is not that of the "
        "images; name a label file"
    )


def candidates(root: Path, images: Path) -> list[Path]:
    """List the files that `auto` takes for labels: in `root`, else beside it under its name."""
    places = [root, *([images] if images != root else []), *_existing(root, _XML_FOLDERS)]
    found = [
        path
        for place in places
        for path in sorted(place.iterdir())
        if path.suffix.lower() in _TABLES | _JSON and not path.name.startswith(".")
    ]
    usual = [path for path in found if path.stem.lower() in _USUAL]
    found = usual or found
    if not found:
        beside = (root.parent / f"{root.name}{suffix}" for suffix in sorted(_TABLES | _JSON))
        found = [path for path in beside if path.is_file()]
    return found


def _file_of(root: Path, images: Path, _: Listing) -> Read | None:
    """A label file in `root`, or beside it under its name."""
    found = candidates(root, images)
    if len(found) > 1:
        names = ", ".join(path.relative_to(root.parent).as_posix() for path in found[:4])
        raise UserError(
            f"{len(found)} files may hold the labels ({names}); name one in prepare.labels"
        )
    return of_file(found[0]) if found else None


def _annotations_of(root: Path, images: Path, listing: Listing) -> Read | None:
    """Annotations in a folder of their own, or beside the images."""
    for folder in _existing(root, _XML_FOLDERS):
        if paths := sorted(folder.rglob(_XML)):
            return Read(annotation.read(folder, paths), None, f"annotations in {folder.name}")
    beside = [
        path
        for name, path in listing.others.items()
        if name.lower().endswith(".xml") and name[:-4] in listing.images
    ]
    if not beside:
        return None
    return Read(annotation.read(images, beside), None, "annotations beside the images")


def _folders_of(_: Path, __: Path, listing: Listing) -> Read | None:
    tags = class_folders.read(listing.images)
    if not tags.rows and not tags.problems:
        return None
    # A set that lies in folders of splits is told of images that are in two of them.
    if any(row.split for row in tags.rows):
        return Read(tags, None, FOLDERS)
    copies = class_folders.copies(listing.images)
    rows = tuple(replace(row, image=copies.get(row.image, row.image)) for row in tags.rows)
    notes = tags.notes
    if copies:
        first, other = next((kept, id_) for id_, kept in copies.items())
        told = f"such as {other} of {first}; each image has the classes of all its folders"
        notes = (*notes, f"{len(copies)} files are copies in other folders, {told}")
    return Read(replace(tags, rows=rows, notes=notes), None, FOLDERS, copies)


def _existing(root: Path, names: tuple[str, ...]) -> list[Path]:
    return [root / name for name in names if (root / name).is_dir()]
