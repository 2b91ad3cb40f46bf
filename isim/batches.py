"""Batches of crops with the rates of their steps: what all training loops have in common."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from isim import distributed, engine
from isim.data.dataset import CropDataset, epoch_order
from isim.errors import UserError


class Schedule(Protocol):
    """What the epochs of every section have in common."""

    @property
    def batch(self) -> int:
        """Images of a batch."""

    @property
    def epochs(self) -> int:
        """Epochs in all."""

    @property
    def seed(self) -> int:
        """Seed of the order, the augmentation and the dropout."""


def steps_per_epoch(count: int, batch: int) -> int:
    """Full batches in an epoch; at least one, smaller if the split is."""
    return max(1, count // batch)


class CropBatches:
    """Batches of crops, epoch after epoch, from the same loader processes.

    Each process of a run takes its share of every batch, so that the images of a step are the
    same ones however many processes there are; a loss is summed over them when each divides its
    part by the count of all.

    They are forked when the first epoch starts, before training fills the memory: processes
    forked later would keep a copy of every page that training then changes.

    Args:
        dataset: The crops.
        params: Batch size and seed.
        device: Where the batches go, and where their images are normalised.

    Attributes:
        dataset: The crops.
        size: Images of a batch, over all processes.

    Raises:
        UserError: A batch has fewer images than there are processes.
    """

    def __init__(self, dataset: CropDataset, params: Schedule, device: torch.device) -> None:
        """Describe the batches; no process is started yet."""
        self.dataset = dataset
        self._params = params
        self._device = device
        workers = engine.worker_count()
        self.size = min(params.batch, len(dataset))
        if self.size < distributed.world():
            raise UserError(
                f"a batch of {self.size} images cannot be shared by {distributed.world()} "
                "processes; raise the stage's batch or start fewer processes"
            )
        # Made once: to copy them to a GPU for every batch would make the CPU wait for it.
        self._mean = torch.tensor(dataset.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(dataset.std, device=device).view(1, 3, 1, 1)
        self._shares: list[list[int]] = []
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._shares,
            num_workers=workers,
            persistent_workers=workers > 0,
            # Its own: only the first epoch would draw from the default one, so that a resumed
            # run's dropout would differ.
            generator=torch.Generator(),
            pin_memory=device.type == "cuda",
        )

    def epoch(self, epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        """This process's shares of an epoch's batches; the last, incomplete one is dropped.

        A batch of one image could not be normalised by its own statistics; the images left
        out differ every epoch.

        Yields:
            As the dataset's items, but image (B, 3, crop, crop) float32, normalised and
            channels-last, and label int64.

        Raises:
            UserError: An unreadable image or label, or a loader process that died.
        """
        self.dataset.set_epoch(epoch)
        order = epoch_order(len(self.dataset), self._params.seed, epoch).tolist()
        steps = steps_per_epoch(len(self.dataset), self._params.batch)
        # Read anew for every epoch, by this process: the workers that live on get indices from it.
        self._shares[:] = [
            list(distributed.mine(order[step * self.size : (step + 1) * self.size]))
            for step in range(steps)
        ]
        try:
            for batch in self._loader:
                there = {k: v.to(self._device, non_blocking=True) for k, v in batch.items()}
                yield there | {
                    "image": self._normalise(there["image"]),
                    "label": there["label"].long(),
                }
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

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        """(B, h, w, 3) uint8 to (B, 3, h, w) float32, which is channels-last as it stands."""
        return images.permute(0, 3, 1, 2).float().div_(255).sub_(self._mean).div_(self._std)


def step_batches(
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    crops: CropBatches,
    params: Schedule,
    epoch: int,
    horizon: int,
    power: float,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of an epoch, each with the rates of its step set.

    Seeds what is drawn while it runs and puts the network into training mode. While it runs, a
    GPU's convolutions are chosen by trying, since all batches are of one size; which one wins
    may differ from run to run, so that a resumed run is bit-equal on the CPU only.

    Args:
        network: What is trained.
        optimizer: Its rates follow the poly schedule.
        crops: The batches.
        params: Seed, batch size and number of epochs.
        epoch: 1-based.
        horizon: Steps of the schedule.
        power: Of the schedule.

    Raises:
        UserError: As `CropBatches.epoch`.
    """
    # Dropout draws for one image must not repeat those for another process's.
    engine.seed_all(params.seed, epoch, *([distributed.rank()] if distributed.rank() else []))
    network.train()
    steps = steps_per_epoch(len(crops.dataset), params.batch)
    title = f"epoch {epoch}/{params.epochs}"
    batches = tqdm(crops.epoch(epoch), total=steps, desc=title, disable=None, leave=False)
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        for index, batch in enumerate(batches):
            step = (epoch - 1) * steps + index
            engine.set_rates(optimizer, engine.poly_factor(step, horizon, power))
            yield batch
    finally:
        torch.backends.cudnn.benchmark = before
