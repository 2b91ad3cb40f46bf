"""Presets: complete sets of parameters that `isim preset NAME` writes into params.yaml.

Some are files; the others are settings on the axes of `paper.yaml` on top of a file, and so is
whatever is asked for with further settings.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isim.errors import UserError
from isim.experiments import cells, overlay
from isim.params import Params, flatten, read_yaml, validate
from isim.runtime.atomic import write_text


def titles() -> dict[str, str]:
    """Names of the presets with their titles: files first, then those put together."""
    files = {name: overlay.head(name)[0] for name in overlay.names()}
    return files | {name: title for name, (title, _) in cells.load().presets.items()}


def parameters(name: str, settings: Sequence[str] = ()) -> Params:
    """Parameters of a preset; arguments and errors are those of `made`."""
    return validate(overlay.plain(text(name, settings)), name)


def text(name: str, settings: Sequence[str] = ()) -> str:
    """YAML of a preset; arguments and errors are those of `made`."""
    return made(name, settings)[1]


def made(name: str, settings: Sequence[str] = ()) -> tuple[list[str], str]:
    """Lines that tell what a preset is (title, expected figures, time, command), and its YAML.

    Args:
        name: Name of a preset, as `titles` lists them.
        settings: `AXIS=VALUE`, on top of it.

    Raises:
        UserError: Unknown name, axis or value; an axis twice; settings that do not go together.
    """
    known = titles()
    if name not in known:
        raise UserError(f"unknown preset {name}; known: {', '.join(known)}")
    paper = cells.load()
    extra: dict[str, str] = {}
    for axis, value in map(paper.setting, settings):
        if axis in extra:
            raise UserError(
                f"axis {axis} is set twice, to '{extra[axis]}' and '{value}'; set it once"
            )
        extra[axis] = value
    base = paper.preset if name in paper.presets else name
    _, own = paper.presets.get(name, ("", {}))
    tree = overlay.tree(base)
    overlay.merge(tree, cells.nest(paper.parameters({**own, **extra})))
    body = overlay.dump(tree)
    head = overlay.head(base)
    if name in paper.presets or extra:
        words = [f"{axis}={value}" for axis, value in extra.items()]
        head = [
            "; ".join((known[name], *words)),
            f"expected: {_expected(paper, flatten(overlay.plain(body)))}",
            f"time: not measured here; see preset {base}, of which settings differ",
            f"run: {shlex.join(('isim', 'preset', name, *words))} && dvc repro",
        ]
    validate(overlay.plain(body), " ".join((name, *settings)))
    return head, body


def write(name: str, path: Path, settings: Sequence[str] = ()) -> list[str]:
    """Write the values of a preset into the parameter file `path`, keeping its comments.

    A missing file is written as `text` gives it; the file changes in one step or not at all.

    Returns:
        The lines of `made`.

    Raises:
        UserError: As `made`; `path` is no valid YAML, holds a parameter that does not exist
            or cannot be written.
    """
    head, result = made(name, settings)
    if path.exists():
        tree = read_yaml(path)
        overlay.merge(tree, overlay.plain(result))
        result = overlay.dump(tree)
        validate(overlay.plain(result), str(path))
    write_text(path, result)
    return head


def _expected(paper: cells.Paper, values: Mapping[str, Any]) -> str:
    """The paper's figures of these parameters, with the table to look up what each is."""
    figures = paper.expected(values)
    if not figures:
        return "the paper has no figure of this"
    tables = (f"table {name}: {', '.join(map(str, found))}" for name, found in figures.items())
    return f"{'; '.join(tables)} (%, the paper's; `isim tables` says of what)"
