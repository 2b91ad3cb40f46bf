"""COCO files, read back by pycocotools and by supervision."""

import contextlib
import io
import json

import numpy as np
import pytest
import supervision
from pycocotools.coco import COCO

from isim.data.formats.coco import run_lengths, write_coco
from isim.data.formats.regions import regions


def read(path):
    """The file by pycocotools, which talks."""
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def drawn(coco, image):
    """The label map that an image's annotations make."""
    label = np.zeros((image["height"], image["width"]), np.uint8)
    for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
        plane = coco.annToMask(annotation)
        assert not (label[plane > 0] > 0).any() or "counts" not in annotation["segmentation"]
        label[plane > 0] = annotation["category_id"]
    return label


@pytest.mark.parametrize("instances", ["parts", "classes"])
@pytest.mark.parametrize("polygons", [False, True])
def test_pycocotools_reads_the_same_pixels(polygons, instances, written, labels, tmp_path):
    path = tmp_path / "all.json"
    count = write_coco(written, path, polygons=polygons, instances=instances)
    coco = read(path)
    assert len(coco.anns) == count
    for image in coco.imgs.values():
        id_ = image["file_name"].removesuffix(".png")
        # Run lengths and polygons along the edges of pixels: both exact, holes too.
        assert (drawn(coco, image) == labels[id_]).all()
    for annotation in coco.anns.values():
        plane = coco.annToMask(annotation)
        rows, columns = np.nonzero(plane)
        left, top, width, height = annotation["bbox"]
        assert (left, top) == (columns.min(), rows.min())
        assert (width, height) == (np.ptp(columns) + 1, np.ptp(rows) + 1)
        assert annotation["area"] == plane.sum()


def test_instances_are_parts_or_classes(written, labels, tmp_path):
    counts = {kind: write_coco(written, tmp_path / "a.json", instances=kind)
              for kind in ("classes", "parts")}  # fmt: skip
    assert counts["classes"] == sum(len(np.unique(label)) - 1 for label in labels.values())
    assert counts["parts"] > counts["classes"]


def test_supervision_reads_the_same_pixels(written, labels, far_from_borders, tmp_path):
    path = tmp_path / "all.json"
    write_coco(written, path, polygons=True)
    whole = json.loads(path.read_text())
    assert [entry["name"] for entry in whole["categories"]] == list(written.names[1:])
    images = written.entries[0].image.parent
    data = supervision.DetectionDataset.from_coco(str(images), str(path), force_masks=True)
    assert len(data) == len(labels)
    for name, _, found in data:
        id_ = str(name).removeprefix(f"{images}/").removesuffix(".png")
        label = np.zeros(labels[id_].shape, np.uint8)
        for plane, number in zip(found.mask, found.class_id, strict=True):
            label[plane] = number + 1
        # It fills polygons with their border: what is right or below may gain a pixel.
        assert far_from_borders(label, labels[id_]) <= 1


def test_run_lengths_may_begin_inside():
    label = np.ones((2, 3), np.uint8)
    label[1, 1] = 0
    (region,) = regions(label, "parts")
    assert run_lengths(region, (2, 3)) == {"size": [2, 3], "counts": [0, 3, 1, 2]}
