"""Label maps with parts, holes and thin lines, as sets that are written in other formats."""

import cv2
import numpy as np
import pytest
from PIL import Image

from isim.data import files
from isim.data.formats.labelled import Labelled, LabelledSet

NAMES = ("background", "apple", "Birne, süß", "cat")


def drawn(seed, size):
    """A label map of discs with holes, some of one pixel, and a border to ignore."""
    draws = np.random.default_rng(seed)
    label = np.zeros(size, np.uint8)
    for number in range(6):
        centre = [int(draws.integers(side)) for side in size[::-1]]
        radius = int(draws.integers(3, min(size) // 4))
        cv2.circle(label, centre, radius, int(draws.integers(1, 4)), -1)
        if number % 2:
            cv2.circle(label, centre, radius // 2, int(draws.integers(0, 4)), -1)
    label[draws.integers(size[0], size=5), draws.integers(size[1], size=5)] = 1
    label[2:4, 2:9] = 255
    return label


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Three images of two splits and sizes, one in a subfolder, and their label maps."""
    folder = tmp_path_factory.mktemp("labelled")
    entries = []
    for number, (id_, split) in enumerate([("a", "train"), ("box/b", "train"), ("c d", "val")]):
        size = (60, 80) if number else (97, 53)
        label = drawn(number, size)
        image = folder / f"images/{id_}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(noise).save(image)
        path = folder / f"masks/{id_}.png"
        files.write_label_map(path, label)
        entries.append(Labelled(id_, image, path, split))
    return LabelledSet(NAMES, tuple(entries))


@pytest.fixture
def labels(written):
    """Label maps by id, in which nothing is ignored: that goes to no object."""
    return {entry.id: np.where(entry.label() == 255, 0, entry.label()) for entry in written.entries}


@pytest.fixture
def far_from_borders():
    """A function that tells the largest distance of wrong pixels from a border of the truth."""

    def far(found, truth):
        wrong = (found != truth).astype(np.uint8)
        if not wrong.any():
            return 0.0
        borders = np.zeros(truth.shape, bool)
        borders[:, 1:] |= truth[:, 1:] != truth[:, :-1]
        borders[:, :-1] |= truth[:, 1:] != truth[:, :-1]
        borders[1:] |= truth[1:] != truth[:-1]
        borders[:-1] |= truth[1:] != truth[:-1]
        distance = cv2.distanceTransform((~borders).astype(np.uint8), cv2.DIST_L2, 5)
        return float(distance[wrong > 0].max())

    return far
