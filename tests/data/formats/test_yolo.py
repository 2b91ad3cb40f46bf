"""YOLO's segment files, read back as ultralytics does, and by supervision."""

import cv2
import numpy as np
import pytest
import supervision
from ruamel.yaml import YAML

from isim.data.formats.yolo import write_yolo


def filled(path, size):
    """Fill a file's polygons as ultralytics does: corners cut to whole pixels, OpenCV's fill."""
    label = np.zeros(size, np.uint8)
    for line in path.read_text().splitlines():
        number, *numbers = line.split()
        ring = np.array(numbers, float).reshape(-1, 2) * size[::-1]
        plane = cv2.fillPoly(np.zeros(size, np.uint8), [ring.astype(np.int32)], 1)
        label[plane > 0] = int(number) + 1
    return label


def test_ultralytics_fill_gives_the_same_pixels(written, labels, tmp_path):
    folder = tmp_path / "yolo"
    objects = write_yolo(written, folder)
    lines = 0
    for entry in written.entries:
        path = folder / f"labels/{entry.split}/{entry.id.replace('/', '__')}.txt"
        lines += len(path.read_text().splitlines())
        truth = labels[entry.id]
        assert (filled(path, truth.shape) == truth).all()
        picture = folder / f"images/{entry.split}/{path.stem}.png"
        assert picture.is_symlink() and picture.read_bytes() == entry.image.read_bytes()
    assert lines == objects


def test_data_yaml_names_classes_and_splits(written, tmp_path):
    write_yolo(written, tmp_path / "yolo", copy=True)
    about = YAML(typ="safe").load((tmp_path / "yolo/data.yaml").read_text(encoding="utf-8"))
    assert about["names"] == {0: "apple", 1: "Birne, süß", 2: "cat"}
    assert (about["train"], about["val"]) == ("images/train", "images/val")
    assert not any(path.is_symlink() for path in (tmp_path / "yolo").rglob("*.png"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_supervision_reads_the_same_objects(split, written, labels, tmp_path):
    folder = tmp_path / "yolo"
    write_yolo(written, folder, copy=True)
    data = supervision.DetectionDataset.from_yolo(
        str(folder / f"images/{split}"), str(folder / f"labels/{split}"),
        str(folder / "data.yaml"), force_masks=True,
    )  # fmt: skip
    assert len(data) == len(written.splits()[split])
    for name, _, found in data:
        id_ = str(name).partition(f"images/{split}/")[2].removesuffix(".png").replace("__", "/")
        label = np.zeros(labels[id_].shape, np.uint8)
        for plane, number in zip(found.mask, found.class_id, strict=True):
            label[plane] = number + 1
        assert (label == labels[id_]).all()
