"""Stage random_walk: a folder of label maps and figures for each split, before and after dCRF."""

import pytest
from PIL import Image
from support import projects

from isim.reporting import pictures


def test_figures_are_those_of_the_label_maps_and_a_split_inside_is_reported_apart(
    run, finished, recorder
):
    """As train of trainaug; its own CAMs are not needed, and val is no part of train."""
    projects.put_inner_split(finished, 5)
    report = run("random_walk", finished)
    counts = {part: found["images"] for part, found in report.items() if isinstance(found, dict)}
    assert counts == {"train": 16, "inner": 5}
    assert projects.names_in(finished / "data/random_walk") == {"train", "train_crf"}
    assert "seconds" in report["train"] and "seconds" not in report["inner"]
    per_class = projects.read_rows(finished / "reports/random_walk/per_class.csv")
    for name, folder in (("walk", "train"), ("walk_crf", "train_crf")):
        for part in counts:
            total = projects.confusion_of(
                projects.items_of(finished, part), finished / "data/random_walk" / folder
            )
            ious = [row[f"{name}_iou"] for row in per_class if row["split"] == part]
            projects.assert_figures(f"{name}_", total, report[part], ious)
    for part in counts:
        told = {name: recorder.figures[f"{part}_{name}", None] for name in report[part]}
        assert told == pytest.approx(report[part], nan_ok=True)
    # Image, ground truth, CAM, walk, walk + dCRF.
    strips = list((finished / "reports/random_walk/pictures/train").iterdir())
    width = 5 * (pictures.MIN_CELL + pictures.GAP) + pictures.GAP
    assert {Image.open(path).size[0] for path in strips} == {width} and len(strips) == 2
