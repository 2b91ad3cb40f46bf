"""Figures of a stage as tables: `figures.csv`, a row a figure, and `seconds.csv`, of its speed.

Figures are equal whenever a stage is run again, what it takes is not: hence two files.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from isim import errors
from isim.runtime import atomic

FILE, SPEED = "figures.csv", "seconds.csv"
# All figures stood in this file once; now it has those that runs are compared by.
OLD = "metrics.json"
_COLUMNS = ("split", "figure", "value")
_TIMES = ("seconds", "images_per_second")


def write(folder: Path, figures: Mapping[str, Any], seconds: float | None) -> None:
    """Write figures by name, those of splits by split and name, and the stage's seconds, if any.

    What is nan or None becomes an empty cell. Raises UserError as `atomic.write_csv`.
    """
    own = {name: value for name, value in figures.items() if not isinstance(value, Mapping)}
    splits = {name: value for name, value in figures.items() if isinstance(value, Mapping)}
    rows = [
        dict(zip(_COLUMNS, (split, name, value), strict=True))
        for split, named in {"": own, **splits}.items()
        for name, value in without_times(named).items()
    ]
    atomic.write_csv(folder / FILE, rows, _COLUMNS)
    if seconds is None:
        return
    times = {"": {"seconds": seconds}, **splits}
    speed = [
        {"split": split, **{name: named.get(name) for name in _TIMES}}
        for split, named in times.items()
        if not named.keys().isdisjoint(_TIMES)
    ]
    atomic.write_csv(folder / SPEED, speed)


def without_times(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the figures of speed, also those of splits."""
    return {
        name: without_times(value) if isinstance(value, Mapping) else value
        for name, value in figures.items()
        if name not in _TIMES
    }


def read(folder: Path) -> dict[str, Any]:
    """Read what `write` wrote but the times, or an old metrics.json; empty where there is neither.

    Raises UserError for a file that is neither.
    """
    for path, made in ((folder / FILE, _of_table), (folder / OLD, _of_report)):
        if path.exists():
            with errors.reading(path, "run `dvc repro` again", "is damaged"):
                return made(path)
    return {}


def _of_table(path: Path) -> dict[str, Any]:
    return tree(atomic.read_csv(path))


def _of_report(path: Path) -> dict[str, Any]:
    return of_old(errors.json_of(path))


def tree(rows: Iterable[Mapping[str, str]]) -> dict[str, Any]:
    """Make the tree of `write` of rows; what reads as a number is one."""
    found: dict[str, Any] = {}
    for row in rows:
        own = found.setdefault(row["split"], {}) if row["split"] else found
        own[row["figure"]] = _value(row["value"])
    return found


def of_old(report: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the tree of an old metrics.json, where some stages had `splits`, to that of `write`."""
    return {k: v for k, v in report.items() if k != "splits"} | dict(report.get("splits", {}))


def _value(text: str) -> Any:  # noqa: ANN401 - number, truth value, text or None
    if text in ("", "True", "False"):
        return {"True": True, "False": False}.get(text)
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        # An md5 such as 12e45 is a text.
        if str(value) == text:
            return value
    return text
