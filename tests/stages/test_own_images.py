"""A person's own images through all stages: negatives, one class, subfolders, names of any kind."""

import re
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image
from support.images import photo
from support.projects import items_of, read_report, read_rows
from support.sections import of_frozen

from isim.data import prepared
from isim.data.files import read_cam, read_image, read_label_map, write_label_map
from isim.errors import UserError
from isim.stages import prepare

NAMES = ("a", "two words/b", "two words/ü,1", "deep/er/日本", "e#(1)", "f", "g", "h")
NEGATIVE = {"two words/b", "f", "g"}


def make(raw, masks=True):
    """Write photographs with masks, most in folders; one is turned by EXIF, one untagged."""
    lines = ["image,labels"]
    for number, name in enumerate((*NAMES, "new/untagged")):
        pixels = photo((48, 64), number)
        image = Image.fromarray(pixels)
        exif = image.getexif()
        path = raw / "images" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "deep/er/日本":
            exif[0x0112] = 6
        image.save(path, exif=exif, quality=95)
        if name not in NAMES:
            continue
        lines.append(f'"{name}.jpg",{"" if name in NEGATIVE else "thing"}')
        if masks and number % 2:
            mask = np.zeros(read_image(path).shape[:2], np.uint8)
            mask[8:30, 10:40] = name not in NEGATIVE
            write_label_map(raw / "masks" / f"{name}.png", mask)
    (raw / "labels.csv").write_text("\n".join([*lines, ""]), encoding="utf-8")


@pytest.fixture
def own(tmp_path, recorder, tiny):
    """A function that prepares a project of such images."""

    def call(masks=True, **changes):
        if not (tmp_path / "raw").exists():
            make(tmp_path / "raw", masks)
        root = tmp_path / "project"
        root.mkdir(exist_ok=True)
        given = {"source": "folder", "root": str(tmp_path / "raw")}
        prepare.run(tiny.prepare.model_copy(update=given | changes), root)
        return root

    return call


def check_maps(root, folder, items):
    for item in items:
        label = read_label_map(root / folder / f"{item.id}.png")
        assert label.shape == read_image(item.image).shape[:2]
        assert item.id not in NEGATIVE or not label.any()


def test_prepared_data_tells_what_is_known(own):
    root = own(val_fraction=0)
    data = prepared.load(root)
    assert set(data.splits) == {"train", "unlabelled"}
    labels = {item.id: item.image_label.tolist() for item in data.split("train")}
    assert labels == {name: [float(name not in NEGATIVE)] for name in NAMES}
    (new,) = data.split("unlabelled", labelled=False)
    assert new.image_label is None and new.id == "new/untagged"
    turned = next(item for item in data.split("train") if item.id == "deep/er/日本")
    assert read_image(turned.image).shape == (64, 48, 3)
    assert read_report(root, "prepare")["train.negatives"] == 3
    with pytest.raises(UserError, match=r"no split 'val'.*eval_split may also be none"):
        data.split("val")


METHODS = ("deeplabcam", "unetcam_bilinear", "cam", "frozen")


def train(method, root, run, tiny):
    """Train by a method; check the label maps of every round, and return their names."""
    changes = {"method": method, "batch": 2, "epochs": 2}
    if method == "frozen":
        changes = of_frozen(tiny.train_cam)
    run("train_cam", root, **changes, pictures=1)
    rounds = sorted(path.name for path in (root / "data/pseudo_labels").iterdir())
    assert rounds
    for name in rounds:
        check_maps(root, f"data/pseudo_labels/{name}", items_of(root))
    return rounds


@pytest.mark.parametrize("method", METHODS[1:3])
def test_negatives_are_background_by_every_method(method, own, run, tiny):
    train(method, own(), run, tiny)


@pytest.mark.parametrize("method", ["deeplabcam", "frozen"])
def test_negatives_are_background_in_every_stage(method, own, run, tiny):
    root = own(val_fraction=0.4)
    learnt, val = (items_of(root, split) for split in ("train", "val"))
    assert {item.id for item in (*learnt, *val)} == set(NAMES)
    assert NEGATIVE & {item.id for item in learnt}
    rounds = train(method, root, run, tiny)
    run("export_cams", root)
    for item in learnt:
        planes = read_cam(root / f"data/cams/train/{item.id}.npz")[0]
        assert len(planes) == (item.id not in NEGATIVE)
    if method == "frozen":
        run("random_walk", root, affinity="cosine", background="constant", pictures=1)
        changes = of_frozen(tiny.train_segmenter)
    else:
        run("train_affinity", root, epochs=1, batch=2, pictures=1)
        run("random_walk", root, pictures=1)
        changes = {"method": "deeplabv2", "epochs": 1, "batch": 2, "crf_after": False}
    for folder in ("train", "train_crf"):
        check_maps(root, f"data/random_walk/{folder}", learnt)
    changes |= {"eval_splits": ("val", "unlabelled"), "pictures": 1}
    report = run("train_segmenter", root, "last_round", **changes)
    assert report["images_without_labels"] == 0
    new = prepared.load(root).split("unlabelled", labelled=False)
    for split, items in (("val", val), ("unlabelled", new)):
        folder = root / f"data/predictions/last_round/{split}"
        assert all((folder / f"{item.id}.png").is_file() for item in items)
    # What a notebook leaves behind is no split.
    (root / "data/cams/.ipynb_checkpoints").mkdir()
    assert set(run("evaluate", root)) == {"train", "val", *rounds}


