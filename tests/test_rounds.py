"""The rule of the second iteration procedure, by examples and by what must always hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isim.rounds import Convergence, due, measured

LOSSES = st.integers(0, 800).map(lambda value: value / 8)
PAIRS = st.lists(st.tuples(LOSSES, LOSSES), max_size=12)
RULES = st.builds(Convergence, st.integers(1, 5), st.floats(0, 0.5), st.integers(1, 20))


def rounds(rule, losses):
    """Epochs (1-based) after which a round runs, the history starting anew after each."""
    found, history = [], []
    for epoch, pair in enumerate(losses, start=1):
        history.append(pair)
        if rule.due(history):
            found.append(epoch)
            history = []
    return found


def warmup(*losses):
    return [(loss, None) for loss in losses]


def test_a_plateau_is_due_after_the_patience():
    rule = Convergence(patience=2, tolerance=0.1, cap=100)
    losses = warmup(1.0, 0.5, 0.49, 0.48, 0.47)
    assert [rule.due(losses[:count]) for count in range(6)] == [False] * 4 + [True] * 2


def test_a_slow_but_steady_improvement_is_none_of_the_noise():
    """Each epoch below the tolerance, the patience together above it."""
    rule = Convergence(patience=4, tolerance=0.05, cap=100)
    assert not rule.due(warmup(*(0.98**epoch for epoch in range(40))))
    assert rule.due(warmup(*(0.99**epoch for epoch in range(40))))


def test_both_losses_must_have_converged():
    rule = Convergence(patience=2, tolerance=0.01, cap=100)
    flat, falling = [1.0] * 6, [0.5**epoch for epoch in range(6)]
    assert rule.due(list(zip(flat, flat, strict=True)))
    assert not rule.due(list(zip(flat, falling, strict=True)))
    assert not rule.due(list(zip(falling, flat, strict=True)))
    assert rule.due(warmup(*flat)) and not rule.due(warmup(*falling))


def test_a_jump_at_a_round_does_not_count_as_converged():
    """With the epochs before the round, the old best would hold for ever."""
    rule = Convergence(patience=2, tolerance=0.01, cap=100)
    before = [(1.0, 0.1)] * 3
    after = [(1.0, 2.0), (1.0, 1.5), (1.0, 1.0), (1.0, 0.7), (1.0, 0.7), (1.0, 0.7)]
    assert rounds(rule, before + after) == [3, 9]


@given(RULES, PAIRS)
def test_the_cap_brings_a_round_in_any_case(rule, losses):
    long = losses * (rule.cap + 1)
    found = [0, *rounds(rule, long)]
    gaps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert all(min(rule.cap, rule.patience + 1) <= gap <= rule.cap for gap in gaps)
    assert len(long) - found[-1] < rule.cap


@given(st.integers(1, 6), st.integers(0, 5), PAIRS)
def test_a_cap_within_the_patience_is_a_fixed_frequency(cap, more, losses):
    rule = Convergence(patience=cap - 1 + more or 1, tolerance=0.0, cap=cap)
    expected = [e for e in range(1, len(losses) + 1) if e % cap == 0]
    assert rounds(rule, losses) == expected


@given(RULES, PAIRS, st.floats(1, 1.9))
def test_more_tolerance_is_never_later(rule, losses, factor):
    wider = Convergence(rule.patience, rule.tolerance * factor, rule.cap)
    assert rule.due(losses) <= wider.due(losses)


@given(RULES, PAIRS, st.integers(-3, 3))
def test_the_unit_of_the_losses_does_not_matter(rule, losses, power):
    """Powers of two: no rounding."""
    scaled = [(a * 2.0**power, b * 4.0**power) for a, b in losses]
    assert rule.due(losses) == rule.due(scaled)


@given(RULES, PAIRS)
def test_a_loss_that_equals_the_other_changes_nothing(rule, losses):
    alone = [(a, None) for a, _ in losses]
    assert rule.due(alone) == rule.due([(a, a) for a, _ in losses])
    assert rule.due(losses) <= rule.due(alone), "a second loss can only delay"


@pytest.mark.parametrize("values", [(0, 0.1, 5), (1, -0.1, 5), (1, 1.0, 5), (1, 0.1, 0)])
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="patience"):
        Convergence(*values)


def ends(params, losses):
    """Epochs that rounds follow when an epoch's two losses are those of `losses`."""
    rows, found = [], []
    for classification, segmentation in losses:
        rows.append({"classification_loss": classification, "segmentation_loss": segmentation})
        if due(params, rows, found):
            found.append(len(rows))
    return found


def test_fixed_frequency_as_in_the_paper(tiny):
    changes = {"epochs": 50, "warmup_epochs": 5, "round_every": 10, "round_rule": "frequency"}
    params = tiny.train_cam.model_copy(update=changes)
    assert ends(params, [(1.0, 1.0)] * 50) == [5, 15, 25, 35, 45]
    # No round at the very end: nothing would be trained on its labels.
    params = params.model_copy(update={"epochs": 45})
    assert ends(params, [(1.0, 1.0)] * 45) == [5, 15, 25, 35]


def test_convergence_starts_after_the_warm_up_and_forgets_what_was_before_a_round(tiny):
    rule = tiny.train_cam.convergence.model_copy(update={"patience": 2, "tolerance": 0.1, "cap": 9})
    changes = {"epochs": 20, "warmup_epochs": 3, "round_rule": "convergence", "convergence": rule}
    params = tiny.train_cam.model_copy(update=changes)
    warm = [(0.5, 0.0)] * 3
    # The new labels make the pixel loss jump; it falls for three epochs, then stays.
    falling = [(0.4, 2.0), (0.3, 1.5), (0.2, 1.0), (0.2, 1.0), (0.2, 1.0)]
    assert ends(params, warm + falling + falling) == [3, 8, 13]
    # The first is not the rule's to decide, nor is one after the last epoch.
    improving = [(0.5**epoch, 0.0) for epoch in range(3)]
    assert ends(params, improving + falling) == [3, 8]
    ending = params.model_copy(update={"epochs": 8})
    assert ends(ending, warm + falling) == [3]
    # One loss that goes on falling puts the round off, up to the cap.
    slow = [(0.2, 0.8**epoch) for epoch in range(12)]
    assert ends(params, warm + slow) == [3, 12]


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(1, 12),
    st.sampled_from(["frequency", "convergence"]),
    st.lists(st.tuples(LOSSES, LOSSES), min_size=60, max_size=60),
)
def test_the_certain_rounds_are_the_fewest(tiny, warm, more, every, rule, losses):
    """By frequency, all."""
    convergence = tiny.train_cam.convergence.model_copy(update={"cap": every})
    changes = {"warmup_epochs": warm, "epochs": warm + more, "round_rule": rule}
    changes |= {"round_every": every, "convergence": convergence}
    params = tiny.train_cam.model_copy(update=changes)
    found = ends(params, losses[: params.epochs])
    # Losses that halve with every epoch do not converge.
    fewest = ends(params, [(0.5**epoch, 1.0) for epoch in range(params.epochs)])
    assert len(fewest) == params.certain_rounds <= len(found)
    assert rule == "convergence" or len(found) == params.certain_rounds


@pytest.mark.parametrize(("every", "expected"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6])])
def test_cams_are_measured_every_so_many_epochs(every, expected, tiny):
    params = tiny.train_cam.model_copy(update={"score_every": every})
    assert [epoch for epoch in range(1, 7) if measured(params, epoch)] == expected
