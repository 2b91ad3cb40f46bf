"""The form of labels is found, and what may be several is asked for."""

import pytest
from support.sources import put_photos

from isim.data.formats import labels, listing
from isim.errors import UserError


@pytest.fixture
def read(tmp_path):
    def call(wanted="auto", images="."):
        folder = tmp_path / images
        return labels.read(wanted, tmp_path, folder, listing.images(folder))

    put_photos(tmp_path, ["cat/1.jpg", "dog/2.jpg"])
    return call


def test_a_file_comes_before_annotations_and_these_before_folders(read, tmp_path):
    assert read().form == "a folder for each class"
    (tmp_path / "cat/1.xml").write_text("<annotation/>")
    assert read().form == "annotations beside the images"
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations/1.xml").write_text("<annotation/>")
    assert read().form == "annotations in Annotations"
    (tmp_path / "any.csv").write_text("image,labels\n1,x\n")
    assert read().form == "the table any.csv"
    (tmp_path / "tags.json").write_text("{}")
    assert read().form == "the JSON file tags.json"


def test_folders_may_be_named(read, tmp_path):
    (tmp_path / "any.csv").write_text("image,labels\n1,x\n")
    (tmp_path / "xml").mkdir()
    assert read(".").form == "a folder for each class"
    with pytest.raises(UserError, match="holds no annotations"):
        read("xml")
    (tmp_path / "xml/1.xml").write_text("<annotation/>")
    assert read("xml").form == "annotations in xml"
