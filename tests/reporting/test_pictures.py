from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from isim.data import files
from isim.data.prepared import Item
from isim.reporting import pictures

PALETTE = files.voc_palette()


@pytest.fixture
def make(tmp_path):
    """A function that writes an image with its mask and CAM; the mask is its label map, too."""

    def write(shape=(50, 70), name="a"):
        item = Item(name, tmp_path / f"{name}.png", tmp_path / f"masks/{name}.png", None)
        Image.fromarray(np.full((*shape, 3), 200, np.uint8)).save(item.image)
        label = np.zeros(shape, np.uint8)
        label[:, shape[1] // 2 :] = 15
        files.write_label_map(item.mask, label)
        files.write_cam(tmp_path / "cam.npz", np.zeros((1, 5, 5)), np.array([15]), shape)
        return item, {"CAM": tmp_path / "cam.npz", "pseudo-label": item.mask}

    return write


def test_overlay_is_red_where_the_cam_is_high_and_blue_where_it_is_low():
    cam = np.zeros((6, 8))
    cam[:, 4:] = 1
    overlay = pictures.overlay(np.full((24, 32, 3), 128, np.uint8), cam)
    assert overlay.shape == (24, 32, 3)
    low, high = overlay[0, 0].astype(int), overlay[-1, -1].astype(int)
    assert low[2] > low[0] + 50 and high[0] > high[2] + 50


@pytest.mark.parametrize("shape", [(96, 96), (375, 500), (60, 900)])
def test_strip_is_captioned_and_keeps_label_colours(shape, make):
    strip = pictures.strip(*make(shape))
    width = (strip.shape[1] - pictures.GAP) // 4
    last = strip[pictures.CAPTION : -pictures.GAP, -width : -pictures.GAP]
    assert np.unique(last.reshape(-1, 3), axis=0).tolist() == PALETTE[[0, 15]].tolist()
    for cell in range(4):
        caption = strip[: pictures.CAPTION, cell * width : (cell + 1) * width]
        assert caption.min() < 100 < caption.max()


def test_strip_has_the_callers_captions_and_may_be_folded(make):
    item, results = make()
    usual = pictures.strip(item, results)
    differs = usual != pictures.strip(item, {"CAM": results["CAM"], "random walk": item.mask})
    last = usual.shape[1] - (usual.shape[1] - pictures.GAP) // 4
    assert differs.any() and not differs[:, :last].any() and not differs[pictures.CAPTION :].any()
    flat, folded = (pictures.strip(item, results, columns) for columns in (4, 2))
    half = (flat.shape[1] + pictures.GAP) // 2
    assert (folded == np.concatenate([flat[:, :half], flat[:, half - pictures.GAP :]])).all()
    # No panel is blank: neither of a ground truth that there is not, nor at the end of a row.
    alone = replace(item, mask=None)
    without, one_row = (pictures.strip(alone, results, columns) for columns in (None, 2))
    cell = (usual.shape[1] - pictures.GAP) // 4
    assert without.shape[1] == usual.shape[1] - cell
    assert (without == one_row).all()


def test_grid_has_a_row_an_image_and_a_column_a_round(make, tmp_path):
    shapes = {"a": (40, 80), "b": (80, 40)}
    items = [make(shape, name)[0] for name, shape in shapes.items()]
    rounds = [tmp_path / f"round_{number}" for number in (1, 2, 3)]
    for number, folder in enumerate(rounds, start=1):
        for name, shape in shapes.items():
            files.write_label_map(folder / f"{name}.png", np.full(shape, number, np.uint8))
    pictures.write_png(tmp_path / "folder/a.png", pictures.rounds_grid(items, rounds))
    grid = np.array(Image.open(tmp_path / "folder/a.png"))
    step = pictures.MIN_CELL + pictures.GAP
    first = pictures.CAPTION + 10
    for row in (first, first + pictures.MIN_CELL // 2 + pictures.GAP):
        columns = [grid[row, pictures.GAP + step * n + 20].tolist() for n in range(4)]
        assert columns == [[200] * 3, *PALETTE[1:4].tolist()]
    assert grid.shape[1] == 4 * step + pictures.GAP


@pytest.mark.parametrize(("count", "expected"), [(3, "bdf"), (9, "bdf"), (2, "bf"), (0, "")])
def test_chosen_images_are_spread_over_those_with_a_ground_truth(count, expected, tmp_path):
    items = [Item(i, tmp_path, tmp_path if i in "bdf" else None, None) for i in "abcdef"]
    assert "".join(item.id for item in pictures.choose(items, count)) == expected
    unlabelled = [replace(item, mask=None) for item in items]
    assert len(pictures.choose(unlabelled, count)) == min(count, 6)
