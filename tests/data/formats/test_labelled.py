"""Label maps and their images, found for other formats."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image

from isim.data import files
from isim.data.formats import labelled
from isim.errors import UserError


def put(path, size=(4, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path)


def test_a_folder_of_predictions_with_its_images(tmp_path):
    for id_ in ("a", "box/b"):
        put(tmp_path / f"images/{id_}.jpg")
        files.write_label_map(tmp_path / f"out/{id_}.png", np.zeros((4, 6), np.uint8))
    put(tmp_path / "images/.hidden/c.jpg")
    put(tmp_path / "images/@eaDir/a.jpg")
    put(tmp_path / "images/without.jpg")
    listed = files.class_list(["background", "cat"])
    (tmp_path / "out/classes.json").write_text(json.dumps(listed))
    data = labelled.collect("out", tmp_path / "images", tmp_path)
    assert [entry.id for entry in data.entries] == ["a", "box/b"]
    assert data.names == ("background", "cat") and [*data.splits()] == ["train"]
    assert data.flat_ids() == {"a": "a", "box/b": "box__b"}


def test_label_sets_and_masks_of_a_project(finished_project):
    data = labelled.collect("last_round", None, finished_project)
    assert len(data.entries) == 16 and [*data.splits()] == ["train"]
    assert data.entries[0].label().shape == (64, 64)
    folder = labelled.collect("data/pseudo_labels/round_01", None, finished_project)
    assert [entry.id for entry in folder.entries] == [entry.id for entry in data.entries]
    assert folder.names == data.names and folder.names[0] == "background"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nothing", "neither a folder nor a label set"),
        ("images", "1 of 1 label maps have no image, such as c.png"),
        ("data/cams", "holds no label maps"),
        ("seeds", "CAMs, not label maps"),
        ("ground_truth_2", "neither"),
    ],
)
def test_what_is_not_there_is_told(source, words, finished_project, tmp_path):
    put(tmp_path / "images/c.png")
    source = str(tmp_path / "images") if source == "images" else source
    with pytest.raises(UserError, match=words):
        labelled.collect(source, None, finished_project)


def turned(mode="RGB"):
    image = Image.new(mode, (8, 6))
    exif = image.getexif()
    exif[274] = 6
    return image, {"exif": exif}


def moving():
    return PLAIN, {"save_all": True, "append_images": [Image.new("RGB", (8, 6), "red")]}


PLAIN = Image.new("RGB", (8, 6), (90, 40, 200))
DEEP = Image.fromarray(np.full((6, 8), 40000, np.uint16))


@pytest.mark.parametrize(
    ("name", "given", "options", "why", "written"),
    [
        ("a.jpg", PLAIN, {}, "", "a.jpg"),
        ("a.JPEG", PLAIN, {}, "", "a.JPEG"),
        ("a.png", PLAIN.convert("P"), {}, "", "a.png"),
        ("a.tif", PLAIN, {}, "", "a.tif"),
        ("a.webp", PLAIN, {}, "", "a.webp"),
        ("a.jpeg", *turned(), "turned by EXIF", "a.jpg"),
        ("a.png", *turned(), "turned by EXIF", "a.png"),
        ("a.tif", *turned(), "turned by EXIF", "a.png"),
        ("a.tif", DEEP, {}, "more than 8 bits", "a.png"),
        ("a.png", DEEP, {}, "more than 8 bits", "a.png"),
        ("a.gif", PLAIN, {}, "GIF", "a.png"),
        ("a.heic", PLAIN, {}, "HEIF", "a.jpg"),
        ("a.avif", PLAIN, {}, "AVIF", "a.jpg"),
        ("a.jfif", PLAIN, {}, "JPEG named .jfif", "a.jpg"),
        ("a.png", PLAIN, {"format": "JPEG"}, "JPEG named .png", "a.jpg"),
        ("a.webp", *moving(), "animation", "a.jpg"),
    ],
)
@pytest.mark.parametrize("copy", [False, True])
def test_images_that_others_do_not_read_alike_are_written_anew(
    copy, name, given, options, why, written, tmp_path
):
    image = tmp_path / name
    if name.endswith(".heic"):
        pytest.importorskip("pillow_heif").register_heif_opener()
    given.save(image, **options)
    entry = labelled.Labelled("a", image, image, "", (0, 65535))
    path = labelled.put_image(entry, tmp_path / "out/deep", "a", copy=copy)
    assert path == tmp_path / "out/deep" / written and files.unusual(image) == why
    assert path.is_symlink() == (not copy and not why)
    # As any program reads the file, in which nothing is left to turn.
    plain = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)[..., ::-1]
    assert plain.dtype == np.uint8 and plain.shape == entry.read().shape
    assert np.abs(plain.astype(int) - entry.read()).max() < 12
    assert files.unusual(path) == ""
    told = labelled.written_anew(labelled.LabelledSet(("background",), (entry, entry)))
    assert told == (why and f"2 images are written anew, upright and 8-bit (2 {why})")


def test_a_label_map_of_another_size_is_told(tmp_path):
    put(tmp_path / "images/a.jpg")
    files.write_label_map(tmp_path / "out/a.png", np.zeros((4, 5), np.uint8))
    (tmp_path / "out/classes.json").write_text(json.dumps(files.class_list(["background", "x"])))
    (entry,) = labelled.collect("out", tmp_path / "images", tmp_path).entries
    with pytest.raises(UserError, match=r"5x4 pixels.*6x4"):
        entry.label()


def test_labels_without_a_name_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "masks").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "photos/a.png")
    names = [{"name": "background"}, {"name": "cat"}]
    (tmp_path / "masks/classes.json").write_text(json.dumps(names))
    for label, fits in ((1, True), (255, True), (2, False), (254, False)):
        files.write_label_map(tmp_path / "masks/a.png", np.full((3, 4), label, np.uint8))
        (entry,) = labelled.collect("masks", tmp_path / "photos", tmp_path).entries
        if fits:
            assert entry.label().max() == label
        else:
            with pytest.raises(UserError, match=rf"holds label {label}, classes.json names 0..1"):
                entry.label()
