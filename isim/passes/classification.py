"""Classification figures of a split on whole, unpadded images (paper Table 1)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
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
    return _figures(items, np.array([line["logits"] for line in lines], np.float32))


def frozen(cached: Features, items: Sequence[Item]) -> dict[str, float]:
    """Classify images by their cached features; figures and errors as of `classify`."""
    if not items:
        return {}
    network = cached.network
    logits = [
        network.logits(network.standardise(cached.tensor(item).flatten(1).T))
        for item in progress.track(items, "classification")
    ]
    return _figures(items, torch.stack(logits).detach().cpu().numpy())


def _figures(items: Sequence[Item], logits: np.ndarray) -> dict[str, float]:
    """Figures of logits (B, K)."""
    if not np.isfinite(logits).all():
        raise UserError(
            "the network's scores are not finite: the rates are likely too "
            "high; lower train_cam.optimizer.encoder_rate and classifier_rate"
        )
    return metrics.classification_figures(np.stack([item.known_label for item in items]), logits)
