"""Rounds of method frozen: the labels of each, and a run that is broken off goes on."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from support.networks import CLASSES, config_of, network_of

from isim.data import files
from isim.errors import UserError
from isim.labels.seeds import seeds
from isim.models import cam
from isim.training import frozen, heads
from isim.training.frozen import FrozenRounds

ROW = {"cam_miou": 0.5, "pseudo_label_miou": 0.25, "coverage": 0.4, "images_per_second": 2.0}
SCORES = SimpleNamespace(row=lambda: ROW, per_class=lambda names: [{"class": n} for n in names])
HEAD = {"kind": "mlp", "width": 8, "dropout": 0.0, "batch": 32, "steps": 5, "rate": 0.01}
ALONE = config_of("frozen", head_kind="none")


@pytest.fixture(scope="module")
def maps(items):
    """Features (C, h, w) float16 by id, h and w other ones for each size."""
    rng = np.random.default_rng(0)
    found = {}
    for item in items:
        truth = files.read_label_map(item.mask)
        size = tuple(side // 8 for side in truth.shape)
        label = seeds.reduced(truth, size, 0.0).reshape(size) % 255
        values = rng.normal(0, 0.05, (112, *size))
        for value in (1, 2, 3):
            values[48 + 8 * value : 56 + 8 * value] += 0.1 * (label == value)
        found[item.id] = values.astype(np.float16)
    return found


@pytest.fixture
def make(items, maps, here, tiny):
    """A function that makes the rounds of a new run; `calls` are what it does, in order."""

    def make(calls, items=items, **changes):
        head = tiny.train_cam.frozen.head.model_copy(update=HEAD)
        values = {"head": head, "rounds": 2, "affinity": "none", "classifier_steps": 5}
        values |= {"crf_every_round": False} | changes
        loop = tiny.train_cam.frozen.model_copy(update=values)
        params = tiny.train_cam.model_copy(update={"frozen": loop, "threshold": 0.5})
        network = network_of("frozen", head_kind="none").eval()

        def planes(config):
            # In another order than the items.
            for item in items[::-1]:
                given = torch.from_numpy(maps[item.id].astype(np.float32))
                yield item, network.planes(given, torch.from_numpy(item.class_ids), config)

        def regenerate(config, name, threshold, refined):
            calls.append((name, threshold, refined))
            for item, found in planes(config):
                label = seeds.seed(found.numpy(), item.class_ids, threshold)
                label = cv2.resize(label, files.image_size(item.image)[::-1], interpolation=0)
                path = here.resume / "pseudo_labels" / name / f"{item.id}.png"
                files.write_label_map(path, label)
            return SCORES

        config = replace(ALONE, affinity=loop.affinity, tau=0.1, beta=3.0, steps=2)
        return FrozenRounds(
            here,
            network,
            config,
            params,
            heads.Patches(items, lambda item: maps[item.id], here.device),
            grids=lambda config: calls.append("grids") or planes(config),
            regenerate=regenerate,
            measure=lambda config, threshold: calls.append("measured") or 0.125,
            validate=lambda: {"val_f1": 0.75},
        )

    return make


@pytest.fixture
def trained(monkeypatch):
    """Labels that heads are trained on, in order."""
    seen, train = [], heads.train_head

    def follow(here, network, patches, labels, **options):
        seen.append(labels)
        return train(here, network, patches, labels, **options)

    monkeypatch.setattr(heads, "train_head", follow)
    return seen


def planes_of(made, item, maps):
    given = torch.from_numpy(maps[item.id].astype(np.float32))
    return made.network.planes(given, torch.from_numpy(item.class_ids), made.config).numpy()


def checkpoint(made, word):
    """Rounds with the network that was trained as `word`."""
    network, config = cam.load(made.here.resume / f"models/{word}.safetensors")
    return SimpleNamespace(network=network, config=config)


def test_the_first_labels_are_those_of_sure_cams(make, trained, items, maps):
    made = make([], rounds=1, threshold=0.4, margin=0.15)
    made.run()
    before, counts = checkpoint(made, "classifier"), np.zeros(256, int)
    for item, labels in zip(items, trained[0], strict=True):
        planes = planes_of(before, item, maps)
        expected = np.full(planes.shape[1:], 255)
        for place in np.ndindex(planes.shape[1:]):
            heights = planes[(slice(None), *place)]
            highest = heights.max(initial=0)
            if highest < np.float32(0.25):
                expected[place] = 0
            elif highest > np.float32(0.55):
                expected[place] = item.class_ids[heights.argmax()]
        assert labels.dtype == np.uint8 and labels.tolist() == expected.ravel().tolist()
        counts += np.bincount(labels, minlength=256)
    assert counts[[0, 1, 2, 3, 255]].all() and counts.sum() == sum(len(each) for each in trained[0])
    shares = [(labels != 255).mean() for labels in trained[0]]
    assert made.epochs[1]["labelled_share"] == pytest.approx(np.mean(shares))


def test_the_next_labels_are_those_of_sure_patches(make, trained, items, maps):
    """Of the softmax over the background and the image's classes."""
    made = make([], sure=0.5)
    made.run()
    before, found = checkpoint(made, "round_01"), set()
    for item, labels in zip(items, trained[1], strict=True):
        patches = torch.from_numpy(maps[item.id].astype(np.float32)).flatten(1).T
        with torch.no_grad():
            scores = before.network.label_scores(before.network.standardise(patches)).numpy()
        known = np.concatenate([[0], item.class_ids]).astype(int)
        odds = np.exp(scores[:, known] - scores[:, :1])
        # A class that is there is likely somewhere: at least 3 : 1.
        odds[:, 1:] *= np.maximum(1, 3 / odds[:, 1:].max(0, initial=0, keepdims=True))
        odds /= odds.sum(1, keepdims=True)
        # Where rounding decides, either is right.
        clear = np.abs(odds.max(1) - 0.5) > 1e-3
        expected = np.where(odds.max(1) > 0.5, known[odds.argmax(1)], 255)
        assert (labels == expected)[clear].all() and clear.mean() > 0.9
        found |= set(labels)
    assert {0, 255} < found


