"""The training loop: epochs of steps, with a state saved after each.

Resume rule: after every epoch weights, optimizer and figures are saved in the resume folder. The
same call goes on after the last saved epoch and ends as if never interrupted: what an epoch draws
depends on the seed and its number alone.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from isim.models import norm
from isim.runtime import checkpoint, devices, memory, processes, progress
from isim.runtime.here import Here
from isim.training import optimizer as optimizers
from isim.training.batches import CropBatches
from isim.training.meter import Meter
from isim.training.steps import Step

Row = dict[str, Any]


def epochs(
    here: Here,
    network: nn.Module,
    crops: CropBatches,
    step: Step,
    *,
    also: Callable[[], Row] | None = None,
) -> Iterator[list[Row]]:
    """Train `network` in place, epoch by epoch; `crops` know how many and the seed.

    Yields after each epoch, those of an interrupted run included, the rows of all epochs so far:
    `epoch`, the mean losses, `figures` of the step, those of `Meter.speed`, and those of `also`,
    which is called before the epoch's state is saved. Raises UserError for a loss that is not
    finite, with the step and the likely cause, and for unreadable data.
    """
    norm.synchronise(network)
    given = step.schedule
    optimizer = optimizers.sgd(given.groups, given.momentum, given.weight_decay)
    state = checkpoint.restore(here.resume, network, optimizer)
    rows: list[Row] = state["epochs"]
    if rows:
        progress.tell(f"{here.name}: continues after epoch {len(rows)}")
    count = crops.params.epochs
    known = len(rows)
    training = progress.task("training", count, "epoch", before=known)
    with memory.keep_freed_memory(), training as trained:
        for epoch in range(1, count + 1):
            if epoch > len(rows):
                row = train_epoch(here, network, crops, step, optimizer=optimizer, epoch=epoch)
                row = {"epoch": epoch, **row, **(also() if also else {})}
                # Clocks differ: the first process's counts.
                rows.append(processes.broadcast(row))
                checkpoint.save_state(here.resume, network, optimizer, state)
                progress.tell(f"epoch {epoch}/{count}: {step.tell(rows[-1])}")
            yield rows[:epoch]
            trained.add(int(epoch > known))


def train_epoch(
    here: Here,
    network: nn.Module,
    crops: CropBatches,
    step: Step,
    *,
    optimizer: torch.optim.Optimizer,
    epoch: int,
) -> Row:
    """Train for one epoch, 1-based; its row and errors are those of `epochs`.

    Meanwhile a GPU's convolutions are chosen by trying, since all batches are of one size; which
    one wins may differ from run to run, so that a resumed run is bit-equal on the CPU only.
    """
    # Dropout draws for one image must not repeat those for another process's.
    devices.seed_all(crops.params.seed, epoch, *processes.own_seed())
    network.train()
    step.begin(epoch)
    meter = Meter(here.device, epoch, crops.steps, step.schedule)
    horizon = crops.steps * step.schedule.horizon
    batches = progress.track(crops.epoch(epoch), f"epoch {epoch}", crops.steps, "step")
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        for place, batch in enumerate(meter.watch(batches), (epoch - 1) * crops.steps):
            factor = optimizers.poly_factor(place, horizon, step.schedule.power)
            optimizers.set_rates(optimizer, factor)
            loss = step.loss(batch)
            meter.add(loss.total, loss.terms)
            optimizer.zero_grad(set_to_none=True)
            loss.total.backward()
            optimizer.step()
    finally:
        torch.backends.cudnn.benchmark = before
    return meter.means() | step.figures(optimizer.param_groups[0]["lr"]) | meter.speed()
