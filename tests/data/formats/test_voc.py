"""The layout of a devkit: masks, boxes, lists."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image

from isim.data import files
from isim.data.formats.labelled import LabelledSet
from isim.data.formats.voc import write_voc
from isim.errors import UserError


def test_masks_lists_and_images_are_those_given(written, tmp_path):
    folder = tmp_path / "devkit"
    assert write_voc(written, folder) == 3
    names = {ET.parse(path).findtext("filename") for path in (folder / "Annotations").iterdir()}
    assert names == {path.name for path in (folder / "JPEGImages").iterdir()}
    for entry in written.entries:
        name = entry.id.replace("/", "__")
        label = files.read_label_map(folder / f"SegmentationClass/{name}.png")
        assert (label == entry.label()).all(), "what is ignored stays 255"
        assert (folder / f"JPEGImages/{name}.png").read_bytes() == entry.image.read_bytes()
    lists = {path.stem: path.read_text() for path in (folder / "ImageSets/Segmentation").iterdir()}
    assert lists == {"train": "a\nbox__b\n", "val": "c d\n"}
    assert (folder / "classes.txt").read_text(encoding="utf-8").splitlines()[1] == "Birne, süß"


def test_boxes_are_those_of_the_parts(written, labels, tmp_path):
    write_voc(written, tmp_path / "devkit")
    root = ET.parse(tmp_path / "devkit/Annotations/a.xml").getroot()
    found = sorted(
        (thing.findtext("name"), *(int(value.text) for value in thing.find("bndbox")))
        for thing in root.iter("object")
    )
    expected = []
    for value in (1, 2, 3):
        count, _, stats, _ = cv2.connectedComponentsWithStats(np.uint8(labels["a"] == value))
        expected += [
            (written.names[value], left + 1, top + 1, left + width, top + height)
            for left, top, width, height, _ in stats[1:count].tolist()
        ]
    assert found == sorted(expected)


def test_two_images_of_one_name_are_told(written, tmp_path):
    first = written.entries[0]
    twice = (replace(first, id="a__b"), replace(first, id="a/b"))
    with pytest.raises(UserError, match="a__b"):
        write_voc(LabelledSet(written.names, twice), tmp_path / "devkit")
    assert not (tmp_path / "devkit").exists()


def test_an_image_that_exif_turns_is_written_upright(written, tmp_path, monkeypatch):
    path, entry = tmp_path / "turned.jpg", written.entries[0]
    exif = Image.Exif()
    exif[274] = 6
    upright = entry.read()
    Image.fromarray(np.rot90(upright).copy()).save(path, quality=95, exif=exif)
    # As any reader that turns images gives it.
    monkeypatch.setattr(files, "read_image", lambda _: upright)
    assert files.unusual(path) == "turned by EXIF"
    monkeypatch.setattr(files, "image_size", lambda _: upright.shape[:2])
    write_voc(LabelledSet(written.names, (replace(entry, image=path),)), tmp_path / "devkit")
    with Image.open(tmp_path / "devkit/JPEGImages/a.jpg") as image:
        assert image.size == upright.shape[1::-1] and 274 not in image.getexif()
