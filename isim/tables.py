"""The paper's tables with what was measured here, as `isim tables` prints them."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from isim import paper as papers
from isim.paper import Cell, Figure, Paper, Table, dig
from isim.runs import Run, lineage, read_all, writer

BLANK = "-"


@dataclass(frozen=True)
class Measured:
    """A value in percent, the run that it is from and how many different runs match."""

    value: float
    run: str
    profile: str
    matching: int


Grid = Sequence[Sequence[Measured | None]]


def report(
    root: Path, name: str | None, form: Literal["text", "markdown", "csv"]
) -> tuple[str, str | None]:
    """The tables with what the runs known in `root` measured.

    Args:
        root: Project folder.
        name: One table, or None for all.
        form: How they are written.

    Returns:
        The tables, and a line that says which runs could not be read, if so.

    Raises:
        UserError: There is no such table.
    """
    paper = papers.load()
    tables = paper.tables if name is None else (paper.table(name),)
    runs, note = read_all(root)
    grids = [measure(table, runs, paper) for table in tables]
    if form == "csv":
        return as_csv(tables, grids), note
    write = markdown if form == "markdown" else text
    parts = [write(table, grid) for table, grid in zip(tables, grids, strict=True)]
    return "\n\n".join(parts), note


def commands(name: str | None) -> str:
    """Shell lines that run every experiment of a table, or of all when `name` is None.

    Raises:
        UserError: There is no such table.
    """
    paper = papers.load()
    tables = paper.tables if name is None else (paper.table(name),)
    return "\n".join(papers.commands(paper, tables))


def measure(table: Table, runs: Sequence[Run], paper: Paper) -> Grid:
    """What `runs` found for each cell of `table`; None where none matches."""
    return [[_measure(cell, runs, paper) for cell in row] for row in table.cells]


def _measure(cell: Cell, runs: Sequence[Run], paper: Paper) -> Measured | None:
    figure = cell.figure
    if figure is None or figure.file is None:
        return None
    # The same run can be found twice, as an experiment and in the workspace it was applied to:
    # then the stage that wrote the report had the same parameters, dependencies and outputs.
    found: dict[str, tuple[Run, float, str]] = {}
    for run in runs:
        parameters = lineage(run.lock, figure.file)
        if parameters is None:
            continue
        profile = str(dig(parameters, paper.profile.parameter))
        needs = paper.profile.needs.get(profile, {})
        wanted = {name: needs.get(name, value) for name, value in cell.matched.items()}
        if not all(equal(dig(parameters, k), v) for k, v in wanted.items()):
            continue
        if not _whole_splits(run, figure, parameters, paper):
            continue
        # Last: it may be a file to get.
        value = _value(run.report(figure.file), figure)
        if value is None:
            continue
        record = repr(writer(run.lock, figure.file))
        found.setdefault(record, (run, value, profile))
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
        value = dig(report, figure.key)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def equal(found: Any, wanted: Any) -> bool:  # noqa: ANN401 - any parameter values
    """Compare parameter values: numbers by value, the rest exactly."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        same = found.keys() == wanted.keys()
        return same and all(equal(found[name], value) for name, value in wanted.items())
    if isinstance(wanted, list | tuple) and isinstance(found, list | tuple):
        return len(found) == len(wanted) and all(map(equal, found, wanted))
    # True == 1 in Python, and they are different parameters.
    return isinstance(found, bool) == isinstance(wanted, bool) and found == wanted


def _whole_splits(run: Run, figure: Figure, parameters: Mapping[str, Any], paper: Paper) -> bool:
    """Check the numbers of images of the splits trained on and scored, and of masks scored."""
    counted = paper.counted
    trained = dig(parameters, counted.trained)
    counts = run.report(counted.file) or {}
    for split in {trained, figure.scored or trained}:
        # The keys of this report have a dot themselves.
        if counts.get(counted.key.format(split=split)) != paper.images.get(split):
            return False
    if figure.images is None:
        return True
    return bool(
        dig(run.report(str(figure.file)), figure.images) == paper.images[str(figure.scored)]
    )


def text(table: Table, grid: Grid) -> str:
    """Plain text: a line of the paper's figures, then one of what was measured, for each row."""
    body = _lines(table, grid)
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    lines = [table.heading, ""]
    for cells in body:
        first = [f"{cell:<{width}}" for cell, width in zip(cells[:2], widths, strict=False)]
        rest = [f"{cell:>{width}}" for cell, width in zip(cells[2:], widths[2:], strict=True)]
        lines.append("  ".join((*first, *rest)).rstrip())
    return "\n".join((*lines, "", *_notes(table, grid)))


def markdown(table: Table, grid: Grid) -> str:
    """A section with a GitHub-flavoured table and a list of notes."""
    header, *body = _lines(table, grid)
    rule = ["---", "---", *["---:"] * len(table.columns)]
    rows = [f"| {' | '.join(cells)} |" for cells in (header, rule, *body)]
    notes = [f"- {note}" for note in _notes(table, grid)]
    return "\n".join((f"## {table.heading}", "", *rows, "", *notes))


def as_csv(tables: Sequence[Table], grids: Sequence[Grid]) -> str:
    """One line a cell, with a header; figures in percent, empty where there is none."""
    buffer = io.StringIO()
    out = csv.writer(buffer, lineterminator="\n")
    out.writerow(
        ("table", "row", "column", "paper", "measured", "run", "optimizer_profile", "matching_runs")
    )
    for table, grid in zip(tables, grids, strict=True):
        for row, cells, line in zip(table.rows, table.cells, grid, strict=True):
            for column, cell, found in zip(table.columns, cells, line, strict=True):
                ours = (
                    (f"{found.value:.4f}", found.run, found.profile, found.matching)
                    if found
                    else ("", "", "", 0)
                )
                paper = "" if cell.paper is None else cell.paper
                out.writerow((table.name, row, column, paper, *ours))
    return buffer.getvalue().rstrip("\n")


def _lines(table: Table, grid: Grid) -> list[list[str]]:
    lines = [["", "", *table.columns]]
    for row, cells, line in zip(table.rows, table.cells, grid, strict=True):
        paper = [BLANK if cell.paper is None else f"{cell.paper:.2f}" for cell in cells]
        lines.append([row, "paper", *paper])
        if any(cell.figure for cell in cells):
            ours = [BLANK if found is None else f"{found.value:.2f}" for found in line]
            lines.append(["", "here", *ours])
    return lines


def _notes(table: Table, grid: Grid) -> list[str]:
    """The table's notes, then which runs the measured figures are from."""
    notes = list(table.notes)
    for row, line in zip(table.rows, grid, strict=True):
        for column, found in zip(table.columns, line, strict=True):
            if found:
                of = f", newest of {found.matching} runs" if found.matching > 1 else ""
                notes.append(
                    f"here, {row}, {column}: {found.run}, optimizer profile {found.profile}{of}"
                )
    return notes
