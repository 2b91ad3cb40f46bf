"""One epoch of the ISIM loop, and the classification figures of a split."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

from isim import distributed, engine, metrics
from isim.batches import CropBatches, require_finite, step_batches, steps_per_epoch
from isim.data import files
from isim.data.dataset import Item
from isim.errors import UserError
from isim.models.cam import CamConfig, CamNetwork
from isim.models.inference import normalize
from isim.models.losses import modified_cross_entropy
from isim.params import TrainCam
from isim.regeneration import ahead


def make_optimizer(network: CamNetwork, params: TrainCam) -> torch.optim.SGD:
    """SGD with the three rates of paper 4.1: encoder, decoder and its head, classifier."""
    rates = params.optimizer
    groups: list[tuple[torch.nn.Module, float]] = [
        (network.encoder, rates.encoder_rate),
        (network.classifier, rates.classifier_rate),
    ]
    groups += [(m, rates.decoder_rate) for m in (network.decoder, network.head) if m is not None]
    return engine.sgd(groups, rates.momentum, rates.weight_decay)


def train_epoch(
    network: CamNetwork,
    optimizer: torch.optim.Optimizer,
    crops: CropBatches,
    params: TrainCam,
    epoch: int,
    precision: str,
    device: torch.device,
) -> dict[str, Any]:
    """Train for one epoch (paper Algorithm 1, lines 6 and 9).

    Up to `warmup_epochs`, and with method `cam` always, the classification loss only.

    Args:
        network: Updated in place.
        optimizer: Of `make_optimizer`; its rates follow the poly schedule each step.
        crops: Crops with the labels of the current round, if there is one.
        params: The stage's section.
        epoch: 1-based; seeds the order, the augmentation and the dropout.
        precision: Resolved: fp32 or bf16.
        device: Where the network is.

    Returns:
        Mean losses, share of crops without foreground, classification figures of the crops
        (prefix `train_`), seconds and images/s.

    Raises:
        UserError: A loss that is not finite: the step and the likely cause.
    """
    start = time.perf_counter()
    segment = network.decoder is not None and epoch > params.warmup_epochs
    steps = steps_per_epoch(len(crops.dataset), params.batch)
    schedule = params.optimizer
    horizon = steps * (schedule.poly_epochs or params.epochs)
    batches = step_batches(network, optimizer, crops, params, epoch, horizon, schedule.poly_power)
    sums = {"classification_loss": 0.0, "segmentation_loss": 0.0}
    without_foreground = 0
    logits_seen, labels_seen = [], []
    for index, batch in enumerate(batches):
        with engine.autocast(precision, device):
            logits, segmentation = network(batch["image"], segment)
        loss = classification = F.multilabel_soft_margin_loss(
            logits.float(), batch["image_label"]
        ) * (len(logits) / crops.size)
        if segmentation is not None:
            pixels, left_out = modified_cross_entropy(segmentation.float(), batch["label"])
            loss = classification + params.segmentation_weight * pixels
            sums["segmentation_loss"] += pixels.item()
            without_foreground += int(left_out)
        sums["classification_loss"] += classification.item()
        require_finite(
            loss,
            f"epoch {epoch}, step {index + 1} of {steps}",
            schedule.momentum,
            "train_cam.optimizer.encoder_rate and classifier_rate",
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        logits_seen.append(logits.detach().float().cpu())
        labels_seen.append(batch["image_label"].cpu())
    labels_seen_, logits_seen_ = (
        distributed.gather_rows(torch.cat(seen).numpy()) for seen in (labels_seen, logits_seen)
    )
    figures = metrics.classification_figures(labels_seen_, logits_seen_)
    sums = distributed.sum_figures(sums | {"left_out": float(without_foreground)})
    without_foreground = int(sums.pop("left_out"))
    seconds = time.perf_counter() - start
    images_seen = len(logits_seen_)
    return {
        **{name: value / steps for name, value in sums.items()},
        "without_foreground": without_foreground / images_seen if segment else 0.0,
        **{f"train_{name}": value for name, value in figures.items()},
        "seconds": seconds,
        "images_per_second": images_seen / seconds,
    }


@torch.inference_mode()
def classify(
    network: CamNetwork,
    config: CamConfig,
    items: Sequence[Item],
    longer_side: int,
    precision: str,
    device: torch.device,
) -> dict[str, float]:
    """Classification figures on whole, unpadded images (paper Table 1).

    Args:
        network: Left in evaluation mode.
        config: Gives the normalisation.
        items: Images of the split.
        longer_side: Pixels that the images' longer side is resized to.
        precision: Resolved: fp32 or bf16.
        device: Where the network is.

    Returns:
        The figures of `metrics.classification_figures`; none without items.

    Raises:
        UserError: Scores that are not finite.
    """
    if not items:
        return {}
    network.eval()

    def read(item: Item) -> torch.Tensor:
        image = torch.from_numpy(files.read_image(item.image)).permute(2, 0, 1)
        factor = longer_side / max(image.shape[-2:])
        size = [max(32, round(side * factor)) for side in image.shape[-2:]]
        return TF.resize(image, size, antialias=True)

    logits = np.zeros((len(items), len(config.classes)), np.float32)
    with ThreadPoolExecutor(2) as pool, engine.autocast(precision, device):
        stream = ahead(pool, lambda row: read(items[row]), distributed.mine(range(len(items))), 4)
        for row, image in stream:
            views = normalize(image[None].to(device), config.mean, config.std)
            views = views.contiguous(memory_format=torch.channels_last)
            logits[row] = network(views, False)[0][0].float().cpu().numpy()
    logits = distributed.sum_array(logits)
    if not np.isfinite(logits).all():
        raise UserError(
            "the network's scores are not finite: the rates are likely too "
            "high; lower train_cam.optimizer.encoder_rate and classifier_rate"
        )
    return metrics.classification_figures(np.stack([item.known_label for item in items]), logits)
