"""Presets put together from settings on the axes of the paper."""

import shlex

import pytest
from ruamel.yaml import YAML

from isim import paper, params, preset

PAPER = paper.load()
BASE = PAPER.preset


def load(name, *settings):
    return YAML(typ="safe").load(preset.text(name, settings))


def different(first, second, prefix=""):
    """Dotted names of the parameters that differ."""
    found = set()
    for name, value in first.items():
        if isinstance(value, dict):
            found |= different(value, second[name], f"{prefix}{name}.")
        elif value != second[name]:
            found.add(f"{prefix}{name}")
    return found


def test_every_procedure_of_figure_4_has_a_preset():
    rules = {}
    for name in preset.titles():
        if name.startswith("voc-rounds-"):
            train = params.validate(load(name), name).train_cam
            every = train.round_every if train.round_rule == "frequency" else "convergence"
            rules[name] = every
            assert train.score_every == 5 and train.method == "deeplabcam"
    assert rules == {
        **{f"voc-rounds-every-{every}": every for every in (2, 5, 10, 25, 50)},
        "voc-rounds-convergence": "convergence",
    }


@pytest.mark.parametrize("name", [entry.name for entry in PAPER.presets])
def test_a_preset_differs_from_the_first_in_its_settings_alone(name):
    entry = next(entry for entry in PAPER.presets if entry.name == name)
    allowed = PAPER.parameters(entry.settings)
    values = load(name)
    assert different(load(BASE), values) <= allowed.keys()
    assert {key: paper.dig(values, key) for key in allowed} == allowed


def test_the_figures_expected_are_those_of_the_cells():
    head = preset.text("voc-cam-resnet50").splitlines()[1]
    assert "table 2: 48.93; table 3: 48.93, 47.59; table 5: 53.18, 50.72" in head
    best = preset.text("voc-deeplabcam-resnest269").splitlines()[1]
    assert "table 7: 61.11, 79.1, 79.64" in best and "54.89" not in best
    assert "has no figure" in preset.text("voc-rounds-every-25").splitlines()[1]
    assert "has no figure" in preset.text("demo", ["method=CAM"]).splitlines()[1]


def test_settings_replace_those_of_the_preset():
    values = load("voc-rounds-every-2", "procedure=on convergence", "size=448x448")
    assert values["train_cam"]["round_rule"] == "convergence"
    assert values["train_cam"]["crop"] == 448 and values["train_cam"]["score_every"] == 5
    # The same cell, however it is asked for.
    assert load(BASE, "METHOD=cam") == load("voc-cam-resnet50")
    split = load(BASE, "split=train")
    assert split["export_cams"]["splits"] == ["train", "val"]


def test_the_command_in_the_head_gives_the_same(tmp_path):
    text = preset.text(BASE, ["procedure=every 2 epochs"])
    _, _, command = text.splitlines()[3].partition("# run: ")
    words = shlex.split(command)
    name, *settings = words[2 : words.index("&&")]
    preset.write(name, tmp_path / "params.yaml", settings)
    assert (tmp_path / "params.yaml").read_text() == text
