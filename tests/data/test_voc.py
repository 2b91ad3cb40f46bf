"""VOC devkits: any part of one is read, and what is wrong in it is named."""

import os
from pathlib import Path

import pytest

from isim.data import voc
from isim.data.source import verify
from isim.errors import UserError

SPLITS = {"train": ["2007_000001", "2007_000002"], "val": ["2008_000003"]}


@pytest.mark.parametrize("place", ["VOCdevkit/VOC2012", "VOC2012", "."])
def test_devkit_is_found_below_root_or_as_root(tmp_path, make_devkit, place):
    devkit = make_devkit(tmp_path / place, SPLITS)
    assert voc.find_devkit(tmp_path, download=False) == devkit


def test_no_devkit_and_no_download_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="set prepare.download: true") as caught:
        voc.find_devkit(tmp_path / "nowhere", download=False)
    assert "VOCtrainval_11-May-2012.tar" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "nowhere").exists()


def test_devkit_is_read_as_it_is(tmp_path, make_devkit):
    devkit = make_devkit(tmp_path, SPLITS | {"test": ["2009_000009"]})
    (devkit / "SegmentationClass/2007_000002.png").unlink()
    source = voc.read_devkit(devkit, voc.CLASSES)
    assert source.splits == {name: tuple(ids) for name, ids in SPLITS.items()} | {
        "test": ("2009_000009",)
    }
    entry = source.entries["2007_000001"]
    assert entry.image == devkit / "JPEGImages/2007_000001.jpg"
    assert entry.mask == devkit / "SegmentationClass/2007_000001.png"
    assert entry.labels == ("cat", "person")
    assert source.entries["2007_000002"].mask is None
    assert source.entries["2009_000009"].labels is None
    checked = verify(source)
    assert checked["2007_000002"].pixels is None
    assert checked["2007_000001"].pixels[[8, 15]].tolist() == [32, 32]


def test_labels_of_the_test_set_are_unknown_whatever_comes_with_it(tmp_path, make_devkit):
    devkit = make_devkit(tmp_path, SPLITS | {"test": ["2009_000009"]})
    # As the server's archive has them, for the person layout task.
    xml = "<annotation><object><name>person</name></object></annotation>"
    (devkit / "Annotations/2009_000009.xml").write_text(xml)
    entry = voc.read_devkit(devkit, voc.CLASSES).entries["2009_000009"]
    assert entry.labels is None and entry.problems == ()


def test_an_image_of_train_keeps_its_labels_in_test(tmp_path, make_devkit):
    devkit = make_devkit(tmp_path, SPLITS)
    (devkit / "ImageSets/Segmentation/test.txt").write_text("2007_000001\n")
    source = voc.read_devkit(devkit, voc.CLASSES)
    assert source.splits["test"] == ("2007_000001",)
    assert source.entries["2007_000001"].labels == ("cat", "person")


def test_a_mask_of_the_test_set_is_checked_without_labels(tmp_path, make_devkit):
    devkit = make_devkit(tmp_path, SPLITS | {"test": ["t"]})
    mask = devkit / "SegmentationClass/t.png"
    mask.write_bytes((devkit / "SegmentationClass/2007_000001.png").read_bytes())
    checked = verify(voc.read_devkit(devkit, voc.CLASSES))["t"]
    assert checked.pixels is not None and checked.pixels[[8, 15]].tolist() == [32, 32]
    assert checked.labels_without_pixels == checked.pixels_without_label == 0


def test_images_of_the_test_set_that_are_not_there_are_left_out(tmp_path, make_devkit):
    devkit = make_devkit(tmp_path, SPLITS | {"test": ["t1", "t2", "t3"]})
    (devkit / "JPEGImages/t2.jpg").unlink()
    source = voc.read_devkit(devkit, voc.CLASSES)
    assert source.splits["test"] == ("t1", "t3")
    assert "t2" not in source.entries
    (note,) = source.notes
    assert "1 of its 3 images" in note and str(devkit / "JPEGImages") in note
    for name in ("t1", "t3"):
        (devkit / f"JPEGImages/{name}.jpg").unlink()
    source = voc.read_devkit(devkit, voc.CLASSES)
    assert list(source.splits) == ["train", "val"]
    assert "3 of its 3 images" in source.notes[0]
    verify(source)
    # Of the other splits a missing image stays a problem.
    (devkit / "JPEGImages/2008_000003.jpg").unlink()
    with pytest.raises(UserError, match=r"2008_000003\.jpg is missing"):
        verify(voc.read_devkit(devkit, voc.CLASSES))


def test_a_single_list_is_enough(tmp_path, make_devkit):
    devkit = make_devkit(tmp_path, {"val": ["a"]})
    assert list(voc.read_devkit(devkit, voc.CLASSES).splits) == ["val"]


def test_no_list_at_all(tmp_path, make_devkit):
    with pytest.raises(UserError, match="holds none of train, val, test"):
        voc.read_devkit(make_devkit(tmp_path, {}), voc.CLASSES)


def test_labels_are_names_of_objects_difficult_included_and_not_of_parts(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(
        "<annotation><object><name> person </name><difficult>1</difficult>"
        "<part><name>head</name></part></object><object><name>dog</name></object>"
        "<object><name>person</name></object></annotation>"
    )
    assert voc.read_annotation(path) == ("dog", "person")


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
def test_bad_annotation_is_a_problem_of_its_image(tmp_path, make_devkit, text, message):
    devkit = make_devkit(tmp_path, SPLITS)
    path = devkit / "Annotations/2007_000001.xml"
    path.unlink() if text is None else path.write_text(text)
    problems = voc.read_devkit(devkit, voc.CLASSES).entries["2007_000001"].problems
    assert len(problems) == 1
    assert str(path) in problems[0]
    assert message in problems[0]


def test_bad_lists_are_problems(tmp_path, make_devkit):
    devkit = make_devkit(tmp_path, {"train": ["a", "b"]})
    (devkit / "ImageSets/Segmentation/train.txt").write_text("a\nb\na\n../secret\n.hidden\n")
    (devkit / "ImageSets/Segmentation/val.txt").write_text("\n")
    with pytest.raises(UserError) as caught:
        verify(voc.read_devkit(devkit, voc.CLASSES))
    text = str(caught.value)
    assert text.startswith("the data has 4 problems")
    for line in ("'../secret' is no plain", "'.hidden' is no plain", "a is listed more than once",
                 "split 'val' is empty"):  # fmt: skip
        assert line in text


def test_class_names_are_those_of_voc():
    assert len(voc.CLASSES) == 20
    assert voc.CLASSES == tuple(sorted(voc.CLASSES))
    assert (voc.CLASSES[0], voc.CLASSES[14], voc.CLASSES[19]) == (
        "aeroplane",
        "person",
        "tvmonitor",
    )


def test_real_sample():
    default = Path(__file__).parents[3] / "shared"
    root = Path(os.environ.get("ISIM_SHARED", default)) / "data" / "voc_sample"
    if not root.is_dir():
        pytest.skip(f"the VOC sample is not at {root}; set ISIM_SHARED")
    source = voc.read_devkit(voc.find_devkit(root, download=False), voc.CLASSES)
    assert {name: len(ids) for name, ids in source.splits.items()} == {"train": 562, "val": 240}
    # A part of the check: all of it takes seconds.
    few = {name: entry for name, entry in source.entries.items() if name < "2007_001"}
    part = type(source)(source.classes, few, {"few": tuple(few)})
    checked = verify(part)
    assert len(checked) > 20
    for name, result in checked.items():
        assert result.pixels is not None and result.pixels.sum() > 0
        assert source.entries[name].labels
