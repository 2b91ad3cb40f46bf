"""The paper's experiments, read from `paper.yaml`: cells of tables and the commands that run them.

What each cell is and what the paper found is data; this module knows how a file like that one is
put together, not what is in it.
"""

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from isim.errors import UserError

# Settings of a cell that are no axis of parameters.
REPORTING = ("figure", "scored", "class", "epoch")


@dataclass(frozen=True)
class Figure:
    """Where the value of a cell is found.

    `file` is a report (JSON, or CSV with the row that `where` picks) and None where no report
    can hold the value; `key` is dotted in JSON, a column in CSV. `stage` writes the file.
    `scored` is the split that the value is over, `images` the key of the number of its images
    that were scored; each None where there is none.
    """

    stage: str
    file: str | None
    key: str
    where: Mapping[str, str]
    images: str | None
    scored: str | None


@dataclass(frozen=True)
class Cell:
    """One value of a table.

    `paper` is in percent, None where the paper has none. `parameters` (dotted names) are what a
    command sets, `matched` what a run must have; `figure` is None for a method of others, which
    no experiment here gives.
    """

    paper: float | None
    parameters: Mapping[str, Any]
    matched: Mapping[str, Any]
    figure: Figure | None


@dataclass(frozen=True)
class Table:
    """A table of the paper, or an experiment that it shows otherwise: `cells[row][column]`.

    `runs` has the name of each row's runs, None where DVC is to find one.
    """

    name: str
    title: str
    rows: tuple[str, ...]
    runs: tuple[str | None, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...]

    @property
    def heading(self) -> str:
        """Name and title in one line."""
        names = {"fig": "Figure ", "sec": "Section "}
        kind, rest = names.get(self.name[:3]), self.name[3:]
        return f"{kind}{rest}. {self.title}" if kind else f"Table {self.name}. {self.title}"


@dataclass(frozen=True)
class Counted:
    """Where a run says how many images `{split}` has: report, key (with the dots that it has).

    `trained` is the parameter that names the split that was trained on.
    """

    file: str
    key: str
    trained: str


@dataclass(frozen=True)
class Profile:
    """A parameter that is shown and not compared; what its values need of other parameters."""

    parameter: str
    needs: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Preset:
    """A preset that is put together: the value of each axis that it sets."""

    name: str
    title: str
    settings: Mapping[str, str]


@dataclass(frozen=True)
class Paper:
    """All of `paper.yaml`.

    `values` are those of `preset`, which hold for parameters that cells do not name, and
    `presets` are others on top of it; `axes` has the parameters of each axis's values; `stages`
    is the pipeline's order; `images` counts the images of whole splits; `profile` is what is
    shown beside a measured value.
    """

    preset: str
    values: Mapping[str, Any]
    stages: tuple[str, ...]
    images: Mapping[str, int]
    counted: Counted
    profile: Profile
    axes: Mapping[str, Mapping[str, Mapping[str, Any]]]
    presets: tuple[Preset, ...]
    tables: tuple[Table, ...]

    def table(self, name: str) -> Table:
        """Return the table of that name.

        Raises:
            UserError: There is none.
        """
        for table in self.tables:
            if table.name == name:
                return table
        known = ", ".join(table.name for table in self.tables)
        raise UserError(f"--table: there is no table '{name}'; choose one of {known}")

    def setting(self, text: str) -> tuple[str, str]:
        """Read `AXIS=VALUE`; case does not matter, and `x` stands for a multiplication sign.

        Raises:
            UserError: No such axis, or it has no such value.
        """
        axis, equals, value = text.partition("=")
        known = _named(axis, self.axes)
        if not equals or known is None:
            raise UserError(
                f"there is no axis '{axis}'; write AXIS=VALUE with one of {', '.join(self.axes)}"
            )
        found = _named(value, self.axes[known])
        if found is None:
            raise UserError(
                f"axis {known} has no '{value}'; choose one of {', '.join(self.axes[known])}"
            )
        return known, found

    def parameters(self, settings: Mapping[str, str]) -> dict[str, Any]:
        """Parameters (dotted names) that settings on axes stand for."""
        return {
            name: parameter
            for axis, value in settings.items()
            for name, parameter in self.axes[axis][value].items()
        }

    def expected(self, values: Mapping[str, Any]) -> dict[str, list[float]]:
        """The paper's figures, by table, that a run with `values` is to give, in percent."""
        found: dict[str, list[float]] = {}
        for table in self.tables:
            for cell in (cell for row in table.cells for cell in row):
                wanted = {**cell.matched, **cell.parameters}
                if cell.paper is None or cell.figure is None or cell.figure.file is None:
                    continue
                if all(dig(values, name) == value for name, value in wanted.items()):
                    found.setdefault(table.name, []).append(cell.paper)
        return found


def _named(name: str, known: Iterable[str]) -> str | None:
    """Which of `known` is meant by `name`, if any."""
    plain = {entry.casefold().replace("×", "x"): entry for entry in known}
    return plain.get(name.strip().casefold().replace("×", "x"))


def load() -> Paper:
    """Read `paper.yaml` of the installed package."""
    folder = Path(str(resources.files("isim")))
    tree = _read(folder / "paper.yaml")
    return parse(tree, _read(folder / "presets" / f"{tree['preset']}.yaml"))


def _read(path: Path) -> Mapping[str, Any]:
    tree: Mapping[str, Any] = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    return tree


