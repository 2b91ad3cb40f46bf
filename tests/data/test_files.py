"""Images, label maps and CAMs survive a round trip; damaged files are named."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from isim.data.files import (
    image_size,
    read_cam,
    read_image,
    read_label_map,
    read_label_of,
    read_truth,
    voc_palette,
    write_cam,
    write_label_map,
)
from isim.errors import UserError


def test_voc_palette_has_the_published_colours():
    palette = voc_palette()
    assert palette.shape == (256, 3)
    assert palette[[0, 1, 2, 8, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [64, 0, 0], [192, 128, 128], [0, 64, 128],
        [224, 224, 192],
    ]  # fmt: skip


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20))))
def test_label_map_round_trip(tmp_path_factory, label_map):
    path = tmp_path_factory.mktemp("labels") / "a.png"
    write_label_map(path, label_map)
    assert np.array_equal(read_label_map(path), label_map)
    with Image.open(path) as image:
        assert image.mode == "P"
        assert image.getpalette() == voc_palette().ravel().tolist()


def test_grey_label_map_reads_as_ids(tmp_path):
    ids = np.array([[0, 1], [255, 7]], np.uint8)
    Image.fromarray(ids).save(tmp_path / "grey.png")
    assert np.array_equal(read_label_map(tmp_path / "grey.png"), ids)


def test_colour_label_map_is_refused(tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "colour.png")
    with pytest.raises(UserError, match="RGB colours; save class ids"):
        read_label_map(tmp_path / "colour.png")


def test_image_is_rgb_and_ignores_exif_orientation(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[..., 0] = 200
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), pixels)


@pytest.mark.parametrize(
    ("least", "size"),
    [(None, (80, 120)), ((41, 60), (80, 120)), ((40, 60), (40, 60)), ((13, 20), (20, 30))],
)
def test_a_large_jpeg_may_be_decoded_smaller_but_never_below_what_is_asked(tmp_path, least, size):
    ramp = np.tile(np.linspace(0, 240, 120, dtype=np.uint8)[None, :, None], (80, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "a.jpg", quality=95)
    image = read_image(tmp_path / "a.jpg", least)
    assert image.shape == (*size, 3)
    assert np.abs(image[0, :, 0] - np.linspace(0, 240, size[1])).max() < 8
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", least), ramp)


def test_grey_image_becomes_three_channels(tmp_path):
    Image.new("L", (5, 4), 9).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png"), np.full((4, 5, 3), 9, np.uint8))


def test_deep_image_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="more than 8 bits"):
        read_image(tmp_path / "deep.png")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9])
def test_truncated_image_is_refused_by_name(tmp_path, suffix, keep):
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(UserError, match=f"{path}.*replace it") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path):
    for read in (read_image, read_label_map, read_cam):
        with pytest.raises(UserError, match="nowhere"):
            read(tmp_path / "nowhere")


def test_truth_must_fit_its_image(tmp_path):
    path = tmp_path / "a.png"
    write_label_map(path, np.array([[0, 2, 255]], np.uint8))
    assert read_truth(path, (1, 3), 3).tolist() == [[0, 2, 255]]
    with pytest.raises(UserError, match=r"a.png is 3x1 pixels, its image 3x2: it has changed"):
        read_truth(path, (2, 3), 3)
    with pytest.raises(UserError, match=r"a.png holds label 2 of 0..1: it has changed"):
        read_truth(path, (1, 3), 2)


def test_a_label_map_must_fit_its_image(tmp_path):
    path, image = tmp_path / "a.png", tmp_path / "a.jpg"
    write_label_map(path, np.array([[0, 2, 255]], np.uint8))
    assert read_label_of(path, image, (1, 3), 3, ignored=True).tolist() == [[0, 2, 255]]
    with pytest.raises(UserError, match=r"a.png is 3x1 pixels but .*a.jpg is 3x2; delete"):
        read_label_of(path, image, (2, 3), 3, ignored=True)
    with pytest.raises(UserError, match=r"a.png holds label 2 of 0..1; it is of other classes"):
        read_label_of(path, image, (1, 3), 2, ignored=True)
    with pytest.raises(UserError, match=r"a.png holds label 255 of 0..2"):
        read_label_of(path, image, (1, 3), 3, ignored=False)


def test_image_size_is_read_from_the_header(tmp_path):
    Image.fromarray(np.zeros((5, 9, 3), np.uint8)).save(tmp_path / "a.jpg")
    assert image_size(tmp_path / "a.jpg") == (5, 9)
    with pytest.raises(UserError, match="b.jpg does not exist"):
        image_size(tmp_path / "b.jpg")


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9)),
        elements=st.floats(0, 1, width=16),
    )
)
def test_cam_round_trip(tmp_path_factory, cam):
    path = tmp_path_factory.mktemp("cams") / "a.npz"
    class_ids = np.arange(1, len(cam) + 1) * 2
    write_cam(path, cam, class_ids, (33, 35))
    again, ids, size = read_cam(path)
    assert again.dtype == np.float32
    assert np.array_equal(again, cam)
    assert np.array_equal(ids, class_ids)
    assert size == (33, 35)


def test_equal_cams_give_equal_bytes(tmp_path):
    # DVC compares hashes: a time stamp in the archive would make every rerun a change.
    for name in ("a", "b"):
        write_cam(tmp_path / f"{name}.npz", np.ones((1, 2, 2)), np.array([3]), (8, 8))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "npy", "pickle"])
def test_damaged_cam_is_refused(tmp_path, damage):
    path = tmp_path / "a.npz"
    write_cam(path, np.ones((2, 9, 9)), np.array([1, 2]), (9, 9))
    if damage == "npy":
        with path.open("wb") as stream:
            np.save(stream, np.ones(3))
    elif damage == "pickle":
        with path.open("wb") as stream:
            np.savez(stream, cam=np.array([{}]), class_ids=np.ones(1), size=np.ones(2))
    else:
        data = path.read_bytes()
        path.write_bytes({"empty": b"", "text": b"hello", "cut": data[: len(data) // 2]}[damage])
    with pytest.raises(UserError, match="not a CAM file; run `isim export-cams`"):
        read_cam(path)
