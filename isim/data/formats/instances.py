"""COCO's instances: a JSON file of images, categories and annotated objects."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from isim import errors
from isim.data import files
from isim.data.formats import json_files, tagged
from isim.data.formats.tagged import Tagged, Tags
from isim.data.prepared import id_fault
from isim.errors import UserError
from isim.metrics import IGNORE

Annotation = Mapping[str, Any]
T = TypeVar("T")
# Characters of a run in COCO's packed form, whose lengths have 32 bits, and a length above them.
_CHARACTERS, _LONGEST = 7, 1 << 40


@dataclass(frozen=True)
class Instances:
    """Content of an instances file.

    Attributes:
        path: The file.
        classes: Distinct names of the categories, in the file's order.
        images: File name, height and width of each image, by its number.
        objects: Annotations of each image, by its number; none of images without any.
        names: Name of each category, by its number.
    """

    path: Path
    classes: tuple[str, ...]
    images: dict[int, tuple[str, int, int]]
    objects: dict[int, list[Annotation]]
    names: dict[int, str]

    def tags(self) -> Tags:
        """Tags of every image: the categories of its objects, crowds included."""
        rows = []
        for number, (name, _, _) in self.images.items():
            found = {self.names[one["category_id"]] for one in self.objects.get(number, ())}
            where = f"{self.path.name}, {name}"
            rows.append(Tagged(name, tagged.distinct(found), where, objects=True))
        return Tags(tuple(rows))

    def unused(self) -> list[str]:
        """Names of the categories without an object, in the file's order."""
        used = {self.names[one["category_id"]] for some in self.objects.values() for one in some}
        return [name for name in self.classes if name not in used]

    def outlined(self, number: int) -> bool:
        """Tell whether every object of an image has an outline; an image without any has none."""
        return all(one.get("segmentation") for one in self.objects.get(number, ()))

    def mask(self, number: int, ids: Mapping[str, int]) -> NDArray[np.uint8]:
        """Make the semantic mask (H, W) of an image, given the class id of each name.

        Larger objects lie below smaller ones, as those that overlap are mostly parts of larger
        ones. Crowds, whose outlines are rough, are IGNORE where no object is.

        Raises UserError for an outline that is none.
        """
        from pycocotools import mask as outlines

        name, height, width = self.images[number]
        found: NDArray[np.uint8] = np.zeros((height, width), np.uint8)
        objects = self.objects.get(number, ())
        try:
            for one in sorted(objects, key=lambda one: (not one.get("iscrowd"), -_area(one))):
                given = one["segmentation"]
                _require_inside(given, height, width)
                if isinstance(given, list):
                    code = outlines.merge(outlines.frPyObjects(given, height, width))
                elif isinstance(given["counts"], list):
                    code = outlines.frPyObjects(given, height, width)
                else:
                    code = given
                inside = outlines.decode([code])[..., 0].astype(bool)
                found[inside] = (
                    IGNORE if one.get("iscrowd") else ids[self.names[one["category_id"]]]
                )
        # pycocotools meets a damaged outline with whatever its parser stumbles over.
        except Exception as error:
            raise UserError(
                f"{self.path}: an outline of {name} is unusable ({errors.reason(error)}); mend it"
            ) from error
        return found


def is_instances(content: object) -> bool:
    """Tell whether the content of a JSON file is COCO's."""
    return isinstance(content, dict) and isinstance(content.get("images"), list)


def read(path: Path, content: object = None) -> Instances:
    """Read an instances file; `content` is that of `json_files.load`, if it was read before.

    Raises:
        UserError: It is missing, unreadable or of another form.
    """
    given: Any = json_files.load(path) if content is None else content
    if not is_instances(given):
        raise UserError(f"{path} is no instances file of COCO: it has no list of images")
    try:
        names = _numbered("categories", given.get("categories", ()), _category)
        images = _numbered("images", given["images"], _image)
        objects: dict[int, list[Annotation]] = {}
        for one in given.get("annotations", ()):
            if one["category_id"] not in names or one["image_id"] not in images:
                raise ValueError(f"annotation {one.get('id')} is of no known image or category")
            objects.setdefault(int(one["image_id"]), []).append(one)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path} is no usable instances file of COCO ({errors.reason(error)}); mend it"
        ) from error
    # Categories of one name are one class.
    return Instances(path, tuple(dict.fromkeys(names.values())), images, objects, names)


