"""Which splits are reported apart, and what is counted for them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from isim import metrics
from isim.data import files
from isim.errors import UserError
from isim.passes import counts

SPLITS = {"train": "ab", "val": "cd", "trainaug": "abx", "trainval": "abcd", "empty": ""}
KNOWN = {name: frozenset(ids) for name, ids in SPLITS.items()}


def test_a_split_comes_first_and_what_is_inside_it_once():
    assert counts.inside(KNOWN["trainval"], KNOWN).keys() == {"train", "val"}
    both = counts.parts(["trainaug", "trainval"], KNOWN)
    listed = [list(part) for part in both.values()]
    assert listed == [["trainaug", "train"], ["trainval", "val"]]
    # Not apart where it is scored for its own sake, wherever it comes in the list.
    assert counts.parts(["trainaug", "train"], KNOWN)["trainaug"].keys() == {"trainaug"}


def test_counts_of_an_array_pass_through_json_and_are_summed_for_each_part():
    arrays = np.random.default_rng(0).integers(0, 3, (3, 2, 3, 3)) * 10**12
    # JSON knows no int64.
    lines = [{"id": k, "n": counts.sparse(a)} for k, a in zip("abx", arrays, strict=True)]
    found = counts.totals(json.loads(json.dumps(lines)), "n", (2, 3, 3), KNOWN)
    assert (found["train"] == arrays[:2].sum(0)).all()
    assert (found["trainaug"] == arrays.sum(0)).all()


def test_what_cannot_be_scored_is_not_written(items, tmp_path):
    labels = {"walk": files.read_label_map(items[0].mask) % 255}
    item = replace(items[0], mask=items[1].mask)
    with pytest.raises(UserError, match=r"mask .* is 53x37 pixels, its image 64x48"):
        counts.scored_and_written(item, labels, {"walk": tmp_path}, 4)
    assert not list(tmp_path.iterdir())


def test_what_needs_no_mask_is_known_without_one(items, tmp_path):
    label = files.read_label_map(items[0].mask) % 255
    share = float((label > 0).mean())
    for item in (items[0], replace(items[0], mask=None)):
        line = counts.scored(item, {"walk": label}, 4)
        assert line["covered"] == {"walk": share} and bool(line["walk"]) == (item.mask is not None)
    lines = [{"covered": {"walk": value}} for value in (0.2, 0.4)]
    assert counts.coverage(lines, "walk") == pytest.approx(0.3)


def test_an_interval_is_of_the_images_that_are_scored():
    lines = [{"n": counts.sparse(np.diag([4, 3 * n]) + 1)} for n in range(4)] + [{"n": []}]
    found = counts.interval("a_", lines, "n", 2)
    bounds = metrics.miou_interval(counts.total([line], "n", (2, 2)) for line in lines)
    assert (found["a_miou_low"], found["a_miou_high"]) == bounds
    assert counts.interval("a_", lines[3:], "n", 2) == {}


def test_sources_of_which_nothing_is_counted_have_no_rows():
    found = {"a": np.eye(2, dtype=int), "b": np.zeros((2, 2), int)}
    assert [row["source"] for row in counts.per_class(found, ("background", "cat"))] == ["a", "a"]
