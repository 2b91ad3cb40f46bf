"""Label Studio's tasks: brushes are decoded as its own code does."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from isim.data.formats.labelstudio import brush, write_labelstudio
from isim.data.formats.regions import Region


def decoded(numbers, size):
    """The alpha channel of a brush, by Umbrella's rle-pack: bit after bit."""
    bits = iter("".join(f"{number:08b}" for number in numbers))

    def read(count):
        return int("".join(next(bits) for _ in range(count)), 2)

    total, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    values = []
    while len(values) < total:
        is_run = read(1)
        length = read(sizes[read(2)]) + 1
        values += [read(word)] * length if is_run else [read(word) for _ in range(length)]
    return np.array(values).reshape(*size, 4)[..., 3]


def test_brushes_are_the_regions(written, labels, tmp_path):
    assert write_labelstudio(written, tmp_path) == 3
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    assert tasks[1]["data"]["image"] == "/data/local-files/?d=box/b.png"
    assert tasks[2]["data"]["image"].endswith("c%20d.png")
    for task, label in zip(tasks, labels.values(), strict=True):
        found = np.zeros(label.shape, np.uint8)
        for result in task["predictions"][0]["result"]:
            size = result["original_height"], result["original_width"]
            (name,) = result["value"]["brushlabels"]
            plane = decoded(result["value"]["rle"], size) == 255
            assert not found[plane].any()
            found[plane] = written.names.index(name)
        assert (found == label).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 7), (300, 200)])
def test_runs_of_any_length(size):
    plane = np.ones(size, np.uint8)
    plane[0, ::3] = 0
    assert (decoded(brush(Region(1, 0, 0, plane), size), size) == 255 * plane).all()


def test_the_interface_has_the_classes(written, tmp_path):
    write_labelstudio(written, tmp_path, url="https://images.example.org/")
    root = ET.parse(tmp_path / "config.xml").getroot()
    found = {label.get("value"): label.get("background") for label in root.iter("Label")}
    assert [*found] == list(written.names[1:]) and found["apple"] == "#800000"
    names = {(part.tag, part.get("name")) for part in root}
    assert names == {("Image", "image"), ("BrushLabels", "mask")}
    address = json.loads((tmp_path / "tasks.json").read_text())[0]["data"]["image"]
    assert address == "https://images.example.org/a.png"
