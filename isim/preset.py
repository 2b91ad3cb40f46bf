"""Presets: complete sets of parameters that `isim preset NAME` writes into params.yaml."""

from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from isim.atomic import write_text
from isim.errors import UserError
from isim.params import read_yaml, validate


def titles() -> dict[str, str]:
    """Names of the presets, each with the first comment line of its file."""
    files = sorted(folder().glob("*.yaml"))
    return {file.stem: file.read_text().splitlines()[0].lstrip("# ") for file in files}


def folder() -> Path:
    """The folder of the preset files inside the installed package."""
    return Path(str(resources.files("isim"))) / "presets"


def write(name: str, path: Path) -> None:
    """Write the values of preset `name` into the parameter file `path`, keeping its comments.

    A missing file is written as the preset stands.

    Args:
        name: Name of a preset, as `titles` lists them.
        path: The parameter file; it changes in one step or not at all.

    Raises:
        UserError: Unknown name; `path` is no valid YAML, holds a parameter that does not exist
            or cannot be written.
    """
    known = titles()
    if name not in known:
        raise UserError(f"unknown preset {name}; known: {', '.join(known)}")
    source = folder() / f"{name}.yaml"
    if not path.exists():
        write_text(path, source.read_text())
        return
    tree = read_yaml(path)
    merge(tree, read_yaml(source))
    text = dump(tree)
    validate(YAML(typ="safe").load(text), str(path))
    write_text(path, text)


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
