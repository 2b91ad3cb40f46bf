"""Scores of CAMs and label maps: those of a plain computation."""

import numpy as np
import pytest
from support.images import counted, opened, seeded

from isim import metrics
from isim.data.files import read_label_map
from isim.errors import UserError
from isim.labels.crf import refine as crf
from isim.passes import scores


@pytest.mark.parametrize(
    ("changes", "expected", "fixed"),
    [
        ({"sweep_step": 0.15, "threshold": 0.77}, [0.1, 0.25, 0.4, 0.77], 3),
        # Steps that are no binary fractions lose no end.
        ({"sweep_start": 0.05, "sweep_step": 0.05}, np.arange(1, 11) / 20, 5),
    ],
)
def test_thresholds_hold_the_fixed_one_and_do_not_pass_the_end(changes, expected, fixed, tiny):
    values, place = scores.thresholds(tiny.evaluate.model_copy(update=changes))
    assert (values.tolist(), place) == (pytest.approx(expected), fixed)


def test_cams_score_as_a_plain_computation_says(whole, items, stored, tiny):
    ((swept, refined, bounds), folder), labels = whole("scores.cams"), []
    values, fixed = scores.thresholds(tiny.evaluate)
    for item in items:
        maps = [seeded(item, stored, value) for value in values]
        label = crf.refine(opened(item)[0], maps[fixed], item.class_ids, tiny.evaluate.crf)
        labels.append([*maps, label])
    for name, count in (("train", 7), ("inner", 3)):
        expected = [counted(items[:count], maps) for maps in zip(*labels[:count], strict=True)]
        assert ([*swept[name], refined[name]] == np.array(expected)).all()
        low, high = bounds[name]["cam_crf_miou_low"], bounds[name]["cam_crf_miou_high"]
        assert low <= metrics.miou(refined[name]) <= high
        best = values[np.argmax([metrics.miou(c) for c in swept[name]])]
        ends = [bounds[name][f"oracle_threshold_{end}"] for end in ("low", "high")]
        assert ends[0] <= best + 1e-6 and ends[1] >= best - 1e-6
    assert np.array_equal(read_label_map(folder / "labels/train/01.png"), labels[1][-1])


def test_label_maps_are_counted_and_must_be_of_the_data(whole, here, items, stored):
    found, _ = whole("scores.labels")
    assert (found["train"] == counted(items, stored)).all()
    assert (found["inner"] == counted(items[:3], stored)).all()
    with pytest.raises(UserError, match=r"label map .*\.png holds label 3 of 0\.\.2"):
        scores.labels(here, items, stored, num_labels=3, parts={})
