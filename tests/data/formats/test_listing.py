"""Images below a folder: ids, what is passed over, and names that find them."""

import os
import sys
import unicodedata

import pytest

from isim.data.formats import listing
from isim.data.formats.listing import Names


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_ids_are_paths_without_suffix_and_what_is_hidden_is_passed_over(tmp_path):
    nfd = unicodedata.normalize("NFD", "ü.GIF")
    names = ["a.JPG", "s/t/b.c.png", nfd, "d.webp", "e.avif", "n.txt", "x.cr2", "masks/a.png"]
    hidden = [".a.png", ".ipynb_checkpoints/a.png", "s/@eaDir/b.png", "Thumbs.db", "__MACOSX/a.png"]
    touch(tmp_path, *names, *hidden)
    found = listing.images(tmp_path, aside=[tmp_path / "masks"])
    assert list(found.images) == ["a", "d", "e", "s/t/b.c", "ü"]
    assert found.images["ü"] == tmp_path / nfd
    assert set(found.others) == {"n.txt", "x.cr2"} and found.problems == ()
    (problem,) = listing.passed_over(found)
    assert "x.cr2 is in a format that is not read" in problem.what and not problem.error


def test_heic_is_read_with_its_package_alone(tmp_path, monkeypatch):
    touch(tmp_path, "a.heic")
    pytest.importorskip("pillow_heif")
    assert list(listing.images(tmp_path).images) == ["a"]
    monkeypatch.setattr(listing.importlib.util, "find_spec", lambda _: None)
    listing.suffixes.cache_clear()
    found = listing.images(tmp_path)
    listing.suffixes.cache_clear()
    assert not found.images
    assert "run `pip install isim[heic]`" in listing.passed_over(found)[0].what


def test_links_are_followed_once(tmp_path):
    touch(tmp_path / "elsewhere", "a.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/photos").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "elsewhere")
    assert list(listing.images(tmp_path / "root").images) == ["photos/a"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_text_are_problems(tmp_path):
    (tmp_path / "a.png").touch()
    with open(os.fsencode(tmp_path) + b"/\xff.png", "w"):
        pass
    found = listing.images(tmp_path)
    assert list(found.images) == ["a"]
    assert "is not UTF-8; rename it" in found.problems[0].what


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_with_control_characters_are_problems(tmp_path):
    # A screenshot of macOS has the second character, and a family the third.
    for name in ("a\nb.png", "a\x1b[31m.png", "10.00\u202fAM \u200d.png", "c\n.cr2", "d\n.txt"):
        (tmp_path / name).touch()
    # macOS writes one into each folder that has an icon of its own.
    (tmp_path / "Icon\r").touch()
    found = listing.images(tmp_path)
    assert list(found.images) == ["10.00\u202fAM \u200d"] and len(found.problems) == 2
    assert all("control characters; rename it" in problem.what for problem in found.problems)
    (odd,) = listing.passed_over(found)
    assert "c\\n.cr2' is in a format that is not read" in odd.what and not odd.error
    assert all(problem.what.isprintable() for problem in (*found.problems, odd))


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("a.jpg", {"a"}),
        ("a", {"a"}),
        ("a.jpg.png", {"a.jpg"}),
        ("b.png", {"s/b"}),
        ("s/b", {"s/b"}),
        ("/x/y/s/b.png", {"s/b"}),
        (r"C:\x\a.jpg", {"a"}),
        ("c.png", {"s/c", "t/c"}),
        ("t/c.png", {"t/c"}),
        ("A.JPG", {"a"}),
        ("S/B.PNG", {"s/b"}),
        ("B", {"s/b"}),
        ("../d.csv", set()),
        ("q/b.png", set()),
        (" e.png", {"s/ e"}),
        ("e.png", {"s/ e"}),
        ("s/e.png ", {"s/ e"}),
        (" a.jpg", {"a"}),
        ("", set()),
        (" ", set()),
        ("/", set()),
    ],
)
def test_names_of_label_files_find_images(tmp_path, name, ids):
    touch(tmp_path, "a.jpg", "a.jpg.png", "s/b.png", "s/c.png", "t/c.png", "s/ e.png", "d.csv")
    names = Names(listing.images(tmp_path))
    assert names.find(name) == ids
    assert bool(names.by_case) == (name in ("A.JPG", "S/B.PNG", "B", "e.png", "s/e.png "))


@pytest.mark.parametrize(
    ("one", "two", "is_one"),
    [
        ("p/1.jpg", "q/1.jpg", False),
        ("p/1.jpg", "1", True),
        ("p/1.jpg", "P/1.JPG", True),
        ("p/1.jpg", "p/1.png", False),
        ("/home/anna/p/images/1.jpg", "/home/ben/p/images/1.jpg", True),
        (r"C:\\p\images\1.jpg", "../Images/1.jpg", True),
        ("../images/1.jpg", "p/images/1.jpg", True),
        ("../1.jpg", "p/1.jpg", True),
        ("a/images/p/1.jpg", "b/images/p/1.jpg", True),
        ("a/images/p/1.jpg", "a/images/q/1.jpg", False),
        ("/home/anna/1.jpg", "/home/ben/1.jpg", False),
        ("images/1.jpg", "q/1.jpg", False),
        ("images/q/1.jpg", "q/1.jpg", True),
        ("/", "..", True),
    ],
)
def test_names_whose_folders_differ_below_the_listed_one_are_two(one, two, is_one):
    assert (
        listing.may_be_one(one, two, "images") == listing.may_be_one(two, one, "images") == is_one
    )
