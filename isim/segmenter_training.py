"""One epoch of a segmenter on a label set."""

from typing import Any

import torch

from isim import engine
from isim.batches import CropBatches, step_batches, steps_per_epoch
from isim.meter import Meter
from isim.models.losses import pixel_cross_entropy
from isim.models.segmenter import Segmenter
from isim.params import TrainSegmenter


def make_optimizer(network: Segmenter, params: TrainSegmenter) -> torch.optim.SGD:
    """SGD with two rates: encoder and, `head_factor` times as high, head (spec 7)."""
    rates = params.optimizer
    groups = [(network.encoder, rates.rate), (network.head, rates.rate * rates.head_factor)]
    return engine.sgd(groups, rates.momentum, rates.weight_decay)


def train_epoch(
    network: Segmenter,
    optimizer: torch.optim.Optimizer,
    crops: CropBatches,
    params: TrainSegmenter,
    epoch: int,
    precision: str,
    device: torch.device,
) -> dict[str, Any]:
    """Train a segmenter for one epoch on the label maps of the crops (paper 4.1.7; spec 7).

    Args:
        network: Updated in place.
        optimizer: Of `make_optimizer`; its rates follow the poly schedule each step.
        crops: Crops with their label maps.
        params: The stage's section.
        epoch: 1-based; seeds the order, the augmentation and the dropout.
        precision: Resolved: fp32 or bf16.
        device: Where the network is.

    Returns:
        Mean loss, the encoder's rate at the last step, and the figures of `Meter.speed`.

    Raises:
        UserError: A loss that is not finite: the step and the likely cause.
    """
    steps = steps_per_epoch(len(crops.dataset), params.batch)
    schedule = params.optimizer
    horizon = steps * params.epochs
    batches = step_batches(network, optimizer, crops, params, epoch, horizon, schedule.poly_power)
    rate = "train_segmenter.optimizer.rate"
    meter = Meter(device, epoch, steps, schedule.momentum, rate)
    forward = engine.compiled(network.forward, params.compile)
    for batch in meter.watch(batches):
        with engine.autocast(precision, device):
            logits = forward(batch["image"])
        loss = pixel_cross_entropy(logits, batch["label"], network.output_stride)
        meter.add(loss, {"loss": loss})
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return meter.means() | {"rate": optimizer.param_groups[0]["lr"]} | meter.speed()
