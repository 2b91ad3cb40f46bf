import json
from pathlib import Path

import numpy as np
import pytest

from isim.data.prepared import Item, Prepared
from isim.reporting.page import content
from isim.runtime import atomic


def item(name, *labels, classes=3):
    known = None if labels == (None,) else np.isin(np.arange(classes), labels).astype(np.float32)
    return Item(name, Path(name), Path("m") if name == "m" else None, known)


def test_splits_count_masks_negatives_and_unknown_tags():
    items = (item("a", 0, 1), item("m", 2), item("b"), item("c", None))
    (row,) = content.splits(Prepared(("x", "y", "z"), {"train": items}))
    assert row == {
        **{"split": "train", "images": 4, "masks": 1, "negatives": 1, "unknown": 1},
        "tags": "1.00",
    }
    assert content.splits(Prepared(("x",), {"u": (item("c", None),)}))[0]["tags"] == "unknown"


def test_classes_that_occur_together_are_a_table_or_the_most_frequent_pairs():
    items = [item("a", 0, 1), item("b", 0, 1, 2), item("c", 1), item("d", None)]
    found = content.together(("x", "y", "z"), items)
    assert found["table"] == [[2, 2, 1], [2, 3, 1], [1, 1, 1]] and found["highest"] == 2
    assert found["most"][0] == ("x", "y", 2, 2, 3)
    many = [item("a", 5, 7, classes=60)]
    found = content.together([str(n) for n in range(60)], many)
    assert found["table"] == [] and found["most"] == [("5", "7", 1, 1, 1)]
    assert content.together(("x",), [item("a", 0, classes=1)])["highest"] == 1


def test_problems_are_cut_off_and_counted(tmp_path):
    assert content.problems(tmp_path).total == 0
    rows = [{"kind": "size", "what": f"<b>{n}", "id": ""} for n in range(content.PROBLEMS + 5)]
    atomic.write_csv(tmp_path / "prepare/problems.csv", rows)
    found = content.problems(tmp_path)
    assert found.head == ["kind", "what", "id"] and found.total == content.PROBLEMS + 5
    assert len(found.rows) == content.PROBLEMS and found.rows[1] == ["size", "<b>1", ""]


def test_curves_are_of_what_there_is(tmp_path):
    assert content.curves(tmp_path) == []
    epochs = [{"epoch": n, "classification_loss": 1 / n, "val_class_map": 0.5} for n in (1, 2)]
    atomic.write_csv(tmp_path / "train_cam/epochs.csv", epochs)
    atomic.write_csv(tmp_path / "train_segmenter/x/epochs.csv", [{"epoch": 1, "loss": 0.5}])
    sweep = [{"split": s, "threshold": t, "cam_miou": 0.5} for s in "ab" for t in (0.1, 0.2)]
    atomic.write_csv(tmp_path / "evaluate/sweep.csv", sweep)
    found = {chart.title: [line.name for line in chart.lines] for chart in content.curves(tmp_path)}
    assert found == {
        "CAM network: losses": ["classification"],
        "Tags: mean average precision": ["val"],
        "CAM: mIoU over the threshold": ["a", "b"],
    }


@pytest.mark.parametrize("masks", [False, True])
def test_the_summary_says_what_is_known(masks):
    found = {"agreement": 0.6, "compared": "CAM and segmenter", "coverage": 0.25}
    if masks:
        found |= {"miou": 0.5, "miou_low": 0.4, "miou_high": 0.6, "scored_images": 20}
    said = content.summary(found, {"val_class_map": 0.93, "train_class_map": 0.99})
    names = [name for _, name, _ in said]
    assert names == ["mAP of the tags", *(["mIoU of the masks"] * masks), "agreement", "coverage"]
    assert said[0][0] == "0.93" and "did not learn from" in said[0][2]
    assert "nan" not in json.dumps(said)
    if masks:
        assert "40.0 to 60.0" in said[1][2]
    (only,) = content.summary({}, {"val_class_map": None, "train_class_map": 0.9})
    assert "its own training images" in only[2] and content.summary({}, {}) == []