def test_labels_after_a_crf_are_those_of_its_maps(make, trained, items, maps, here):
    calls = []
    made = make(calls, crf_every_round=True, sure=0.7)
    made.run()
    assert [call for call in calls if isinstance(call, tuple)] == [
        ("round_01", 0.5, True),
        ("round_02", 0.5, True),
    ]
    for item, labels in zip(items, trained[1], strict=True):
        label = files.read_label_map(here.resume / f"pseudo_labels/round_01/{item.id}.png")
        size = maps[item.id].shape[1:]
        assert labels.tolist() == seeds.reduced(label, size, 0.7).tolist()


def test_figures_are_those_of_the_classifier_and_of_each_round(make, capsys):
    calls = []
    made = make(calls, threshold=0.4)
    made.run()
    assert calls == [
        *("measured", "grids", ("round_01", 0.5, False)),
        *("grids", ("round_02", 0.5, True)),
    ]
    epochs = made.epochs
    assert [row["epoch"] for row in epochs] == [1, 2, 3]
    assert all(epochs[0][k] == row[k] for row in epochs for k in ("classification_loss", "val_f1"))
    assert all(0 <= row["train_element_accuracy"] <= 1 for row in epochs)
    assert [row["segmentation_loss"] > 0 for row in epochs] == [False, True, True]
    assert [(row["round"], row["epoch"]) for row in made.rows] == [(1, 2), (2, 3)]
    assert made.mious == [{"epoch": 1, "cam_miou": 0.125}, *made.rows]
    assert [(r["round"], r["class"]) for r in made.per_class] == [
        (number, name) for number in (1, 2) for name in CLASSES
    ]
    # It ends as the last round's.
    assert made.config.head_kind == "mlp" and made.network.head is not None
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == [
        *("train_it", "train_it", "train_it", "round_01", "train_it", "round_02")
    ]
    assert "without dCRF" in said[3] and "after dCRF" in said[5]


