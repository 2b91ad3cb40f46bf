"""Prepared data loads as it was written; what cannot be used is told in one line."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from isim.data import prepared
from isim.errors import UserError
from isim.runtime.identity import md5


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function that writes a project's prepared data, two splits and an empty one, and loads."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("ISIM_DATA", "/r")
    folder = tmp_path / "data/prepared"

    def call(labels=("a,cat;dog,1", "b,dog,1", "c,,1"), **about):
        folder.mkdir(parents=True, exist_ok=True)
        splits = {"train": 2, "val": 1, "test": 0}
        known = {"format": 2, "source": "voc", "root": "prepared:", "classes": ["cat", "dog"]}
        (folder / "dataset.json").write_text(json.dumps(known | {"splits": splits} | about))
        train = "b,i/b.jpg,prepared:masks/b.png\na,i/a.jpg,\n"
        for name, lines in (("train", train), ("val", "c,i/c.jpg,m/c.png\n"), ("test", "")):
            (folder / f"{name}.csv").write_text("id,image,mask\n" + lines)
        (folder / "labels.csv").write_text("\n".join(["id,labels,known", *labels]) + "\n")
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
    (c,) = data.split("val")
    assert c.mask == Path("/r/voc/m/c.png")
    # It shows none of the classes, which is known.
    assert c.known_label.tolist() == [0, 0] and len(c.class_ids) == 0
    # Generated images lie in the prepared folder.
    assert load().split("val")[0].image == tmp_path / "data/prepared/i/c.jpg"


def test_unknown_and_empty_splits(load):
    data = load()
    with pytest.raises(UserError, match=r"no split 'trainaug'.*train, val, test"):
        data.split("trainaug")
    with pytest.raises(UserError, match="'test' is empty"):
        data.split("test")


def test_unknown_labels_are_given_to_who_can_do_without(load):
    data = load(labels=("a,cat,1", "b,,0", "c,cat,1"))
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
    with pytest.raises(UserError, match="has format 1, this version reads 2"):
        load(format=1)
    with pytest.raises(UserError, match=r"damaged.*run `isim prepare` again"):
        load(labels=("a,cow,1",))
    (tmp_path / "data/prepared/dataset.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        prepared.load(tmp_path)


@pytest.fixture
def prepared_files(tmp_path, load, monkeypatch):
    """A function that tells of the files of prepared data; and two such files."""
    load(root="$ISIM_DATA")
    monkeypatch.setenv("ISIM_DATA", str(tmp_path / "raw"))
    files = [tmp_path / "raw/i/a.jpg", tmp_path / "raw/m/c.png"]
    rows = ["path,bytes,md5", "prepared:masks/b.png,3,none"]
    for number, path in enumerate(files):
        path.parent.mkdir(parents=True)
        path.write_text(f"photo {number}")
        rows.append(f"{path.relative_to(tmp_path / 'raw')},{path.stat().st_size},{md5(path)}")
    (tmp_path / "data/prepared/manifest.csv").write_text("\n".join([*rows, ""]))
    return files


def test_files_that_changed_since_they_were_prepared_are_told(tmp_path, prepared_files):
    prepared.require_unchanged(tmp_path)
    first, second = prepared_files
    content = first.read_text()
    # Of the same size, and of another time.
    first.write_text("photo 7")
    with pytest.raises(UserError, match=r"^\S+/i/a.jpg has changed since `isim prepare`; run"):
        prepared.require_unchanged(tmp_path)
    second.unlink()
    with pytest.raises(UserError, match=r"a.jpg has changed .*, and 1 more files; run `isim prep"):
        prepared.require_unchanged(tmp_path)
    first.write_text(content)
    with pytest.raises(UserError, match=r"c.png is missing since `isim prepare`; run"):
        prepared.require_unchanged(tmp_path)


def test_files_are_read_again_only_where_size_or_time_differ(tmp_path, prepared_files, monkeypatch):
    read = []
    monkeypatch.setattr(prepared.identity, "md5", lambda path: read.append(path) or md5(path))
    prepared.require_unchanged(tmp_path)
    assert read == prepared_files
    prepared.require_unchanged(tmp_path)
    os.utime(prepared_files[0])
    prepared.require_unchanged(tmp_path)
    assert read == [*prepared_files, prepared_files[0]]
    # The record may be deleted, or damaged, at any time.
    (record,) = tmp_path.glob(".isim/*.json")
    record.write_text("[")
    prepared.require_unchanged(tmp_path)
    assert len(read) == 5
    prepared.remember(tmp_path, {path: md5(path) for path in prepared_files})
    prepared.require_unchanged(tmp_path)
    assert len(read) == 5
