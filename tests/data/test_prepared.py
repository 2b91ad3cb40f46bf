"""Prepared data loads as it was written; what cannot be used is told in one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from isim.data import prepared
from isim.errors import UserError


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function that writes a project's prepared data, two splits and an empty one, and loads."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("ISIM_DATA", "/r")
    folder = tmp_path / "data/prepared"

    def call(labels=("a,cat;dog", "b,dog", "c,cat"), **about):
        folder.mkdir(parents=True, exist_ok=True)
        splits = {"train": 2, "val": 1, "test": 0}
        known = {"format": 1, "source": "voc", "root": "prepared:", "classes": ["cat", "dog"]}
        (folder / "dataset.json").write_text(json.dumps(known | {"splits": splits} | about))
        train = "b,i/b.jpg,prepared:masks/b.png\na,i/a.jpg,\n"
        for name, lines in (("train", train), ("val", "c,i/c.jpg,m/c.png\n"), ("test", "")):
            (folder / f"{name}.csv").write_text("id,image,mask\n" + lines)
        (folder / "labels.csv").write_text("\n".join(["id,labels", *labels]) + "\n")
        return prepared.load(tmp_path)

    return call


def test_items_and_classes(tmp_path, load):
    data = load(root="$ISIM_DATA/voc")
    assert data.classes == ("cat", "dog")
    b, a = data.split("train")
    assert (b.id, b.image, a.id, a.mask) == ("b", Path("/r/voc/i/b.jpg"), "a", None)
    assert b.mask == tmp_path / "data/prepared/masks/b.png"
    assert a.image_label.dtype == np.float32
    assert (a.image_label.tolist(), b.image_label.tolist()) == ([1, 1], [0, 1])
    assert (a.class_ids.tolist(), b.class_ids.tolist()) == ([1, 2], [2])
    assert data.split("val")[0].mask == Path("/r/voc/m/c.png")
    # Generated images lie in the prepared folder.
    assert load().split("val")[0].image == tmp_path / "data/prepared/i/c.jpg"


def test_unknown_and_empty_splits(load):
    data = load()
    with pytest.raises(UserError, match=r"no split 'trainaug'.*train, val, test"):
        data.split("trainaug")
    with pytest.raises(UserError, match="'test' is empty"):
        data.split("test")


def test_unknown_labels_are_given_to_who_can_do_without(load):
    data = load(labels=("a,cat", "b,", "c,cat"))
    b, a = data.split("train", labelled=False)
    assert b.image_label is None
    assert a.known_label.tolist() == [1, 0]
    for name in ("known_label", "class_ids"):
        with pytest.raises(UserError, match="classes of image b are unknown"):
            getattr(b, name)
    with pytest.raises(UserError, match=r"split 'train' are unknown \(1 of 2 images\)"):
        data.split("train")


def test_missing_damaged_and_foreign_prepared_data(tmp_path, load):
    with pytest.raises(UserError, match=r"dataset.json is missing; run `isim prepare`"):
        prepared.load(tmp_path)
    with pytest.raises(UserError, match="has format 2, this version reads 1"):
        load(format=2)
    with pytest.raises(UserError, match=r"damaged.*run `isim prepare` again"):
        load(labels=("a,cow",))
    (tmp_path / "data/prepared/dataset.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        prepared.load(tmp_path)
