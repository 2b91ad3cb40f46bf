"""One epoch of the ISIM loop, and the classification figures of a split."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

from isim import distributed, engine, metrics
from isim.batches import CropBatches, step_batches, steps_per_epoch
from isim.data import files
from isim.data.dataset import Item
from isim.errors import UserError
from isim.meter import Meter
from isim.models.cam import CamConfig, CamNetwork
from isim.models.inference import normalize
from isim.models.losses import modified_cross_entropy
from isim.params import TrainCam
from isim.stream import ahead


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
        (prefix `train_`), and the figures of `Meter.speed`.

    Raises:
        UserError: A loss that is not finite: the step and the likely cause.
    """
    segment = network.decoder is not None and epoch > params.warmup_epochs
    steps = steps_per_epoch(len(crops.dataset), params.batch)
    schedule = params.optimizer
    horizon = steps * (schedule.poly_epochs or params.epochs)
    batches = step_batches(network, optimizer, crops, params, epoch, horizon, schedule.poly_power)
    rates = "train_cam.optimizer.encoder_rate and classifier_rate"
    meter = Meter(device, epoch, steps, schedule.momentum, rates)
    forward = engine.compiled(network.forward, params.compile)
    none = torch.zeros((), device=device)
    logits_seen, labels_seen = [], []
    for batch in meter.watch(batches):
        with engine.autocast(precision, device):
            logits, segmentation = forward(batch["image"], segment)
        loss = classification = F.multilabel_soft_margin_loss(
            logits.float(), batch["image_label"]
        ) * (len(logits) / crops.size)
        pixels, left_out = none, none
        if segmentation is not None:
            pixels, left_out = modified_cross_entropy(segmentation.float(), batch["label"])
            loss = classification + params.segmentation_weight * pixels
        terms = {"classification_loss": classification, "segmentation_loss": pixels}
        meter.add(loss, terms | {"without_foreground": left_out / crops.size})
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        logits_seen.append(logits.detach().float())
        labels_seen.append(batch["image_label"])
    means = meter.means()
    figures = metrics.classification_figures(
        *(
            distributed.gather_rows(torch.cat(seen).cpu().numpy())
            for seen in (labels_seen, logits_seen)
        )
    )
    return {
        **means,
        **{f"train_{name}": value for name, value in figures.items()},
        **meter.speed(),
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
