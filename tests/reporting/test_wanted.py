"""The masks that are wished for: spread over classes, doubtful and usual ones, without a mask."""

import random
from collections import Counter

import pytest
from support.projects import drop_masks, read_rows

from isim.errors import UserError
from isim.reporting import wanted
from isim.runtime import atomic

HEAD = ("id", "splits", "labels", "doubt", "iou")


def row(id_, labels, doubt, iou=""):
    return dict(zip(HEAD, (id_, "train", labels, str(doubt), iou), strict=True))


def test_classes_take_turns_and_in_each_the_doubtful_and_the_usual_one():
    cats = [row(f"cat{n}", "cat", n / 10) for n in range(9)]
    dogs = [row(f"dog{n}", "dog", n / 10) for n in range(3)]
    found = wanted.choose([*cats, *dogs], 5)
    assert [(r["id"], r["why"]) for r in found] == [
        ("cat8", "doubtful cat"),
        ("dog2", "doubtful dog"),
        ("cat4", "usual cat"),
        ("dog1", "usual dog"),
        ("cat7", "doubtful cat"),
    ]


def test_the_choice_is_the_same_whatever_the_order_of_the_rows():
    rows = [row(f"{n:02d}", "cat;dog" if n % 3 else "cow", round(n % 7 / 7, 2)) for n in range(40)]
    found = wanted.choose(rows, 12)
    random.Random(0).shuffle(rows)
    assert wanted.choose(rows, 12) == found
    taken = Counter(name for r in found for name in r["labels"].split(";"))
    assert max(taken.values()) - min(taken.values()) <= 1


def test_images_that_have_a_mask_or_no_class_are_not_asked_for():
    rows = [row("a", "cat", 1, "0.5"), row("b", "", 1), row("c", "cat", ""), row("d", "cat", 0)]
    assert [r["id"] for r in wanted.choose(rows, 9)] == ["d"]


def test_the_list_says_where_to_put_the_masks(project):
    with pytest.raises(UserError, match=r"cannot read .*images\.csv.*run `isim report` first"):
        wanted.write(project, 3, None)
    rows = [row("train_00001", "duck", 0.5), row("val_00002", "fox", 0.25) | {"splits": "val"}]
    atomic.write_csv(project / "reports/report/images.csv", rows)
    text = wanted.write(project, 3, None)
    assert "train_00001  duck  (doubtful duck)" in text and "0 background, 1 badger, 2 duck" in text
    (first, second) = read_rows(project / wanted.OUT)
    assert first["mask"].endswith("SegmentationClass/train_00001.png") and first["mask"] in text
    assert second["id"] == "val_00002"
    wanted.write(project, 3, "val")
    assert [r["id"] for r in read_rows(project / wanted.OUT)] == ["val_00002"]
    with pytest.raises(UserError, match="no split 'test'; use one of train, val"):
        wanted.write(project, 3, "test")
    rows[1]["iou"] = "0.5"
    atomic.write_csv(project / "reports/report/images.csv", rows)
    with pytest.raises(UserError, match="every image of split val that has tags has a mask"):
        wanted.write(project, 3, "val")


def test_masks_of_a_folder_go_beside_its_images(project):
    text = (project / "params.yaml").read_text()
    text = text.replace("source: shapes", "source: folder").replace(
        "root: $ISIM_DATA", "root: mine"
    )
    (project / "params.yaml").write_text(text)
    drop_masks(project, "train")
    from isim.data import prepared
    from isim.params import load

    item = prepared.load(project).split("train")[0]
    item = type(item)(item.id, project / "mine/images/a.jpg", None, item.image_label)
    found = wanted._files(item, load(project / "params.yaml").prepare, project)
    assert found["mask"] == str(project / f"mine/masks/{item.id}.png")
