"""The three losses, a step each: the ISIM loop's, the segmenters', AffinityNet's.

A step is told when an epoch begins, turns each batch into the loss that is minimised, and gives
the epoch's figures beside the mean losses. What trains with it is `loop.epochs`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isim import metrics
from isim.labels.walk.affinity_labels import reduce_label
from isim.models.affinity import AffinityNet, affinity_loss, pair_affinity
from isim.models.cam import CamNetwork
from isim.models.losses import modified_cross_entropy, pixel_cross_entropy
from isim.models.segmenter import Segmenter
from isim.params import TrainAffinity, TrainCam, TrainSegmenter
from isim.runtime import devices, processes
from isim.runtime.here import Here

Batch = dict[str, Tensor]


class Loss(NamedTuple):
    """A batch's loss and the terms to be averaged over the epoch, scalars each."""

    total: Tensor
    terms: dict[str, Tensor]


class Schedule(NamedTuple):
    """SGD with a poly schedule (paper 4.1): rates of modules, and the decay's horizon in epochs.

    `rates` names the parameters to lower when the loss is not finite.
    """

    groups: Sequence[tuple[nn.Module, float]]
    momentum: float
    weight_decay: float
    power: float
    horizon: int
    rates: str


class Step(ABC):
    """A training, as `loop.epochs` knows it: of a network, by a stage's section."""

    schedule: Schedule

    def begin(self, epoch: int) -> None:  # noqa: B027 - nothing, where all epochs are alike
        """Prepare for an epoch, 1-based."""

    @abstractmethod
    def loss(self, batch: Batch) -> Loss:
        """Compute the loss of this process's share of a batch."""

    def figures(self, rate: float) -> dict[str, float]:
        """Return the epoch's figures beside the mean terms; `rate` is the encoder's at its end."""
        return {}

    @abstractmethod
    def tell(self, row: dict[str, Any]) -> str:
        """Put an epoch's row into words."""


class CamStep(Step):
    """The ISIM loop (paper Algorithm 1, lines 6 and 9).

    Up to `warmup_epochs`, unless there are label maps to `start` from, and with method `cam`
    always, the classification loss only. `size` is the number of images of a batch, over all
    processes.
    """

    def __init__(self, here: Here, network: CamNetwork, params: TrainCam, size: int) -> None:
        """Describe the step; `begin` starts an epoch."""
        self._here, self._network, self._params, self._size = here, network, params, size
        self._forward = devices.torch_compiled(network.forward, params.compile)
        self._segment = False
        self._labels: list[Tensor] = []
        self._logits: list[Tensor] = []
        # Paper 4.1: a rate each for the encoder, the classifier, and the decoder with its head.
        given = params.optimizer
        groups: list[tuple[nn.Module, float]] = [
            (network.encoder, given.encoder_rate),
            (network.classifier, given.classifier_rate),
        ]
        parts = (network.decoder, network.head)
        groups += [(part, given.decoder_rate) for part in parts if part is not None]
        sgd = given.momentum, given.weight_decay, given.poly_power
        rates = "train_cam.optimizer.encoder_rate and classifier_rate"
        self.schedule = Schedule(groups, *sgd, given.poly_epochs or params.epochs, rates)

    def begin(self, epoch: int) -> None:
        """Decide whether the decoder learns in this epoch."""
        labelled = epoch > self._params.warmup_epochs or self._params.starts_from_labels
        self._segment = self._network.decoder is not None and labelled
        self._labels, self._logits = [], []

    def loss(self, batch: Batch) -> Loss:
        """Classification loss and, after the warm-up, the modified cross-entropy (Eq. 2)."""
        with devices.autocast(self._here.precision, self._here.device):
            logits, segmentation = self._forward(batch["image"], self._segment)
        labels = batch["image_label"]
        share = len(logits) / self._size
        total = classification = F.multilabel_soft_margin_loss(logits.float(), labels) * share
        pixels = left_out = torch.zeros((), device=logits.device)
        if segmentation is not None:
            pixels, left_out = modified_cross_entropy(segmentation.float(), batch["label"])
            total = classification + self._params.segmentation_weight * pixels
        self._labels.append(labels)
        self._logits.append(logits.detach().float())
        terms = {"classification_loss": classification, "segmentation_loss": pixels}
        return Loss(total, terms | {"without_foreground": left_out / self._size})

    def figures(self, rate: float) -> dict[str, float]:
        """Classification figures of the crops, prefix `train_`."""
        labels, logits = (
            np.concatenate(processes.gather(torch.cat(seen).tolist()), dtype=np.float32)
            for seen in (self._labels, self._logits)
        )
        found = metrics.classification_figures(labels, logits)
        return {f"train_{name}": value for name, value in found.items()}

    def tell(self, row: dict[str, Any]) -> str:
        """Losses and mean average precisions, where there are classes to rank."""
        maps = (
            f", {split} mAP {found:.3f}"
            for split in ("train", "val")
            if math.isfinite(found := row.get(f"{split}_class_map", math.nan))
        )
        return (
            f"classification {row['classification_loss']:.4f}, segmentation "
            f"{row['segmentation_loss']:.4f}{''.join(maps)}"
        )


