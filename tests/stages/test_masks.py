"""Stage masks: where each image's mask comes from, what cleaning does, data without masks."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from support import projects
from support.sections import changed

from isim.data import files, prepared
from isim.errors import UserError
from isim.labels.clean.clean import clean, count_parts
from isim.runtime import atomic
from isim.stages import train_segmenter

LAST = "data/pseudo_labels/round_02"
PLAIN = {"least_area": 0.0, "fill_holes": 0.0}


def mask_of(root, id_):
    return files.read_label_map(root / f"data/masks/{id_}.png")


def make_unlabelled(root, split):
    """Let the tags of a split be unknown."""
    ids = {item.id for item in prepared.load(root).splits[split]}
    path = root / "data/prepared/labels.csv"
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    unknown = {"labels": "", "known": 0}
    atomic.write_csv(path, [row | (unknown if row["id"] in ids else {}) for row in rows])


def test_every_image_has_a_mask_and_the_report_its_figures(run, finished):
    report = run("masks", finished)
    data = prepared.load(finished)
    ids = {item.id for items in data.splits.values() for item in items}
    assert projects.names_in(finished / "data/masks") == ids | projects.CARDS
    assert report["label_set"] == 16 and report["cam"] == 8 and report["segmenter"] == 0
    for item in data.split("train"):
        stored = files.read_label_map(finished / LAST / f"{item.id}.png")
        assert (mask_of(finished, item.id) == clean(stored, 0.001, 0.001)).all()
    parts = sum(count_parts(mask_of(finished, id_)) for id_ in ids)
    assert report["parts_after"] == parts <= report["parts_before"]
    for split in ("train", "val"):
        items = projects.items_of(finished, split)
        confusion = projects.confusion_of(items, finished / "data/masks")
        row = report[split]
        iou = np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
        assert row["miou"] == pytest.approx(np.nanmean(iou))
        assert row["images"] == row["scored_images"] == len(items)
    listed = json.loads((finished / "data/masks/classes.json").read_text())
    assert [entry["name"] for entry in listed] == ["background", *data.classes]
    assert listed[1] == {"id": 1, "name": data.classes[0], "colour": [128, 0, 0]}
    assert len(list((finished / "reports/masks/pictures").rglob("*.png"))) == 4


def test_an_image_that_has_no_label_map_gets_what_the_training_would_give(
    run, by_frozen, copies, recorder
):
    root = copies(by_frozen)
    path = max((root / "data/pseudo_labels").glob("round_*")) / "train_00003.png"
    expected = files.read_label_map(path)
    path.unlink()
    report = run("masks", root, **PLAIN)
    assert report["label_set"] == 15 and report["cam"] == 9
    assert (mask_of(root, path.stem) == expected).mean() > 0.999
    assert report["parts_before"] == report["parts_after"] and report["changed_share"] == 0


def test_images_without_tags_are_predicted_as_the_segmenter_was_tested(run, finished, tiny):
    make_unlabelled(finished, "val")
    with pytest.raises(UserError, match=r"8 images have no tags.*train-segmenter last_round"):
        run("masks", finished)
    params = changed(tiny.train_segmenter, crf_after=True)
    train_segmenter.run(params, "last_round", finished)
    report = run("masks", finished, **PLAIN, segmenter_crf=params.crf)
    assert report["segmenter"] == 8 and report["cam"] == 0
    for item in prepared.load(finished).splits["val"]:
        folder = finished / "data/predictions/last_round/val_crf"
        predicted = files.read_label_map(folder / f"{item.id}.png")
        assert (mask_of(finished, item.id) == predicted).mean() > 0.99


def test_a_negative_is_background(run, finished, monkeypatch):
    data = prepared.load(finished)
    item = data.split("val")[0]
    negative = replace(item, image_label=np.zeros(len(data.classes), np.float32))
    splits = data.splits | {"val": (negative, *data.split("val")[1:])}
    monkeypatch.setattr(prepared, "load", lambda _: prepared.Prepared(data.classes, splits))
    run("masks", finished)
    assert not mask_of(finished, item.id).any()


def test_without_masks_there_is_no_figure_of_them(run, finished):
    for split in ("train", "val"):
        projects.drop_masks(finished, split)
    report = run("masks", finished)
    for row in (report["train"], report["val"]):
        assert row["images"] and not {"miou", "miou_before", "iou"} & row.keys()
    assert "null" not in (finished / "reports/masks/metrics.json").read_text()


def test_true_masks_may_be_the_label_set(run, finished):
    report = run("masks", finished, labels="ground_truth", **PLAIN)
    assert report["label_set"] == 24
    for item in projects.items_of(finished, "val"):
        assert (mask_of(finished, item.id) == files.read_label_map(item.mask)).all()


def test_a_label_set_that_is_not_there_is_told(run, project):
    with pytest.raises(UserError, match="label set 'last_round'"):
        run("masks", project)
