"""A user's own folder is read, split reproducibly, and refused with every problem named."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from isim.data.files import write_label_map
from isim.data.folder import read_folder, split_ids
from isim.data.source import verify
from isim.errors import UserError


def make_folder(root, rows, images=("a.jpg", "b.png", "c.JPG"), header="image,labels"):
    (root / "images").mkdir(parents=True)
    for name in images:
        Image.new("RGB", (8, 6)).save(root / "images" / name)
    (root / "labels.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return root


ROWS = ["a.jpg,dog; cat", "b,cat", "c.JPG,ape;"]


def test_images_labels_and_masks(tmp_path):
    root = make_folder(tmp_path, ROWS)
    write_label_map(root / "masks/b.png", np.full((6, 8), 2, np.uint8))
    source = read_folder(root, 0.34, 0)
    assert source.classes == ("ape", "cat", "dog")
    assert list(source.entries) == ["a", "b", "c"]
    assert source.entries["a"].labels == ("cat", "dog")
    assert source.entries["b"].image == root / "images/b.png"
    assert source.entries["b"].mask == root / "masks/b.png"
    assert source.entries["c"].mask is None
    assert source.entries["c"].labels == ("ape",)
    assert len(source.splits["val"]) == 1
    assert verify(source)["b"].labels_without_pixels == 0


def test_a_file_name_wins_over_an_equal_stem(tmp_path):
    source = read_folder(
        make_folder(tmp_path, ["a.jpg,x", "a.jpg.png,y"], ("a.jpg", "a.jpg.png")), 0.5, 0
    )
    assert {name: entry.labels for name, entry in source.entries.items()} == {
        "a": ("x",),
        "a.jpg": ("y",),
    }


def test_classes_file_decides_the_order(tmp_path):
    root = make_folder(tmp_path, ROWS)
    (root / "classes.txt").write_text("dog\ncat\n\nbat\nape\n")
    assert read_folder(root, 0.34, 0).classes == ("dog", "cat", "bat", "ape")


def test_byte_order_mark_and_further_columns_are_fine(tmp_path):
    root = make_folder(tmp_path, [f"{row},x" for row in ROWS], header="\ufeffimage,labels,note")
    assert read_folder(root, 0.34, 0).classes == ("ape", "cat", "dog")


def test_all_problems_are_listed_at_once(tmp_path):
    rows = ["a.jpg,dog", "b.png,", "c.JPG,fly", "d.jpg,dog", "a,cat", "../labels.csv,dog"]
    root = make_folder(tmp_path, rows, ("a.jpg", "b.png", "c.JPG", "e.jpg", "e.png"))
    (root / "classes.txt").write_text("cat\ndog")
    write_label_map(root / "masks/f.png", np.zeros((6, 8), np.uint8))
    with pytest.raises(UserError) as caught:
        verify(read_folder(root, 0.34, 0))
    lines = str(caught.value).splitlines()
    for part in (
        "b.png names no class",
        "c.JPG: unknown class 'fly'",
        "images/d.jpg is missing",
        "labels.csv, a: this image has more than one row",
        "images/../labels.csv is missing",
        "e.png and e.jpg share one id",
        "e.jpg has no row in labels.csv",
        "masks/f.png is the mask of no image",
    ):
        assert sum(part in line for line in lines) == 1, part
    assert len(lines) == 9


def test_missing_parts(tmp_path):
    with pytest.raises(UserError, match="images does not exist"):
        read_folder(tmp_path, 0.2, 0)
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="labels.csv does not exist"):
        read_folder(tmp_path, 0.2, 0)
    (tmp_path / "labels.csv").write_text("a.jpg,dog\n")
    with pytest.raises(UserError, match="must begin with the header image,labels"):
        read_folder(tmp_path, 0.2, 0)
    (tmp_path / "labels.csv").write_bytes(b"image,labels\n\xff\xfe,dog\n")
    with pytest.raises(UserError, match="UTF-8"):
        read_folder(tmp_path, 0.2, 0)
    (tmp_path / "labels.csv").write_text("image,labels\n")
    with pytest.raises(UserError, match="has 0 classes"):
        read_folder(tmp_path, 0.2, 0)


@pytest.mark.parametrize("text", ["background\ncat", "cat\ncat", "cat;dog"])
def test_bad_classes_file(tmp_path, text):
    root = make_folder(tmp_path, ROWS)
    (root / "classes.txt").write_text(text)
    with pytest.raises(UserError, match="must name each class once"):
        read_folder(root, 0.2, 0)


@given(st.sets(st.text("abc", min_size=1), max_size=40), st.floats(0.01, 0.99), st.integers(0, 9))
def test_split_is_a_partition_and_reproducible(names, fraction, seed):
    ids = sorted(names)
    splits = split_ids(ids, fraction, seed)
    assert sorted(splits["train"] + splits["val"]) == ids
    assert splits == split_ids(ids, fraction, seed)
    if len(ids) > 1:
        assert 1 <= len(splits["val"]) < len(ids)
        assert abs(len(splits["val"]) - fraction * len(ids)) <= 1


def test_another_seed_draws_others():
    ids = [str(number) for number in range(100)]
    assert split_ids(ids, 0.3, 0)["val"] != split_ids(ids, 0.3, 1)["val"]
