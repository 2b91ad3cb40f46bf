"""Presets: complete sets of parameters that `isim preset NAME` writes into params.yaml.

Some are files; the others are settings on the axes of `paper.yaml` on top of a file, and so is
whatever is asked for with further settings.
"""

import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from isim import paper as papers
from isim.atomic import write_text
from isim.errors import UserError
from isim.paper import Paper
from isim.params import read_yaml, validate


def titles() -> dict[str, str]:
    """Names of the presets, each with what it is: files first, then those put together."""
    files = sorted(folder().glob("*.yaml"))
    written = {file.stem: file.read_text().splitlines()[0].lstrip("# ") for file in files}
    return written | {entry.name: entry.title for entry in papers.load().presets}


def folder() -> Path:
    """The folder of the preset files inside the installed package."""
    return Path(str(resources.files("isim"))) / "presets"


def text(name: str, settings: Sequence[str] = ()) -> str:
    """YAML of a preset, opened by four comments: title, expected figures, time, command.

    Args:
        name: Name of a preset, as `titles` lists them.
        settings: `AXIS=VALUE`, on top of it.

    Raises:
        UserError: Unknown name, axis or value; an axis twice; settings that do not go together.
    """
    known = titles()
    if name not in known:
        raise UserError(f"unknown preset {name}; known: {', '.join(known)}")
    paper = papers.load()
    extra: dict[str, str] = {}
    for axis, value in map(paper.setting, settings):
        if axis in extra:
            raise UserError(
                f"axis {axis} is set twice, to '{extra[axis]}' and '{value}'; set it once"
            )
        extra[axis] = value
    made = {entry.name: entry for entry in paper.presets}
    base = paper.preset if name in made else name
    written = (folder() / f"{base}.yaml").read_text()
    if base == name and not extra:
        return written
    own = made[name].settings if name in made else {}
    tree = YAML(typ="rt").load(_without_head(written))
    merge(tree, _nested(paper.parameters({**own, **extra})))
    body = dump(tree)
    values = YAML(typ="safe").load(body)
    words = [f"{axis}={value}" for axis, value in extra.items()]
    validate(values, " ".join((name, *words)))
    head = (
        "; ".join((known[name], *words)),
        f"expected: {_expected(paper, values)}",
        f"time: not measured here; see preset {base}, of which settings differ",
        f"run: {shlex.join(('isim', 'preset', name, *words))} && dvc repro",
    )
    return "".join(f"# {line}\n" for line in head) + "\n" + body


def write(name: str, path: Path, settings: Sequence[str] = ()) -> None:
    """Write the values of a preset into the parameter file `path`, keeping its comments.

    A missing file is written as the preset stands.

    Args:
        name: As for `text`.
        path: The parameter file; it changes in one step or not at all.
        settings: As for `text`.

    Raises:
        UserError: As `text`; `path` is no valid YAML, holds a parameter that does not exist
            or cannot be written.
    """
    source = text(name, settings)
    if not path.exists():
        write_text(path, source)
        return
    tree = read_yaml(path)
    merge(tree, YAML(typ="rt").load(source))
    result = dump(tree)
    validate(YAML(typ="safe").load(result), str(path))
    write_text(path, result)


def _without_head(source: str) -> str:
    """The text after the comments that a file opens with, which tell of that file alone."""
    lines = source.splitlines(keepends=True)
    while lines and (lines[0].startswith("#") or not lines[0].strip()):
        del lines[0]
    return "".join(lines)


def _nested(parameters: Mapping[str, Any]) -> CommentedMap:
    """Parameters by dotted name as a tree that `merge` takes."""
    tree: dict[str, Any] = {}
    for name, value in parameters.items():
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return YAML(typ="rt").load(dump(tree))


def _expected(paper: Paper, values: Mapping[str, Any]) -> str:
    """The paper's figures of these parameters, with the table to look up what each is."""
    figures = paper.expected(values)
    if not figures:
        return "the paper has no figure of this"
    tables = (f"table {name}: {', '.join(map(str, found))}" for name, found in figures.items())
    return f"{'; '.join(tables)} (%, the paper's; `isim tables` says of what)"


def merge(tree: CommentedMap, values: CommentedMap) -> None:
    """Set every value of `values` in `tree` in place, in block style; comments of `tree` stay."""
    for key, value in values.items():
        old = tree.get(key)
        if isinstance(old, CommentedMap) and isinstance(value, CommentedMap):
            merge(old, value)
        elif isinstance(old, CommentedSeq) and isinstance(value, CommentedSeq):
            _replace_items(old, value)
        else:
            tree[key] = value
    # `dvc exp run -S` can rewrite lists in flow style, which holds no comments.
    tree.fa.set_block_style()


def _replace_items(old: CommentedSeq, new: CommentedSeq) -> None:
    # A comment that follows a list belongs to the list's last item: it moves to the new last.
    trailing = old.ca.items.pop(len(old) - 1, None)
    old.ca.items.clear()
    old[:] = list(new)
    if trailing is not None:
        old.ca.items[len(old) - 1] = trailing
    old.fa.set_block_style()


def dump(tree: Any) -> str:  # noqa: ANN401 - a round-trip YAML tree
    """YAML text of a round-trip tree: two spaces, lists indented below their key."""
    yaml = YAML(typ="rt")
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 100
    stream = StringIO()
    yaml.dump(tree, stream)
    return stream.getvalue()
