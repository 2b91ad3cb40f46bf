"""Pictures and plots: arrays in, RGB arrays or PNG files out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from isim.atomic import atomic_path

# Pixels. A caption fits above the narrowest cell; the widest keep a strip on one screen.
MIN_CELL, MAX_CELL = 192, 320
CAPTION = 22
GAP = 4
# Any filter would invent colours, that is classes, at the borders of a label map.
LABEL, PHOTO = Image.Resampling.NEAREST, Image.Resampling.LANCZOS
# A heat map with more classes than this has cells too small for numbers.
MAX_NUMBERED = 30


def colorize(label_map: np.ndarray) -> np.ndarray:
    """Colour a label map with the VOC palette (255 is cream).

    Args:
        label_map: (H, W) uint8 class ids.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    ids, bits, channels = np.arange(256)[:, None, None], np.arange(8)[:, None], np.arange(3)
    # Bit 3b + c of an id is bit 7 - b of channel c.
    palette = ((((ids >> (3 * bits + channels)) & 1) << (7 - bits)).sum(1)).astype(np.uint8)
    return palette[label_map]


def cam_overlay(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """Blend a heat map (blue 0, red 1) into an image, half and half.

    Args:
        image: (H, W, 3) uint8 RGB.
        cam: (h, w) float in [0, 1]; resized bilinearly to the image.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    height, width = image.shape[:2]
    cam = cv2.resize(cam.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    levels = np.rint(np.clip(cam, 0, 1) * 255).astype(np.uint8)
    heat = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_JET), cv2.COLOR_BGR2RGB)
    return cv2.addWeighted(image, 0.5, heat, 0.5, 0)


def picture_strip(
    image: np.ndarray,
    truth: np.ndarray | None,
    cam: np.ndarray,
    label: np.ndarray,
    columns: int = 4,
    caption: str = "pseudo-label",
) -> np.ndarray:
    """Image, ground truth, CAM and label map side by side, with captions.

    Args:
        image: (H, W, 3) uint8 RGB.
        truth: (H, W) uint8, or None when the image has no ground truth.
        cam: (h, w) float in [0, 1], the maximum over the labelled classes.
        label: (H, W) uint8.
        columns: Pictures a row. 2 for MLflow, which shows thumbnails of at most 256 pixels.
        caption: Of the label map.

    Returns:
        (H', W', 3) uint8 RGB; the same size whether or not there is a truth.
    """
    cells = [(cam_overlay(image, cam), PHOTO, "CAM"), (colorize(label), LABEL, caption)]
    return _strip(image, truth, cells, columns)


def prediction_strip(
    image: np.ndarray,
    truth: np.ndarray | None,
    predictions: Mapping[str, np.ndarray],
    columns: int = 4,
) -> np.ndarray:
    """Image, ground truth and predictions side by side, with captions.

    Args:
        image: (H, W, 3) uint8 RGB.
        truth: (H, W) uint8, or None when the image has no ground truth.
        predictions: Caption -> (H, W) uint8.
        columns: As in `picture_strip`.

    Returns:
        (H', W', 3) uint8 RGB; the same size whether or not there is a truth.
    """
    cells = [(colorize(label), LABEL, name) for name, label in predictions.items()]
    return _strip(image, truth, cells, columns)


def _strip(
    image: np.ndarray,
    truth: np.ndarray | None,
    results: list[tuple[np.ndarray, Image.Resampling, str]],
    columns: int,
) -> np.ndarray:
    """Image, ground truth and the cells of `results`, `columns` a row."""
    shown = colorize(truth) if truth is not None else np.full_like(image, 255)
    cells = [
        (image, PHOTO, "image"),
        (shown, LABEL, "ground truth" if truth is not None else "no ground truth"),
        *results,
    ]
    # The last row must be as wide as the others.
    while len(cells) > columns and len(cells) % columns:
        cells.append((np.full_like(image, 255), PHOTO, ""))
    width = min(max(image.shape[1], MIN_CELL), MAX_CELL)
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    return np.concatenate([_row(row, width, CAPTION) for row in rows])


def rounds_grid(
    images: Sequence[np.ndarray], label_maps: Sequence[Sequence[np.ndarray]]
) -> np.ndarray:
    """How pseudo-labels change: a row an image, a column a round (the paper's Fig. 5).

    Args:
        images: N images (H, W, 3) uint8 RGB, each of its own size.
        label_maps: For each image its (H, W) uint8 label maps, round 1 first, equally many.

    Returns:
        (H', W', 3) uint8 RGB; only the first row has captions.
    """
    rows: list[np.ndarray] = []
    for image, maps in zip(images, label_maps, strict=True):
        labels = [(colorize(m), LABEL, f"round {n}") for n, m in enumerate(maps, start=1)]
        rows.append(_row([(image, PHOTO, "image"), *labels], MIN_CELL, 0 if rows else CAPTION))
    return np.concatenate(rows)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an (H, W, 3) uint8 RGB image atomically.

    Raises:
        UserError: The folder cannot be written or the disk is full.
    """
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def curves(
    rows: Sequence[Mapping[str, Any]],
    x: str,
    columns: Mapping[str, str],
    label: str,
    path: Path,
    scale: float = 1.0,
) -> None:
    """Plot columns of a report table against an integer column (epoch, round) as PNG.

    Args:
        rows: At least one row; a NaN interrupts its line.
        x: Column on the horizontal axis.
        columns: Column -> name in the legend.
        label: Caption of the vertical axis, with the unit.
        path: File to write.
        scale: Factor on the values: 100 shows fractions in percent.

    Raises:
        UserError: As `write_png`.
    """
    figure, axes = _axes(6.4, 4.0)
    for column, name in columns.items():
        values = [scale * float(row[column]) for row in rows]
        axes.plot([row[x] for row in rows], values, marker="o", markersize=4, label=name)
    axes.set_xlabel(x)
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def epoch_curves(
    lines: Mapping[str, Sequence[tuple[int, float, bool]]], label: str, path: Path
) -> None:
    """Plot figures over the epochs, one line a run, as PNG; dots are where a round followed.

    Args:
        lines: Name in the legend -> epoch, value and whether a round followed, epochs ascending.
        label: Caption of the vertical axis, with the unit.
        path: File to write.

    Raises:
        UserError: As `write_png`.
    """
    figure, axes = _axes(8.0, 4.5 + 0.25 * len(lines))
    for name, points in lines.items():
        epochs, values, rounds = zip(*points, strict=True)
        dots = [place for place, is_round in enumerate(rounds) if is_round]
        axes.plot(epochs, values, marker="o", markersize=5, markevery=dots, label=name)
    axes.set_xlabel("epoch (dots: rounds)")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=1)
    _save(figure, path)


def class_bars(
    classes: Sequence[str], series: Mapping[str, Sequence[float]], label: str, path: Path
) -> None:
    """Plot fractions a class as grouped bars in percent, PNG.

    Args:
        classes: L names, drawn from top to bottom.
        series: Name in the legend -> L fractions; NaN (an absent class) has no bar.
        label: Caption of the axis, without the unit.
        path: File to write.

    Raises:
        UserError: As `write_png`.
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
    """Plot a confusion matrix as PNG, each row (a true class) in percent of its pixels.

    Args:
        confusion: (L, L) int64 pixel counts, rows the truth, columns the prediction.
        classes: L names.
        path: File to write.

    Raises:
        UserError: As `write_png`.
    """
    totals = confusion.sum(1, keepdims=True)
    share = 100 * confusion / np.maximum(totals, 1)
    side = 2.4 + 0.36 * len(classes)
    figure, axes = _axes(side + 0.6, side)
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("prediction")
    axes.set_ylabel("ground truth")
    if len(classes) <= MAX_NUMBERED:
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.5:
                color = "white" if value > 60 else "black"
                axes.text(
                    column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color
                )
    figure.colorbar(shown, ax=axes, label="% of the true class", shrink=0.8)
    _save(figure, path)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    # No pyplot: its global state outlives the plot and wants a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        # Without the version of matplotlib, equal plots are equal files for DVC.
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})


def _row(
    cells: Sequence[tuple[np.ndarray, Image.Resampling, str]], width: int, top: int
) -> np.ndarray:
    """Cells (RGB, filter, caption) of one size, resized to `width`; captions if `top` pixels."""
    height = max(1, round(width * cells[0][0].shape[0] / cells[0][0].shape[1]))
    size = (len(cells) * (width + GAP) + GAP, top + height + GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)
    for place, (cell, resample, caption) in enumerate(cells):
        left = GAP + place * (width + GAP)
        sheet.paste(Image.fromarray(cell).resize((width, height), resample), (left, top))
        if top:
            draw.text((left + width / 2, top / 2), caption, "black", font, anchor="mm")
    return np.asarray(sheet)
