"""Plots of figures as PNG files. matplotlib is imported where something is drawn, not before."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isim.metrics import iou
from isim.runtime.atomic import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


def curves(
    rows: Rows, x: str, columns: Mapping[str, str], label: str, *, path: Path, scale: float = 1.0
) -> None:
    """Plot columns of a report table against an integer column (epoch, round).

    `columns` maps columns to names in the legend, `label` tells the unit of the vertical axis, and
    `scale` is a factor on the values: 100 shows fractions in percent. A NaN interrupts its line;
    a column of NaN alone is left out, and nothing is drawn where no column is left.

    Raises:
        UserError: The folder cannot be written or the disk is full.
    """
    from matplotlib.ticker import MaxNLocator

    found = {name: [scale * float(row[column]) for row in rows] for column, name in columns.items()}
    found = {name: values for name, values in found.items() if np.isfinite(values).any()}
    if not found:
        return
    figure, axes = _axes(6.4, 4.0)
    for name, values in found.items():
        axes.plot([row[x] for row in rows], values, marker="o", markersize=4, label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def class_ious(classes: Sequence[str], confusions: Mapping[str, np.ndarray], path: Path) -> None:
    """Plot the IoU of each class of each confusion matrix (L, L); nothing where there is none.

    Errors are those of `curves`.
    """
    if confusions:
        ious = {name: iou(confusion).tolist() for name, confusion in confusions.items()}
        class_bars(classes, ious, "IoU", path)


def class_bars(
    classes: Sequence[str], series: Mapping[str, Sequence[float]], label: str, path: Path
) -> None:
    """Plot fractions a class as grouped bars in percent, classes from top to bottom.

    `series` maps names in the legend to (L,) fractions; NaN (an absent class) has no bar. Errors
    are those of `curves`.
    """
    thickness = 0.8 / len(series)
    figure, axes = _axes(7.0, 1.3 + len(classes) * max(0.15 * len(series), 0.36))
    for place, (name, fractions) in enumerate(series.items()):
        offset = (place + 0.5) * thickness - 0.4
        percent = 100 * np.asarray(fractions, float)
        centers = np.arange(len(classes)) + offset
        axes.barh(centers, np.nan_to_num(percent), thickness, label=name)
        for center, value in zip(centers, percent, strict=True):
            text, end = ("absent", 0.0) if np.isnan(value) else (f"{value:.1f}", value)
            axes.text(end + 0.5, center, text, va="center", fontsize=7)
    axes.set_yticks(range(len(classes)), classes)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.set_xlim(0, 107)
    axes.set_xlabel(f"{label} (%)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=min(len(series), 4))
    _save(figure, path)


def confusion_heatmap(confusion: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Plot a confusion matrix, each row (a true class) in percent of its pixels.

    `confusion` has (L, L) int64 pixel counts, predictions in its columns; nothing is drawn where
    all are 0. Errors are those of `curves`.
    """
    if not confusion.any():
        return
    totals = confusion.sum(1, keepdims=True)
    percent = 100 * confusion / np.maximum(totals, 1)
    side = 2.4 + 0.36 * len(classes)
    figure, axes = _axes(side + 0.6, side)
    shown = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("prediction")
    axes.set_ylabel("ground truth")
    # Else the cells are too small for numbers.
    if len(classes) <= 30:
        for (row, column), value in np.ndenumerate(percent):
            if value >= 0.5:
                color, text = "white" if value > 60 else "black", f"{value:.0f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(shown, ax=axes, label="% of the true class", shrink=0.8)
    _save(figure, path)


def _axes(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    # No pyplot: its global state outlives the plot and wants a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: "Figure", path: Path) -> None:
    with atomic_path(path) as temporary:
        # Without the version of matplotlib, equal plots are equal files for DVC.
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
