"""Overlays: an image with its mask in colours, contours and a legend, as JPEG."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from isim.data.files import voc_palette
from isim.data.formats.labelled import LabelledSet
from isim.errors import drawable
from isim.metrics import IGNORE
from isim.runtime.atomic import atomic_path

# Longer side of what is written, in pixels: overlays are looked at, not computed with.
LARGEST = 1600
_SHARE = 0.5
# Code points from which on Pillow's own font has few.
_OTHER_SCRIPTS = 0x180


def write_overlays(data: LabelledSet, folder: Path) -> int:
    """Write `<id>.jpg` of each image to a folder; returns their number.

    Raises UserError for unreadable files or a failed write.
    """
    for entry in data.told("overlay"):
        write_jpeg(folder / f"{entry.id}.jpg", drawn(entry.read(), entry.label(), data.names))
    return len(data.entries)


def write_jpeg(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an (H, W, 3) uint8 RGB image. Raises UserError as `atomic_path` does."""
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, format="JPEG", quality=90)


def drawn(
    image: NDArray[np.uint8], label: NDArray[np.uint8], names: Sequence[str]
) -> NDArray[np.uint8]:
    """Draw a label map over its image, with a legend of its classes and their shares below.

    Both are (H, W) and (H, W, 3) uint8; `names` has one for each label, the background's first.
    The picture is (H', W', 3), its longer side, without the legend, at most `LARGEST`.
    """
    shares = np.bincount(label.ravel(), minlength=256) / label.size
    factor = min(1.0, LARGEST / max(label.shape))
    if factor < 1:
        size = [max(1, round(side * factor)) for side in label.shape[::-1]]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
        label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST).astype(np.uint8)
    colours = voc_palette()
    found = image.copy()
    inside = label > 0
    mixed = cv2.addWeighted(image, 1 - _SHARE, colours[label], _SHARE, 0)
    found[inside] = mixed[inside]
    for value in np.unique(label[inside]):
        edge = cv2.morphologyEx(
            (label == value).astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)
        )
        found[(edge > 0) & (label == value)] = colours[value]
    return np.concatenate([found, _legend(shares, names, found.shape[1])])


def _legend(shares: NDArray[np.float64], names: Sequence[str], width: int) -> NDArray[np.uint8]:
    """Draw the classes that occur, as many lines of them as need be: (h, width, 3) uint8."""
    font = ImageFont.load_default(size=14)
    names = [drawable(name, range(_OTHER_SCRIPTS)) for name in names]
    entries = [(v, f"{names[v]} {_percent(shares[v])}") for v in range(1, len(names)) if shares[v]]
    if shares[IGNORE]:
        entries.append((IGNORE, f"not sure {_percent(shares[IGNORE])}"))
    lines: list[list[tuple[int, int, str]]] = [[]]
    left = 4
    for value, text in entries:
        wide = 18 + round(font.getlength(text)) + 12
        if left + wide > width and lines[-1]:
            lines.append([])
            left = 4
        lines[-1].append((left, value, text))
        left += wide
    sheet = Image.new("RGB", (width, 22 * len(lines)), "white")
    draw, colours = ImageDraw.Draw(sheet), voc_palette()
    for row, line in enumerate(lines):
        top = 22 * row
        for left, value, text in line:
            box = (left, top + 4, left + 13, top + 17)
            draw.rectangle(box, tuple(colours[value].tolist()), "black")
            draw.text((left + 18, top + 11), text, "black", font, anchor="lm")
        if not entries:
            draw.text((4, top + 11), f"{names[0]} alone", "black", font, anchor="lm")
    return np.asarray(sheet)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"
