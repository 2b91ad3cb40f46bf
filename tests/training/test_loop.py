"""The contract of all trainings: one that is interrupted ends as one that is not."""

from itertools import count

import pytest
import torch
from support.networks import copied, same

from isim.errors import UserError
from isim.training import loop, optimizer

SPEED = {"seconds", "images_per_second", "waiting_share"}
every_training = pytest.mark.parametrize("name", ["unetcam_learnable", "deeplabv3", "affinity"])


def train(given, here, also=lambda: {"more": 1.5}, stop=None):
    """Rows of the epochs, the figures of speed left out; the training ends after `stop`."""
    rows = []
    for rows in loop.epochs(here, given.network, given.crops, given.step, also=also):
        assert rows[-1].keys() > SPEED
        if len(rows) == stop:
            break
    return [{k: v for k, v in row.items() if k not in SPEED} for row in rows]


@every_training
def test_an_interrupted_one_goes_on_where_it_was(name, make, here, monkeypatch, capsys, tmp_path):
    given = make(name)
    expected = train(given, here)
    assert [(row["epoch"], row["more"]) for row in expected] == [(1, 1.5), (2, 1.5), (3, 1.5)]

    here.resume = tmp_path / "again"
    broken, calls = make(name), count(1)
    loss = broken.step.loss
    # In the second epoch's second step.
    broken.step.loss = lambda batch: 1 / 0 if next(calls) == 4 else loss(batch)
    with pytest.raises(ZeroDivisionError):
        train(broken, here)
    # With helpers, and with other numbers drawn before.
    monkeypatch.setenv("ISIM_WORKERS", "1")
    torch.rand(7)
    capsys.readouterr()
    # Its state is there when an epoch's rows come.
    train(make(name), here, stop=2)
    assert "train_it: continues after epoch 1\n" in capsys.readouterr().out
    last, called = make(name), []
    assert train(last, here, lambda: called.append(1) or {"more": 1.5}) == expected
    assert called == [1], "one epoch was left"
    assert same(last.network, copied(given.network))
    said = capsys.readouterr().out
    assert "epoch 3/3: " in said and "epoch 2/3" not in said
    # Nothing is left to do, and all rows come.
    assert train(make(name), here, pytest.fail) == expected


@every_training
def test_a_loss_that_is_no_number_names_the_step_and_the_rate(name, make, here):
    given = make(name)
    next(given.network.encoder.parameters()).data.fill_(float("nan"))
    words = rf"\Athe loss is nan at epoch 1, step 1 of 2: .*lower {given.step.schedule.rates}.*\Z"
    with pytest.raises(UserError, match=words):
        train(given, here)
    assert not list(here.resume.glob("*")), "no state to go on from"


@pytest.mark.parametrize(("horizon", "steps"), [(0, 6), (2, 4)])
def test_rates_and_modes_are_those_of_training(horizon, steps, make, here, monkeypatch):
    given, factors = make(poly_epochs=horizon, weight_decay=0.25), []
    set_rates = optimizer.set_rates

    def spy(sgd, factor):
        factors.append(factor)
        set_rates(sgd, factor)
        rates = [rate * factor for _, rate in given.step.schedule.groups]
        assert [group["lr"] for group in sgd.param_groups] == rates
        assert {(g["momentum"], g["weight_decay"]) for g in sgd.param_groups} == {(0.9, 0.25)}
        assert given.network.training and torch.backends.cudnn.benchmark

    monkeypatch.setattr(optimizer, "set_rates", spy)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    given.network.eval()
    train(given, here)
    assert factors == [(1 - min(step, steps - 1) / steps) ** 0.9 for step in range(6)]
    assert not torch.backends.cudnn.benchmark, "put back"
