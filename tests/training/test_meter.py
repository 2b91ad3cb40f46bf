"""Losses are summed where they are, speed is counted, and nothing that is not finite passes."""

import time

import pytest
import torch

from isim.errors import UserError
from isim.training import meter
from isim.training.steps import Schedule


def metered(values=(), device="cpu"):
    """A meter of the second of epochs of five steps, to which losses are added."""
    found = meter.Meter(torch.device(device), 2, 5, Schedule([], 0.9, 0.0, 0.9, 1, "the.rate"))
    add(found, values)
    return found


def add(losses, values):
    for value in values:
        loss = torch.tensor(value, requires_grad=True)
        losses.add(loss, {"loss": loss, "left_out": torch.tensor(3)})


def test_means_over_the_steps():
    assert metered([1.0, 2.0, 6.0]).means() == {"loss": 3.0, "left_out": 3.0}


def test_on_a_gpu_losses_are_read_together_and_the_first_bad_step_is_named(monkeypatch):
    """A GPU's losses, which the CPU stands in for: nothing is read for four steps."""
    monkeypatch.setattr(meter, "STEPS_A_READING", 4)
    losses = metered([1.0, float("nan"), 2.0], "cuda")
    message = r"^the loss is nan at epoch 2, step 2 of 5: .*momentum 0\.9; lower the\.rate"
    with pytest.raises(UserError, match=message):
        add(losses, [float("inf")])
    losses = metered([1.0, 2.0, 3.0, 4.0, float("nan")], "cuda")
    with pytest.raises(UserError, match=r"nan at epoch 2, step 5 of 5"):
        losses.means()
    # The CPU's are read before their steps.
    with pytest.raises(UserError, match=r"inf at epoch 2, step 2 of 5"):
        metered([1.0, float("inf")])


def test_the_wait_for_data_is_counted_and_the_work_is_not():
    def slow():
        for _ in range(3):
            time.sleep(0.02)
            yield {"image": torch.zeros(4, 1)}

    losses = metered()
    for _ in losses.watch(slow()):
        time.sleep(0.01)
    speed = losses.speed()
    waited = speed["waiting_share"] * speed["seconds"]
    assert 0.06 <= waited <= speed["seconds"] - 0.03
    assert speed["images_per_second"] * speed["seconds"] == pytest.approx(12)
