"""mIoU over the epochs of several runs in one picture (the paper's Fig. 4)."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isim import runs, viz
from isim.errors import UserError
from isim.paper import flatten

REPORT = "reports/train_cam/miou.csv"
COLUMNS = {
    "cam_miou": "mIoU of the CAMs, before dCRF (%)",
    "pseudo_label_miou": "mIoU of the pseudo-labels (%)",
}
WORKSPACE = "workspace"


@dataclass(frozen=True)
class Source:
    """One run: the text of its report and its `train_cam` (flat, dotted), as far as known."""

    text: str
    parameters: Mapping[str, Any]


def draw(
    root: Path, names: Sequence[str], column: str, out: Path, *, with_workspace: bool
) -> list[str]:
    """Draw a line for each experiment, or for the workspace.

    Args:
        root: Project folder.
        names: Experiments or git revisions; without any the workspace is drawn.
        column: One of `COLUMNS`.
        out: The PNG.
        with_workspace: Draw the workspace beside the experiments, unless it is one of them.

    Returns:
        What is drawn, by name.

    Raises:
        UserError: `out` is named as no PNG is; an unknown column, experiment or revision; one
            that has no report, as the workspace may; no figure in any report; `out` cannot be
            written.
    """
    if out.suffix.lower() != ".png":
        what = "is a folder" if out.is_dir() else "does not end in .png"
        raise UserError(f"--out: {out} {what}; name a PNG file, such as reports/curves.png")
    if column not in COLUMNS:
        raise UserError(f"--column: there is no '{column}'; choose one of {', '.join(COLUMNS)}")
    sources = {name: _experiment(root, name) for name in dict.fromkeys(names)}
    if with_workspace or not names:
        here = _workspace(root)
        if here not in sources.values():
            sources = {WORKSPACE: here, **sources}
    lines = {}
    for name, label in _labels(sources).items():
        points = _points(name, sources[name].text, column)
        if points:
            lines[label] = points
    if not lines:
        raise UserError(
            f"{REPORT} has no {column} in {', '.join(sources)}: no image of the split has a mask"
        )
    viz.epoch_curves(lines, COLUMNS[column], out)
    return list(sources)


def _experiment(root: Path, name: str) -> Source:
    found = runs.at(root, name, REPORT)
    if found is None:
        raise UserError(
            f"{name} has no {REPORT}; run train_cam in it (`dvc exp run train_cam`), or "
            "`dvc fetch` it if it was run elsewhere"
        )
    text, parameters = found
    return Source(text, flatten((parameters or {}).get("train_cam", {})))


def _workspace(root: Path) -> Source:
    try:
        text = (root / REPORT).read_text()
    except OSError as error:
        raise UserError(f"{REPORT} is not there; run `dvc repro train_cam` first") from error
    run = runs.workspace(root)
    # A report that DVC did not record is shown, too; what it was made with is not known.
    parameters = run and REPORT in run.reports and runs.lineage(run.lock, REPORT)
    return Source(text, flatten((parameters or {}).get("train_cam", {})))


def _labels(sources: Mapping[str, Source]) -> dict[str, str]:
    """What each run is called in the picture: its name and the parameters that differ."""
    known = [source.parameters for source in sources.values() if source.parameters]
    names = {name: None for parameters in known for name in parameters}
    # How often the curve was measured says nothing of what it shows.
    names.pop("score_every", None)
    differ = [n for n in names if any(p.get(n) != known[0].get(n) for p in known)]
    labels = {}
    for name, source in sources.items():
        words = [f"{n}={source.parameters[n]}" for n in differ if n in source.parameters]
        labels[name] = f"{name}: {', '.join(words)}" if words else name
    return labels


def _points(name: str, text: str, column: str) -> list[tuple[int, float, bool]]:
    """Epoch, percent and whether a round followed, for every row that has a figure.

    Raises:
        UserError: The report is not what train_cam writes.
    """
    points = []
    try:
        for row in csv.DictReader(io.StringIO(text)):
            value = float(row[column] or math.nan)
            if math.isfinite(value):
                points.append((int(row["epoch"]), 100 * value, bool(row["round"])))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{REPORT} of {name} is damaged ({error}); run `dvc repro train_cam` again"
        ) from error
    return points
