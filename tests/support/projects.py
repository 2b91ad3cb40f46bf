"""Project folders of preset `tiny`: what tests of stages read from them, and change in them."""

import csv
import json

import numpy as np
import pytest

from isim import metrics
from isim.data import files, prepared
from isim.runtime import figures


def items_of(root, split="train"):
    return prepared.load(root).split(split)


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_report(root, stage):
    """Read the figures of a stage; its headline must be JSON."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    folder = root / "reports" / stage
    json.loads((folder / "metrics.json").read_text(), parse_constant=refuse)
    return figures.read(folder)


# What tells of a folder of label maps, beside them.
CARDS = {"card", "classes"}


def names_in(folder):
    """Names of what is in a folder, without suffixes."""
    return {path.stem for path in folder.iterdir()}


def confusion_of(items, folder):
    """Count the pixels of label maps in a folder, (6, 6)."""
    total = np.zeros((6, 6), np.int64)
    for item in items:
        label = files.read_label_map(folder / f"{item.id}.png")
        total += metrics.confusion_matrix(files.read_label_map(item.mask), label, 6)
    return total


def assert_figures(prefix, confusion, report, ious):
    """A report has the figures of a confusion matrix, and rows of a table its IoUs."""
    for name, value in metrics.segmentation_figures(prefix, confusion).items():
        # What is no number is null there.
        found = np.nan if report[name] is None else report[name]
        assert found == pytest.approx(value, nan_ok=True), name
    # A cell of what is not known is empty.
    found = [float(cell or "nan") for cell in ious]
    assert found == pytest.approx(metrics.iou(confusion).tolist(), nan_ok=True)


def drop_masks(root, split, keep=0):
    """Make `split` one in which only the first `keep` images have a mask."""
    path = root / f"data/prepared/{split}.csv"
    head, *rows = path.read_text().splitlines()
    rows[keep:] = [row.rpartition(",")[0] + "," for row in rows[keep:]]
    path.write_text("\n".join([head, *rows]) + "\n")


def put_true_cams(root):
    """Put the masks of `train` in the place of its CAMs."""
    for item in items_of(root):
        ids, truth = item.class_ids, files.read_label_map(item.mask)
        planes = np.float32(truth[::4, ::4] == ids[:, None, None])
        files.write_cam(root / f"data/cams/train/{item.id}.npz", planes, ids, truth.shape)


def put_inner_split(root, count, split="train"):
    """Make the first images of a split a split `inner`, too."""
    folder = root / "data/prepared"
    lines = (folder / f"{split}.csv").read_text().splitlines()
    (folder / "inner.csv").write_text("\n".join(lines[: 1 + count]) + "\n")
    about = json.loads((folder / "dataset.json").read_text())
    about["splits"]["inner"] = count
    (folder / "dataset.json").write_text(json.dumps(about))
