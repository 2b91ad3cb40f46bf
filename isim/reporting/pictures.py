"""Pictures: strips, grids and overlays of images and label maps (paper Fig. 5), no axes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from isim.data import files
from isim.data.prepared import Item
from isim.runtime.atomic import atomic_path

# Pixels. A caption fits above the narrowest cell; the widest keep a strip on one screen.
MIN_CELL, MAX_CELL = 192, 320
CAPTION = 22
GAP = 4
# Any filter would invent colours, that is classes, at the borders of a label map.
LABEL, PHOTO = Image.Resampling.NEAREST, Image.Resampling.LANCZOS
# RGB image, filter to resize it with, caption.
Cell = tuple[np.ndarray, Image.Resampling, str]


def choose(items: Sequence[Item], count: int) -> list[Item]:
    """Choose `count` images, evenly spread over the split; with a ground truth if any has one."""
    pool = [item for item in items if item.mask is not None] or list(items)
    places = np.linspace(0, len(pool) - 1, min(count, len(pool))).astype(int)
    return [pool[place] for place in places]


def colorize(label_map: np.ndarray) -> np.ndarray:
    """Colour (H, W) uint8 class ids with the VOC palette (255 is cream): (H, W, 3) uint8 RGB."""
    return np.take(files.voc_palette(), label_map, axis=0)


def overlay(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """Blend a heat map (blue 0, red 1) into an image, half and half.

    `image` and the result are (H, W, 3) uint8 RGB; `cam`, (h, w) float in [0, 1], is resized
    bilinearly.
    """
    height, width = image.shape[:2]
    cam = cv2.resize(cam.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    levels = np.rint(np.clip(cam, 0, 1) * 255).astype(np.uint8)
    heat = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_JET), cv2.COLOR_BGR2RGB)
    return cv2.addWeighted(image, 0.5, heat, 0.5, 0)


def strip(item: Item, results: Mapping[str, Path], columns: int | None = None) -> np.ndarray:
    """Put an image, its ground truth and what was made of it side by side, with captions.

    `results` maps captions to CAM files (`.npz`, at any stride; shown is the maximum over the
    classes) or label maps (`.png`). `columns` is the number of cells a row, 2 for a square, as
    MLflow's thumbnails are; all of them stand in one where they do not fill the last row. The strip
    is (H', W', 3) uint8 RGB; there is no panel for a ground truth that there is not.

    Raises:
        UserError: A file is missing or unreadable.
    """
    image = files.read_image(item.image)
    cells: list[Cell] = [(image, PHOTO, "image")]
    if item.mask is not None:
        cells.append(_label(item.mask, "ground truth"))
    for caption, path in results.items():
        if path.suffix == ".npz":
            cam = files.read_cam(path)[0].max(0, initial=0.0)
            cells.append((overlay(image, cam), PHOTO, caption))
        else:
            cells.append(_label(path, caption))
    if columns is None or len(cells) % columns:
        columns = len(cells)
    width = min(max(image.shape[1], MIN_CELL), MAX_CELL)
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    return np.concatenate([_row(row, width, CAPTION) for row in rows])


def rounds_grid(items: Sequence[Item], rounds: Sequence[Path]) -> np.ndarray:
    """Show how pseudo-labels change: a row an image, a column a round (paper Fig. 5).

    `rounds` are the folders of their label maps `<id>.png`, round 1 first; the picture is
    (H', W', 3) uint8 RGB.

    Raises:
        UserError: A file is missing or unreadable.
    """
    rows: list[np.ndarray] = []
    for item in items:
        cells: list[Cell] = [(files.read_image(item.image), PHOTO, "image")]
        for number, folder in enumerate(rounds, start=1):
            cells.append(_label(folder / f"{item.id}.png", f"round {number}"))
        rows.append(_row(cells, MIN_CELL, 0 if rows else CAPTION))
    return np.concatenate(rows)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an (H, W, 3) uint8 RGB image. Raises UserError as `atomic_path` does."""
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def _label(path: Path, caption: str) -> Cell:
    return colorize(files.read_label_map(path)), LABEL, caption


def _row(cells: Sequence[Cell], width: int, top: int) -> np.ndarray:
    """Put cells of one size side by side, resized to `width`; captions if `top` pixels."""
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
