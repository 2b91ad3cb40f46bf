"""Parameters: what is valid, errors of one line, the shared dCRF; the presets as such."""

import copy
import datetime
import math
import re
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from ruamel.yaml import YAML

from isim import params
from isim.errors import UserError
from isim.runtime import identity

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tree():
    return YAML(typ="safe").load((ROOT / "params.yaml").read_text())


def refusal(tree):
    """The one line that says what is wrong with a tree, without the file's name."""
    with pytest.raises(UserError) as caught:
        params.validate(tree, "params.yaml")
    message = str(caught.value)
    assert message.startswith("params.yaml: ") and "\n" not in message
    return message.removeprefix("params.yaml: ")


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
        ("train_cam", {"method": "smp:"}, r"smp:<Name>"),
        ("train_cam", {"batch": 0, "epochs": 0}, "and 1 more"),
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
    assert words in refusal(tree)


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
    assert words in refusal(tree)


def test_a_misspelt_name_in_a_label_set_is_found(tree):
    tree["label_sets"] = [{"nam": "seeds", "path": "data/cams"}]
    assert re.match(r"label_sets\.0\.nam: .*did you mean name\?", refusal(tree))


def test_label_sets_of_every_kind_and_none(tree):
    known = (*params.LABEL_SETS, "round_01", "round_12", "round_100")
    tree["train_cam"] |= {"epochs": 200, "round_every": 1}
    entries = [{"name": name, "path": params.label_set_path(name)} for name in known]
    for sets in (entries, []):
        tree["label_sets"] = sets
        assert len(params.validate(tree, "here").label_sets) == len(sets)


@pytest.mark.parametrize(
    ("change", "rounds"),
    [
        ({}, 4),
        ({"epochs": 45}, 4),
        ({"epochs": 44}, 3),
        ({"round_every": 50}, 1),
        # Only the cap is sure: after the epochs 20, 30 and 40.
        ({"round_rule": "convergence"}, 3),
        ({"round_rule": "convergence", "round_every": 1}, 3),
    ],
)
def test_a_round_that_is_not_made_for_certain_is_refused(change, rounds, tree):
    tree["train_cam"] |= change
    names = [f"round_{number:02d}" for number in (1, rounds, rounds + 1)]
    sets = [{"name": name, "path": f"data/pseudo_labels/{name}"} for name in dict.fromkeys(names)]
    tree["masks"]["segmenter"] = names[0]
    params.validate(tree | {"label_sets": sets[:-1]}, "params.yaml")
    tree["label_sets"] = sets
    sure = " for certain" if "round_rule" in change else ""
    assert refusal(tree).startswith(
        f"label_sets lists round_{rounds + 1:02d}, but the last round that train_cam makes{sure} "
        f"is round_{rounds:02d}; list that, or last_round"
    )


CARRIED = [(section, block) for block, carriers in params.SHARED.items() for section in carriers]


def test_the_shared_crf_is_that_of_all_sections_but_the_segmenter(tree):
    tree["crf"]["bilateral_srgb"] = 7
    made = params.validate(tree, "here")
    found = {name: part.crf.bilateral_srgb for name, part in made if hasattr(part, "crf")}
    assert found == dict.fromkeys(params.SHARED["crf"], 7) | {"train_segmenter": 3}


@pytest.mark.parametrize(("section", "block"), CARRIED)
def test_a_section_carries_shared_blocks_and_none_of_its_own(section, block, tree):
    assert (
        getattr(getattr(params.validate(tree, "here"), section), block).model_dump() == tree[block]
    )
    tree[section][block] = tree[block]
    assert refusal(tree) == (
        f"{section}: its {block} is the one at the top level of the file; remove {section}.{block}"
    )


@pytest.mark.parametrize("block", params.SHARED)
def test_a_wrong_shared_block_is_reported_once(block, tree):
    for name, words in (("steps", f"{block}.steps: "), ("backend", f"{block}.backend: unknown")):
        message = refusal(tree | {block: tree[block] | {name: -1}})
        assert message.startswith(words) and " more" not in message


@pytest.mark.parametrize("affinity", get_args(params.Affinity))
def test_train_affinity_knows_what_the_walk_takes(affinity, tree):
    tree["random_walk"]["affinity"] = affinity
    assert params.validate(tree, "here").train_affinity.affinity == affinity
    tree["train_affinity"]["affinity"] = affinity
    message = "train_affinity: its affinity is random_walk's; remove train_affinity.affinity"
    assert refusal(tree) == message


