"""The generated data set: the same bytes each time, a devkit, labels that fit the masks."""

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from support.sources import contents

from isim.data import files
from isim.data.sources import shapes
from isim.params import Shapes


@pytest.fixture(scope="module")
def devkit(tmp_path_factory) -> Path:
    return shapes.generate(tmp_path_factory.mktemp("shapes"), Shapes(train=12, val=3, size=64), 0)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[np.ndarray, np.ndarray]]:
    return [shapes.draw(np.random.default_rng(number), 64) for number in range(40)]


def test_the_seed_decides_every_byte_whatever_the_number_of_images(tmp_path, devkit):
    few, other = (
        contents(shapes.generate(tmp_path / str(seed), Shapes(train=2, val=1, size=64), seed))
        for seed in (0, 3)
    )
    many = contents(devkit)
    assert all(many[path] == data for path, data in few.items() if path.parts[0] != "ImageSets")
    images = [path for path in few if path.suffix == ".jpg"]
    # The splits differ, too.
    assert len(images) == len({few[path] for path in images}) == 3
    assert all(few[path] != other[path] for path in images)


def test_annotations_name_the_classes_of_the_mask_and_box_them(devkit):
    for path in sorted((devkit / "Annotations").iterdir()):
        mask = files.read_label_map(devkit / f"SegmentationClass/{path.stem}.png")
        objects = {o.findtext("name"): o.find("bndbox") for o in ET.parse(path).iter("object")}
        present = sorted(set(np.unique(mask).tolist()) - {0, 255})
        assert set(objects) == {shapes.CLASSES[label - 1] for label in present}
        for label in present:
            rows, columns = (place + 1 for place in np.nonzero(mask == label))
            box = (columns.min(), rows.min(), columns.max(), rows.max())
            found = objects[shapes.CLASSES[label - 1]]
            assert [side.tag for side in found] == ["xmin", "ymin", "xmax", "ymax"]
            assert tuple(int(side.text) for side in found) == box


def test_masks_hold_all_classes_with_a_border_mixed_before_a_background(drawn):
    for image, mask in drawn:
        assert image.shape == (64, 64, 3) and image.dtype == mask.dtype == np.uint8
        assert {0, 255} < set(np.unique(mask).tolist())
        # Between an object and the background there is always a border pixel.
        for axis in (0, 1):
            pairs = [np.take(mask, range(k, 63 + k), axis) for k in (0, 1)]
            for one, other in (pairs, pairs[::-1]):
                assert not ((one == 0) & (other > 0) & (other < 255)).any()
    present = [set(np.unique(mask).tolist()) - {0, 255} for _, mask in drawn]
    assert set.union(*present) == set(range(1, len(shapes.CLASSES) + 1))
    assert {len(labels) for labels in present} >= {1, 2}
    share = [((mask > 0) & (mask < 255)).mean() for _, mask in drawn]
    assert min(share) > 0.03 and max(share) < 0.7


def test_no_mean_colour_tells_a_class(drawn):
    """Bodies share their coats: mean colours of the classes differ less than those within one."""
    colours: dict[int, list[np.ndarray]] = {label: [] for label in range(1, 6)}
    for image, mask in drawn:
        for label in set(np.unique(mask).tolist()) - {0, 255}:
            colours[label].append(image[mask == label].mean(axis=0))
    between = np.std([np.mean(values, axis=0) for values in colours.values()], axis=0)
    within = np.mean([np.std(values, axis=0) for values in colours.values()], axis=0)
    assert (between < within).all()
