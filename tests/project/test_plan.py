"""The plan: which images are tried, how times grow, and that it comes true."""

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isim.data.sources.source import Entry, Source
from isim.experiments import preset
from isim.params import Shapes
from isim.project import plan
from isim.project.plan import DryRun, Timed
from isim.runtime import devices, progress
from isim.runtime.progress import Ended

TINY = preset.parameters("tiny")
OWN = preset.parameters("own-images")


def entries(count, masks):
    none = Path("/nowhere")
    return {
        f"{n:03d}": Entry(none / f"{n}.jpg", none / "m.png" if n < masks else None, ("a",))
        for n in range(count)
    }


@given(
    train=st.integers(2, 60),
    val=st.integers(0, 20),
    unlabelled=st.integers(0, 10),
    wanted=st.integers(1, 20),
)
def test_images_of_a_dry_run_are_of_every_split_and_about_as_many_as_wanted(
    train, val, unlabelled, wanted
):
    found = entries(train + val + unlabelled, train // 2)
    ids = list(found)
    splits = {
        "train": tuple(ids[:train]),
        "val": tuple(ids[train : train + val]),
        "unlabelled": tuple(ids[train + val :]),
    }
    kept = plan.some(Source(("a",), found, splits), wanted)
    chosen = {id_ for some in kept.splits.values() for id_ in some}
    assert chosen == set(kept.entries) and len(chosen) <= wanted + 6
    assert len(chosen) >= min(wanted, len(ids))
    for name, all_ in splits.items():
        # In their order, and two at least.
        assert list(kept.splits[name]) == [id_ for id_ in all_ if id_ in chosen]
        assert len(kept.splits[name]) >= min(2, len(all_))
    assert not train // 2 or any(entry.mask for entry in kept.entries.values())


def timed(word, *loops, rest=0.0):
    return Timed(word, list(loops), sum(loop.seconds for loop in loops) + rest)


@pytest.mark.parametrize(
    ("what", "params", "expected"),
    [
        # Images grow with their number; what is no loop does not grow.
        (timed("export_cams", Ended(("train",), "image", 8, 2.0), rest=1.0), OWN, 21),
        (timed("export_cams", Ended(("features",), "", 0, 2.0)), OWN, 2),
        # 10 of 150 steps, and of the segmenter's 300.
        (timed("train_cam", Ended(("head",), "step", 10, 2.0)), OWN, 30),
        (timed("train_segmenter", Ended(("head",), "step", 10, 2.0)), OWN, 60),
        (timed("train_cam", Ended(("classifier",), "step", 100, 2.0)), OWN, 2),
        (timed("train_cam", Ended(("round_02",), "image", 8, 2.0)), OWN, 20),
        # An epoch of warm-up of three, then two; the first of a kind is left out.
        (timed("train_cam", Ended(("training", "epoch 1"), "step", 1, 9.0)), TINY, 0),
        (timed("train_cam", Ended(("training", "epoch 2"), "step", 1, 1.0)), TINY, 10),
        (timed("train_cam", Ended(("training", "epoch 4"), "step", 1, 1.0)), TINY, 20),
        (timed("train_segmenter", Ended(("training", "epoch 2"), "step", 1, 1.0)), TINY, 20),
        # Two rounds; a measurement after every epoch, but those that are rounds.
        (timed("train_cam", Ended(("training", "round_01"), "image", 8, 1.0)), TINY, 20),
        (timed("train_cam", Ended(("training", "scores", ""), "image", 8, 1.0)), TINY, 10),
        (timed("evaluate", Ended(("labels/round_01",), "image", 8, 1.0)), TINY, 20),
        (timed("evaluate", Ended(("cams/val",), "image", 8, 1.0)), TINY, 10),
    ],
)
def test_a_stage_takes_as_much_longer_as_it_has_more_to_do(what, params, expected):
    assert plan.estimate(what, params, ratio=10.0) == pytest.approx(expected)


def test_a_dry_run_has_few_steps_and_is_of_the_same_kind():
    small = plan.smaller(OWN)
    assert small.train_cam.frozen.head.steps == small.train_segmenter.head.steps == plan.STEPS
    assert small.train_cam.frozen.rounds == OWN.train_cam.frozen.rounds
    assert plan.smaller(TINY).train_cam.certain_rounds == 1
    cam = OWN.train_cam.model_copy(update={"start": "previous"})
    grown = OWN.model_copy(update={"train_cam": cam})
    assert plan._absolute(grown, Path("project")).train_cam.start == "previous", "it is no path"
    assert plan.smaller(grown).train_cam.start == "none", "a dry run has no previous network"
    for params in (OWN, TINY):
        assert plan.smaller(params).prepare == params.prepare


@pytest.fixture
def in_cpu_seconds(monkeypatch):
    """Times are those of this process's threads: neighbours do not count."""
    monkeypatch.setattr(progress, "_teller", progress._Teller(time.process_time))
    monkeypatch.setattr(plan, "_start_seconds", lambda folder: 0.0)
    monkeypatch.setenv("ISIM_DEVICE", "cpu")
    monkeypatch.setenv("ISIM_WORKERS", "0")


def frozen(params):
    """The method frozen on the images of `tiny`, with small batches of patches."""
    plain = {"method": "frozen", "encoder": "test_resnet", "threshold": 0.5}
    plain["features"] = params.train_cam.features.model_copy(update={"sides": (128,)})
    head = params.train_segmenter.head.model_copy(update={"batch": 512, "steps": 60})
    loop = params.train_cam.frozen.model_copy(update={"head": head})
    walk = {"affinity": "cosine", "background": "constant", "threshold": 0.5}
    changes = {
        "train_cam": params.train_cam.model_copy(update=plain | {"frozen": loop}),
        "train_affinity": params.train_affinity.model_copy(update={"affinity": "cosine"}),
        "random_walk": params.random_walk.model_copy(update=walk),
        "train_segmenter": params.train_segmenter.model_copy(update=plain | {"head": head}),
    }
    return params.model_copy(update=changes)


@pytest.mark.parametrize("change", [lambda params: params, frozen], ids=["trained", "frozen"])
def test_a_plan_comes_true(change, in_cpu_seconds, tmp_path):
    """A run of four times as many images takes what the plan said, within a factor of two."""
    shapes = TINY.prepare.model_copy(update={"shapes": Shapes(train=48, val=16, size=64)})
    sets = TINY.label_sets[:1]
    params = change(TINY.model_copy(update={"prepare": shapes, "label_sets": sets}))
    with devices.intra_op_threads(1):
        made = plan.make(params, tmp_path)
        whole = DryRun(tmp_path / "whole", wanted=1000)
        real = {name: one.seconds for name, one in whole.run(params).items()}
    real["prepare"] += whole.listing
    assert (made.images, whole.kept) == (64, 64) and 16 <= made.tried <= 22
    assert list(made.stages) == list(real)
    told, took = sum(made.stages.values()), sum(real.values())
    assert took / 2 < told < took * 2, f"{made.stages} instead of {real}"
    for name in ("train_cam", "export_cams"):
        assert real[name] / 3 < made.stages[name] < real[name] * 3, name
    assert not list(tmp_path.glob("[!w]*")), "the project's folder is left alone"
    text = "\n".join(made.lines())
    assert f"{made.tried} of 64 images" in text
    assert "features" in text and "memory" in text
    assert (made.features > 0) == (params.train_cam.method == "frozen")
