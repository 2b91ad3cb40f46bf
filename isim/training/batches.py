"""Batches of crops, shared by the processes of a run."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from isim.data.crops import CropDataset, epoch_order
from isim.data.prepared import Item
from isim.errors import UserError
from isim.models.affinity import AffinityConfig
from isim.models.cam import CamConfig
from isim.models.segmenter import SegmenterConfig
from isim.params import Training
from isim.runtime import helpers, processes


def of_crops(
    items: Sequence[Item],
    config: CamConfig | AffinityConfig | SegmenterConfig,
    params: Training,
    device: torch.device,
    *,
    labels: Sequence[Callable[[str], Path]],
    scales: tuple[float, float] | None = None,
) -> "CropBatches":
    """Return `CropBatches` on `device`; the other arguments are those of `CropDataset`."""
    given = (items, params.crop, config.mean, config.std)
    crops = CropDataset(*given, seed=params.seed, labels=labels, scales=scales)
    return CropBatches(crops, params, device)


class CropBatches:
    """Batches of crops, epoch after epoch, from the same loader processes.

    Each process of a run takes its share of every batch, so that the images of a step are the
    same ones however many processes there are; a loss is summed over them when each divides its
    part by the count of all.

    The loaders are forked when the first epoch starts, before training fills the memory: processes
    forked later would keep a copy of every page that training then changes.

    Attributes:
        size: Images of a batch, over all processes.
        steps: Full batches in an epoch; at least one, smaller if the split is.
    """

    def __init__(self, dataset: CropDataset, params: Training, device: torch.device) -> None:
        """Describe the batches; no process is started yet.

        Raises UserError when a batch has fewer images than there are processes.
        """
        self.dataset, self.params, self._device = dataset, params, device
        self.size = min(params.batch, len(dataset))
        self.steps = max(1, len(dataset) // params.batch)
        if self.size < processes.world():
            raise UserError(
                f"a batch of {self.size} images cannot be shared by {processes.world()} "
                "processes; raise the stage's batch or start fewer processes"
            )
        # Made once: to copy them to a GPU for every batch would make the CPU wait for it.
        self._mean, self._std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1)
            for values in (dataset.mean, dataset.std)
        )
        self._shares: list[list[int]] = []
        workers = helpers.worker_count()
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._shares,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=helpers.start_loader,
            # Its own: only the first epoch would draw from the default one, so that a resumed
            # run's dropout would differ.
            generator=torch.Generator(),
            pin_memory=device.type == "cuda",
        )

    def epoch(self, epoch: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield this process's shares of an epoch's batches; the last, incomplete one is dropped.

        A batch of one image could not be normalised by its own statistics; the images left out
        differ every epoch. Batches are as the dataset's items, but image (B, 3, crop, crop)
        float32, normalised and channels-last, and label int64. Raises UserError for an unreadable
        image or label, or a loader process that died.
        """
        self.dataset.set_epoch(epoch)
        order = epoch_order(len(self.dataset), self.params.seed, epoch).tolist()
        # Read anew for every epoch, by this process: the workers that live on get indices from it.
        self._shares[:] = [
            list(processes.mine(order[step * self.size : (step + 1) * self.size]))
            for step in range(self.steps)
        ]
        try:
            # The first time this forks the processes.
            with helpers.signals_held():
                loaded = iter(self._loader)
            for batch in loaded:
                there = {k: v.to(self._device, non_blocking=True) for k, v in batch.items()}
                # (B, h, w, 3) uint8: after the permutation it is channels-last as it stands.
                pixels = there["image"].permute(0, 3, 1, 2).float().div_(255)
                image = pixels.sub_(self._mean).div_(self._std)
                yield there | {"image": image, "label": there["label"].long()}
        except UserError as error:
            # A loader process sends its whole traceback as the message: keep the last line.
            last = str(error.args[0]).strip().splitlines()[-1]
            raise UserError(last.removeprefix("isim.errors.UserError: ")) from error
        except (RuntimeError, OSError) as error:
            if "No space left on device" in str(error):
                # Nothing here writes to a disk.
                raise UserError(
                    "no shared memory is left for what the loaders read (/dev/shm); give the "
                    "container more, as docker run --shm-size 8g does, or set ISIM_WORKERS=0: "
                    "finished epochs are kept"
                ) from error
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                "a data loader process died (out of memory?); run the same command again with a "
                f"smaller ISIM_WORKERS than {helpers.worker_count()}: finished epochs are kept"
            ) from error
