"""Devkits: any part of one is read, and what is wrong in it is named."""

import pytest
from support.sources import SPLITS, problems_of

from isim.data.sources.devkit import read_devkit
from isim.data.sources.source import Entry, verify
from isim.data.sources.voc import CLASSES
from isim.errors import UserError


@pytest.fixture
def devkit(tmp_path, make_devkit):
    return make_devkit(tmp_path, SPLITS)


def put(devkit, split, *names):
    (devkit / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join([*names, ""]))


def test_devkit_is_read_as_it_is(devkit):
    (devkit / "SegmentationClass/b.png").unlink()
    source = read_devkit(devkit, CLASSES)
    assert {split: list(ids) for split, ids in source.splits.items()} == SPLITS
    image, mask = devkit / "JPEGImages/a.jpg", devkit / "SegmentationClass/a.png"
    assert source.entries["a"] == Entry(image, mask, ("cat", "person"))
    assert source.entries["b"].mask is None
    assert verify(source)["a"].pixels[[8, 15]].tolist() == [32, 32]


def test_labels_of_the_test_set_are_unknown_whatever_comes_with_it(devkit):
    # As the server's archive has them, for the person layout task.
    xml = "<annotation><object><name>person</name></object></annotation>"
    (devkit / "Annotations/t.xml").write_text(xml)
    mask = (devkit / "SegmentationClass/a.png").read_bytes()
    (devkit / "SegmentationClass/t.png").write_bytes(mask)
    source = read_devkit(devkit, CLASSES)
    assert source.entries["t"].labels is None and source.entries["t"].problems == ()
    # A mask is checked all the same.
    checked = verify(source)["t"]
    assert checked.pixels[[8, 15]].tolist() == [32, 32]
    assert checked.bare == checked.more == ()


def test_images_of_the_test_set_that_are_not_there_are_left_out(devkit):
    put(devkit, "test", "t1", "a", "t3")
    source = read_devkit(devkit, CLASSES)
    assert source.splits["test"] == ("a",) and "t1" not in source.entries
    # An image of train keeps its labels.
    assert source.entries["a"].labels == ("cat", "person")
    (note,) = source.notes
    assert "2 of its 3 images" in note and str(devkit / "JPEGImages") in note
    put(devkit, "test", "t1", "t2", "t3")
    source = read_devkit(devkit, CLASSES)
    assert list(source.splits) == ["train", "val"] and "3 of its 3 images" in source.notes[0]
    verify(source)
    # A missing image of another split stays a problem.
    (devkit / "JPEGImages/c.jpg").unlink()
    (problem,) = problems_of(read_devkit(devkit, CLASSES))
    assert problem.startswith("the data has 1 problem: ") and "c.jpg is missing" in problem


def test_a_single_list_is_enough_but_not_none(tmp_path, make_devkit):
    devkit = make_devkit(tmp_path, {"val": ["a"]})
    assert list(read_devkit(devkit, CLASSES).splits) == ["val"]
    (devkit / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(UserError, match="holds none of train, val, test"):
        read_devkit(devkit, CLASSES)


def test_labels_are_names_of_objects_difficult_included_and_not_of_parts(devkit):
    (devkit / "Annotations/a.xml").write_text(
        "<annotation><object><name> person </name><difficult>1</difficult><part><name>head</name>"
        "</part></object><object><name>dog</name></object><object><name>person</name></object>"
        "</annotation>"
    )
    assert read_devkit(devkit, CLASSES).entries["a"].labels == ("dog", "person")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", "not a readable annotation"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "declares a DOCTYPE"),
        ("<annotation/>", "names no class"),
        ("<annotation><object><name>zebra</name></object></annotation>", "unknown class 'zebra'"),
        (None, "is missing: an image without a label"),
    ],
)
def test_bad_annotation_is_a_problem_of_its_image(devkit, text, message):
    path = devkit / "Annotations/a.xml"
    path.unlink() if text is None else path.write_text(text)
    (problem,) = read_devkit(devkit, CLASSES).entries["a"].problems
    assert str(path) in problem.what and message in problem.what and problem.error


def test_bad_lists_are_problems(devkit):
    put(devkit, "train", "a", "b", "a", "../secret", ".hidden")
    put(devkit, "val")
    head, *lines = problems_of(read_devkit(devkit, CLASSES))
    assert head.startswith("the data has 4 problems")
    expected = ("'../secret' is no plain", "'.hidden' is no plain", "a is listed more than once")
    for line, part in zip(lines, (*expected, "split 'val' is empty"), strict=True):
        assert part in line