class SegmenterStep(Step):
    """Pixel cross-entropy of a segmenter on the crops' label maps (paper 4.1.7; spec 7)."""

    def __init__(self, here: Here, network: Segmenter, params: TrainSegmenter) -> None:
        """Describe the step."""
        self._here, self._network, self._params = here, network, params
        self._forward = devices.torch_compiled(network.forward, params.compile)
        given = params.optimizer
        groups = [(network.encoder, given.rate), (network.head, given.rate * given.head_factor)]
        sgd = given.momentum, given.weight_decay, given.poly_power
        self.schedule = Schedule(groups, *sgd, params.epochs, "train_segmenter.optimizer.rate")

    def loss(self, batch: Batch) -> Loss:
        """Mean cross-entropy over the pixels that count."""
        with devices.autocast(self._here.precision, self._here.device):
            logits = self._forward(batch["image"])
        loss = pixel_cross_entropy(logits, batch["label"], self._network.output_stride)
        return Loss(loss, {"loss": loss})

    def figures(self, rate: float) -> dict[str, float]:
        """The encoder's rate at the last step."""
        return {"rate": rate}

    def tell(self, row: dict[str, Any]) -> str:
        """The loss."""
        return f"loss {row['loss']:.4f}"


class AffinityStep(Step):
    """AffinityNet's loss on pairs of sure pixels (paper 4.1.6; spec 6)."""

    def __init__(self, here: Here, network: AffinityNet, params: TrainAffinity) -> None:
        """Describe the step."""
        self._here, self._radius = here, params.radius
        # Not the pairs, whose 34 unrolled planes would take minutes to compile.
        self._features = devices.torch_compiled(network.features, params.compile)
        groups = [(network.encoder, params.rate), (network.head, params.head_factor * params.rate)]
        sgd = params.momentum, params.weight_decay, params.poly_power
        self.schedule = Schedule(groups, *sgd, params.epochs, "train_affinity.rate or head_factor")
        side = params.crop
        places = reduce_label(np.arange(side * side).reshape(side, side), params.stride)
        # Made once: to copy them to a GPU for every batch would make the CPU wait for it.
        self._places = torch.from_numpy(places).to(here.device)  # (h, w)

    def loss(self, batch: Batch) -> Loss:
        """Loss and its three terms."""
        labels = batch["label"].flatten(1)[:, self._places]  # (B, h, w)
        with devices.autocast(self._here.precision, self._here.device):
            affinities = pair_affinity(self._features(batch["image"]), self._radius)
            loss = affinity_loss(affinities, labels, self._radius)
        terms = {f"{name}_loss": value for name, value in loss._asdict().items()}
        return Loss(loss.total, {"loss": terms.pop("total_loss"), **terms})

    def tell(self, row: dict[str, Any]) -> str:
        """The loss and its terms."""
        return (
            f"loss {row['loss']:.4f} (background {row['background_loss']:.4f}, foreground "
            f"{row['foreground_loss']:.4f}, negative {row['negative_loss']:.4f})"
        )
