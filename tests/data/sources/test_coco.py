"""COCO 2014: splits, tags and semantic masks of the usual protocol."""

import json

import numpy as np
import pytest
from support.sources import make_coco, section

from isim.data.files import read_label_map
from isim.data.sources import coco
from isim.data.sources.source import verify
from isim.errors import UserError


@pytest.fixture
def read(tmp_path):
    make_coco(tmp_path / "raw")
    return lambda: coco.read(section("coco"), tmp_path / "raw", tmp_path / "out")


def test_splits_classes_and_tags(read, tmp_path):
    source = read()
    assert source.classes == ("person", "kite", "cat")
    eleven, twelve, thirteen = (f"COCO_train2014_{number:012d}" for number in (11, 12, 13))
    assert source.splits == {
        "train": (eleven, twelve),
        "train_all": (eleven, twelve, thirteen),
        "val": ("COCO_val2014_000000000021",),
    }
    assert source.entries[eleven].labels == ("cat", "person")
    # A crowd is a tag, too.
    assert source.entries[twelve].labels == ("kite", "person")
    assert source.entries[thirteen].labels == ()
    assert source.entries[eleven].image == tmp_path / f"raw/train2014/{eleven}.jpg"
    assert source.notes == (
        "train_all: train and 1 images without an object",
        "val: 1 images without an object; left out",
    )
    assert verify(source)[twelve].bare == ("person",)


def test_smaller_objects_lie_on_larger_ones_and_crowds_are_ignored_below_them(read):
    source = read()
    expected = np.zeros((6, 8), np.uint8)
    expected[1:5, 1:5] = 3
    expected[2:4, 2:4] = 1
    assert np.array_equal(
        read_label_map(source.entries["COCO_train2014_000000000011"].mask), expected
    )
    expected[...] = 0
    expected[:, 6:] = 255
    expected[1:5, 1:5] = 2
    assert np.array_equal(
        read_label_map(source.entries["COCO_train2014_000000000012"].mask), expected
    )
    assert not read_label_map(source.entries["COCO_train2014_000000000013"].mask).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda given: given.pop("images"), "it has no list of images"),
        (lambda given: given["images"][0].pop("height"), r"no usable instances file .*no 'height'"),
        (lambda given: given["annotations"][0].update(category_id=5), "no known image or category"),
        (lambda given: given.update(images=[7]), "no usable instances file"),
        (lambda given: given.update(categories=[]), "no known image or category"),
    ],
)
def test_files_of_another_form_are_told(read, tmp_path, change, words):
    path = tmp_path / "raw/annotations/instances_train2014.json"
    given = json.loads(path.read_text())
    change(given)
    path.write_text(json.dumps(given))
    with pytest.raises(UserError, match=words):
        read()


@pytest.mark.parametrize("outline", [[[1, 2]], {"size": [6, 8], "counts": 5}, {"size": [1]}, 7])
def test_unusable_outlines_are_problems_of_the_data(read, tmp_path, outline):
    path = tmp_path / "raw/annotations/instances_train2014.json"
    given = json.loads(path.read_text())
    given["annotations"][0]["segmentation"] = outline
    path.write_text(json.dumps(given))
    (problem,) = read().problems
    assert problem.kind == "unusable outline" and "COCO_train2014_000000000011.jpg" in problem.what
