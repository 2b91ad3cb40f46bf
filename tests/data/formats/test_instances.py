"""COCO's instances: outlines of every form give the pixels that pycocotools gives."""

import time

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st
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
            "two of the categories differ and have the id 1",
        ),
        ({"categories": [{"id": 1, "name": None}]}, "category 1 has no name"),
        ({"images": [("a.jpg", 1), ("b.jpg", 1)]}, "two of the images differ and have the id 1"),
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


def test_entries_that_are_there_twice_and_categories_of_one_name_are_one(tmp_path):
    image = {"file_name": "a.jpg", "id": 4, "height": 6, "width": 8}
    categories = [{"id": number, "name": name} for number, name in ((1, "cat"), (2, "dog"))]
    categories += [{"id": 1, "name": "cat"}, {"id": 3, "name": " cat"}]
    objects = [
        {"image_id": 4, "category_id": 1, "area": 4, "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]},
        {"image_id": 4, "category_id": 3, "area": 4, "segmentation": [[5, 3, 7, 3, 7, 5, 5, 5]]},
    ]
    write_instances(tmp_path / "a.json", categories, [image, image], objects)
    found = instances.read(tmp_path / "a.json")
    assert found.classes == ("cat", "dog") and found.unused() == ["dog"]
    assert [row.labels for row in found.tags().rows] == [("cat",)]
    assert (found.mask(4, instances.class_ids(found.classes)) == 1).sum() == 8


@pytest.mark.parametrize("seed", range(20))
def test_runs_that_do_not_fill_the_image_are_refused(read, seed):
    inside = np.random.default_rng(seed).integers(0, 2, (6, 8)).astype(np.uint8, order="F")
    packed = outlines.encode(inside)["counts"].decode()
    found = read({"segmentation": {"size": [6, 8], "counts": packed}})
    assert np.array_equal(found.mask(4, {"b": 1, "a": 2}), inside)
    # The rest would be as the memory was.
    for counts in (packed[:-1], f"{packed}0o", f"{packed[:4]}\x00{packed[4:]}", "", [10, 20]):
        with pytest.raises(UserError, match=r"its runs (are|have)"):
            read({"segmentation": {"size": [6, 8], "counts": counts}}).mask(4, {"b": 1, "a": 2})


@drawn(
    st.integers(0, 2**32), st.integers(1, 90), st.integers(1, 90), st.sampled_from([0, 1, 2, 50])
)
def test_packed_runs_are_those_of_pycocotools(seed, height, width, blur):
    noise = np.random.default_rng(seed).random(height * width)
    # Long runs are of several characters.
    near = np.convolve(noise, np.ones(blur + 1), "same")[: noise.size]
    smooth = near > (blur + 1) / 2
    inside = smooth.reshape((height, width), order="F")
    packed = outlines.encode(np.asfortranarray(inside, np.uint8))
    ends = np.flatnonzero(np.diff(smooth.astype(int), prepend=0))
    expected = np.diff(ends, prepend=0, append=smooth.size).tolist()
    found = instances._runs(packed["counts"].decode()).tolist()
    assert found == expected and sum(found[1::2]) == outlines.area(packed)
    assert instances._runs([float(run) for run in expected]).tolist() == expected
    # What is taken for uncompressed runs gives the same mask.
    plain = outlines.frPyObjects({"size": [height, width], "counts": expected}, height, width)
    assert plain["counts"] == packed["counts"]


def test_runs_of_the_largest_images_are_read_at_once():
    places = np.random.default_rng(0).integers(0, 1 << 26, 300_000)
    side = 1 << 13
    inside = np.zeros(side * side, np.uint8)
    inside[places] = 1
    packed = outlines.encode(inside.reshape((side, side), order="F"))["counts"].decode()
    start = time.perf_counter()
    assert instances._runs(packed).sum() == side * side
    for damaged in ("o" * 400_000, f"{'o' * 400_000}0", f"{packed}ooooooo0"):
        with pytest.raises(ValueError, match=r"its runs (are|have)"):
            instances._runs(damaged)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    "counts",
    [[10, 60, -22], [10.5, 37.5], [float("nan"), 48], [1e300], [2**70], [[48]], ["48"], [None],
     "o", "0p", "0\u00e9", [0, 2**33, 48], [True]],
)  # fmt: skip
def test_runs_that_are_none_are_refused(read, counts):
    with pytest.raises(UserError, match=r"an outline of s/a.jpg is unusable"):
        read({"segmentation": {"size": [6, 8], "counts": counts}}).mask(4, {"b": 1, "a": 2})


def test_runs_may_be_whole_floats(read):
    found = read({"segmentation": {"size": [6, 8], "counts": [7.0, 4.0, 37.0]}})
    assert (found.mask(4, {"b": 1, "a": 2}) == 1).sum() == 4
