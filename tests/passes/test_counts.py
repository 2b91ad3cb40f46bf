"""Which splits are reported apart, and what is counted for them."""

import json
from dataclasses import replace

import numpy as np
import pytest

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
