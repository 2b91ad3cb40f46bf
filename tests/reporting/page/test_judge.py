from pathlib import Path

import numpy as np
import pytest

from isim import metrics
from isim.data.prepared import Item
from isim.passes import counts
from isim.reporting.page import judge

NAMES = ("cat", "dog")


def item(name, *labels):
    known = None if labels == (None,) else np.float32([name in labels for name in NAMES])
    return Item(name, Path(f"{name}.png"), None, known)


def line(pixels, agreement=None, pair=("pseudo-label", "segmenter"), **more):
    found = {"pixels": list(pixels.items()), "parts": 2, **more}
    if agreement is not None:
        between = np.diag([100, round(100 * agreement), 0])
        found |= {"pair": list(pair), "agreement": agreement, "between": counts.sparse(between)}
    return found


def judged(one, found, **changes):
    given = {"classes": NAMES, "disputed": 0, "covering": 0.9} | changes
    return judge.image(one, ["train"], found, **given)


def test_an_image_is_empty_or_covers_everything_by_its_mask():
    cat = item("a", "cat")
    assert judged(cat, line({0: 90, 1: 10}))["coverage"] == pytest.approx(0.1)
    assert judged(cat, line({0: 100}))["empty"] == 1
    assert judged(item("a"), line({0: 100}))["empty"] == 0, "a negative has no object"
    assert judged(item("a", None), line({0: 100}))["empty"] == 0
    assert [judged(cat, line({0: n, 1: 100 - n}))["covering"] for n in (10, 11)] == [1, 0]
    assert judged(item("a", "cat", "dog"), line({0: 1}))["labels"] == "cat;dog"


def test_what_is_not_known_is_none():
    row = judged(item("a", None), {"size": (4, 4), "layers": []})
    unknown = ("tags", "doubt", "agreement", "stable", "coverage", "parts", "iou")
    assert [row[name] for name in unknown] == [None] * 7
    assert judge.ranked([row], [{}])[0]["doubt"] is None


def test_doubt_orders_images_of_each_pair_by_themselves():
    agree = [0.9, 0.5, 0.7]
    lines = [line({0: 5, 1: 5}, a) for a in agree]
    lines += [line({0: 5, 1: 5}, a / 10, ("CAM", "segmenter")) for a in agree]
    lines += [line({0: 10}, 1.0)]
    rows = judge.ranked([judged(item("a", "cat"), one) for one in lines], lines)
    doubts = [row["doubt"] for row in rows]
    # Halved: none has fewer parts. The empty one agrees best.
    assert doubts[:3] == pytest.approx([0.125, 0.375, 0.25])
    assert doubts[3:6] == pytest.approx([0, 1 / 3, 1 / 6]) and doubts[6] == 1


def test_doubt_is_the_mean_of_what_is_known():
    lines = [
        line({0: 5, 1: 5}, 0.9, stable=0.2) | {"parts": 1},
        line({0: 5, 1: 5}, 0.5, stable=0.8) | {"parts": 3},
        line({0: 5, 1: 5}, 0.7) | {"parts": 2},
    ]
    rows = judge.ranked([judged(item("a", "cat"), one) for one in lines], lines)
    expected = [(0 + 1 / 2 + 0) / 3, (2 / 3 + 0 + 2 / 3) / 3, (1 / 3 + 1 / 3) / 2]
    assert [row["doubt"] for row in rows] == pytest.approx(expected)


def test_sums_are_of_one_pair_that_of_the_segmenter_first():
    lines = [line({0: 5, 1: 5}, 0.2, ("pseudo-label", "CAM")) for _ in range(3)]
    lines.append(line({0: 8, 1: 2}, 0.6, stable=0.5))
    rows = judge.ranked([judged(item("a", "cat"), one) for one in lines], lines)
    found = judge.together(rows, lines, 3)
    assert found["compared"] == "pseudo-label and segmenter" and found["agreement"] == 0.6
    assert (found["compared_images"], found["images"], found["with_mask"]) == (1, 4, 4)
    assert found["stable"] == 0.5 and found["parts_median"] == 2
    assert found["coverage"] == pytest.approx((3 * 0.5 + 0.2) / 4)
    assert found["scored_images"] == 0 and "miou" not in found
    assert "agreement" not in judge.together(rows[:0], [], 3)


def test_masks_that_are_there_give_a_miou_with_bounds():
    confusions = [np.diag([9, n, 0]) + np.array([[0, 1, 0]] * 3) for n in (1, 5, 8)]
    lines = [line({0: 5, 1: 5}, counts=counts.sparse(c), iou=0.5) for c in confusions]
    rows = [judged(item("a", "cat"), one) for one in lines]
    found = judge.together(rows, lines, 3)
    assert found["miou"] == metrics.miou(np.sum(confusions, 0)) and found["scored_images"] == 3
    assert found["miou_low"] <= found["miou"] <= found["miou_high"]


def test_classes_count_tagged_images_missing_ones_and_what_agrees():
    items = [item("a", "cat"), item("b", "cat", "dog"), item("c", None)]
    lines = [line({0: 60, 1: 40}, 0.4), line({0: 80, 2: 20}, 0.4), line({0: 1})]
    cat, dog = judge.classes(NAMES, items, lines)
    assert (cat["images"], cat["masks"], cat["missing"]) == (2, 1, 1)
    assert cat["coverage"] == pytest.approx(0.2) and dog["coverage"] == pytest.approx(0.2)
    assert cat["agreement"] == 1.0 and dog["agreement"] is None and cat["iou"] is None


def test_disputed_tags_are_grouped_by_image():
    row = {"id": "a", "class": "cat", "tagged": "1", "probability": "0.1", "usual": "0.3"}
    found = judge.disputes([row, row | {"class": "dog", "tagged": "0"}])
    assert [(entry["class"], entry["tagged"]) for entry in found["a"]] == [
        ("cat", True),
        ("dog", False),
    ]
