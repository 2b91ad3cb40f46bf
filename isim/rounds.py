"""When a round is due: the two procedures of Fig. 4, fixed frequency and convergence (spec 3.2).

And after which other epochs the CAMs are measured, so that procedures can be compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isim.params import TrainCam


@dataclass(frozen=True)
class Convergence:
    """A round after every epoch at which both losses have stopped to improve, or at the cap.

    A loss has converged when its best value of the last `patience` epochs is not more than
    `tolerance`, relatively, below its best of the epochs before these. A round is due when the
    classification and the segmentation loss have both converged, and in any case `cap` epochs
    after the last one. The paper does not give its rule; this is the usual one of early stopping.

    Only epochs since the last round count: new labels make the segmentation loss jump, and an
    old best value would then hold forever. Without a segmentation loss (method `cam`) the
    classification loss decides alone.

    Two rounds are not this rule's to decide, but `due`'s in this module: the first follows the
    warm-up in any case, whatever the losses do in it, and none follows the last epoch.

    Hence rounds lie at least `patience` + 1 epochs apart, or `cap` where that is less: a cap of
    no more than `patience` + 1 is the fixed frequency `cap`.

    Args:
        patience: Epochs, at least 1.
        tolerance: Fraction of the loss, in [0, 1).
        cap: Epochs, at least 1.

    Raises:
        ValueError: A value out of its range.
    """

    patience: int
    tolerance: float
    cap: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.patience < 1 or self.cap < 1 or not 0 <= self.tolerance < 1:
            raise ValueError(f"patience and cap must be 1 or more, tolerance in [0, 1): {self}")

    def due(self, history: Sequence[tuple[float, float | None]]) -> bool:
        """Tell whether a round follows the last epoch of `history`.

        Args:
            history: Mean classification and segmentation loss of every epoch since the last
                round, oldest first; the latter None in epochs that have none.
        """
        if len(history) >= self.cap:
            return True
        classification = [loss for loss, _ in history]
        segmentation = [loss for _, loss in history if loss is not None]
        return self._converged(classification) and (
            not segmentation or self._converged(segmentation)
        )

    def _converged(self, losses: Sequence[float]) -> bool:
        before, last = losses[: -self.patience], losses[-self.patience :]
        return bool(before) and min(last) >= (1 - self.tolerance) * min(before)


def due(params: TrainCam, rows: Sequence[Mapping[str, float]], round_ends: Sequence[int]) -> bool:
    """Tell whether a round follows the last epoch of `rows`.

    The first comes after the warm-up by either procedure, and none after the last epoch, where
    nothing would be trained on its labels. The answer rests on the arguments alone, so that a
    resumed run repeats it.

    Args:
        params: `warmup_epochs`, `epochs`, `round_rule` and what belongs to it.
        rows: Figures of all epochs so far: `classification_loss` and `segmentation_loss`.
        round_ends: Epochs (1-based) that rounds have followed.
    """
    epoch = len(rows)
    if epoch < params.warmup_epochs or epoch == params.epochs:
        return False
    if not round_ends:
        return True
    since = rows[round_ends[-1] :]
    if params.round_rule == "frequency":
        return len(since) == params.round_every
    rule = Convergence(**params.convergence.model_dump())
    return rule.due([(row["classification_loss"], row["segmentation_loss"]) for row in since])


def measured(params: TrainCam, epoch: int) -> bool:
    """Tell whether the CAMs are scored after `epoch` (1-based) though no round follows it."""
    return params.score_every > 0 and epoch % params.score_every == 0
