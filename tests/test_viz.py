import numpy as np
import pytest
from PIL import Image

from isim import viz
from isim.data.files import voc_palette


def test_colorize_uses_the_voc_palette():
    colored = viz.colorize(np.array([[0, 1, 15, 255]], np.uint8))
    assert colored.tolist() == [[[0, 0, 0], [128, 0, 0], [192, 128, 128], [224, 224, 192]]]
    # The same as in the label-map files, which viz must not import.
    assert (viz.colorize(np.arange(256, dtype=np.uint8)) == voc_palette()).all()


def test_overlay_is_red_where_the_cam_is_high_and_blue_where_it_is_low():
    cam = np.zeros((6, 8))
    cam[:, 4:] = 1
    overlay = viz.cam_overlay(np.full((24, 32, 3), 128, np.uint8), cam)
    assert overlay.shape == (24, 32, 3)
    low, high = overlay[0, 0].astype(int), overlay[-1, -1].astype(int)
    assert low[2] > low[0] + 50 and high[0] > high[2] + 50


@pytest.mark.parametrize("shape", [(96, 96), (375, 500), (60, 900)])
def test_strip_is_captioned_and_keeps_label_colours(shape):
    label = np.zeros(shape, np.uint8)
    label[:, shape[1] // 2 :] = 15
    image = np.full((*shape, 3), 200, np.uint8)
    strip = viz.picture_strip(image, label, np.zeros((5, 5)), label)
    width = (strip.shape[1] - viz.GAP) // 4
    last = strip[viz.CAPTION : -viz.GAP, -width : -viz.GAP]
    colours = {tuple(c) for c in last.reshape(-1, 3).tolist()}
    assert colours == {tuple(voc_palette()[0].tolist()), tuple(voc_palette()[15].tolist())}
    for cell in range(4):
        caption = strip[: viz.CAPTION, cell * width : (cell + 1) * width]
        assert caption.min() < 100 < caption.max()


def test_the_caption_of_the_label_map_is_the_callers():
    image, label = np.full((40, 60, 3), 200, np.uint8), np.ones((40, 60), np.uint8)
    usual, other = (
        viz.picture_strip(image, label, np.zeros((5, 5)), label, 4, caption)
        for caption in ("pseudo-label", "random walk")
    )
    differs = (usual != other).any(axis=(0, 2))
    last = usual.shape[1] - (usual.shape[1] - viz.GAP) // 4
    assert differs.any() and not differs[:last].any()
    assert (usual[viz.CAPTION :] == other[viz.CAPTION :]).all()


def test_strip_may_be_folded():
    image, label = np.full((50, 70, 3), 7, np.uint8), np.ones((50, 70), np.uint8)
    flat = viz.picture_strip(image, None, np.zeros((50, 70)), label)
    folded = viz.picture_strip(image, None, np.zeros((50, 70)), label, columns=2)
    half = (flat.shape[1] + viz.GAP) // 2
    assert (folded == np.concatenate([flat[:, :half], flat[:, half - viz.GAP :]])).all()


def test_strip_has_the_same_size_without_a_ground_truth():
    image, label = np.zeros((50, 70, 3), np.uint8), np.ones((50, 70), np.uint8)
    with_truth = viz.picture_strip(image, label, np.zeros((50, 70)), label)
    without = viz.picture_strip(image, None, np.zeros((50, 70)), label)
    assert with_truth.shape == without.shape
    assert (with_truth != without).any()


def test_grid_has_a_row_an_image_and_a_column_a_round():
    images = [np.full((40, 80, 3), 9, np.uint8), np.full((80, 40, 3), 9, np.uint8)]
    maps = [[np.full(i.shape[:2], r, np.uint8) for r in (1, 2, 3)] for i in images]
    grid = viz.rounds_grid(images, maps)
    step = viz.MIN_CELL + viz.GAP
    rows = (viz.CAPTION + 10, viz.CAPTION + viz.MIN_CELL // 2 + viz.GAP + 10)
    for row in rows:
        columns = [grid[row, viz.GAP + step * n + 20].tolist() for n in range(4)]
        assert columns == [[9, 9, 9], *(voc_palette()[r].tolist() for r in (1, 2, 3))]
    assert grid.shape[1] == 4 * step + viz.GAP


def test_png_is_read_back_unchanged(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    viz.write_png(tmp_path / "folder/a.png", image)
    assert (np.array(Image.open(tmp_path / "folder/a.png")) == image).all()


def _draw(kind, path, values):
    classes = ["background", "badger", "duck"]
    if kind == "curves":
        rows = [{"round": n + 1, "cam_miou": v} for n, v in enumerate(values)]
        viz.curves(rows, "round", {"cam_miou": "CAM"}, "mIoU (%)", path, scale=100)
    elif kind == "bars":
        viz.class_bars(classes, {"CAM": values, "pseudo-label": values}, "IoU", path)
    else:
        viz.confusion_heatmap(np.diag(np.nan_to_num(values) * 100).astype(int), classes, path)


@pytest.mark.parametrize("kind", ["curves", "bars", "confusion"])
def test_plots_show_their_values_and_are_reproducible(kind, tmp_path):
    plots = {"a": [0.2, 0.4, 0.6], "b": [0.2, 0.4, 0.6], "c": [0.6, 0.0, np.nan]}
    for name, values in plots.items():
        _draw(kind, tmp_path / f"{name}.png", values)
    pictures = {name: (tmp_path / f"{name}.png").read_bytes() for name in "abc"}
    # Equal plots must be equal files, or DVC sees a change in every run.
    assert pictures["a"] == pictures["b"] != pictures["c"]
    assert np.array(Image.open(tmp_path / "a.png").convert("L")).std() > 5
