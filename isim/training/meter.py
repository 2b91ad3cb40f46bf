"""Measurements of an epoch while it runs: mean losses, images a second, the wait for data."""

import math
import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from isim.errors import UserError
from isim.runtime import processes
from isim.training.steps import Batch, Schedule

# On a GPU the losses of so many steps are read at once: each reading makes it wait for the CPU.
STEPS_A_READING = 32


class Meter:
    """Sums the losses of an epoch where they are, and stops it at one that is not finite.

    On the CPU every loss is looked at before its step is taken. On a GPU that is up to
    `STEPS_A_READING` steps later, at the end of the epoch at the latest: a state that is saved
    after the epoch never comes from a loss that was not finite.
    """

    def __init__(self, device: torch.device, epoch: int, steps: int, schedule: Schedule) -> None:
        """Start the clock; the epoch, its steps and the schedule are for the message."""
        self._every = 1 if device.type == "cpu" else STEPS_A_READING
        self._epoch, self._steps, self._schedule = epoch, steps, schedule
        self._unread: list[Tensor] = []
        self._names: tuple[str, ...] = ()
        self._rows: list[list[float]] = []
        self._images = 0
        self._waited = 0.0
        self._start = time.perf_counter()

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, counting their images and how long they are waited for."""
        stream = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(stream, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            self._images += len(batch["image"])
            yield batch

    def add(self, loss: Tensor, terms: dict[str, Tensor]) -> None:
        """Note a step, before it is taken: the loss that is minimised, and terms to average.

        All are scalars, the terms the same in every step. Raises UserError when this loss, or on
        a GPU an earlier one, is not finite.
        """
        self._names = tuple(terms)
        self._unread.append(torch.stack([t.detach().float() for t in (loss, *terms.values())]))
        if len(self._unread) == self._every:
            self._take()

    def means(self) -> dict[str, float]:
        """Return the mean of each term, summed over all processes, over the steps so far.

        On a GPU this waits for the last one. Raises UserError as `add`.
        """
        self._take()
        columns = zip(self._names, zip(*self._rows, strict=True), strict=True)
        return processes.sum_figures({name: sum(c) / len(c) for name, c in columns})

    def speed(self) -> dict[str, float]:
        """Return seconds since the start, images a second, share of the seconds waited for data.

        Call it after `means`, which waits for what a GPU has yet to do.
        """
        seconds = time.perf_counter() - self._start
        return {
            "seconds": seconds,
            "images_per_second": processes.sum_figures({"": self._images})[""] / seconds,
            "waiting_share": self._waited / seconds,
        }

    def _take(self) -> None:
        given, unread = self._schedule, self._unread
        for loss, *terms in torch.stack(unread).tolist() if unread else []:
            self._rows.append(terms)
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at epoch {self._epoch}, step {len(self._rows)} of "
                    f"{self._steps}: the rates are likely too high for momentum {given.momentum}; "
                    f"lower {given.rates} (or try precision: fp32)"
                )
        unread.clear()
