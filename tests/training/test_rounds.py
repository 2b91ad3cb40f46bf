"""Rounds: when they are due, by examples and by what must always hold; each is made once."""

import math
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.networks import CLASSES, config_of
from support.sections import changed

from isim.models import common
from isim.params import Converged
from isim.runtime.here import Here
from isim.training.rounds import Rounds, converged, due, told

LOSSES = st.integers(0, 800).map(lambda value: value / 8)
PAIRS = st.lists(st.tuples(LOSSES, LOSSES), max_size=12)
RULES = st.builds(
    Converged, patience=st.integers(1, 5), tolerance=st.floats(0, 0.5), cap=st.integers(1, 20)
)


def rows_of(pairs):
    return [{"classification_loss": a, "segmentation_loss": b} for a, b in pairs]


def ends(params, pairs):
    """Epochs that rounds follow when an epoch's two losses are those of `pairs`."""
    found, rows = [], rows_of(pairs)
    for epoch in range(1, len(rows) + 1):
        if due(params, rows[:epoch], found):
            found.append(epoch)
    return found


def test_a_plateau_is_converged_after_the_patience():
    def flat(losses, **rule):
        return converged(Converged(cap=100, **rule), rows_of([(loss, 0.0) for loss in losses]))

    losses = [1.0, 0.5, 0.49, 0.48, 0.47]
    found = [flat(losses[:count], patience=2, tolerance=0.1) for count in range(6)]
    assert found == [False] * 4 + [True] * 2
    # Each epoch below the tolerance, the patience together above it or not.
    for rate, expected in ((0.98, False), (0.99, True)):
        slow = [rate**epoch for epoch in range(40)]
        assert flat(slow, patience=4, tolerance=0.05) == expected


@given(RULES, PAIRS, st.floats(1, 1.9), st.integers(-3, 3))
def test_what_always_holds_of_the_rule(rule, pairs, factor, power):
    found = converged(rule, rows_of(pairs))
    wider = rule.model_copy(update={"tolerance": rule.tolerance * factor})
    assert found <= converged(wider, rows_of(pairs)), "more tolerance is never later"
    # Powers of two: no rounding.
    scaled = rows_of([(a * 2.0**power, b * 4.0**power) for a, b in pairs])
    assert found == converged(rule, scaled), "the unit of the losses does not matter"
    alone = converged(rule, rows_of([(a, 0.0) for a, _ in pairs]))
    assert found <= alone, "a second loss can only delay"
    assert alone == converged(rule, rows_of([(a, a) for a, _ in pairs]))


@pytest.mark.parametrize("values", [(0, 0.1, 5), (1, -0.1, 5), (1, 1.0, 5), (1, 0.1, 0)])
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="Converged"):
        Converged(**dict(zip(("patience", "tolerance", "cap"), values, strict=True)))


def test_fixed_frequency_as_in_the_paper(tiny):
    params = changed(tiny.train_cam, warmup_epochs=5, round_every=10, round_rule="frequency")
    # No round at the very end: nothing would be trained on its labels.
    for epochs, expected in ((50, [5, 15, 25, 35, 45]), (45, [5, 15, 25, 35])):
        assert ends(changed(params, epochs=epochs), [(1.0, 1.0)] * epochs) == expected


def test_convergence_starts_after_the_warm_up_and_forgets_what_was_before_a_round(tiny):
    rule = {"round_rule": "convergence", "patience": 2, "tolerance": 0.1, "cap": 9}
    params = changed(tiny.train_cam, epochs=20, warmup_epochs=3, **rule)
    warm = [(0.5, 0.0)] * 3
    # The new labels make the pixel loss jump; it falls for three epochs, then stays.
    falling = [(0.4, 2.0), (0.3, 1.5), (0.2, 1.0), (0.2, 1.0), (0.2, 1.0)]
    assert ends(params, warm + falling + falling) == [3, 8, 13]
    # The first is not the rule's to decide, nor is one after the last epoch.
    improving = [(0.5**epoch, 0.0) for epoch in range(3)]
    assert ends(params, improving + falling) == [3, 8]
    assert ends(changed(params, epochs=8), warm + falling) == [3]
    # One loss that goes on falling, whichever, puts the round off, up to the cap.
    slow = [(0.2, 0.8**epoch) for epoch in range(12)]
    for losses in (slow, [pair[::-1] for pair in slow]):
        assert ends(params, warm + losses) == [3, 12]


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from(["frequency", "convergence"]),
    RULES,
    st.lists(st.tuples(LOSSES, LOSSES), min_size=60, max_size=60),
)
def test_gaps_are_within_the_bounds_and_the_certain_rounds_the_fewest(
    tiny, warm, more, kind, rule, losses
):
    """By frequency, all; a cap within the patience is a fixed frequency."""
    changes = {"warmup_epochs": warm, "epochs": warm + more, "round_rule": kind}
    changes |= {"round_every": rule.cap, "convergence": rule}
    params = changed(tiny.train_cam, **changes)
    found = ends(params, losses[: params.epochs])
    # Losses that halve with every epoch do not converge.
    fewest = ends(params, [(0.5**epoch, 0.5**epoch) for epoch in range(params.epochs)])
    assert len(fewest) == params.certain_rounds <= len(found)
    least = rule.cap if kind == "frequency" else min(rule.cap, rule.patience + 1)
    assert all(least <= after - before <= rule.cap for before, after in pairwise(found))
    assert found == [] or params.epochs - found[-1] <= rule.cap


