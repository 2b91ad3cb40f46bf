"""Annotations of VOC's form: one XML file an image, with an `object` for each thing in it."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from isim.data.formats import tagged
from isim.data.formats.tagged import Tagged, Tags
from isim.data.problems import Problem
from isim.errors import UserError


def names(path: Path) -> tuple[tuple[str, ...], str]:
    """Read the sorted names of objects, difficult included, not of parts; and the image's name.

    Raises UserError when the file is no such annotation.
    """
    try:
        text = path.read_bytes()
        # VOC needs no DTD; entities are how XML files exhaust memory.
        if b"<!DOCTYPE" in text:
            raise UserError(f"{path} declares a DOCTYPE; remove it")
        root = ElementTree.fromstring(text)
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a readable annotation ({reason}); replace it") from error
    # The objects' own names; those of their parts are below them.
    labels = {(node.findtext("name") or "").strip() for node in root.iter("object")}
    return tuple(sorted(labels)), (root.findtext("filename") or "").strip()


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
