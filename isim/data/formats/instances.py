"""COCO's instances: a JSON file of images, categories and annotated objects."""

import operator
from collections import Counter
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


@dataclass(frozen=True)
class Instances:
    """Content of an instances file.

    Attributes:
        path: The file.
        classes: Names of the categories, in the file's order.
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
        used = {name for row in rows for name in row.labels or ()}
        unused = [name for name in self.classes if name not in used]
        note = f"{self.path.name}: {len(unused)} categories without an object are no classes"
        return Tags(tuple(rows), notes=(f"{note}, such as {unused[0]}",) if unused else ())

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
        _require_once("file_name", [name for name, _, _ in images.values()])
        objects: dict[int, list[Annotation]] = {}
        for one in given.get("annotations", ()):
            if one["category_id"] not in names or one["image_id"] not in images:
                raise ValueError(f"annotation {one.get('id')} is of no known image or category")
            objects.setdefault(int(one["image_id"]), []).append(one)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path} is no usable instances file of COCO ({errors.reason(error)}); mend it"
        ) from error
    return Instances(path, tuple(names.values()), images, objects, names)


def _numbered(what: str, given: Sequence[Any], make: Callable[[Any], T]) -> dict[int, T]:
    """Make the values of entries by their ids. ValueError for an id that is there twice."""
    _require_once(f"id of the {what}", [int(one["id"]) for one in given])
    return {int(one["id"]): make(one) for one in given}


def _require_once(what: str, values: Sequence[object]) -> None:
    # The last of equal ones would take the place of the others without a word.
    value, count = next(iter(Counter(values).most_common(1)), (None, 1))
    if count > 1:
        raise ValueError(f"{what} {value} is there {count} times")


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
        if (told := sum(_runs(outline["counts"]))) != height * width:
            # pycocotools leaves the rest as it finds the memory.
            raise ValueError(f"its runs are of {told} pixels, not of {height * width}")
        return
    for polygon in outline:
        points = np.asarray(polygon, np.float64)
        # NaN is in no range.
        if points.ndim != 1 or not (np.abs(points) <= 2 * max(height, width)).all():
            raise ValueError("a corner lies far outside of the image")


def _runs(counts: Any) -> list[int]:  # noqa: ANN401 - of JSON
    """Lengths of the runs of an outline; ValueError, or LookupError, for what is none."""
    if isinstance(counts, list):
        return [operator.index(count) for count in counts]
    found: list[int] = []
    value = shift = 0
    for char in counts.encode("ascii"):
        # Five bits a character, and from the fourth run on the difference to the one before last.
        value |= (char - 48 & 31) << shift
        shift += 5
        if char - 48 & 32:
            continue
        value -= 1 << shift if char - 48 & 16 else 0
        found.append(value + (found[-2] if len(found) > 2 else 0))
        value = shift = 0
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
