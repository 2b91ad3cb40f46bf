"""Images, label maps and CAMs survive a round trip; damaged files are named."""

import sys
from functools import partial

import cv2
import numpy as np
import pillow_heif
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageOps

from isim.data import files
from isim.errors import UserError


def test_voc_palette_has_the_published_colours():
    palette = files.voc_palette()
    assert palette.shape == (256, 3) and palette.dtype == np.uint8
    assert palette[[0, 1, 2, 8, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [64, 0, 0], [192, 128, 128], [0, 64, 128],
        [224, 224, 192],
    ]  # fmt: skip


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20))))
def test_label_map_round_trip(tmp_path_factory, label_map):
    path = tmp_path_factory.mktemp("labels") / "a.png"
    files.write_label_map(path, label_map)
    assert np.array_equal(files.read_label_map(path), label_map)
    with Image.open(path) as image:
        assert image.mode == "P"
        assert image.getpalette() == files.voc_palette().ravel().tolist()


def test_images_and_label_maps_may_be_grey_but_not_deep_or_in_colours(tmp_path):
    ids = np.array([[0, 1], [255, 7]], np.uint8)
    Image.fromarray(ids).save(tmp_path / "grey.png")
    assert np.array_equal(files.read_label_map(tmp_path / "grey.png"), ids)
    assert np.array_equal(files.read_image(tmp_path / "grey.png"), np.stack([ids] * 3, -1))
    Image.new("RGB", (3, 3)).save(tmp_path / "colour.png")
    with pytest.raises(UserError, match="RGB colours; save class ids"):
        files.read_label_map(tmp_path / "colour.png")
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="more than 8 bits"):
        files.read_image(tmp_path / "deep.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "heic"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_an_image_is_turned_by_its_exif_orientation_as_viewers_do(tmp_path, suffix, orientation):
    path = tmp_path / f"a.{suffix}"
    corners = np.zeros((2, 3, 3), np.uint8)
    corners[0, 0], corners[0, 2], corners[1, 0] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    image = Image.fromarray(corners.repeat(32, 0).repeat(32, 1))
    exif = image.getexif()
    exif[0x0112] = orientation
    if suffix == "heic":
        pillow_heif.register_heif_opener()
    image.save(path, exif=exif, quality=95)
    with Image.open(path) as again:
        shown = np.array(ImageOps.exif_transpose(again).convert("RGB"))
    assert np.array_equal(files.read_image(path), shown)
    # HEIC has a way of its own to tell it, which its package applies.
    sideways = 4 < orientation < 9 and suffix != "heic"
    assert files.image_size(path) == shown.shape[:2] == ((96, 64) if sideways else (64, 96))
    assert min(files.read_image(path, (20, 20)).shape[:2]) >= 20


def test_damaged_exif_is_no_reason_to_refuse_an_image(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=b"Exif\0\0no header at all")
    assert files.read_image(tmp_path / "a.jpg").shape == (4, 6, 3)
    assert files.image_size(tmp_path / "a.jpg") == (4, 6)


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (6, 4), (shade, 0, 0)) for shade in (200, 10)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (files.read_image(tmp_path / "a.gif") == [200, 0, 0]).all()


def test_heic_is_told_apart_from_a_damaged_file_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.HEIC").write_bytes(b"")
    for read in (files.read_image, files.image_size):
        with pytest.raises(UserError, match=r"run `pip install isim\[heic\]`"):
            read(tmp_path / "a.HEIC")


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_shown_by_a_range_and_refused_without(tmp_path, suffix, channels):
    path = tmp_path / f"a.{suffix}"
    values = np.array([[100, 300, 500], [600, 1100, 65535]], np.uint16)
    cv2.imwrite(str(path), np.stack([values, values // 2, values // 4], -1)[..., :channels])
    with pytest.raises(UserError, match=r"more than 8 bits a channel; set prepare.sixteen_bit"):
        files.read_image(path)
    assert files.is_deep(path) and files.image_size(path) == (2, 3)
    shown = files.read_deep_image(path, (100, 1100))
    assert shown.shape == (2, 3, 3) and shown.dtype == np.uint8
    # The first channel of OpenCV's is blue.
    assert shown[..., 2].tolist() == [[0, 51, 102], [128, 255, 255]]
    assert shown[0, 1].tolist() == ([51] * 3 if channels == 1 else [0, 13, 51])


@pytest.mark.parametrize(
    ("mode", "format_", "simple"),
    [
        ("P", "PNG", True),
        ("L", "PNG", True),
        ("1", "PNG", False),
        ("P", "GIF", False),
        ("L", "BMP", False),
        ("RGB", "TIFF", False),
        ("RGBA", "PNG", False),
        ("I;16", "PNG", False),
    ],
)
def test_masks_of_any_form_have_values_or_colours(tmp_path, mode, format_, simple):
    path, values = tmp_path / "a", np.array([[0, 1], [2, 255]], np.uint8)
    if mode == "P":
        image = Image.fromarray(values)
        image.putpalette(files.voc_palette().tobytes())
    elif mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16))
    elif mode == "1":
        image = Image.fromarray(values > 1)
    else:
        image = Image.fromarray(values).convert(mode)
    image.save(path, format=format_)
    raw = files.read_raw_mask(path)
    assert raw.simple == simple
    if mode == "1":
        assert raw.values.tolist() == [[0, 0], [255, 255]]
    elif raw.values is not None:
        assert np.array_equal(raw.values, values)
        assert raw.values.dtype == np.uint8
    assert (raw.values is None) == (mode in ("RGB", "RGBA") or format_ == "GIF")
    if mode in ("P", "RGB", "RGBA"):
        assert raw.colors.shape == (2, 2, 3)
        assert raw.colors[0, 1].tolist() == ([128, 0, 0] if mode == "P" else [1, 1, 1])


@pytest.mark.parametrize(
    ("least", "size"),
    [(None, (80, 120)), ((41, 60), (80, 120)), ((40, 60), (40, 60)), ((13, 20), (20, 30))],
)
def test_a_large_jpeg_may_be_decoded_smaller_but_never_below_what_is_asked(tmp_path, least, size):
    ramp = np.tile(np.linspace(0, 240, 120, dtype=np.uint8)[None, :, None], (80, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "a.jpg", quality=95)
    image = files.read_image(tmp_path / "a.jpg", least)
    assert image.shape == (*size, 3)
    assert np.abs(image[0, :, 0] - np.linspace(0, 240, size[1])).max() < 8
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert np.array_equal(files.read_image(tmp_path / "a.png", least), ramp)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9])
def test_truncated_image_is_refused_by_name(tmp_path, suffix, keep):
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(UserError, match=f"{path}.*replace it") as caught:
        files.read_image(path)
    assert "\n" not in str(caught.value)