def test_without_val_and_masks_every_stage_runs(own, run, tiny):
    root = own(masks=False, val_fraction=0)
    run("train_cam", root, **of_frozen(tiny.train_cam), eval_split="none")
    run("export_cams", root, splits=("train",))
    run("random_walk", root, affinity="cosine", background="constant")
    plain = of_frozen(tiny.train_segmenter) | {"eval_splits": ("unlabelled",)}
    run("train_segmenter", root, "last_round", **plain)
    run("evaluate", root)


def test_a_photograph_that_was_replaced_is_an_error_of_the_next_stage(own, run, tmp_path):
    root = own()
    path = tmp_path / "raw/images/two words/b.jpg"
    Image.fromarray(photo((48, 64), 99)).save(path)
    words = r"two words/b.jpg has changed since `isim prepare`; run `isim prepare` again"
    with pytest.raises(UserError, match=words):
        run("train_cam", root, batch=2)
    assert not (root / "models").exists()


def test_problems_are_listed_whatever_ends_the_run(own, tmp_path):
    root = own()
    table = root / "reports/prepare/problems.csv"
    kinds = {row["kind"] for row in read_rows(table)}
    assert {"names with a comma", "classes with few training images"} & kinds
    with (tmp_path / "raw/labels.csv").open("a", encoding="utf-8") as stream:
        stream.write("lost.jpg,thing\n")
    before = (root / "data/prepared/train.csv").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="the data has 1 problem"):
        own()
    (error,) = [row for row in read_rows(table) if row["severity"] == "error"]
    assert (error["kind"], error["file"]) == ("missing image", "lost.jpg")
    assert (root / "data/prepared/train.csv").read_text(encoding="utf-8") == before
    (tmp_path / "raw/labels.csv").write_text("nothing\n")
    with pytest.raises(UserError, match="must begin with a header"):
        own()
    (row,) = read_rows(table)
    assert row["kind"] == "unusable data" and "found: nothing" in row["what"]


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_what_is_converted_in_another_way_is_other_data(kind, own, tmp_path):
    """Stages that depend on the labelled images read what `prepare` makes of the files."""
    own()
    raw, given = tmp_path / "raw", []
    if kind == "image":
        deep = np.full((48, 64, 3), 9000, np.uint16)
        cv2.imwrite(str(raw / "images/h.png"), deep)
        (raw / "images/h.jpg").unlink()
        given = [{"sixteen_bit": (0.0, high)} for high in (20000.0, 40000.0)]
    else:
        for path in (raw / "masks").rglob("*.png"):
            values = np.where(read_label_map(path) == 1, np.uint8(7), np.uint8(9))
            Image.fromarray(values).save(path)
        names = ("thing", "background")
        given = [{"mask_values": {7: names[i], 9: names[1 - i]}} for i in (0, 1)]
    labels = raw / "labels.csv"
    if kind == "image":
        labels.write_text(labels.read_text(encoding="utf-8").replace("h.jpg", "h.png"), "utf-8")
    found = [
        (own(**changes) / "data/prepared" / prepared.LABELLED).read_bytes() for changes in given
    ]
    assert found[0] != found[1]
    assert (own(**given[1]) / "data/prepared" / prepared.LABELLED).read_bytes() == found[1]


def test_data_that_grow_compute_what_is_new(own, run, tiny, tmp_path, capsys):
    """Unlabelled images change nothing that is trained, val stays val, label maps are reused."""
    changes = of_frozen(tiny.train_cam, rounds=1)
    segmenter = of_frozen(tiny.train_segmenter) | {"pictures": 1, "crf_after": True}

    def everything(root):
        run("train_cam", root, **changes, pictures=1)
        run("train_segmenter", root, "last_round", **segmenter, eval_splits=("val", "unlabelled"))
        run("masks", root, pictures=1)
        told = re.findall(
            r"(\w+)[^:\n]*: (\d+) of (\d+) label maps \((\w+)\)", capsys.readouterr().out
        )
        made = ("data/masks", "data/predictions", "data/pseudo_labels")
        paths = [path for name in made for path in (root / name).rglob("*.png")]
        reused = {name: (int(again), int(count)) for _, again, count, name in told}
        return reused, {path.relative_to(root): path.read_bytes() for path in paths}

    root = own(val_fraction=0.4)
    labelled = root / "data/prepared/labelled.json"
    known, val = labelled.read_bytes(), {item.id for item in items_of(root, "val")}
    first = everything(root)[0]
    assert {again for again, _ in first.values()} == {0}

    image = Image.fromarray(photo((48, 64), 70))
    image.save(tmp_path / "raw/images/new/another.jpg", quality=95)
    own(val_fraction=0.4)
    assert labelled.read_bytes() == known
    reused, made = everything(root)
    assert reused["unlabelled"] == reused["by_segmenter"] == (1, 2)
    assert all(again == count for name, (again, count) in reused.items() if reused[name][1] != 2)
    shutil.rmtree(root / ".isim/results")
    assert everything(root)[1] == made

    # A changed image, and one more with a tag: what is in val stays there.
    Image.fromarray(photo((48, 64), 71)).save(tmp_path / "raw/images/a.jpg", quality=95)
    image.save(tmp_path / "raw/images/more.jpg", quality=95)
    with (tmp_path / "raw/labels.csv").open("a", encoding="utf-8") as stream:
        stream.write("more.jpg,thing\n")
    own(val_fraction=0.4)
    assert labelled.read_bytes() != known
    now = {item.id for item in items_of(root, "val")}
    assert val <= now <= val | {"more"}
