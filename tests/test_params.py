"""Parameters and presets: validation, structure, paths, digests."""

import re
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from isim import params, preset
from isim.errors import UserError

ROOT = Path(__file__).parent.parent
PRESETS = sorted(preset.titles())


def plain(path):
    return YAML(typ="safe").load(path.read_text())


@pytest.fixture
def tree():
    return plain(ROOT / "params.yaml")


def structure(value):
    """Names in order; leaves by kind, lists not by length."""
    if isinstance(value, dict):
        return {name: structure(child) for name, child in value.items()}
    return "list" if isinstance(value, list) else "leaf"


def ordered(value):
    return [(k, ordered(v)) for k, v in value.items()] if isinstance(value, dict) else value


def values_of(name):
    return YAML(typ="safe").load(preset.text(name))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid_and_has_the_structure_of_params_yaml(name, tree):
    values = values_of(name)
    params.validate(values, name)
    assert ordered(structure(values)) == ordered(structure(tree))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_opens_with_what_it_is(name):
    *head, blank = preset.text(name).splitlines()[:5]
    assert not blank and head[0] == f"# {preset.titles()[name]}"
    assert all(line.startswith("# ") for line in head)
    assert head[1].startswith("# expected: ")
    assert head[2].startswith("# time: ")
    assert head[3].startswith(f"# run: isim preset {name} && dvc repro")


def test_params_yaml_is_the_demo(tree):
    assert tree == plain(preset.folder() / "demo.yaml")


def test_the_issue_names_these_presets():
    wanted = {"demo", "tiny", "voc-sample-mobilenetv2", "voc-deeplabcam-resnet50"}
    assert wanted | {"voc-cam-resnet50"} <= set(preset.titles())


@pytest.mark.parametrize("method", ["cam", "deeplabcam"])
def test_the_paper_presets_hold_the_values_of_section_4_1(method):
    values = params.validate(values_of(f"voc-{method}-resnet50"), method)
    train = values.train_cam
    assert train.method == method
    rule = (train.round_rule, train.warmup_epochs, train.round_every)
    assert rule == ("frequency", 5, 10)
    assert (train.epochs, train.crop, train.threshold) == (50, 320, 0.3)
    assert set(train.scales) == {1.0, 0.5, 1.5, 2.0} and train.flip
    assert (train.optimizer.profile, train.split) == ("paper", "trainaug")
    assert values.prepare.download and values.prepare.sbd
    affinity, walk = values.train_affinity, values.random_walk
    assert (affinity.foreground_threshold, affinity.background_threshold) == (0.3, 0.1)
    assert (affinity.crop, affinity.batch, affinity.epochs) == (512, 16, 3)
    assert (affinity.rate, affinity.head_factor, affinity.weight_decay) == (0.1, 10, 5e-4)
    assert (affinity.stride, affinity.radius, affinity.weights) == (8, 5, "imagenet")
    assert (walk.beta, walk.steps_log2, walk.alpha) == (8, 8, 16)
    assert set(walk.splits) <= set(values.export_cams.splits)
    assert affinity.split in values.export_cams.splits


