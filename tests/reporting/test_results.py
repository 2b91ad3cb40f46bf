"""The result table: percent, blanks, columns, and reports that are missing or damaged."""

import shutil
from pathlib import Path

import pytest

from isim.errors import UserError
from isim.reporting import results
from isim.runtime import figures

PARAMS = Path(__file__).parents[2] / "params.yaml"
ROUNDS, FINAL, WALK = "train_cam/rounds.csv", "evaluate", "random_walk"
HEADER = "round,epoch,cam_miou,pseudo_label_miou,masked_share,seconds,images_per_second\n"


@pytest.fixture
def table(tmp_path):
    """A function that writes reports, by path, and returns the table."""
    shutil.copy(PARAMS, tmp_path)

    def write(reports):
        for name, found in ({ROUNDS: HEADER, FINAL: {}} | reports).items():
            path = tmp_path / "reports" / name
            if isinstance(found, dict):
                figures.write(path, found, 1.5)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(found)
        return results.table(tmp_path)

    return write


def cells(text):
    return [line.split() for line in text.splitlines()]


def test_results_are_in_percent(table):
    rounds = HEADER + "1,5,0.31234,0.4,0.1,12.34,9\n2,15,0.456,nan,0,11,9\n"
    final = {"cam_miou": 0.5, "cam_miou_oracle": 0.625, "cam_crf_miou": None}
    final = {"train": final, "round_01": {"pseudo_label_miou": 0.4}}
    text = table({ROUNDS: rounds, FINAL: final})
    for row in ("1 5 31.2 40.0 12.3", "2 15 45.6 - 11.0", "train 50.0 62.5"):
        assert row.split() in cells(text)
    assert "round_01" not in text and "isim ui" in text


def test_results_show_the_random_walk_where_there_is_one(table):
    assert "random walk, %" not in table({ROUNDS: HEADER + "1,5,0.3,0.4,0.1,12.3,9\n"})
    walk = {"precision": "fp32", "map_stride": 8, "val": {"walk_miou": None}}
    text = table({WALK: walk | {"train": {"walk_miou": 0.7425, "walk_crf_miou": 0.7483}}})
    assert ["train", "74.2", "74.8"] in cells(text) and ["val", "-", "-"] in cells(text)


def test_what_there_is_so_far_is_shown_and_nothing_at_all_is_an_error(table):
    with pytest.raises(UserError, match="holds no results yet; run `dvc repro` first"):
        table({})
    assert "random walk, %" in table({WALK: {"val": {"walk_miou": 0.5}}})


def test_without_masks_figures_that_need_none_are_told(table):
    rounds = HEADER.replace("masked_share", "coverage,masked_share") + "1,5,,,0.25,0,11,9\n"
    page = {"compared": "CAM and segmenter", "agreement": 0.8, "scored_images": 0}
    page |= {"coverage": 0.25, "parts_median": 2, "empty": 1, "with_mask": 9, "covering": 0}
    text = table(
        {
            ROUNDS: rounds,
            "train_cam": {"val_class_map": 0.93},
            "report": page,
            FINAL: {"val": {"cam_miou": None, "cam_miou_oracle": None, "cam_crf_miou": None}},
        }
    )
    assert ["1", "5", "25.0", "11.0"] in cells(text) and "final network" not in text
    for line in (
        "tags are learnt, mAP 0.93 on val",
        "CAM and segmenter agree, IoU 0.80",
        "masks cover 25 % of the pixels",
        "1 of 9 masks are empty in spite of tags, 0 cover everything",
    ):
        assert line in text
    assert "nan" not in text and "mIoU of" not in text


def test_intervals_stand_beside_the_figures(table):
    split = {"miou": 0.55, "miou_low": 0.512, "miou_high": 0.584}
    text = table({"train_segmenter/last_round": {"label_set": "last_round", "val": split}})
    assert ["last_round", "val", "55.0", "51.2", "to", "58.4"] in cells(text)


def test_columns_of_the_segmenters_are_below_their_heads(table):
    names = ("last_round", "random_walk_crf")
    row = {"val": {"miou": 0.1, "crf_miou": 0.5}}
    text = table({f"train_segmenter/{name}": row for name in names})
    lines = text.partition("mIoU of the segmenters, %\n")[2].splitlines()[:3]
    assert [line.split()[0] for line in lines] == ["trained", *names]
    words = ("split", "val", "val")
    assert len({line.index(word) for line, word in zip(lines, words, strict=True)}) == 1
    assert len(set(map(len, lines))) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (ROUNDS, "round,epoch\n1,5\n"),
        (ROUNDS, HEADER + "1,5,a,b,0,1,1\n"),
        ("evaluate/figures.csv", "split,figure\nval,cam_miou\n"),
        ("evaluate/figures.csv", "split,figure,value\nval,cam_miou,much\n"),
        ("random_walk/figures.csv", "split,figure,value\nval,walk_miou\n\0,x,\n"),
        ("report/metrics.json", "{"),
    ],
)
def test_damaged_reports_are_an_error_of_one_line(name, text, table):
    with pytest.raises(UserError, match=rf"\A.*{name.partition('/')[0]}.*damaged.*dvc repro.*\Z"):
        table({name: text})
