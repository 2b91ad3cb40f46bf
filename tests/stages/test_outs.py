"""What all stages leave: tables that plots draw, headlines, and cards of folders of label maps."""

import csv
import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from support.projects import read_rows

from isim.data import prepared
from isim.runtime import identity

ROOT = Path(__file__).parents[2]
PLOTS = [
    next(iter(plot.items()))
    for plot in YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["plots"]
]


def dropped(template, field):
    """The value that a template leaves out of a field, by its filters; None if there is none."""
    for step in template.get("transform", ()):
        equal = step.get("filter", {}).get("not", {})
        if equal.get("field") in ("<DVC_METRIC_X>", "<DVC_METRIC_Y>"):
            own = {"x": "<DVC_METRIC_X>", "y": "<DVC_METRIC_Y>"}[field]
            return equal["equal"] if equal["field"] == own else None
    return None


def columns(plot, axis):
    """Pairs of a table and a column that a plot has on an axis."""
    named = plot[axis]
    if isinstance(named, str):
        return [(table, named) for table, _ in columns(plot, "y")]
    return [
        (t, c) for t, names in named.items() for c in ([names] if isinstance(names, str) else names)
    ]


def quantitative(template, axis):
    return template["encoding"][axis]["type"] == "quantitative"


@pytest.mark.parametrize(("name", "plot"), PLOTS, ids=[name for name, _ in PLOTS])
@pytest.mark.parametrize("known", [True, False])
def test_plotted_points_are_numbers(name, plot, known, finished_project, tmp_path):
    template = json.loads((ROOT / f".dvc/plots/{plot['template']}.json").read_text())
    points = 0
    for axis in ("x", "y"):
        left_out = dropped(template, axis)
        for table, column in columns(plot, axis):
            rows = read_rows(finished_project / table)
            if not known and table.endswith(("rounds.csv", "miou.csv", "per_class.csv")):
                # Without masks, or an epoch that was measured between rounds.
                figures = {"cam_miou", "pseudo_label_miou", "iou"}
                rows += [{k: "" if k in figures else v for k, v in rows[0].items()}]
            values = [row[column] for row in rows if row[column] != left_out]
            points += len(values)
            if quantitative(template, axis):
                assert all(float(value) == float(value) for value in values)
            assert "" not in values
    assert points


STAGES = ("prepare", "train_cam", "export_cams", "train_affinity", "random_walk", "evaluate")


@pytest.mark.parametrize("stage", STAGES)
def test_the_headline_is_small_and_has_numbers_alone(stage, finished_project):
    def leaves(tree):
        for value in tree.values():
            yield from leaves(value) if isinstance(value, dict) else [value]

    headline = json.loads((finished_project / f"reports/{stage}/metrics.json").read_text())
    found = list(leaves(headline))
    # Runs are not compared by the CAMs that are stored, nor by AffinityNet's training.
    assert bool(found) == (stage not in ("export_cams", "train_affinity"))
    assert len(found) <= 4 and all(isinstance(value, int | float) for value in found)
    with (finished_project / f"reports/{stage}/figures.csv").open(newline="") as file:
        assert not {"seconds", "images_per_second"} & {
            row["figure"] for row in csv.DictReader(file)
        }


@pytest.mark.parametrize(
    ("folder", "model"),
    [
        ("pseudo_labels/round_01", "train_cam/round_01.safetensors"),
        ("pseudo_labels/round_02", "train_cam/round_02.safetensors"),
        ("random_walk", "train_affinity/model.safetensors"),
    ],
)
def test_a_folder_of_label_maps_tells_what_it_is(folder, model, finished_project, tiny):
    place = finished_project / "data" / folder
    listed = json.loads((place / "classes.json").read_text())
    names = [entry["name"] for entry in listed]
    assert names == ["background", *prepared.load(finished_project).classes]
    text = (place / "card.json").read_text()
    card = json.loads(text)
    (network,) = card["network"].values()
    assert network == identity.md5(finished_project / "models" / model)
    stage = card["made_by"]
    watched = {"pictures", "score_every"}
    parameters = getattr(tiny, stage).model_dump(mode="json", exclude=watched)
    assert card["parameters"] == parameters
    assert card["inputs"]["data/prepared"] == identity.md5(finished_project / "data/prepared")
    assert card["isim"] and "seconds" not in text and str(finished_project) not in text
    if stage == "train_cam":
        row = read_rows(finished_project / "reports/train_cam/rounds.csv")[card["round"] - 1]
        assert card["figures"]["pseudo_label_miou"] == float(row["pseudo_label_miou"])