def _numbered(what: str, given: Sequence[Any], make: Callable[[Any], T]) -> dict[int, T]:
    """Make the values of entries by their ids. ValueError for two that differ and have one id."""
    found: dict[int, T] = {}
    for one in given:
        number = int(one["id"])
        value = make(one)
        # The last one would take the place of the others without a word.
        if found.setdefault(number, value) != value:
            raise ValueError(f"two of the {what} differ and have the id {number}")
    return found


def _category(one: Mapping[str, Any]) -> str:
    name = one["name"]
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise ValueError(f"category {one['id']} has no name")
    return tagged.class_name(str(name))


def _image(one: Mapping[str, Any]) -> tuple[str, int, int]:
    return _posix(one["file_name"]), *_size(one)


def class_ids(classes: Sequence[str]) -> dict[str, int]:
    """Number the classes: 1 + the place of each."""
    return {name: place for place, name in enumerate(classes, start=1)}


def _area(annotation: Annotation) -> float:
    area = annotation.get("area")
    return float(area) if isinstance(area, int | float) else 0.0


def _require_inside(outline: Any, height: int, width: int) -> None:  # noqa: ANN401 - of JSON
    """Raise ValueError for an outline far outside of its image: pycocotools would end Python."""
    if isinstance(outline, Mapping):
        if [*outline["size"]] != [height, width]:
            raise ValueError(f"it is of {outline['size']} pixels, the image {[height, width]}")
        runs = _runs(outline["counts"])
        if not ((runs >= 0) & (runs <= height * width)).all():
            raise ValueError("its runs are longer than the image, or below 0")
        if (told := int(runs.sum())) != height * width:
            # pycocotools leaves the rest as it finds the memory.
            raise ValueError(f"its runs are of {told} pixels, not of {height * width}")
        return
    for polygon in outline:
        points = np.asarray(polygon, np.float64)
        # NaN is in no range.
        if points.ndim != 1 or not (np.abs(points) <= 2 * max(height, width)).all():
            raise ValueError("a corner lies far outside of the image")


def _runs(counts: Any) -> NDArray[np.int64]:  # noqa: ANN401 - of JSON
    """Lengths (R,) of the runs of an outline; ValueError for what is none, or may be damaged."""
    if isinstance(counts, list):
        given = np.asarray(counts)
        if given.ndim != 1 or given.dtype.kind not in "iuf":
            raise ValueError("its runs are no list of numbers")
        # NaN is in no range.
        if not ((np.abs(given) < _LONGEST) & (given == np.floor(given))).all():
            raise ValueError("its runs are no whole numbers of pixels")
        return given.astype(np.int64)
    codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    # Five bits a character, the lowest first; the sixth tells that the run goes on.
    ends = np.flatnonzero(codes & 32 == 0)
    if not ((codes >= 0) & (codes < 64)).all() or (len(codes) and codes[-1] & 32):
        raise ValueError("its runs have characters of no run, or are cut off")
    lengths = np.diff(ends, prepend=-1)
    if (lengths > _CHARACTERS).any():
        raise ValueError("its runs are longer than any image")
    starts = ends - lengths + 1
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    found: NDArray[np.int64] = np.zeros(len(ends), np.int64)
    if len(ends):
        found = np.add.reduceat((codes & 31) << shifts, starts)
    # The highest bit is the sign.
    found -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)
    # From the fourth run on each is the difference to the one before last.
    for first in (1, 2):
        found[first::2] = np.cumsum(found[first::2])
    return found


def _size(image: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of an image in pixels. ValueError for those of no image."""
    height, width = int(image["height"]), int(image["width"])
    if height < 1 or width < 1 or height * width > files.MOST_PIXELS:
        raise ValueError(f"{image['file_name']} of {width}x{height} pixels")
    if fault := id_fault(_posix(image["file_name"]).lstrip("/")):
        raise ValueError(f"an image called {fault}")
    return height, width


def _posix(name: object) -> str:
    return str(name).replace("\\", "/")
