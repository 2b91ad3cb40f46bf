"""isim export: what each format writes, what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from isim.data import files
from isim.errors import UserError
from isim.experiments import preset
from isim.passes import export
from isim.passes.export import Options

LAST = Options(source="last_round")
WRITTEN = {
    "coco": ("all.json", [""]),
    "yolo": ("yolo", ["data.yaml", "images/train/train_00003.jpg", "labels/train/train_00003.txt"]),
    "voc": ("voc", ["SegmentationClass/train_00003.png", "ImageSets/Segmentation/train.txt"]),
    "labelstudio": ("tasks", ["tasks.json", "config.xml"]),
    "overlay": ("overlays", ["train_00003.jpg"]),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_a_label_set_in_each_format(form, finished_project, tmp_path):
    name, expected = WRITTEN[form]
    told = export.run(form, tmp_path / name, LAST, finished_project)
    assert told.startswith(str(tmp_path / name)) and "of 16 images" in told
    assert all((tmp_path / name / part).exists() for part in expected)


@pytest.mark.parametrize("form", ["yolo", "voc"])
def test_images_that_are_written_anew_are_told(form, tmp_path):
    (tmp_path / "params.yaml").write_text(
        preset.text("tiny").replace("sixteen_bit: refuse", "sixteen_bit: [0, 65535]")
    )
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(tmp_path / "photos/deep.tif")
    Image.new("RGB", (6, 4)).save(tmp_path / "photos/plain.jpg")
    for name in ("deep", "plain"):
        files.write_label_map(tmp_path / f"masks/{name}.png", np.ones((4, 6), np.uint8))
    (tmp_path / "masks/classes.json").write_text(json.dumps(files.class_list(["background", "x"])))
    options = Options(source="masks", images=tmp_path / "photos")
    told = export.run(form, tmp_path / "out", options, tmp_path)
    assert told.endswith(
        "of 2 images; 1 image is written anew, upright and 8-bit (1 more than 8 bits)"
    )
    found = {path.name: path for path in (tmp_path / "out").rglob("*") if path.suffix != ".xml"}
    assert found["plain.jpg"].is_symlink() and not found["deep.png"].is_symlink()
    assert "deep.tif" not in found


@pytest.mark.parametrize(
    ("form", "name", "options", "words"),
    [
        ("coco", "all", {}, "coco is a file; name one, such as .*all.json"),
        ("yolo", "full", {}, "no empty folder"),
        ("voc", "voc", {"polygons": True}, "--polygons means nothing for voc"),
        ("onnx", "a.onnx", {"source": "last_round"}, "--from means nothing for onnx"),
        ("overlay", "o", {"source": "data/masks"}, "neither a folder"),
        ("coco", "full/precious.txt", {"source": "last_round"}, "was not written by this command"),
        ("coco", "full/own.json", {"source": "last_round"}, "was not written by this command"),
        ("onnx", "full/precious.txt", {}, "was not written by this command; name another file"),
        ("onnx", "full/other.onnx", {}, "was not written by this command; name another file"),
        ("coco", "full", {"source": "last_round"}, "coco is a file"),
        ("onnx", "a.onnx", {"model": "no"}, "no is missing; run `isim train-segmenter`"),
    ],
)
def test_what_cannot_be_is_one_line(form, name, options, words, finished_project, tmp_path):
    (tmp_path / "full").mkdir()
    kept = {"other.onnx", "own.json", "precious.txt"}
    for own in kept:
        (tmp_path / "full" / own).write_text("keep")
    with pytest.raises(UserError, match=words):
        export.run(form, tmp_path / name, Options(**options), finished_project)
    assert {path.name for path in tmp_path.rglob("*")} == {"full", *kept}
    assert {(tmp_path / "full" / own).read_text() for own in kept} == {"keep"}


@pytest.mark.parametrize("name", ["all.json", "labels.coco"])
def test_an_export_takes_the_place_of_an_earlier_one(name, finished_project, tmp_path):
    first = export.run("coco", tmp_path / name, LAST, finished_project)
    assert export.run("coco", tmp_path / name, LAST, finished_project) == first
