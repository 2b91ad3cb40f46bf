import math

import pytest

from isim.reporting import words


@pytest.mark.parametrize(
    ("learnt", "told"),
    [
        (0.93, "tags are learnt, mAP 0.93"),
        (0.9, "tags are learnt, mAP 0.90"),
        (0.72, "tags are mostly learnt, mAP 0.72"),
        (0.1, "tags are hardly learnt, mAP 0.10"),
    ],
)
def test_how_well_tags_are_known(learnt, told):
    assert words.tags_learnt(learnt) == told


def test_label_maps_agree_more_or_less():
    assert words.agree("CAM", "segmenter", 0.8) == "CAM and segmenter agree, IoU 0.80"
    assert "hardly agree" in words.agree("CAM", "segmenter", 0.1)


def test_a_miou_or_what_there_is_instead():
    assert words.miou("walk", 0.5) == "walk mIoU 50.00"
    without = words.miou("walk", math.nan, 0.25)
    assert without == "walk covers 25 % of the pixels (no masks to score it)"
    assert words.miou("walk", math.nan) == "walk made (no masks to score it)"


@pytest.mark.parametrize("bounds", [{}, {"miou_low": None, "miou_high": None}, {"miou_low": 0.2}])
def test_an_interval_that_is_not_known_has_no_words(bounds):
    assert words.interval(bounds) == ""
    assert words.interval({"miou_low": 0.512, "miou_high": 0.584}) == "51.2 to 58.4"
