"""Which splits are reported apart, and what is counted for them."""

from pathlib import Path

import numpy as np

from isim import splits
from isim.data.dataset import Item

KNOWN = {
    name: frozenset(ids)
    for name, ids in {
        "train": "ab",
        "val": "cd",
        "trainaug": "abx",
        "trainval": "abcd",
        "same": "ba",
        "empty": "",
    }.items()
}


def test_members_are_the_ids():
    items = [Item(name, Path(), None, None) for name in "ab"]
    assert splits.members({"train": items, "none": []}) == {
        "train": {"a", "b"},
        "none": frozenset(),
    }


def test_inside_is_a_part_that_is_not_all():
    assert splits.inside(KNOWN["trainaug"], KNOWN).keys() == {"train", "same"}
    assert splits.inside(KNOWN["train"], KNOWN) == {}
    assert splits.inside(frozenset("abcdx"), KNOWN).keys() == KNOWN.keys() - {"empty"}


def test_a_split_comes_first_and_what_is_inside_it_once():
    known = {name: ids for name, ids in KNOWN.items() if name != "same"}
    both = splits.parts(["trainaug", "trainval"], known)
    assert {name: list(part) for name, part in both.items()} == {
        "trainaug": ["trainaug", "train"],
        "trainval": ["trainval", "val"],
    }
    assert both["trainaug"]["train"] == {"a", "b"}
    # Not apart where it is scored for its own sake, wherever it comes in the list.
    assert splits.parts(["trainaug", "train"], known)["trainaug"].keys() == {"trainaug"}


def test_counts_go_to_the_parts_of_an_image():
    counted = splits.parts(["trainaug"], KNOWN)["trainaug"]
    totals = {name: np.zeros(2, np.int64) for name in counted}
    for id_, counts in (("a", [1, 0]), ("x", [0, 5])):
        splits.add(totals, counted, id_, np.array(counts))
    found = {name: total.tolist() for name, total in totals.items()}
    assert found == {"trainaug": [1, 5], "train": [1, 0], "same": [1, 0]}
