"""Preset files: a complete base with comments, and files of the values that differ from it."""

from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

FOLDER = Path(__file__).parent / "presets"
BASE = "base"


def names() -> list[str]:
    """Names of the preset files, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != BASE)


def head(name: str) -> list[str]:
    """Four lines that a preset file opens with: title, expected figures, time, command."""
    return [line.removeprefix("# ") for line in _read(name).splitlines()[:4]]


def tree(name: str) -> CommentedMap:
    """All parameters of a preset file, with the comments of the base."""
    whole: CommentedMap = YAML(typ="rt").load(_read(BASE))
    merge(whole, plain(_read(name)))
    return whole


def plain(text: str) -> dict[str, Any]:
    """Mappings, lists and values of a YAML text; none in a text of comments alone."""
    return YAML(typ="safe").load(text) or {}


def merge(tree: CommentedMap, values: Mapping[str, Any]) -> None:
    """Set every value of `values` in `tree` in place, in block style; comments of `tree` stay."""
    for key, value in values.items():
        old = tree.get(key)
        if isinstance(old, CommentedMap) and isinstance(value, Mapping):
            merge(old, value)
        elif isinstance(old, CommentedSeq) and isinstance(value, list):
            # A comment that follows a list belongs to its last item: it moves to the new last.
            trailing = old.ca.items.get(len(old) - 1)
            old.ca.items.clear()
            old[:] = value
            if trailing is not None:
                old.ca.items[len(old) - 1] = trailing
            old.fa.set_block_style()
        else:
            tree[key] = value
    # `dvc exp run -S` can rewrite lists in flow style, which holds no comments.
    tree.fa.set_block_style()


def dump(tree: CommentedMap) -> str:
    """YAML text of a commented tree: two spaces, lists indented below their key."""
    yaml = YAML(typ="rt")
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 100
    stream = StringIO()
    yaml.dump(tree, stream)
    return stream.getvalue()


def _read(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
