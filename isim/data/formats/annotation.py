"""Annotations of VOC's form: one XML file an image, with an `object` for each thing in it."""

import contextlib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NoReturn
from xml.parsers import expat

from isim import errors
from isim.data.formats import tagged
from isim.data.formats.tagged import Tagged, Tags
from isim.data.problems import Problem
from isim.errors import UserError

# Bytes of one image's annotation.
_MOST_BYTES = 16 << 20


def names(path: Path) -> tuple[tuple[str, ...], str]:
    """Read the sorted names of objects, difficult included, not of parts; and the image's name.

    Raises UserError when the file is no such annotation.
    """
    with errors.reading(path, "replace it", "is not a readable annotation"):
        text = errors.contents(path, _MOST_BYTES)
        _refuse_dtd(path, text)
        root = ElementTree.fromstring(text)
        # Another form, whose objects are not found, would tell that there is none.
        if root.tag != "annotation":
            raise ValueError(f"its root is <{root.tag[:40]}>, not <annotation>")
        # The objects' own names; those of their parts are below them.
        labels = {(node.findtext("name") or "").strip() for node in root.iter("object")}
        if "" in labels:
            raise ValueError("an object has no name")
        return tuple(sorted(labels)), (root.findtext("filename") or "").strip()


class _Begun(Exception):
    """The first element begins: no DTD can follow."""


def _refuse_dtd(path: Path, text: bytes) -> None:
    """Raise UserError for a DTD, in any encoding: entities are how XML files exhaust memory."""

    def refuse(*_: object) -> NoReturn:
        raise UserError(f"{path} declares a DOCTYPE; remove it")

    def begin(*_: object) -> NoReturn:
        raise _Begun

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler, parser.StartElementHandler = refuse, begin
    with contextlib.suppress(_Begun):
        parser.Parse(text, True)


def read(folder: Path, paths: list[Path]) -> Tags:
    """Read the tags of annotations; an image has the place and name of its own below `folder`."""
    rows, problems = [], []
    for path in paths:
        try:
            labels, image = names(path)
        except UserError as error:
            problems.append(Problem("unreadable annotation", str(error), str(path)))
            continue
        relative = path.relative_to(folder)
        row = Tagged(
            relative.with_suffix("").as_posix(),
            tagged.distinct(labels),
            relative.as_posix(),
            otherwise=image,
            objects=True,
        )
        rows.append(row)
    return Tags(tuple(rows), tuple(problems))
