"""COCO's instances: outlines of every form give the pixels that pycocotools gives."""

import numpy as np
import pytest
from pycocotools import mask as outlines
from support.sources import write_instances

from isim.data.formats import instances
from isim.errors import UserError

SQUARE = [1, 1, 5, 1, 5, 5, 1, 5]


@pytest.fixture
def read(tmp_path):
    def call(*objects, **image):
        path = tmp_path / "instances.json"
        one = {"id": 4, "file_name": "s\\a.jpg", "height": 6, "width": 8} | image
        categories = [{"id": 9, "name": "b"}, {"id": 2, "name": "a"}]
        given = [{"image_id": 4, "category_id": 9, "area": 1} | given for given in objects]
        write_instances(path, categories, [one], given)
        return instances.read(path)

    return call


def test_outlines_of_every_form(read):
    inside = np.zeros((6, 8), np.uint8, order="F")
    inside[1:5, 1:5] = 1
    packed = outlines.encode(inside)
    counts = [7, 4, 2, 4, 2, 4, 2, 4, 19]
    for given in (
        [SQUARE],
        {"size": [6, 8], "counts": counts},
        {"size": [6, 8], "counts": packed["counts"].decode()},
    ):
        found = read({"segmentation": given})
        assert found.classes == ("b", "a") and found.outlined(4)
        mask = found.mask(4, {"b": 7, "a": 3})
        assert np.array_equal(mask, 7 * inside), given
    (row,) = found.tags().rows
    assert (row.image, row.labels) == ("s/a.jpg", ("b",))


def test_parts_of_one_object_are_united_and_boxes_alone_are_no_outlines(read):
    found = read({"segmentation": [[0, 0, 2, 0, 2, 2, 0, 2], [5, 3, 7, 3, 7, 5, 5, 5]]})
    assert (found.mask(4, {"b": 1, "a": 2}) == 1).sum() == 8
    for objects in ([{"bbox": [1, 1, 4, 4]}], [{"segmentation": []}, {"segmentation": [SQUARE]}]):
        assert not read(*objects).outlined(4)


def test_what_is_no_instances_file_is_refused(tmp_path):
    for content, words in (([], "has no list of images"), ({"images": [{}]}, "no 'id'")):
        with pytest.raises(UserError, match=words):
            instances.read(tmp_path / "a.json", content)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]},
            "id of the categories 1",
        ),
        ({"categories": [{"id": 1, "name": None}]}, "category 1 has no name"),
        ({"images": [("a.jpg", 1), ("b.jpg", 1)]}, "id of the images 1 is there 2 times"),
        ({"images": [("a.jpg", 1), ("a.jpg", 2)]}, "file_name a.jpg is there 2 times"),
    ],
)
def test_entries_that_would_take_the_place_of_others_are_refused(tmp_path, changes, words):
    given = {"categories": [{"id": 1, "name": "a"}], "images": [("a.jpg", 1)]} | changes
    given["images"] = [
        {"file_name": name, "id": number, "height": 6, "width": 8}
        for name, number in given["images"]
    ]
    with pytest.raises(UserError, match=words):
        instances.read(tmp_path / "a.json", given)


def test_categories_without_an_object_are_told(read):
    (note,) = read({"segmentation": [SQUARE]}).tags().notes
    assert note == "instances.json: 1 categories without an object are no classes, such as a"


@pytest.mark.parametrize("seed", range(20))
def test_runs_that_do_not_fill_the_image_are_refused(read, seed):
    inside = np.random.default_rng(seed).integers(0, 2, (6, 8)).astype(np.uint8, order="F")
    packed = outlines.encode(inside)["counts"].decode()
    found = read({"segmentation": {"size": [6, 8], "counts": packed}})
    assert np.array_equal(found.mask(4, {"b": 1, "a": 2}), inside)
    # The rest would be as the memory was.
    for counts in (packed[:-1], "", [10, 20]):
        with pytest.raises(UserError, match="its runs are of"):
            read({"segmentation": {"size": [6, 8], "counts": counts}}).mask(4, {"b": 1, "a": 2})
