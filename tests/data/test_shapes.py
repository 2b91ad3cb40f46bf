"""The generated data set: the same bytes each time, a devkit, labels that fit the masks."""

import hashlib
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from isim.data import files, shapes, voc
from isim.data.source import verify


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def devkit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    shapes.generate(folder, 12, 3, 64, 0)
    return folder / "VOCdevkit/VOC2012"


@pytest.fixture(scope="module")
def drawn() -> list[tuple[np.ndarray, np.ndarray]]:
    return [shapes.draw(np.random.default_rng(number), 64) for number in range(40)]


def test_the_seed_decides_every_byte(tmp_path):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        shapes.generate(tmp_path / folder, 2, 1, 64, seed)
    first, again, other = (digests(tmp_path / folder) for folder in "abc")
    assert first == again
    images = [name for name in first if name.endswith(".jpg")]
    assert len(images) == 3 and all(first[name] != other[name] for name in images)


def test_an_image_does_not_depend_on_how_many_are_asked_for(tmp_path, devkit):
    shapes.generate(tmp_path, 2, 1, 64, 0)
    few, many = digests(tmp_path / "VOCdevkit/VOC2012"), digests(devkit)
    assert all(many[name] == digest for name, digest in few.items() if "ImageSets" not in name)


def test_the_splits_differ(devkit):
    train, val = (
        files.read_image(devkit / f"JPEGImages/{name}_00000.jpg") for name in ("train", "val")
    )
    assert (train != val).any()


def test_the_devkit_is_read_and_found_consistent(devkit):
    source = voc.read_devkit(devkit, shapes.CLASSES)
    assert {name: len(ids) for name, ids in source.splits.items()} == {"train": 12, "val": 3}
    assert set(verify(source)) == {name for ids in source.splits.values() for name in ids}


def test_annotations_name_the_classes_of_the_mask_and_box_them(devkit):
    for path in sorted((devkit / "Annotations").iterdir()):
        mask = files.read_label_map(devkit / f"SegmentationClass/{path.stem}.png")
        objects = {o.findtext("name"): o for o in ET.parse(path).iter("object")}
        present = sorted(set(np.unique(mask).tolist()) - {0, 255})
        assert set(objects) == {shapes.CLASSES[label - 1] for label in present}
        for label in present:
            box = objects[shapes.CLASSES[label - 1]].find("bndbox")
            left, top, right, bottom = (
                int(box.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")
            )
            rows, columns = np.nonzero(mask == label)
            assert (rows.min() + 1, rows.max() + 1) == (top, bottom)
            assert (columns.min() + 1, columns.max() + 1) == (left, right)


def test_masks_hold_classes_with_a_border(drawn):
    for image, mask in drawn:
        assert image.shape == (64, 64, 3) and image.dtype == mask.dtype == np.uint8
        inside, border = (mask > 0) & (mask < 255), mask == 255
        assert inside.any() and border.any() and (mask == 0).any()
        # Between an object and the background there is always a border pixel.
        for axis in (0, 1):
            one, other = (np.take(mask, range(k, 63 + k), axis) for k in (0, 1))
            assert not ((one == 0) & (other > 0) & (other < 255)).any()
            assert not ((other == 0) & (one > 0) & (one < 255)).any()


def test_every_class_occurs_and_images_mix_them(drawn):
    present = [set(np.unique(mask).tolist()) - {0, 255} for _, mask in drawn]
    assert set.union(*present) == set(range(1, len(shapes.CLASSES) + 1))
    assert {len(labels) for labels in present} >= {1, 2}


def test_objects_are_no_specks_and_leave_background(drawn):
    share = [((mask > 0) & (mask < 255)).mean() for _, mask in drawn]
    assert 0.03 < min(share) and max(share) < 0.7


def test_no_mean_colour_tells_a_class(drawn):
    """Bodies share their coats: mean colours of the classes differ less than those within one."""
    colours: dict[int, list[np.ndarray]] = {label: [] for label in range(1, 6)}
    for image, mask in drawn:
        for label in set(np.unique(mask).tolist()) - {0, 255}:
            colours[label].append(image[mask == label].mean(axis=0))
    between = np.std([np.mean(values, axis=0) for values in colours.values()], axis=0)
    within = np.mean([np.std(values, axis=0) for values in colours.values()], axis=0)
    assert (between < within).all()
