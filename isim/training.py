"""One epoch of the ISIM loop, and the classification figures of a split."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from isim import engine, metrics
from isim.data import files
from isim.data.dataset import CropDataset, Item, epoch_order
from isim.errors import UserError
from isim.models.cam import CamConfig, CamNetwork
from isim.models.inference import normalize
from isim.models.losses import modified_cross_entropy
from isim.params import TrainAffinity, TrainCam
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


def steps_per_epoch(count: int, batch: int) -> int:
    """Full batches in an epoch; at least one, smaller if the split is."""
    return max(1, count // batch)


class CropBatches:
    """Batches of crops, epoch after epoch, from the same loader processes.

    They are forked when the first epoch starts, before training fills the memory: processes
    forked later would keep a copy of every page that training then changes.

    Args:
        dataset: The crops.
        params: Batch size and seed.
        device: Where the batches go.
    """

    def __init__(
        self, dataset: CropDataset, params: TrainCam | TrainAffinity, device: torch.device
    ) -> None:
        """Describe the batches; no process is started yet."""
        self.dataset = dataset
        self._params = params
        self._device = device
        workers = engine.worker_count()
        self._order: list[int] = []
        self._loader = DataLoader(
            dataset,
            batch_size=min(params.batch, len(dataset)),
            sampler=self._order,
            num_workers=workers,
            persistent_workers=workers > 0,
            # Its own: only the first epoch would draw from the default one, so that a resumed
            # run's dropout would differ.
            generator=torch.Generator(),
            pin_memory=device.type == "cuda",
        )

    def epoch(self, epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of an epoch on the device; the last, incomplete one is dropped.

        A batch of one image could not be normalised by its own statistics; the images left
        out differ every epoch.

        Raises:
            UserError: An unreadable image or label, or a loader process that died.
        """
        self.dataset.set_epoch(epoch)
        count = steps_per_epoch(len(self.dataset), self._params.batch) * self._params.batch
        self._order[:] = epoch_order(len(self.dataset), self._params.seed, epoch)[:count].tolist()
        try:
            for batch in self._loader:
                yield {k: v.to(self._device, non_blocking=True) for k, v in batch.items()}
        except UserError as error:
            # A loader process sends its whole traceback as the message: keep the last line.
            last = str(error).strip().splitlines()[-1]
            raise UserError(last.removeprefix("isim.errors.UserError: ")) from error
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                "a data loader process died (out of memory?); run the same command again with a "
                f"smaller ISIM_WORKERS than {engine.worker_count()}: finished epochs are kept"
            ) from error


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
    engine.seed_all(params.seed, epoch)
    network.train()
    segment = network.decoder is not None and epoch > params.warmup_epochs
    steps = steps_per_epoch(len(crops.dataset), params.batch)
    schedule = params.optimizer
    horizon = steps * (schedule.poly_epochs or params.epochs)
    sums = {"classification_loss": 0.0, "segmentation_loss": 0.0}
    without_foreground = 0
    logits_seen, labels_seen = [], []
    batches = tqdm(
        crops.epoch(epoch),
        total=steps,
        desc=f"epoch {epoch}/{params.epochs}",
        disable=None,
        leave=False,
    )
    for index, batch in enumerate(batches):
        step = (epoch - 1) * steps + index
        engine.set_rates(optimizer, engine.poly_factor(step, horizon, schedule.poly_power))
        images = batch["image"].contiguous(memory_format=torch.channels_last)
        with engine.autocast(precision, device):
            logits, segmentation = network(images, segment)
        loss = classification = F.multilabel_soft_margin_loss(logits.float(), batch["image_label"])
        if segmentation is not None:
            pixels, left_out = modified_cross_entropy(segmentation.float(), batch["label"])
            loss = classification + params.segmentation_weight * pixels
            sums["segmentation_loss"] += pixels.item()
            without_foreground += int(left_out)
        sums["classification_loss"] += classification.item()
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at epoch {epoch}, step {index + 1} of {steps}: the "
                f"rates are likely too high for momentum {schedule.momentum}; lower "
                "train_cam.optimizer.encoder_rate and classifier_rate (or try precision: fp32)"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        logits_seen.append(logits.detach().float().cpu())
        labels_seen.append(batch["image_label"].cpu())
    figures = metrics.classification_figures(
        torch.cat(labels_seen).numpy(), torch.cat(logits_seen).numpy()
    )
    seconds = time.perf_counter() - start
    images_seen = sum(len(logits) for logits in logits_seen)
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
        for row, (_, image) in enumerate(ahead(pool, read, items, 4)):
            views = normalize(image[None].to(device), config.mean, config.std)
            views = views.contiguous(memory_format=torch.channels_last)
            logits[row] = network(views, False)[0][0].float().cpu().numpy()
    if not np.isfinite(logits).all():
        raise UserError(
            "the network's scores are not finite after this epoch: the rates are likely too "
            "high; lower train_cam.optimizer.encoder_rate and classifier_rate"
        )
    return metrics.classification_figures(np.stack([item.image_label for item in items]), logits)
