"""isim export: what each format writes, what is refused."""

import pytest

from isim.errors import UserError
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


@pytest.mark.parametrize(
    ("form", "name", "options", "words"),
    [
        ("coco", "all", {}, "coco is a file; name one, such as .*all.json"),
        ("yolo", "full", {}, "no empty folder"),
        ("voc", "voc", {"polygons": True}, "--polygons means nothing for voc"),
        ("onnx", "a.onnx", {"source": "last_round"}, "--from means nothing for onnx"),
        ("overlay", "o", {"source": "data/masks"}, "neither a folder"),
        ("onnx", "a.onnx", {"model": "no"}, "not a checkpoint of train_segmenter"),
    ],
)
def test_what_cannot_be_is_one_line(form, name, options, words, finished_project, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious.txt").write_text("keep")
    with pytest.raises(UserError, match=words):
        export.run(form, tmp_path / name, Options(**options), finished_project)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "precious.txt"]