def parse(tree: Mapping[str, Any], values: Mapping[str, Any]) -> Paper:
    """Put the cells of a tree like `paper.yaml` together.

    Args:
        tree: As `paper.yaml`.
        values: All parameters, as the preset that the tree names has them.

    Raises:
        KeyError: A setting that is on no axis, or a figure that is not described.
        ValueError: Figures of the paper that do not fit their rows and columns.
    """
    return Paper(
        preset=tree["preset"],
        values=values,
        stages=tuple(tree["stages"]),
        counted=Counted(**tree["counted"]),
        images=tree["images"],
        profile=Profile(**tree["profile"]),
        axes=tree["axes"],
        presets=tuple(
            Preset(entry["name"], entry["title"], entry["with"]) for entry in tree["presets"]
        ),
        tables=tuple(_table(entry, tree, flatten(values)) for entry in tree["tables"]),
    )


def _table(entry: Mapping[str, Any], tree: Mapping[str, Any], given: Mapping[str, Any]) -> Table:
    rows, columns = (_lines(entry[name], tree["axes"]) for name in ("rows", "columns"))
    blank = [[None] * len(columns)] * len(rows)
    figures = entry.get("paper", blank)
    shared = tree["defaults"] | entry.get("with", {})
    cells = tuple(
        tuple(
            Cell(value, {}, {}, None)
            if row is None
            else _cell(shared | row | (column or {}), value, tree, given)
            for column, value in zip(columns.values(), values, strict=True)
        )
        for row, values in zip(rows.values(), figures, strict=True)
    )
    notes = tuple(entry.get("notes", ()))
    named = entry.get("named", False)
    runs = tuple(_slug(f"{entry['name']} {row}") if named else None for row in rows)
    return Table(entry["name"], entry["title"], tuple(rows), runs, tuple(columns), cells, notes)


def _slug(words: str) -> str:
    """Words as the name of an experiment, which is that of a git reference."""
    return re.sub(r"[^a-z0-9]+", "-", words.casefold()).strip("-")


def _lines(
    entry: Mapping[str, Any], axes: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, dict[str, str] | None]:
    """Settings of every row or column, by its name."""
    if "over" not in entry:
        return entry
    names = entry.get("only", axes[entry["over"][0]])
    return {name: dict.fromkeys(entry["over"], name) for name in names}


def _cell(
    settings: Mapping[str, str],
    paper: float | None,
    tree: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Cell:
    described = tree["figures"][settings["figure"]]

    def depends(name: str) -> bool:
        return name.split(".")[0] in described["sections"]

    parameters: dict[str, Any] = {}
    for axis, value in settings.items():
        if axis not in REPORTING:
            parameters |= {k: v for k, v in tree["axes"][axis][value].items() if depends(k)}
    values = {**given, **parameters}
    unused = [
        pattern for name, meant in tree["unused"].items() for pattern in meant.get(values[name], ())
    ]
    compared = described.get("compared", ())
    not_compared = (*tree["not_compared"], *described.get("not_compared", ()))
    common = {k: v for k, v in given.items() if depends(k) and not _fits(k, unused)}
    matched = {
        name: value
        for name, value in (common | parameters).items()
        if name in compared or not _fits(name, not_compared)
    }
    words = {name: settings.get(name, "") for name in REPORTING}
    where = {name: text.format(**words) for name, text in described.get("where", {}).items()}
    images = described.get("images")
    figure = Figure(
        stage=described["stage"],
        file=described.get("file"),
        key=described.get("key", "").format(**words),
        where=where,
        images=images and images.format(**words),
        scored=settings.get("scored"),
    )
    return Cell(paper, parameters, matched, figure)


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


@dataclass(frozen=True)
class Experiment:
    """Parameters (dotted names) and the stages to run for every value that hangs on them.

    `name` is None where any will do.
    """

    parameters: Mapping[str, Any]
    stages: tuple[str, ...]
    name: str | None


def experiments(tables: Iterable[Table]) -> list[Experiment]:
    """The fewest runs that give every value of `tables`, in their order.

    Two cells share a run when no parameter differs: the one with the longer way through the
    pipeline then gives the other's value, too.
    """
    found: list[Experiment] = []
    cells = [
        (name, cell)
        for table in tables
        for name, row in zip(table.runs, table.cells, strict=True)
        for cell in row
    ]
    for name, cell in cells:
        if cell.figure is None:
            continue
        wanted = cell.parameters
        for place, known in enumerate(found):
            if all(known.parameters.get(key, value) == value for key, value in wanted.items()):
                stages = dict.fromkeys((*known.stages, cell.figure.stage))
                both = {**known.parameters, **wanted}
                found[place] = Experiment(both, tuple(stages), known.name or name)
                break
        else:
            found.append(Experiment(wanted, (cell.figure.stage,), name))
    return found


def commands(paper: Paper, tables: Iterable[Table]) -> list[str]:
    """Shell lines that run `tables`: write the preset, queue each experiment, start the queue.

    Args:
        paper: Has the preset, whose values are not set again, and the order of stages.
        tables: What is to be run.

    Returns:
        One command a line.
    """
    lines = [f"isim preset {paper.preset}"]
    for experiment in experiments(tables):
        options = [
            f"-S {shlex.quote(f'{name}={literal(value)}')}"
            for name, value in experiment.parameters.items()
            if dig(paper.values, name) != value
        ]
        stages = sorted(experiment.stages, key=paper.stages.index)
        named = [f"--name {experiment.name}"] if experiment.name else []
        lines.append(" ".join(("dvc exp run --queue", *named, *stages, *options)))
    lines.append("dvc queue start")
    return lines


def literal(value: Any) -> str:  # noqa: ANN401 - any parameter value
    """Write a parameter's value as `dvc exp run -S` (Hydra's grammar) takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(literal, value)) + "]"
    return str(value)


def dig(tree: Any, name: str) -> Any:  # noqa: ANN401 - any parameter tree
    """Return the value of dotted `name` in nested mappings, or None."""
    for part in name.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return None
        tree = tree[part]
    return tree