ROW = {"cam_miou": 0.5, "pseudo_label_miou": math.nan, "coverage": 0.3, "images_per_second": 2.0}


def test_a_round_without_masks_tells_what_needs_none():
    label = "pseudo-label covers 30 % of the pixels (no masks to score it), 2.0 images/s"
    assert told(ROW) == f"CAM mIoU 50.00, {label}"
    assert told(ROW | {"cam_miou": math.nan}) == label


SCORES = SimpleNamespace(row=lambda: ROW, per_class=lambda names: [{"class": n} for n in names])


def test_rounds_and_measurements_are_made_once(tmp_path, tiny, monkeypatch, capsys):
    """Another run of the training decides alike, and reads what has been made."""
    calls = []
    monkeypatch.setattr(common, "save", lambda path, *_: calls.append(path.relative_to(tmp_path)))
    losses = rows_of([(1.0, 1.0)] * 5)

    def run(count, every=1):
        changes = {"epochs": 5, "warmup_epochs": 1, "round_every": 2, "score_every": every}
        rounds = Rounds(
            Here(tmp_path),
            None,
            config_of("cam"),
            changed(tiny.train_cam, **changes),
            lambda _, name: calls.append(name) or SCORES,
            lambda _: calls.append("measured") or 0.25,
        )
        return rounds, [rounds.after_epoch(losses[:epoch]) for epoch in range(1, count + 1)]

    run(2)
    assert calls == [Path("models/round_01.safetensors"), "round_01", "measured"]
    rounds, found = run(5)
    assert calls[3:] == [Path("models/round_02.safetensors"), "round_02", "measured", "measured"]
    assert found == rounds.mious
    figures = [(row["epoch"], row.get("round"), row["cam_miou"]) for row in found]
    measured = [(epoch, None, 0.25) for epoch in (2, 4, 5)]
    assert figures == [(1, 1, 0.5), measured[0], (3, 2, 0.5), *measured[1:]]
    assert rounds.rows == [found[0], found[2]] and math.isnan(found[0]["pseudo_label_miou"])
    classes = [(row["round"], row["class"]) for row in rounds.per_class]
    assert classes == list(product((1, 2), CLASSES))
    capsys.readouterr()
    assert str(run(5)[0].rows) == str(rounds.rows) and len(calls) == 7
    assert capsys.readouterr().out == "", "nothing was made"
    # Every other epoch, or never; a round is a measurement, too.
    for every, expected in ((2, [1, 2, 3, 4]), (0, [1, 3])):
        assert [row["epoch"] for row in run(5, every)[1] if row] == expected


@pytest.mark.parametrize(("start", "first"), [("none", False), ("labels", True)])
def test_labels_come_from_a_decoder_that_has_learnt(start, first, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(common, "save", lambda *_: None)
    used = []
    changes = {"epochs": 5, "warmup_epochs": 2, "round_every": 2, "score_every": 1}
    rounds = Rounds(
        Here(tmp_path),
        None,
        config_of("deeplabcam", decoder_labels=True),
        changed(tiny.train_cam, start=start, **changes),
        lambda config, name: used.append(config.decoder_labels) or SCORES,
        lambda config: used.append(config.decoder_labels) or 0.25,
    )
    for epoch in range(1, 6):
        rounds.after_epoch(rows_of([(1.0, 1.0)] * epoch))
    # The warm-up's measurement and the first round, then what has learned from its labels.
    assert used == [first, first, True, True, True]
    assert [row.get("round") for row in rounds.mious] == [None, 1, None, 2, None]
