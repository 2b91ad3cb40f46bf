"""Fixtures that several test modules share."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

VOC_NAMES = {"bird": 3, "cat": 8, "cow": 10, "dog": 12, "person": 15}
MakeDevkit = Callable[..., Path]


def _make_devkit(
    devkit: Path,
    splits: Mapping[str, Sequence[str]],
    names: Sequence[str] = ("cat", "person"),
    size: tuple[int, int] = (24, 32),
) -> Path:
    """Write a tiny VOC devkit; each image shows all `names`, side by side, and a void border."""
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (devkit / folder).mkdir(parents=True, exist_ok=True)
    for split, ids in splits.items():
        listing = "".join(f"{name}\n" for name in ids)
        (devkit / f"ImageSets/Segmentation/{split}.txt").write_text(listing)
        for number, name in enumerate(ids):
            noise = np.random.default_rng(number).integers(0, 255, (*size, 3), np.uint8)
            Image.fromarray(noise).save(devkit / f"JPEGImages/{name}.jpg")
            if split == "test":
                continue
            mask = np.zeros(size, np.uint8)
            for column, label in enumerate(names):
                mask[4:12, 2 + 6 * column : 6 + 6 * column] = VOC_NAMES[label]
            mask[12] = 255
            Image.fromarray(mask).save(devkit / f"SegmentationClass/{name}.png")
            objects = "".join(f"<object><name>{label}</name></object>" for label in names)
            xml = f"<annotation>{objects}</annotation>"
            (devkit / f"Annotations/{name}.xml").write_text(xml)
    return devkit


@pytest.fixture
def make_devkit() -> MakeDevkit:
    return _make_devkit