def test_label_maps_and_ground_truth_must_fit_their_image(tmp_path):
    path = tmp_path / "a.png"
    files.write_label_map(path, np.array([[0, 2, 255]], np.uint8))
    of_label = partial(files.read_label_of, ignored=True)
    for read, told in (
        (of_label, "; it is of an earlier state"),
        (files.read_truth, ": it has changed"),
    ):
        assert read(path, (1, 3), 3).tolist() == [[0, 2, 255]]
        with pytest.raises(UserError, match=f"a.png is 3x1 pixels, its image 3x2{told}"):
            read(path, (2, 3), 3)
        with pytest.raises(UserError, match=f"a.png holds label 2 of 0..1{told}"):
            read(path, (1, 3), 2)
    with pytest.raises(UserError, match=r"a.png holds label 255 of 0..2"):
        files.read_label_of(path, (1, 3), 3, ignored=False)
    files.write_label_map(path, np.full((1, 3), 255, np.uint8))
    assert (files.read_truth(path, (1, 3), 1) == 255).all()


@pytest.mark.parametrize(
    "read", [files.image_size, files.read_image, files.read_label_map, files.read_cam]
)
def test_missing_files_are_named(tmp_path, read):
    with pytest.raises(UserError, match=r"nowhere.* (does not exist|is missing)"):
        read(tmp_path / "nowhere")


SHAPES = st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9))


@given(hnp.arrays(np.float32, SHAPES, elements=st.floats(0, 1, width=16)))
def test_cam_round_trip(tmp_path_factory, cam):
    folder = tmp_path_factory.mktemp("cams")
    class_ids = np.arange(1, len(cam) + 1) * 2
    for name in ("a.npz", "b.npz"):
        files.write_cam(folder / name, cam, class_ids, (33, 35))
    again, ids, size = files.read_cam(folder / "a.npz")
    assert again.dtype == np.float32 and np.array_equal(again, cam)
    assert np.array_equal(ids, class_ids) and size == (33, 35)
    # DVC compares hashes: a time stamp in the archive would make every rerun a change.
    assert (folder / "a.npz").read_bytes() == (folder / "b.npz").read_bytes()


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "npy", "pickle"])
def test_damaged_cam_is_refused(tmp_path, damage):
    path = tmp_path / "a.npz"
    files.write_cam(path, np.ones((2, 9, 9)), np.array([1, 2]), (9, 9))
    data = path.read_bytes()
    with path.open("wb") as stream:
        if damage == "npy":
            np.save(stream, np.ones(3))
        elif damage == "pickle":
            np.savez(stream, cam=np.array([{}]), class_ids=np.ones(1), size=np.ones(2))
        else:
            stream.write({"empty": b"", "text": b"hello", "cut": data[: len(data) // 2]}[damage])
    with pytest.raises(UserError, match=r"not a CAM file \(.+\); run `isim export-cams`"):
        files.read_cam(path)


def test_classes_are_listed_with_their_colours():
    listed = files.class_list(["background", "cat"])
    assert listed == [
        {"id": 0, "name": "background", "colour": [0, 0, 0]},
        {"id": 1, "name": "cat", "colour": [128, 0, 0]},
    ]
