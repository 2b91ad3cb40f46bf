"""A user's own folder is read, split reproducibly, and refused with every problem named."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sources import make_folder, problems_of, section

from isim.data.files import write_label_map
from isim.data.sources import folder
from isim.data.sources.folder import split_ids
from isim.data.sources.source import verify
from isim.errors import UserError


def read(root):
    return folder.read(section("folder", val_fraction=0.34), root, root)


def test_images_labels_and_masks(tmp_path):
    rows = ["a.jpg,dog; cat", "b,cat", "c.JPG,ape;"]
    root = make_folder(tmp_path, rows, ["a.jpg", "b.png", "c.JPG"])
    write_label_map(root / "masks/b.png", np.full((6, 8), 2, np.uint8))
    source = read(root)
    assert source.classes == ("ape", "cat", "dog")
    found = [(name, entry.image.name, *entry.labels) for name, entry in source.entries.items()]
    assert found == [("a", "a.jpg", "cat", "dog"), ("b", "b.png", "cat"), ("c", "c.JPG", "ape")]
    assert source.entries["b"].mask == root / "masks/b.png"
    assert source.entries["c"].mask is None
    assert len(source.splits["val"]) == 1
    assert verify(source)["b"].labels_without_pixels == 0
    (root / "classes.txt").write_text("dog\ncat\n\nbat\nape\n")
    assert read(root).classes == ("dog", "cat", "bat", "ape")


def test_byte_order_mark_further_columns_and_names_like_stems_are_fine(tmp_path):
    rows, header = ["a.jpg,x,note", "a.jpg.png,y,"], "\ufeffimage,labels,more"
    source = read(make_folder(tmp_path, rows, ["a.jpg", "a.jpg.png"], header=header))
    assert [(name, *e.labels) for name, e in source.entries.items()] == [("a", "x"), ("a.jpg", "y")]


def test_all_problems_are_listed_at_once(tmp_path):
    rows = ["a.jpg,dog", "b.png,", "c.JPG,fly", "d.jpg,dog", "a,cat", "../labels.csv,dog"]
    root = make_folder(tmp_path, rows, ("a.jpg", "b.png", "c.JPG", "e.jpg", "e.png"))
    (root / "classes.txt").write_text("cat\ndog")
    write_label_map(root / "masks/f.png", np.zeros((6, 8), np.uint8))
    _, *lines = problems_of(read(root))
    parts = (
        "e.png and e.jpg share one id",
        "b.png names no class",
        "c.JPG: unknown class 'fly'",
        "images/d.jpg is missing",
        "labels.csv, a: this image has more than one row",
        "images/../labels.csv is missing",
        "e.jpg has no row in labels.csv",
        "masks/f.png is the mask of no image",
    )
    for line, part in zip(lines, parts, strict=True):
        assert part in line


def test_missing_and_malformed_parts(tmp_path):
    with pytest.raises(UserError, match="images does not exist"):
        read(tmp_path)
    (tmp_path / "images").mkdir()
    for data, told in (
        (None, r"cannot read .*labels.csv \(.*No such file"),
        (b"a.jpg,dog\n", "must begin with the header image,labels"),
        (b"image,labels\n\xff\xfe,dog\n", "UTF-8"),
        (b"image,labels\n", "has 0 classes"),
    ):
        if data:
            (tmp_path / "labels.csv").write_bytes(data)
        with pytest.raises(UserError, match=told):
            read(tmp_path)
    for text in ("background\ncat", "cat\ncat", "cat;dog"):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(UserError, match="must name each class once"):
            read(tmp_path)


@given(st.sets(st.text("abc", min_size=1), max_size=40), st.floats(0.01, 0.99), st.integers(0, 9))
def test_split_is_a_partition_and_reproducible(names, fraction, seed):
    ids = sorted(names)
    splits = split_ids(ids, fraction, seed)
    assert sorted(splits["train"] + splits["val"]) == ids
    assert all(list(part) == sorted(part) for part in splits.values())
    assert splits == split_ids(ids, fraction, seed)
    if len(ids) > 1:
        assert 1 <= len(splits["val"]) < len(ids)
        assert abs(len(splits["val"]) - fraction * len(ids)) <= 1
    many = [str(number) for number in range(100)]
    assert split_ids(many, 0.3, seed)["val"] != split_ids(many, 0.3, seed + 1)["val"]
