"""Presets: valid, complete, commented, and those put together from settings of the paper."""

import shlex
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides

from isim.experiments import cells, overlay, preset
from isim.params import flatten

PARAMS = Path(__file__).parents[2] / "params.yaml"
PAPER = cells.load()


def load(name, *settings):
    return overlay.plain(preset.text(name, settings))


def comments(text):
    return [line.strip() for line in text.splitlines() if line.strip().startswith("#")]


@pytest.mark.parametrize("name", preset.titles())
def test_a_preset_is_valid_and_tells_what_it_is_over_the_comments_of_the_base(name):
    assert preset.parameters(name).model_dump()
    head, text = preset.made(name)
    assert head[0] == preset.titles()[name]
    assert head[1].startswith("expected: ")
    assert head[2].startswith("time: ")
    assert head[3].startswith(f"run: isim preset {name} && dvc repro")
    assert comments(text) == comments(PARAMS.read_text())
    assert "[" not in "".join(line.split("#")[0] for line in text.splitlines()), "block style"


def test_params_yaml_is_the_demo():
    assert preset.text("demo") == PARAMS.read_text()


def test_an_experiment_and_a_preset_leave_the_comments_of_params_yaml(tmp_path):
    """Of a list of mappings, DVC would drop what follows it."""
    path = tmp_path / "params.yaml"
    before = PARAMS.read_text()
    path.write_text(before)
    apply_overrides(str(path), ["train_cam.seed=7"])
    for name in ("voc-sample-mobilenetv2", "demo"):
        preset.write(name, path)
    assert path.read_text() == before


SECTION_4_1 = """
prepare: {source: voc, download: true, sbd: true}
crf: {steps: 10, gt_prob: 0.7, gaussian_sxy: 3, gaussian_compat: 3,
  bilateral_sxy: 50, bilateral_srgb: 5, bilateral_compat: 10}
train_cam: {split: trainaug, epochs: 50, crop: 320, batch: 16, threshold: 0.3, flip: true,
  scales: [1.0, 0.5, 1.5, 2.0], round_rule: frequency, warmup_epochs: 5, round_every: 10,
  optimizer: {profile: paper}}
export_cams: {splits: [trainaug, val]}
train_affinity: {split: trainaug, foreground_threshold: 0.3, background_threshold: 0.1, crop: 512,
  batch: 16, epochs: 3, rate: 0.1, head_factor: 10, weight_decay: 0.0005, stride: 8, radius: 5,
  weights: imagenet}
random_walk: {splits: [trainaug], beta: 8, steps_log2: 8, alpha: 16}
train_segmenter: {method: deeplabv3, output_stride: 16, crop: 512, epochs: 50, batch: 16,
  scale_min: 0.5, scale_max: 1.5, test_scales: [0.5, 0.75, 1.0, 1.25, 1.5, 1.75], test_flip: true,
  allow_decoder_weights: false,
  crf: {gaussian_sxy: 1, bilateral_sxy: 67, bilateral_srgb: 3, bilateral_compat: 4}}
"""


@pytest.mark.parametrize("method", ["cam", "deeplabcam"])
def test_the_presets_of_the_paper_hold_the_values_of_its_section_4_1(method):
    wanted = flatten(overlay.plain(SECTION_4_1)) | {"train_cam.method": method}
    values = flatten(load(f"voc-{method}-resnet50"))
    assert {name: values[name] for name in wanted} == wanted


def test_every_procedure_of_figure_4_has_a_preset():
    found = {
        name: settings["procedure"]
        for name, (_, settings) in PAPER.presets.items()
        if "procedure" in settings
    }
    every = {f"voc-rounds-every-{n}": f"every {n} epochs" for n in (2, 5, 10, 25, 50)}
    assert found == every | {"voc-rounds-convergence": "on convergence"}


@pytest.mark.parametrize("name", PAPER.presets)
def test_a_preset_differs_from_the_first_in_its_settings_alone(name):
    _, settings = PAPER.presets[name]
    assert flatten(load(name)) == PAPER.values | PAPER.parameters(settings)


def test_the_figures_expected_are_those_of_the_cells():
    head = preset.made("voc-cam-resnet50")[0][1]
    assert "table 2: 48.93; table 3: 48.93, 47.59; table 5: 53.18, 50.72" in head
    best = preset.made("voc-deeplabcam-resnest269")[0][1]
    assert "table 7: 61.11, 79.1, 79.64" in best and "54.89" not in best
    assert "has no figure" in preset.made("voc-rounds-every-25")[0][1]
    assert "has no figure" in preset.made("demo", ["method=CAM"])[0][1]


def test_settings_replace_those_of_the_preset():
    values = load("voc-rounds-every-2", "procedure=on convergence", "size=448x448")
    assert values["train_cam"]["round_rule"] == "convergence"
    assert values["train_cam"]["crop"] == 448 and values["train_cam"]["score_every"] == 5
    # The same cell, however it is asked for.
    assert load(PAPER.preset, "METHOD=cam") == load("voc-cam-resnet50")
    split = load(PAPER.preset, "split=train")
    assert split["export_cams"]["splits"] == ["train", "val"]


def test_the_command_in_the_head_gives_the_same(tmp_path):
    head, text = preset.made(PAPER.preset, ["procedure=every 2 epochs"])
    _, _, command = head[3].partition("run: ")
    words = shlex.split(command)
    name, *settings = words[2 : words.index("&&")]
    preset.write(name, tmp_path / "params.yaml", settings)
    assert (tmp_path / "params.yaml").read_text() == text
