"""Classification of a split's whole, unpadded images: figures (paper Table 1), disputed tags."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from isim import metrics
from isim.data.prepared import Item
from isim.errors import UserError
from isim.models.cam import CamConfig, CamNetwork
from isim.models.common import normalize
from isim.passes import each
from isim.passes.features import Features
from isim.passes.stream import Array, Tensors
from isim.runtime import devices, progress
from isim.runtime.here import Here


def classify(
    here: Here, network: CamNetwork, config: CamConfig, items: Sequence[Item], *, longer_side: int
) -> dict[str, float]:
    """Classify images whose longer side is resized to `longer_side` pixels.

    Returns the figures of `metrics.classification_figures`, none without items; the network is
    left in evaluation mode. Raises UserError for an unreadable image or scores that are not
    finite.
    """
    if not items:
        return {}
    return figures(items, logits(here, network, config, items, longer_side=longer_side))


def logits(
    here: Here, network: CamNetwork, config: CamConfig, items: Sequence[Item], *, longer_side: int
) -> NDArray[np.float32]:
    """Compute the logits (B, K) that `classify` scores; network and errors as there."""
    network.eval()

    @torch.inference_mode()
    def logits_of(_: Sequence[Item], images: Tensor) -> list[Tensors]:
        factor = longer_side / max(images.shape[-2:])
        size = [max(32, round(side * factor)) for side in images.shape[-2:]]
        found: list[Tensors] = []
        # One at a time: a batch fills a device by the pixels before the resizing.
        for image in images:
            views = normalize(TF.resize(image[None], size, antialias=True), config.mean, config.std)
            with devices.autocast(here.precision, here.device):
                logits = network(views.contiguous(memory_format=torch.channels_last), False)[0]
            found.append((logits[0].float(),))
        return found

    def finish(_: Item, logits: Array) -> dict[str, Any]:
        return {"logits": logits.tolist()}

    with progress.task("classification"):
        lines = each.image(here, items, finish, name=None, compute=logits_of).lines
    found = np.array([line["logits"] for line in lines], np.float32)
    return found.reshape(-1, len(config.classes))


def frozen(cached: Features, items: Sequence[Item]) -> dict[str, float]:
    """Classify images by their cached features; figures and errors as of `classify`."""
    if not items:
        return {}
    return figures(items, frozen_logits(cached, items))


@torch.inference_mode()
def frozen_logits(cached: Features, items: Sequence[Item]) -> NDArray[np.float32]:
    """Compute the logits (B, K) of images by their cached features."""
    network = cached.network
    found = [
        network.logits(network.standardise(cached.tensor(item).flatten(1).T), cached.pooling)
        for item in progress.track(items, "classification")
    ]
    classes = network.classifier.weight.shape[0]
    stacked = torch.stack(found).cpu().numpy() if found else np.zeros((0, classes))
    return stacked.astype(np.float32)


def disputed(
    items: Sequence[Item], logits: NDArray[np.float32], classes: Sequence[str]
) -> list[dict[str, Any]]:
    """List the tags that logits (B, K) contradict, the clearest first.

    A tag is disputed where its probability is below the mean of the images without it, a missing
    one where it is above the mean of the images that have it: so it does not matter how sure a
    network is of a class in general (C. Northcutt et al., Confident Learning, 2021). A row has
    `id`, `class`, whether it is `tagged`, its `probability` and that mean, `usual`.
    """
    if not items:
        return []
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    tagged = np.stack([item.known_label for item in items]) > 0
    rows = []
    for label, name in enumerate(classes):
        known, found = tagged[:, label], probabilities[:, label]
        if known.all() or not known.any():
            continue
        usual = np.where(known, found[~known].mean(), found[known].mean())
        for place in np.flatnonzero(np.where(known, found < usual, found > usual)).tolist():
            row = {"id": items[place].id, "class": name, "tagged": int(known[place])}
            values = {"probability": float(found[place]), "usual": float(usual[place])}
            rows.append(row | {key: round(value, 4) for key, value in values.items()})
    return sorted(rows, key=lambda row: -abs(row["probability"] - row["usual"]))


def figures(items: Sequence[Item], logits: np.ndarray) -> dict[str, float]:
    """Score the logits (B, K) of images. Raises UserError for such that are not finite."""
    if not np.isfinite(logits).all():
        raise UserError(
            "the network's scores are not finite: the rates are likely too "
            "high; lower train_cam.optimizer.encoder_rate and classifier_rate"
        )
    return metrics.classification_figures(np.stack([item.known_label for item in items]), logits)