def test_a_previous_network_labels_a_round(tree):
    tree["train_cam"] |= {"method": "frozen", "start": "previous"}
    assert params.validate(tree, "here").train_cam.start == "previous"
    tree["train_cam"]["frozen"]["rounds"] = 0
    assert "start: previous labels the first round" in refusal(tree)


def test_a_grid_whose_affinities_fill_the_memory_is_refused(tree):
    tree["train_cam"] |= {"method": "frozen", "output_stride": 16}
    tree["train_cam"]["features"] = {"sides": [2048], "scales": [1.0], "stages": 1}
    assert params.validate(tree, "here").train_cam.features.sides == (2048,)
    tree["train_cam"]["features"]["sides"] = [512, 2080]
    assert refusal(tree).endswith("whose affinities fill the memory; use 2048 at most")
    tree["train_cam"]["features"] |= {"sides": [1024], "scales": [0.5, 2.25]}
    assert "features.sides: 1024 times 2.25 (scales)" in refusal(tree)
    assert refusal(tree).endswith("use 910 at most")
    tree["train_cam"]["features"]["scales"] = [0.5, 4.5]
    assert "features.scales" in refusal(tree)
    tree["train_cam"]["features"] |= {"sides": list(range(1009, 1025)), "scales": [4.0]}
    assert "squares of the 16 sides at scales sum" in refusal(tree)


def test_a_wrong_affinity_is_reported_once(tree):
    tree["random_walk"]["affinity"] = "nets"
    message = refusal(tree)
    assert message.startswith("random_walk.affinity: ") and " more" not in message


@pytest.mark.parametrize("name", ["evaluate", "crf"])
def test_a_missing_section_is_named(name, tree):
    del tree[name]
    assert refusal(tree).startswith(f"{name}: missing;")


def test_masks_carry_what_was_trained(tree):
    made = params.validate(tree, "here")
    for name, (section, key) in params.OF_MASKS.items():
        assert getattr(made.masks, name) == getattr(getattr(made, section), key)
    wrong = tree["masks"] | {"flip": True}
    message = "masks: its flip is train_cam.flip; remove masks.flip"
    assert refusal(tree | {"masks": wrong}) == message
    message = refusal(tree | {"masks": tree["masks"] | {"labels": "seeds"}})
    assert message.startswith("masks.labels: 'seeds' is no label set with label maps")
    message = refusal(tree | {"masks": tree["masks"] | {"segmenter": "random_walk"}})
    assert message.startswith("masks.segmenter is random_walk, but label_sets lists")
    # A section whose values they carry is told alone.
    tree["train_cam"]["scales"] = []
    assert refusal(tree).startswith("train_cam.scales: ")


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    changed = re.sub(r"segmentation_weight: .*", "segmentation_weight: 1e-4", text)
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
    def digest():
        return identity.digest(params.validate(tree, "here").train_cam.model_dump())

    before = digest()
    assert before == digest()
    tree["crf"]["steps"] += 1
    assert before != digest()


def _numbers(kind, place=(), bounds=()):
    """Every number that a parameter holds: its place, type and bounds, inside of whatever it is."""
    if get_origin(kind) is Annotated:
        inner, *about = get_args(kind)
        yield from _numbers(inner, place, (*bounds, *about))
    elif kind in (int, float):
        yield place, kind, bounds
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            yield from _numbers(field.annotation, (*place, name), tuple(field.metadata))
    else:
        for part in get_args(kind):
            if part is not Ellipsis and get_origin(kind) is not Literal:
                yield from _numbers(part, place)


NUMBERS = {".".join(place): (kind, about) for place, kind, about in _numbers(params.Params)}


def _limits(about):
    """Lower and upper bounds in the metadata of a field."""
    flat = [part for one in about for part in (getattr(one, "metadata", None) or [one])]
    found = {
        name: getattr(part, name) for part in flat for name in ("gt", "ge", "lt", "le")
        if getattr(part, name, None) is not None
    }  # fmt: skip
    return found.keys() & {"gt", "ge"}, found.keys() & {"lt", "le"}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_both_bounds(name):
    assert len(NUMBERS) > 100
    least, most = _limits(NUMBERS[name][1])
    assert least and most


