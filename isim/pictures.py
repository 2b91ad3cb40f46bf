"""The fixed set of pictures that rounds, evaluations and segmenters show (paper Fig. 5)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from isim import viz
from isim.data import files
from isim.data.dataset import Item


def choose(items: Sequence[Item], count: int) -> list[Item]:
    """Choose `count` images, evenly spread over the split; with a ground truth if any has one."""
    pool = [item for item in items if item.mask is not None] or list(items)
    places = np.linspace(0, len(pool) - 1, min(count, len(pool))).astype(int)
    return [pool[place] for place in places]


def strip(
    item: Item, cam: Path, label: Path, columns: int, caption: str = "pseudo-label"
) -> np.ndarray:
    """Image, ground truth, CAM and label map side by side.

    Args:
        item: The image and, if any, its ground truth.
        cam: CAM file of `files.write_cam`, at any stride.
        label: Label map, PNG.
        columns: Cells a row: 4 for a strip, 2 for a square.
        caption: Of the label map.

    Returns:
        (H', W', 3) uint8 RGB.

    Raises:
        UserError: A file is missing or unreadable.
    """
    planes, _, _ = files.read_cam(cam)
    return viz.picture_strip(
        files.read_image(item.image),
        files.read_label_map(item.mask) if item.mask else None,
        planes.max(0, initial=0.0),
        files.read_label_map(label),
        columns,
        caption,
    )


def prediction_strip(item: Item, predictions: Mapping[str, Path], columns: int) -> np.ndarray:
    """Image, ground truth and predictions side by side.

    Args:
        item: The image and, if any, its ground truth.
        predictions: Caption -> label map, PNG.
        columns: Cells a row: 4 for a strip, 2 for a square.

    Returns:
        (H', W', 3) uint8 RGB.

    Raises:
        UserError: A file is missing or unreadable.
    """
    return viz.prediction_strip(
        files.read_image(item.image),
        files.read_label_map(item.mask) if item.mask else None,
        {name: files.read_label_map(path) for name, path in predictions.items()},
        columns,
    )
