"""`isim compare`: the few figures by which runs are compared, a row a run.

They come from `metrics.json` and `dvc.lock`, which git has of every revision, also of one of an
older isim; what a run does not have is a dash.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from isim.errors import UserError
from isim.experiments import runs
from isim.experiments.runs import Run
from isim.runtime import figures

HEAD = (
    "run",
    "method",
    "encoder",
    "seed",
    "rounds",
    "CAM",
    "CAM + CRF",
    "walk",
    "segmenter",
    "min",
)
NOTE = (
    "mIoU in %: of CAMs and random walk on split train (else the first), of the segmenter on val, "
    "trained on last_round (else {others}); min: minutes that the stages took"
)
BLANK = "-"
# Columns that are words.
_WORDS = 3
# Label sets by which a segmenter stands for the run; not ground_truth, the upper bound.
_SEGMENTERS = ("last_round", "random_walk_crf", "random_walk", "seeds")


def table(
    root: Path, revisions: Sequence[str], *, markdown: bool = False
) -> tuple[str, str | None]:
    """Compare the workspace with revisions or experiments; without any, with all experiments.

    Returns the table and, where some runs could not be read, a line that says why. Raises UserError
    for an unknown revision, and where there is no run at all.
    """
    found, note = runs.read_all(root) if not revisions else (_named(root, revisions), None)
    if revisions and (empty := [run.name for run in found if not run.lock]):
        note = f"without results, for there is no dvc.lock with any: {', '.join(empty)}"
    if not found:
        raise UserError(f"{root} has no run to compare: no dvc.lock; run `dvc repro` first")
    minutes = runs.cached(root)
    rows = [HEAD, *(_row(run, minutes) for run in found)]
    others = ", ".join(_SEGMENTERS[1:])
    lines = _markdown(rows) if markdown else _aligned(rows)
    return "\n".join([*lines, "", NOTE.format(others=others)]), note


def _named(root: Path, revisions: Sequence[str]) -> list[Run]:
    here = runs.workspace(root)
    return [*([here] if here else []), *(runs.at(root, revision) for revision in revisions)]


def _row(run: Run, cached: Callable[[str], str | None]) -> tuple[str, ...]:
    params = _parameters(run)
    cam, final, walk = (_report(run, name) for name in ("train_cam", "evaluate", "random_walk"))
    rounds = cam.get("rounds")
    return (
        run.name,
        *(str(params.get(name, BLANK)) for name in ("method", "encoder", "seed")),
        BLANK if rounds is None else str(rounds),
        # In older revisions each split had all of its figures.
        _percent(_of_split(final.get("cam")), _split(final, "cam_miou"), cam.get("cam_miou")),
        _percent(
            _of_split(final.get("crf")),
            _split(final, "cam_crf_miou"),
            cam.get("pseudo_label_miou"),
        ),
        _percent(
            _of_split(walk.get("walk")), _split(walk, "walk_crf_miou"), _split(walk, "walk_miou")
        ),
        _percent(*(_segmenter(run, name) for name in _SEGMENTERS)),
        _minutes(run, cached),
    )


def _parameters(run: Run) -> Mapping[str, Any]:
    """Parameters that train_cam ran with."""
    claim = run.lock.get("models/train_cam")
    files = claim[0].get("params") if claim else None
    for sections in (files or {}).values():
        if isinstance(found := sections.get("train_cam"), dict):
            return found
    return {}


def _report(run: Run, stage: str) -> Mapping[str, Any]:
    found = run.reports.get(f"reports/{stage}/{figures.OLD}")
    return found if isinstance(found, dict) else {}


def _of_split(found: Any) -> Any:  # noqa: ANN401 - of a report
    """Return the figure of split train, else of the first."""
    if not isinstance(found, dict) or not found:
        return None
    return found.get("train", next(iter(found.values())))


def _split(report: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401 - of a report
    """Find a figure in a report that has a tree of figures a split."""
    rows = {k: row[name] for k, row in report.items() if isinstance(row, dict) and name in row}
    return _of_split(rows)


def _segmenter(run: Run, label_set: str) -> Any:  # noqa: ANN401 - of a report
    report = _report(run, f"train_segmenter/{label_set}")
    for splits in (report.get(label_set), report.get("splits")):
        if isinstance(splits, dict) and "val" in splits:
            found = splits["val"]
            return found.get("miou") if isinstance(found, dict) else found
    return None


def _minutes(run: Run, cached: Callable[[str], str | None]) -> str:
    """Sum up the seconds of all stages; a dash where one is not known."""
    total, paths = 0.0, [path for path in run.lock if path.endswith(f"/{figures.SPEED}")]
    for path in paths:
        rows = run.reports.get(path)
        claim = run.lock[path]
        if rows is None and claim and (text := cached(claim[1])) is not None:
            rows = runs.parse(path, text)
        own = [row.get("seconds") for row in rows or () if not row.get("split")]
        try:
            total += float(own[0])
        except (IndexError, TypeError, ValueError):
            return BLANK
    return f"{total / 60:.1f}" if paths else BLANK


def _percent(*values: Any) -> str:  # noqa: ANN401 - of reports
    """Write the first value that is a number."""
    for value in values:
        if isinstance(value, int | float) and math.isfinite(value):
            return f"{100 * value:.1f}"
    return BLANK


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.ljust] * _WORDS + [str.rjust] * (len(HEAD) - _WORDS)
    every = [zip(pads, row, widths, strict=True) for row in rows]
    return ["  ".join(pad(cell, width) for pad, cell, width in row).rstrip() for row in every]


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
    rule = "|" + "---|" * _WORDS + "--:|" * (len(HEAD) - _WORDS)
    return [head, rule, *body]