def _leaves(tree, place=()):
    """Places of all values of a tree that are neither sections nor lists of them."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list) and value:
            yield from _leaves(value, (*place, name))
        else:
            yield (*place, name)


TREE = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
LEAVES = list(_leaves(TREE))
ODD = [True, 1e300, -1e300, 10**400, 1e-300, float("nan"), "1", "x\x1b", "y" * 5000, [[]] * 2000]
ODD += [{"a": 1}, None, 2.0, datetime.date(2026, 1, 1), b"x", [0.5] * 5000, {1: {2: 3}}]


@given(st.sampled_from(LEAVES), st.sampled_from(ODD) | st.integers() | st.floats() | st.text())
def test_whatever_a_value_is_it_is_taken_as_it_is_or_one_line(place, value):
    tree = copy.deepcopy(TREE)
    section = tree
    for name in place[:-1]:
        section = section[name]
    before = section[place[-1]]
    section[place[-1]] = value
    try:
        params.validate(tree, "params.yaml")
    except UserError as error:
        told = str(error)
        assert told.isprintable() and len(told) < 300
    else:
        # Nothing is taken for something of another type: no bool for a number, no text for one.
        numbers = (int, float)
        if type(before) in numbers and not isinstance(value, str):
            assert type(value) in numbers and not isinstance(value, bool)
        if isinstance(before, bool):
            assert isinstance(value, bool)
        assert not isinstance(value, float) or math.isfinite(value)


TOGETHER = [
    *(
        (section, {"batch": 128, "crop": 4096}, {"batch": 129}, "batch (129) and crop (4096)")
        for section in ("train_cam", "train_affinity", "train_segmenter")
    ),
    ("train_cam", {"batch": 16384, "crop": 352}, {"crop": 4096}, "batch (16384) and crop (4096)"),
    ("train_cam", {"scales": [4.0] * 4}, {"scales": [4.0] * 32}, "train_cam.scales: the squares"),
    ("train_cam", {"scales": [1.0] * 32}, {"scales": [4.0] * 5}, "train_cam.scales: the squares"),
    ("export_cams", {"scales": [2.0] * 16}, {"scales": [2.0] * 17}, "export_cams.scales: the"),
    ("train_segmenter", {"test_scales": [4.0]}, {"test_scales": [4.0] * 5}, ".test_scales: the"),
    ("train_cam.features", {"sides": [4096]}, {"sides": list(range(4081, 4097))}, "s.sides: the"),
    ("train_segmenter.features", {"sides": [448, 672, 896]}, {"sides": [4096, 4095, 128]}, "sides"),
    (
        "prepare.shapes",
        {"train": 60_000, "val": 5000, "size": 512},
        {"train": 10**6},
        "train (1000000) and val (5000) and size (512)",
    ),
    ("prepare.shapes", {"train": 10**6, "size": 64}, {"size": 512}, "size (512) together mean"),
    ("train_cam.frozen.head", {"batch": 1 << 20}, {"width": 8192}, "batch (1048576) and width"),
    ("train_segmenter.head", {"width": 8192}, {"batch": 1 << 20}, "batch (1048576) and width"),
    ("report", {"sheet": 1000}, {"thumbnail": 1024}, "sheet (1000) and thumbnail (1024)"),
]


@pytest.mark.parametrize(("section", "taken", "beyond", "words"), TOGETHER)
def test_numbers_within_their_bounds_are_refused_where_together_they_fill_the_memory(
    section, taken, beyond, words, tree
):
    part = tree
    for name in section.split("."):
        part = part[name]
    part |= taken
    params.validate(tree, "here")
    part |= beyond
    message = refusal(tree)
    assert message.startswith(section) and words in message and len(message) < 285
    assert "smaller" in message and " more)" not in message


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("train_cam", "epochs", 10**8),
        ("train_cam", "epochs", True),
        ("train_cam", "epochs", 50.0),
        ("train_cam", "epochs", "50"),
        ("train_cam", "crop", 64000),
        ("train_cam", "output_stride", 16.0),
        ("train_cam", "flip", 1),
        ("train_cam", "scales", [0.5] * 1000),
        ("train_cam", "scales", [1e-9]),
        ("export_cams", "stride", True),
        ("export_cams", "splits", ["train"] * 1000),
        ("evaluate", "sweep_step", 1e-8),
        ("train_affinity", "radius", 10**6),
        ("prepare", "seed", 2**64),
        ("prepare", "root", "a\x1bb"),
        ("prepare", "root", "a" * 10**6),
        ("prepare", "shapes", {"train": 10**9, "val": 1, "size": 64}),
        ("prepare", "mask_values", {True: "cat"}),
        ("random_walk", "beta", 10**9),
        ("crf", "bilateral_srgb", 1e-300),
    ],
)
def test_values_that_real_use_never_meets_are_refused(section, name, value, tree):
    tree[section][name] = value
    assert refusal(tree).startswith(f"{section}.{name}")