@pytest.mark.parametrize("method", [*params.METHODS, "smp:FPN"])
def test_every_method_is_accepted(method, tree):
    tree["train_cam"] |= {"method": method, "output_stride": 16}
    assert params.validate(tree, "here").train_cam.method == method


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("train_cam", {"warmup_epochs": 50, "epochs": 50}, "warmup_epochs"),
        ("train_cam", {"method": "deeplabcam", "crop": 100}, "multiple of output_stride"),
        ("train_cam", {"method": "deeplabcam", "output_stride": 32}, "too coarse"),
        ("train_cam", {"method": "unetcam"}, "unetcam_learnable"),
        ("train_cam", {"method": "smp:"}, "smp:FPN"),
        ("train_cam", {"threshold": 1.5}, "train_cam.threshold"),
        ("train_cam", {"scales": []}, "train_cam.scales"),
        ("train_cam", {"score_every": -1}, "train_cam.score_every"),
        ("train_cam", {"segmentation_weight": float("nan")}, "segmentation_weight"),
        ("train_cam", {"epochs": "many"}, "'many'"),
        ("evaluate", {"sweep_start": 0.9, "sweep_stop": 0.1}, "sweep_start"),
        ("export_cams", {"stride": 3}, "export_cams.stride"),
        ("train_affinity", {"stride": 16}, "train_affinity.stride"),
        ("train_affinity", {"radius": 1}, "train_affinity.radius"),
        ("train_affinity", {"background_threshold": 0.3}, "foreground_threshold"),
        ("random_walk", {"background": "linear"}, "random_walk.background"),
        ("random_walk", {"steps_log2": 40}, "random_walk.steps_log2"),
        ("random_walk", {"splits": []}, "random_walk.splits"),
        ("prepare", {"colour": 1}, "prepare.colour"),
        ("train_segmenter", {"scale_min": 1.2, "scale_max": 0.8}, "scale_min (1.2)"),
        ("train_segmenter", {"eval_splits": ["val", "val"]}, "eval_splits"),
        ("train_segmenter", {"output_stride": 32}, "train_segmenter.output_stride"),
    ],
)
def test_an_error_is_one_line_with_the_name(section, change, words, tree):
    tree[section] |= change
    with pytest.raises(UserError) as caught:
        params.validate(tree, "params.yaml")
    message = str(caught.value)
    assert words in message and message.startswith("params.yaml: ") and "\n" not in message


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ([("truth", "data/prepared")], "unknown label set 'truth'"),
        ([("round_00", "data/pseudo_labels/round_00")], "unknown label set 'round_00'"),
        ([("round_2", "data/pseudo_labels/round_2")], "such as round_02"),
        ([("round_02", "data/pseudo_labels/round_01")], "path: data/pseudo_labels/round_02"),
        ([("last_round", "data/pseudo_labels/round_02")], "path: data/pseudo_labels"),
        ([("seeds", "data/prepared")], "path: data/cams"),
        ([("seeds", "data/cams"), ("seeds", "data/cams")], "lists seeds twice"),
    ],
)
def test_label_sets_that_do_not_fit_are_one_line(sets, words, tree):
    tree["label_sets"] = [{"name": name, "path": path} for name, path in sets]
    with pytest.raises(UserError) as caught:
        params.validate(tree, "params.yaml")
    message = str(caught.value)
    assert words in message and message.startswith("params.yaml: ") and "\n" not in message


def test_a_misspelt_name_in_a_label_set_is_found(tree):
    tree["label_sets"] = [{"nam": "seeds", "path": "data/cams"}]
    with pytest.raises(UserError, match=r"label_sets\.0\.nam: .*did you mean name\?"):
        params.validate(tree, "params.yaml")


def test_label_sets_of_every_kind_and_none(tree):
    known = (
        "ground_truth",
        "seeds",
        "last_round",
        "random_walk",
        "random_walk_crf",
        "round_01",
        "round_12",
        "round_100",
    )
    tree["train_cam"] |= {"epochs": 200, "round_every": 1}
    entries = [{"name": name, "path": params.label_set_path(name)} for name in known]
    for sets in (entries, []):
        tree["label_sets"] = sets
        assert len(params.validate(tree, "here").label_sets) == len(sets)


@pytest.mark.parametrize(
    ("change", "rounds", "words"),
    [
        ({}, 4, "train_cam makes is round_04;"),
        ({"epochs": 45}, 4, "train_cam makes is round_04;"),
        ({"epochs": 44}, 3, "train_cam makes is round_03;"),
        ({"round_every": 50}, 1, "train_cam makes is round_01;"),
        # Only the cap is sure: after the epochs 20, 30 and 40.
        ({"round_rule": "convergence"}, 3, "makes for certain is round_03;"),
        ({"round_rule": "convergence", "round_every": 1}, 3, "makes for certain is round_03;"),
    ],
)
def test_a_round_that_is_not_made_for_certain_is_refused(change, rounds, words, tree):
    tree["train_cam"] |= change
    tree["label_sets"] = [{"name": "", "path": ""}]
    for number in (1, rounds, rounds + 1):
        name = f"round_{number:02d}"
        tree["label_sets"][0] |= {"name": name, "path": f"data/pseudo_labels/{name}"}
        if number <= rounds:
            params.validate(tree, "params.yaml")
            continue
        with pytest.raises(UserError) as caught:
            params.validate(tree, "params.yaml")
        message = str(caught.value)
        assert message.startswith(f"params.yaml: label_sets lists {name}, but the last round ")
        assert words in message and "or last_round" in message and "\n" not in message


