"""The paper's tables with what was measured here, as `isim tables` prints them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from isim.experiments import cells as papers
from isim.experiments.cells import Cell, Figure, Paper, Table
from isim.experiments.runs import Run, lineage, read_all
from isim.params import flatten
from isim.runtime import atomic

BLANK = "-"


@dataclass(frozen=True)
class Measured:
    """A value in percent, the run that it is from and how many different runs match."""

    value: float
    run: str
    profile: str
    matching: int


# What was measured, by row and column.
Found = Mapping[tuple[str, str], Measured]


def report(
    root: Path, name: str | None, form: Literal["text", "markdown", "csv"]
) -> tuple[str, str | None]:
    """The table `name`, or all for None, with what the runs known in the project measured.

    Returns:
        The tables, and a line that says which runs could not be read, if so.

    Raises:
        UserError: There is no such table.
    """
    paper = papers.load()
    tables = paper.chosen(name)
    runs, note = read_all(root)
    found = [measure(table, runs, paper) for table in tables]
    if form == "csv":
        return as_csv(tables, found), note
    return "\n\n".join(map(markdown if form == "markdown" else text, tables, found)), note


def measure(table: Table, runs: Sequence[Run], paper: Paper) -> Found:
    """Values that `runs` found for the cells of `table`; of several runs the newest counts."""
    found = {}
    for row, cells in zip(table.rows, table.cells, strict=True):
        for column, cell in zip(table.columns, cells, strict=True):
            if measured := _measure(cell, runs, paper):
                found[row, column] = measured
    return found


def _measure(cell: Cell, runs: Sequence[Run], paper: Paper) -> Measured | None:
    figure = cell.figure
    if figure is None or figure.file is None:
        return None
    # The same run can be found twice, as an experiment and in the workspace it was applied to:
    # then the stage that wrote the report had the same parameters, dependencies and outputs.
    found: dict[str, tuple[Run, float, str]] = {}
    for run in runs:
        file = run.written(figure.file)
        sections = lineage(run.lock, file)
        if sections is None:
            continue
        parameters = flatten(sections)
        profile = str(parameters.get(paper.profile["parameter"]))
        needs = paper.profile["needs"].get(profile, {})
        wanted = {name: needs.get(name, value) for name, value in cell.matched.items()}
        same = all(equal(parameters.get(k), v) for k, v in wanted.items())
        if not same or not _whole_splits(run, figure, parameters, paper):
            continue
        # Last: it may be a file to get.
        value = _value(run.report(figure.file), figure)
        if value is not None:
            found.setdefault(repr(run.lock[file]), (run, value, profile))
    if not found:
        return None
    run, value, profile = max(found.values(), key=lambda entry: entry[0].when)
    return Measured(100 * value, run.name, profile, len(found))


def _value(report: Any, figure: Figure) -> float | None:  # noqa: ANN401 - JSON or CSV rows
    value: Any
    if isinstance(report, list):
        rows = [r for r in report if all(r.get(k) == v for k, v in figure.where.items())]
        value = rows[0].get(figure.key) if rows else None
    else:
        value = flatten(report or {}).get(figure.key)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def equal(found: Any, wanted: Any) -> bool:  # noqa: ANN401 - any parameter values
    """Compare parameter values: numbers by value, the rest exactly."""
    if isinstance(wanted, list) and isinstance(found, list):
        return len(found) == len(wanted) and all(map(equal, found, wanted))
    # True == 1 in Python, and they are different parameters.
    return isinstance(found, bool) == isinstance(wanted, bool) and found == wanted


def _whole_splits(run: Run, figure: Figure, parameters: Mapping[str, Any], paper: Paper) -> bool:
    """Check the numbers of images of the splits trained on and scored, and of masks scored."""
    trained = str(parameters.get(paper.counted["trained"]))
    counts = run.report(paper.counted["file"]) or {}
    # The keys of this report have a dot themselves.
    key = paper.counted["key"]
    splits = {trained, figure.scored or trained}
    if any(counts.get(key.format(split=split)) != paper.images.get(split) for split in splits):
        return False
    if figure.images is None:
        return True
    scored = flatten(run.report(str(figure.file)) or {})
    return bool(scored.get(figure.images) == paper.images[str(figure.scored)])


def text(table: Table, found: Found) -> str:
    """Plain text: a line of the paper's figures, then one of what was measured, for each row."""
    rows = _rows(table, found)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [table.heading, ""]
    for row in rows:
        sides = zip(row, "<<" + ">" * len(table.columns), widths, strict=True)
        lines.append("  ".join(f"{cell:{side}{width}}" for cell, side, width in sides).rstrip())
    return "\n".join((*lines, "", *_notes(table, found)))


def markdown(table: Table, found: Found) -> str:
    """A section with a GitHub-flavoured table and a list of notes."""
    header, *body = _rows(table, found)
    rule = ["---", "---", *["---:"] * len(table.columns)]
    rows = [f"| {' | '.join(row)} |" for row in (header, rule, *body)]
    notes = [f"- {note}" for note in _notes(table, found)]
    return "\n".join((f"## {table.heading}", "", *rows, "", *notes))


def as_csv(tables: Sequence[Table], found: Sequence[Found]) -> str:
    """One line a cell, with a header; figures in percent, empty where there is none."""
    lines = []
    for table, measured in zip(tables, found, strict=True):
        for row, cells in zip(table.rows, table.cells, strict=True):
            for column, cell in zip(table.columns, cells, strict=True):
                one = measured.get((row, column))
                lines.append(
                    {
                        "table": table.name,
                        "row": row,
                        "column": column,
                        "paper": cell.paper,
                        "measured": one and f"{one.value:.4f}",
                        "run": one and one.run,
                        "optimizer_profile": one and one.profile,
                        "matching_runs": one.matching if one else 0,
                    }
                )
    return atomic.csv_text(lines).rstrip("\n")


def _rows(table: Table, found: Found) -> list[list[str]]:
    lines = [["", "", *table.columns]]
    for row, cells in zip(table.rows, table.cells, strict=True):
        paper = [BLANK if cell.paper is None else f"{cell.paper:.2f}" for cell in cells]
        lines.append([row, "paper", *paper])
        if any(cell.figure for cell in cells):
            ours = [found.get((row, column)) for column in table.columns]
            lines.append(["", "here", *(f"{one.value:.2f}" if one else BLANK for one in ours)])
    return lines


def _notes(table: Table, found: Found) -> list[str]:
    """The table's notes, then which runs the measured figures are from."""
    notes = list(table.notes)
    for (row, column), one in found.items():
        of = f", newest of {one.matching} runs" if one.matching > 1 else ""
        notes.append(f"here, {row}, {column}: {one.run}, optimizer profile {one.profile}{of}")
    return notes
