"""Rounds: the two procedures of Fig. 4, fixed frequency and convergence (spec 3.2).

After other epochs the CAMs may be measured, so that procedures can be compared.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from isim.models import cam, common
from isim.params import Converged, TrainCam
from isim.reporting import words
from isim.runtime import progress
from isim.runtime.here import Here
from isim.training.loop import Row


def converged(rule: Converged, rows: Sequence[Mapping[str, float]]) -> bool:
    """Tell whether both losses have stopped to improve, or the cap is reached.

    A loss has converged when its best value of the last `patience` epochs is not more than
    `tolerance`, relatively, below its best of the epochs before these. The paper does not give
    its rule; this is the usual one of early stopping. Hence rounds lie at least `patience` + 1
    epochs apart, or `cap` where that is less.

    `rows` are the figures of the epochs since the last round only: new labels make the
    segmentation loss jump, and an old best value would then hold forever. With method `cam` that
    loss is 0 throughout, so that the classification loss decides alone.
    """

    def flat(losses: Sequence[float]) -> bool:
        before, last = losses[: -rule.patience], losses[-rule.patience :]
        return bool(before) and min(last) >= (1 - rule.tolerance) * min(before)

    names = ("classification_loss", "segmentation_loss")
    return len(rows) >= rule.cap or all(flat([row[name] for row in rows]) for name in names)


def due(params: TrainCam, rows: Sequence[Mapping[str, float]], round_ends: Sequence[int]) -> bool:
    """Tell whether a round follows the last epoch.

    The first comes after the warm-up by either procedure, and none after the last epoch, where
    nothing would be trained on its labels. The answer rests on the arguments alone, so that a
    resumed run repeats it: the figures of all epochs so far, and the epochs (1-based) that rounds
    have followed.
    """
    if len(rows) < params.warmup_epochs or len(rows) == params.epochs:
        return False
    if not round_ends:
        return True
    since = rows[round_ends[-1] :]
    if params.round_rule == "frequency":
        return len(since) == params.round_every
    return converged(params.convergence, since)


def name(number: int) -> str:
    """Name a round, as its files are called."""
    return f"round_{number:02d}"


def told(row: Mapping[str, Any]) -> str:
    """Put a round's figures in words; without masks those that need none."""
    label = words.miou("pseudo-label", row["pseudo_label_miou"], row["coverage"])
    cam = f"CAM mIoU {100 * row['cam_miou']:.2f}, " if math.isfinite(row["cam_miou"]) else ""
    speed = row["images_per_second"]
    return f"{cam}{label}" + (f", {speed:.1f} images/s" if math.isfinite(speed) else "")


class Scores(Protocol):
    """Scores of a round's CAMs and pseudo-labels."""

    def row(self) -> dict[str, float]:
        """Headline figures: `cam_miou`, `pseudo_label_miou`, `coverage`, `images_per_second`, .."""

    def per_class(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Rows of the background and each class."""


@dataclass
class Rounds:
    """Rounds and measurements of a training, those of an interrupted run included.

    A round's checkpoint is `models/<name>.safetensors` in the resume folder; `regenerate` makes
    its pseudo-labels, given the configuration and its `name`. `measure` scores the CAMs alone:
    their mIoU. A decoder that has learnt nothing yet gives no labels.

    Attributes:
        epochs: Figures of each epoch.
        rows: Figures of each round, with `round` and `epoch`.
        per_class: A row a round and class.
        mious: Rows of rounds and of measurements, in order; the latter have no `round`.
    """

    here: Here
    network: cam.CamNetwork
    config: cam.CamConfig
    params: TrainCam
    regenerate: Callable[..., Scores]
    measure: Callable[[cam.CamConfig], float]
    epochs: Sequence[Row] = ()
    rows: list[Row] = field(default_factory=list)
    per_class: list[Row] = field(default_factory=list)
    mious: list[Row] = field(default_factory=list)

    def after_epoch(self, epochs: Sequence[Row]) -> Row | None:
        """Make the round or the measurement that is due after `epochs`, or the rest of it.

        Returns its row; None where nothing is due.
        """
        self.epochs = epochs
        epoch, every = len(epochs), self.params.score_every
        if due(self.params, epochs, [row["epoch"] for row in self.rows]):
            number = len(self.rows) + 1
            made = self.here.once(name(number), partial(self._make, number, epoch))
            self.rows.append(made["row"])
            self.per_class += made["per_class"]
            self.mious.append(made["row"])
        elif every and epoch % every == 0:
            measured = self.here.once(f"measured_{epoch:04d}", partial(self._measure, epoch))
            self.mious.append(measured)
        else:
            return None
        return self.mious[-1]

    def _make(self, number: int, epoch: int) -> dict[str, Any]:
        path = self.here.resume / "models" / f"{name(number)}.safetensors"
        common.save(path, self.network, self.config)
        scores = self.regenerate(self._labelling(), name=name(number))
        row = {"round": number, "epoch": epoch, **scores.row()}
        progress.tell(f"{name(number)} after epoch {epoch}: {told(row)}")
        per_class = scores.per_class(self.config.classes)
        return {"row": row, "per_class": [{"round": number, **entry} for entry in per_class]}

    def _measure(self, epoch: int) -> Row:
        miou = self.measure(self._labelling())
        if math.isfinite(miou):
            progress.tell(f"after epoch {epoch}: CAM mIoU {100 * miou:.2f}")
        return {"epoch": epoch, "cam_miou": miou}

    def _labelling(self) -> cam.CamConfig:
        learnt = bool(self.rows) or self.params.starts_from_labels
        return replace(self.config, decoder_labels=self.config.decoder_labels and learnt)
