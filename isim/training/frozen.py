"""Method frozen: a classifier on cached features, then rounds of a head, seconds each.

Resume rule: what is trained, and each round's figures, are recorded when they are done; the same
call goes on after the last record. A kill costs at most the head that was being trained, or the
images of a round that were in flight.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isim import metrics
from isim.data.prepared import Item
from isim.errors import UserError
from isim.labels.seeds import seeds
from isim.metrics import IGNORE
from isim.models import cam, common, frozen
from isim.models.cam import CamConfig
from isim.models.frozen import FrozenNetwork
from isim.params import TrainCam
from isim.runtime import progress
from isim.runtime.here import Here
from isim.training import heads
from isim.training.heads import Patches
from isim.training.loop import Row
from isim.training.rounds import Scores, name, told

Planes = Iterable[tuple[Item, Tensor]]


@dataclass
class FrozenRounds:
    """The loop of method frozen, the part of an interrupted run included.

    Attributes:
        grids: Gives images with their (K', h, w) CAMs on the grid, walked, by the network as it is.
        regenerate: Makes and scores label maps of all images: `name`, `threshold`, `refined`.
        measure: Scores the CAMs alone at a threshold; nan without masks.
        validate: Image figures of the held-out split, by the classifier.
        earlier: Gives images with CAMs as `grids`, by the head of an earlier network; its sure
            patches are the first round's labels then, not those of the classifier.
        rows, per_class, mious, epochs: As `training.rounds.Rounds` has them; an epoch is the
            training of the classifier, then of each round's head.
    """

    here: Here
    network: FrozenNetwork
    config: CamConfig
    params: TrainCam
    patches: Patches
    grids: Callable[[CamConfig], Planes]
    regenerate: Callable[..., Scores]
    measure: Callable[[CamConfig, float], float]
    validate: Callable[[], Row]
    earlier: Callable[[CamConfig], Planes] | None = None
    rows: list[Row] = field(default_factory=list)
    per_class: list[Row] = field(default_factory=list)
    mious: list[Row] = field(default_factory=list)
    epochs: list[Row] = field(default_factory=list)

    def run(self) -> None:
        """Train the classifier and the heads; network and config end as the last round's."""
        given, count = self.params.frozen, self.params.frozen.rounds
        self._done("classifier", self._classifier)
        threshold = self.here.once("threshold", self._threshold)["threshold"]
        measured = self.here.once("walked", lambda: {"miou": self.measure(self.config, threshold)})
        self.mious.append({"epoch": 1, "cam_miou": measured["miou"]})
        score = f", mIoU {100 * measured['miou']:.2f}" if math.isfinite(measured["miou"]) else ""
        progress.tell(
            f"{self.here.name}: CAMs walked ({given.affinity}), threshold {threshold:.2f}{score}"
        )
        if not count:
            self._round(1, threshold, refined=True)
        labels: Callable[[], list[np.ndarray]] = partial(self._first_labels, threshold)
        if self.earlier is not None:
            labels = partial(self._sure_labels, self.earlier)
        for number in range(1, count + 1):
            self._done(name(number), partial(self._head, number, labels))
            refined = given.crf_every_round or number == count
            self._round(number, self.params.threshold, refined=refined)
            labels = partial(self._sure_labels, self.grids)
            if refined:
                labels = partial(self._map_labels, number)

    def _done(self, word: str, train: Callable[[], Row]) -> None:
        """Train, or load what was trained; all processes go on with the first one's weights."""
        path = self.here.resume / "models" / f"{word}.safetensors"

        def make() -> Row:
            row = train()
            common.save(path, self.network, self.config)
            return row

        row = self.here.once(f"trained_{word}", make)
        self.config = heads.load(self.here, self.network, path, cam.load)
        self.epochs.append({"epoch": len(self.epochs) + 1, **row})
        progress.tell(
            f"{self.here.name}: {word} trained: classification {row['classification_loss']:.4f}, "
            f"segmentation {row['segmentation_loss']:.4f}"
        )

    def _classifier(self) -> Row:
        given = self.params.frozen
        loss, logits = heads.train_classifier(
            self.network,
            self.patches,
            seed=self.params.seed,
            pooling=given.pooling,
            steps=given.classifier_steps,
            rate=given.classifier_rate,
        )
        truth = np.stack([item.known_label for item in self.patches.items])
        found = metrics.classification_figures(truth, logits.cpu().numpy())
        figures = {f"train_{name}": value for name, value in found.items()}
        losses = {"classification_loss": loss, "segmentation_loss": 0.0, "labelled_share": 0.0}
        return losses | figures | self.validate()

    def _head(self, number: int, label: Callable[[], list[np.ndarray]]) -> Row:
        labels = label()  # by the last round's head
        given = self.params.frozen.head
        self.config = replace(self.config, head_kind=given.kind, head_width=given.width)
        # From the seed alone, whatever came before.
        torch.manual_seed(self.params.seed)
        self.network.head = frozen.new_head(self.network, self.config).to(self.here.device)
        seed = self.params.seed, number
        loss = heads.train_head(
            self.here, self.network, self.patches, labels, params=given, seed=seed
        )
        labelled = np.mean([float((label != IGNORE).mean()) for label in labels])
        # The classifier's figures stay what they are.
        first = {k: v for k, v in self.epochs[0].items() if k != "epoch"}
        return first | {"segmentation_loss": loss, "labelled_share": float(labelled)}

    def _round(self, number: int, threshold: str | float, *, refined: bool) -> None:
        made = self.here.once(
            name(number), lambda: self._scored(number, threshold, refined=refined)
        )
        self.rows.append(made["row"])
        self.per_class += made["per_class"]
        self.mious.append(made["row"])

    def _scored(self, number: int, threshold: str | float, *, refined: bool) -> dict[str, Any]:
        scores = self.regenerate(self.config, name(number), threshold, refined)
        row = {"round": number, "epoch": len(self.epochs), **scores.row()}
        what = "after dCRF" if refined else "without dCRF"
        progress.tell(f"{name(number)}: {told(row)} ({what})")
        per_class = scores.per_class(self.config.classes)
        return {"row": row, "per_class": [{"round": number, **entry} for entry in per_class]}

    def _threshold(self) -> Row:
        """Choose the threshold of the walked CAMs without masks: Otsu's of the plain ones, carried.

        The walk may move labels, but not change how many patches are labelled: Otsu's threshold of
        the walked CAMs themselves is too low, as walking levels them (docs/results.md).
        """
        given = self.params.frozen.threshold
        if given != "auto":
            return {"threshold": given}
        plain = self._peaks(replace(self.config, affinity="none"))
        threshold = seeds.otsu(plain)
        if self.config.affinity != "none":
            share = float((plain > threshold).mean())
            threshold = float(np.quantile(self._peaks(self.config), 1 - share))
        return {"threshold": threshold}

    def _peaks(self, config: CamConfig) -> NDArray[np.float32]:
        """Highest CAMs of all patches of images that have a class."""
        found = [planes for _, planes in self.grids(config) if len(planes)]
        if not found:
            raise UserError(
                "train_cam.frozen.threshold: no image has a class, so that none can be chosen; "
                "look at the labels"
            )
        return torch.cat([planes.amax(0).flatten() for planes in found]).cpu().numpy()

    def _first_labels(self, threshold: float) -> list[np.ndarray]:
        """Label patches by the walked CAMs: background below lo, a class above hi, else IGNORE."""
        margin = self.params.frozen.margin
        found = {}
        for item, planes in self.grids(self.config):
            best, height = seeds.peak(planes.cpu().numpy(), item.class_ids)
            best[height <= threshold + margin] = IGNORE
            # An image without a class, whose heights are 0, is background at any threshold.
            best[height <= max(threshold - margin, 0)] = 0
            found[item.id] = best.ravel()
        return self._ordered(found)

    def _sure_labels(self, grids: Callable[[CamConfig], Planes]) -> list[np.ndarray]:
        """Label patches whose probability, of the image's classes and the background, is sure."""
        found = {}
        for item, planes in grids(self.config):
            odds = planes.clamp(1e-6, 1 - 1e-6).logit().exp()  # p_k / p_0
            odds = torch.cat([torch.ones_like(odds[:0].sum(0, keepdim=True)), odds])
            sure, best = (odds / odds.sum(0)).max(0)
            labels = np.concatenate([[0], item.class_ids]).astype(np.uint8)[best.cpu().numpy()]
            labels[(sure <= self.params.frozen.sure).cpu().numpy()] = IGNORE
            found[item.id] = labels.ravel()
        return self._ordered(found)

    def _map_labels(self, number: int) -> list[np.ndarray]:
        """Label patches by a round's label maps: one that a label covers for the share `sure`."""
        folder = self.here.resume / "pseudo_labels" / name(number)
        given = self.patches.items, lambda id_: folder / f"{id_}.png", self.patches.sizes
        return heads.label_grids(*given, share=self.params.frozen.sure)

    def _ordered(self, found: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [found[item.id] for item in self.patches.items]
