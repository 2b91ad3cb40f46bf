"""Contact sheet: the pictures of a stage in one, where MLflow shows them at a glance."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Pixels.
WIDTH, HEIGHT = 960, 6000
CAPTION = 20
# Longest side of a picture that is read at all.
MOST_SIDE = 20000


def found(folder: Path, most: int) -> list[Path]:
    """List at most `most` pictures below a folder of reports, in the order of their names."""
    return sorted(path for path in folder.rglob("*.png") if path.is_file())[:most]


def sheet(paths: Sequence[Path], folder: Path) -> np.ndarray | None:
    """Put pictures one below the other, each with its name below `folder`; None if there is none.

    None is enlarged, and the sheet, (H, W, 3) uint8 RGB, ends before it is `HEIGHT` pixels high.
    Raises OSError when one cannot be read.
    """
    parts: list[tuple[str, Image.Image]] = []
    height = 0
    for path in paths:
        with Image.open(path) as opened:
            if max(opened.size) > MOST_SIDE:
                continue
            scale = min(1.0, WIDTH / opened.width)
            size = (max(1, round(opened.width * scale)), max(1, round(opened.height * scale)))
            if height + size[1] + CAPTION > HEIGHT:
                continue
            picture = opened.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        parts.append((path.relative_to(folder).with_suffix("").as_posix(), picture))
        height += size[1] + CAPTION
    if not parts:
        return None
    canvas = Image.new("RGB", (max(picture.width for _, picture in parts), height), "white")
    draw, font, top = ImageDraw.Draw(canvas), ImageFont.load_default(size=14), 0
    for title, picture in parts:
        draw.text((4, top + 2), title, "black", font)
        canvas.paste(picture, (0, top + CAPTION))
        top += CAPTION + picture.height
    return np.asarray(canvas)
