"""The paper's experiments, of `paper.yaml`: cells of tables and the commands that run them."""

import itertools
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from isim.errors import UserError
from isim.experiments import overlay
from isim.params import flatten

# Settings of a cell that are no axis of parameters.
REPORTING = ("figure", "scored", "class", "epoch")

Settings = Mapping[str, str]


@dataclass(frozen=True)
class Figure:
    """Place in which the value of a cell is found.

    `file` is a report of `stage` (JSON, or CSV with the row that `where` picks) and None where no
    report can hold the value; `key` is dotted in JSON, a column in CSV. `scored` is the split that
    the value is over, `images` the key of the number of its images that were scored, if any.
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
    command sets, `matched` what a run must have; `figure` is None for a method of others.
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
        kind = {"fig": "Figure", "sec": "Section"}.get(self.name[:3])
        place = f"{kind} {self.name[3:]}" if kind else f"Table {self.name}"
        return f"{place}. {self.title}"


class Paper:
    """Content of `paper.yaml`, which says what each of its entries means.

    `values` are those of the preset, by dotted name; `presets` has title and settings by name.
    """

    def __init__(self, tree: Mapping[str, Any]) -> None:
        """Put the cells of the file's content together.

        Raises:
            KeyError: A setting that is on no axis, or a figure that is not described.
            ValueError: Figures of the paper that do not fit their rows and columns.
        """
        self._tree = tree
        self.preset: str = tree["preset"]
        self.values = flatten(overlay.plain(overlay.dump(overlay.tree(self.preset))))
        self.stages: list[str] = tree["stages"]
        self.images: Mapping[str, int] = tree["images"]
        self.counted: Mapping[str, str] = tree["counted"]
        self.profile: Mapping[str, Any] = tree["profile"]
        self.axes: Mapping[str, Mapping[str, Mapping[str, Any]]] = tree["axes"]
        self.presets: dict[str, tuple[str, Settings]] = {
            entry["name"]: (entry["title"], entry["with"]) for entry in tree["presets"]
        }
        self.tables = tuple(map(self._table, tree["tables"]))

    def chosen(self, name: str | None) -> tuple[Table, ...]:
        """Return the table of that name alone, or all tables without one.

        Raises:
            UserError: There is no such table.
        """
        found = tuple(table for table in self.tables if name in (None, table.name))
        if not found:
            known = ", ".join(table.name for table in self.tables)
            raise UserError(f"--table: there is no table '{name}'; choose one of {known}")
        return found

    def setting(self, text: str) -> tuple[str, str]:
        """Read `AXIS=VALUE`; case does not matter, and `x` stands for a multiplication sign.

        Raises:
            UserError: No such axis, or it has no such value.
        """
        name, equals, word = text.partition("=")
        unknown = f"there is no axis '{name}'; write AXIS=VALUE with one of"
        axis = _named(name if equals else "", self.axes, unknown)
        return axis, _named(word, self.axes[axis], f"axis {axis} has no '{word}'; choose one of")

    def parameters(self, settings: Settings) -> dict[str, Any]:
        """Parameters (dotted names) that settings on axes stand for."""
        meant = (self.axes[axis][value] for axis, value in settings.items())
        return {name: value for parameters in meant for name, value in parameters.items()}

    def expected(self, values: Mapping[str, Any]) -> dict[str, list[float]]:
        """The paper's figures, by table, that a run with `values` is to give, in percent."""
        found: dict[str, list[float]] = {}
        for table in self.tables:
            for cell in itertools.chain(*table.cells):
                if cell.paper is None or cell.figure is None or cell.figure.file is None:
                    continue
                wanted = {**cell.matched, **cell.parameters}
                if all(values[name] == value for name, value in wanted.items()):
                    found.setdefault(table.name, []).append(cell.paper)
        return found

    def _table(self, entry: Mapping[str, Any]) -> Table:
        rows, columns = (self._lines(entry[name]) for name in ("rows", "columns"))
        shared = self._tree["defaults"] | entry.get("with", {})
        paper = entry.get("paper", [[None] * len(columns)] * len(rows))
        cells = tuple(
            tuple(
                # A row without settings is a method of others.
                Cell(figure, {}, {}, None)
                if row is None
                else self._cell(shared | row | column, figure)
                for column, figure in zip(columns.values(), figures, strict=True)
            )
            for row, figures in zip(rows.values(), paper, strict=True)
        )
        notes = tuple(entry.get("notes", ()))
        named = entry.get("named", False)
        runs = tuple(_slug(f"{entry['name']} {row}") if named else None for row in rows)
        return Table(entry["name"], entry["title"], tuple(rows), runs, tuple(columns), cells, notes)

    def _lines(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        """Settings of every row or column, by its name."""
        if "over" not in entry:
            return entry
        names = entry.get("only", self.axes[entry["over"][0]])
        return {name: dict.fromkeys(entry["over"], name) for name in names}

    def _cell(self, settings: Settings, paper: float | None) -> Cell:
        described = self._tree["figures"][settings["figure"]]
        sections, compared = described["sections"], described.get("compared", ())
        on_axes = {axis: value for axis, value in settings.items() if axis not in REPORTING}
        parameters = _of(self.parameters(on_axes), sections)
        values = self.values | parameters
        unused = [
            pattern
            for name, meant in self._tree["unused"].items()
            for pattern in meant.get(values[name], ())
        ]
        aside = [*self._tree["not_compared"], *described.get("not_compared", ())]
        common = {k: v for k, v in _of(self.values, sections).items() if not _fits(k, unused)}
        matched = {
            name: value
            for name, value in (common | parameters).items()
            if name in compared or not _fits(name, aside)
        }
        words = {name: settings.get(name, "") for name in REPORTING}
        images = described.get("images")
        figure = Figure(
            described["stage"],
            described.get("file"),
            described.get("key", "").format(**words),
            {name: text.format(**words) for name, text in described.get("where", {}).items()},
            images and images.format(**words),
            settings.get("scored"),
        )
        return Cell(paper, parameters, matched, figure)


@cache
def load() -> Paper:
    """Read the installed `paper.yaml`; errors as `Paper`."""
    return Paper(overlay.plain(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8")))


def _named(name: str, known: Iterable[str], otherwise: str) -> str:
    """Find the one of `known` that is meant by `name`."""
    plain = {entry.casefold().replace("×", "x"): entry for entry in known}
    found = plain.get(name.strip().casefold().replace("×", "x"))
    if found is None:
        raise UserError(f"{otherwise} {', '.join(known)}")
    return found


def _slug(words: str) -> str:
    """Words as the name of an experiment, which is that of a git reference."""
    return re.sub(r"[^a-z0-9]+", "-", words.casefold()).strip("-")


def _of(parameters: Mapping[str, Any], sections: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name.split(".")[0] in sections}


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def nest(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by dotted name as a tree."""
    tree: dict[str, Any] = {}
    for name, value in parameters.items():
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return tree


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
    every = [
        (name, cell.figure.stage, cell.parameters)
        for table in tables
        for name, cells in zip(table.runs, table.cells, strict=True)
        for cell in cells
        if cell.figure
    ]
    for name, stage, wanted in every:
        for place, known in enumerate(found):
            if all(known.parameters.get(key, value) == value for key, value in wanted.items()):
                stages = tuple(dict.fromkeys((*known.stages, stage)))
                both = {**known.parameters, **wanted}
                found[place] = Experiment(both, stages, known.name or name)
                break
        else:
            found.append(Experiment(wanted, (stage,), name))
    return found


def commands(name: str | None) -> str:
    """Shell lines that run a table, or all: write the preset, queue each experiment, start.

    Raises:
        UserError: There is no such table.
    """
    paper = load()
    lines = [f"isim preset {paper.preset}"]
    for experiment in experiments(paper.chosen(name)):
        options = [
            f"-S {shlex.quote(f'{name}={literal(value)}')}"
            for name, value in experiment.parameters.items()
            if paper.values[name] != value
        ]
        stages = sorted(experiment.stages, key=paper.stages.index)
        named = [f"--name {experiment.name}"] if experiment.name else []
        lines.append(" ".join(("dvc exp run --queue", *named, *stages, *options)))
    return "\n".join((*lines, "dvc queue start"))


def literal(value: Any) -> str:  # noqa: ANN401 - any parameter value
    """Write a parameter's value as `dvc exp run -S` (Hydra's grammar) takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(literal, value)) + "]"
    return str(value)