def test_an_experiment_and_a_preset_leave_the_comments_of_params_yaml(tmp_path):
    """Of a list of mappings, DVC would drop what follows it."""
    path = tmp_path / "params.yaml"
    before = (ROOT / "params.yaml").read_text()
    path.write_text(before)
    apply_overrides(str(path), ["train_cam.seed=7"])
    for name in ("voc-sample-mobilenetv2", "demo"):
        preset.write(name, path)
    assert path.read_text() == before


def test_the_paper_presets_hold_the_segmenter_of_section_4_1_7():
    values = params.validate(plain(preset.folder() / "voc-deeplabcam-resnet50.yaml"), "here")
    section = values.train_segmenter
    assert (section.method, section.output_stride) == ("deeplabv3", 16)
    assert (section.crop, section.epochs, section.batch) == (512, 50, 16)
    assert (section.scale_min, section.scale_max) == (0.5, 1.5)
    assert section.test_scales == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) and section.test_flip
    assert (section.crf.gaussian_sxy, section.crf.bilateral_sxy) == (1, 67)
    assert (section.crf.bilateral_srgb, section.crf.bilateral_compat) == (3, 4)
    assert not section.allow_decoder_weights


def test_a_missing_section_is_named(tree):
    del tree["evaluate"]
    with pytest.raises(UserError, match="evaluate: missing"):
        params.validate(tree, "params.yaml")


def test_further_errors_are_counted(tree):
    tree["train_cam"] |= {"batch": 0, "epochs": 0}
    with pytest.raises(UserError, match=r"and 1 more"):
        params.validate(tree, "params.yaml")


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    changed, found = re.subn(r"segmentation_weight: .*", "segmentation_weight: 1e-4", text)
    assert found == 1
    (tmp_path / "params.yaml").write_text(changed)
    assert params.load(tmp_path / "params.yaml").train_cam.segmentation_weight == 1e-4


@pytest.mark.parametrize("text", ["", "a: [1", "- 1\n- 2\n", "just words"])
def test_a_file_that_is_no_mapping_is_an_error(text, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"params\.yaml"):
        params.load(path)


def test_sections_are_frozen(tree):
    section = params.validate(tree, "here").prepare
    with pytest.raises(ValueError, match="frozen"):
        section.seed = 1


def test_the_digest_depends_on_every_value(tree):
    before = params.digest(params.validate(tree, "here").train_cam)
    assert before == params.digest(params.validate(tree, "here").train_cam)
    tree["train_cam"]["crf"]["steps"] += 1
    assert before != params.digest(params.validate(tree, "here").train_cam)


@pytest.fixture
def clean(monkeypatch):
    for name in ("DVC_ROOT", "ISIM_DATA", "ISIM_SHARED"):
        monkeypatch.delenv(name, raising=False)


def test_paths_have_defaults(clean, tmp_path):
    assert params.resolve_path("$ISIM_DATA", tmp_path) == tmp_path / "data/raw"
    assert params.resolve_path("${ISIM_SHARED}/w", tmp_path) == tmp_path.parent / "shared/w"


def test_paths_follow_the_environment(clean, monkeypatch, tmp_path):
    monkeypatch.setenv("ISIM_DATA", str(tmp_path / "elsewhere"))
    assert params.resolve_path("$ISIM_DATA/voc", Path("/nowhere")) == tmp_path / "elsewhere/voc"


def test_paths_are_anchored_on_the_repository_of_dvc(clean, monkeypatch, tmp_path):
    """`dvc exp run --temp` works in a copy: DVC_ROOT names the repository."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert params.home(Path("/copy")) == tmp_path
    assert params.resolve_path("mine", Path("/copy")) == tmp_path / "mine"


def test_an_unset_variable_in_a_path_is_an_error(clean, tmp_path):
    with pytest.raises(UserError, match="not set"):
        params.resolve_path("$ISIM_NO_SUCH_VARIABLE/x", tmp_path)


@given(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20))
def test_a_plain_relative_path_stays_below_the_home(name):
    assert params.resolve_path(name, ROOT).parent == params.home(ROOT)