def test_without_rounds_the_walked_cams_are_the_labels(make, trained):
    calls = []
    made = make(calls, rounds=0, threshold=0.35)
    made.run()
    assert calls == ["measured", ("round_01", 0.35, True)] and trained == []
    assert made.network.head is None and made.config.head_kind == "none"
    assert [row["round"] for row in made.rows] == [1] and len(made.epochs) == 1


@pytest.mark.parametrize("affinity", ["none", "cosine"])
def test_a_threshold_is_chosen_without_masks(affinity, make, items, maps):
    """Otsu's of the plain CAMs; a walk changes how high they are, not how many are labelled."""
    calls = []
    made = make(calls, rounds=0, threshold="auto", affinity=affinity)
    made.run()
    walked = checkpoint(made, "classifier")
    plain = SimpleNamespace(network=walked.network, config=ALONE)
    heights, walked = (
        np.concatenate(
            [planes_of(one, item, maps).max(0).ravel() for item in items if item.id != "02"]
        )
        for one in (plain, walked)
    )
    threshold, chosen = seeds.otsu(heights), calls[-1][1]
    assert (chosen == threshold) == (affinity == "none") and threshold != 0.5
    assert (walked > chosen).mean() == pytest.approx((heights > threshold).mean(), abs=0.01)


def test_images_of_no_class_at_all_are_background(make, items, trained):
    make([], [items[2]], threshold=0.4, margin=0.1).run()
    assert [set(labels[0]) for labels in trained] == [{0}, {0}]


def test_without_any_class_no_threshold_can_be_chosen(make, items):
    with pytest.raises(UserError, match=r"^train_cam\.frozen\.threshold: no image has a class"):
        make([], [items[2]], threshold="auto").run()


def outcome(made):
    files = sorted(path for path in made.here.resume.rglob("*.*") if path.is_file())
    told = made.rows, made.per_class, made.mious, made.epochs, made.config
    return told, {path.relative_to(made.here.resume): path.read_bytes() for path in files}


class Killed(Exception):
    """The process ended here."""


@pytest.mark.parametrize("crf", [False, True])
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bytes(
    crf, make, here, tmp_path, monkeypatch
):
    """Killed before and within each part of it, again and again."""
    changes = {"crf_every_round": crf, "affinity": "cosine", "threshold": "auto", "margin": 0.05}
    whole = []
    made = make(whole, **changes)
    made.run()
    expected = outcome(made)
    here.resume = tmp_path / "other"
    calls = []
    for owner, name, moment in (
        *((heads, "train_classifier", "before"), (heads, "train_classifier", "after")),
        *((heads, "load", "before"), (frozen.seeds, "otsu", "before")),
        *((FrozenRounds, "measure", "before"), (frozen.seeds, "peak", "before")),
        *((heads, "train_head", "before"), (heads, "train_head", "after")),
        *((FrozenRounds, "regenerate", "before"), (FrozenRounds, "regenerate", "after")),
        *((heads, "train_head", "before"), (heads, "train_head", "after")),
        *((FrozenRounds, "regenerate", "before"), (FrozenRounds, "regenerate", "after")),
    ):
        made = make(calls, **changes)
        target = made if owner is FrozenRounds else owner
        function = getattr(target, name)

        def die(*given, function=function, moment=moment, **options):
            if moment == "after":
                function(*given, **options)
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(target, name, die)
            with pytest.raises(Killed):
                made.run()
    made = make(calls, **changes)
    made.run()
    assert outcome(made) == expected
    # Nothing that was recorded is made again.
    again = []
    made = make(again, **changes)
    monkeypatch.setattr(heads, "train_head", partial(pytest.fail, "trained again"))
    made.run()
    assert again == [] and outcome(made) == expected


def test_a_margin_above_the_threshold_leaves_patches_without_any_cam_to_the_background(make):
    made = make([], threshold=0.5, margin=0.7)
    made.run()
    assert 0 < made.epochs[1]["labelled_share"] < 1
