"""Overviews: thumbnails and layers as they lie on disk, and how label maps are compared."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from isim import metrics
from isim.data import files
from isim.errors import UserError
from isim.passes import overviews
from isim.passes.overviews import Frame, Made


@pytest.fixture
def frame(here, tiny):
    return Frame(here.resume / "page", tiny.report, 0.3, 4)


@pytest.fixture
def run(here, items, stored, frame, tmp_path):
    """A function that makes overviews of items, each with its own files: their lines."""
    for item in items:
        label = files.read_label_map(stored / f"{item.id}.png")
        files.write_label_map(tmp_path / f"{item.id}.png", np.roll(label, 5, 1))

    def run(some=items, cams=True, **changes):
        made = {}
        for number, item in enumerate(some):
            maps = {"mask": stored / f"{item.id}.png", "pseudo-label": stored / f"{item.id}.png"}
            maps |= {"segmenter": tmp_path / f"{item.id}.png", "ground truth": item.mask}
            maps = {name: changes.get(name, path) for name, path in maps.items()}
            maps = {name: path for name, path in maps.items() if path is not None}
            cam = stored / f"{item.id}.npz" if cams else None
            steps = {"last round": stored / f"{item.id}.png"}
            made[item.id] = Made(number, maps, cam, steps)
        return made, overviews.make(here, some, made, frame)

    return run


def test_layers_lie_one_below_the_other_as_large_as_the_thumbnail(run, items, frame):
    made, lines = run()
    for item, line in zip(items, lines, strict=True):
        path = frame.folder / overviews.place(made[item.id].number)
        photo, layers = (Image.open(path.with_suffix(end)) for end in (".jpg", ".png"))
        assert line["layers"] == ["mask", "pseudo-label", "segmenter", "ground truth"]
        assert layers.size == (photo.width, 4 * photo.height) and max(photo.size) <= 64
        assert tuple(line["size"]) == files.image_size(item.image)
        colours = np.array(layers.convert("RGBA"))
        values = np.array(layers)
        assert (colours[values == 0, 3] == 0).all() and (colours[values > 0, 3] == 255).all()
        truth = files.read_label_map(item.mask)
        assert set(np.unique(values[3 * photo.height :])) <= set(np.unique(truth))


def test_figures_are_those_of_the_label_maps(run, items, stored, tmp_path):
    _, lines = run()
    for item, line in zip(items, lines, strict=True):
        mask = files.read_label_map(stored / f"{item.id}.png")
        other = files.read_label_map(tmp_path / f"{item.id}.png")
        truth = files.read_label_map(item.mask)
        assert dict(line["pixels"]) == dict(zip(*np.unique(mask, return_counts=True), strict=True))
        assert line["pair"] == ["pseudo-label", "segmenter"]
        confusion = metrics.confusion_matrix(mask, other, 4)
        assert line["agreement"] == pytest.approx(metrics.agreement(confusion))
        assert line["iou"] == metrics.agreement(metrics.confusion_matrix(truth, mask, 4))
        assert line["stable"] is None or 0 <= line["stable"] <= 1


@pytest.mark.parametrize(
    ("changes", "pair"),
    [
        ({}, ["pseudo-label", "segmenter"]),
        ({"segmenter": None}, ["pseudo-label", "CAM"]),
        ({"segmenter": None, "cams": False}, None),
        # The mask of an image with tags is made from them.
        ({"pseudo-label": None}, ["mask", "segmenter"]),
        ({"pseudo-label": None, "segmenter": None}, ["mask", "CAM"]),
        ({"mask": None}, None),
    ],
)
def test_what_is_compared_hangs_on_what_there_is(changes, pair, run, items):
    assert run(items[:1], **changes)[1][0].get("pair") == pair


def test_an_image_of_unknown_tags_has_no_label_that_is_made_from_them(run, items):
    unknown = [replace(items[0], image_label=None, mask=None)]
    (line,) = run(unknown, **{"pseudo-label": None, "ground truth": None})[1]
    assert "pair" not in line and "stable" not in line and "pixels" in line


def test_parts_are_connected_and_of_one_class():
    mask = np.zeros((40, 40), np.uint8)
    mask[2:10, 2:10] = 1
    mask[10:14, 10:14] = 1  # touches at a corner
    mask[20:30, 20:30] = 2
    mask[20:30, 30:35] = 3  # beside it, another class
    mask[38, 38] = 1  # a speck
    assert overviews._parts(mask) == 3
    assert overviews._parts(np.zeros((4, 4), np.uint8)) == 0


def test_the_sheet_shows_seeds_of_all_thresholds_then_every_step(here, run, items, stored, frame):
    made, _ = run()
    lines = overviews.sheet(here, items, made, frame)
    with_cam = [item for item in items if item.image_label is not None]
    for item, line in zip(with_cam, lines, strict=True):
        thresholds = len(frame.params.thresholds)
        assert line["steps"] == ["last round", "ground truth"]
        assert len(line["shares"]) == thresholds + 2
        seeds = line["shares"][:thresholds]
        assert seeds == sorted(seeds, reverse=True), "a higher threshold labels less"
        path = frame.folder / f"sheet/{made[item.id].number:06d}.png"
        photo = Image.open(path.with_suffix(".jpg"))
        assert Image.open(path).size == (photo.width, photo.height * (thresholds + 2))


def test_a_label_map_of_another_image_is_an_error(run, items, tmp_path):
    files.write_label_map(tmp_path / "other.png", np.zeros((3, 3), np.uint8))
    with pytest.raises(UserError, match=r"label map .*other\.png is 3x3 pixels"):
        run(items[:1], mask=tmp_path / "other.png")
