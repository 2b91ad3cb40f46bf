"""Regeneration of pseudo-labels: CAM, seed, dCRF, PNG and scores, streamed and overlapped.

The network goes on to the next images while helpers refine, write and score the last ones.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isim import atomic, distributed, engine, metrics
from isim.data import files
from isim.data.dataset import Item
from isim.gpu import seeds as gpu_seeds
from isim.journal import Journal
from isim.labels import crf as cpu_crf
from isim.models import folding
from isim.models.cam import CamConfig, CamNetwork
from isim.models.inference import multi_scale_cams
from isim.params import Crf
from isim.stream import Host, computed, delivered, group_size, in_workers, refines_on_gpu, to_host
from isim.workers import (
    RefineTask,
    ScoreTask,
    Sweep,
    dense,
    refine_image,
    score,
)

# Thresholds that a round's CAMs are scored at, to find the best one on the ground truth.
SWEEP = np.round(np.arange(0.05, 0.601, 0.05), 2).astype(np.float32)


@dataclass(frozen=True)
class CamSettings:
    """How CAMs are computed (spec 4); `precision` is resolved: fp32 or bf16."""

    scales: tuple[float, ...]
    flip: bool
    precision: str


@dataclass(frozen=True)
class Scores:
    """Result of a pass over a split.

    `seed_confusion` and `label_confusion` are (L, L) int64 before and after dCRF, over the
    `scored` images that have a ground truth, `sweep_confusion` (T, L, L) those of the seeds at
    the thresholds `SWEEP`; `masked_share` is the share of images whose
    label holds no foreground (paper Eq. 3); `seconds` and `computed` tell the speed.
    """

    seed_confusion: NDArray[np.int64]
    label_confusion: NDArray[np.int64]
    sweep_confusion: NDArray[np.int64]
    threshold: float
    scored: int
    masked_share: float
    seconds: float
    computed: int

    def row(self) -> dict[str, float]:
        """Headline figures under their names in reports and MLflow; nan without any mask."""
        fixed = metrics.miou(self.seed_confusion)
        sweep = [metrics.miou(confusion) for confusion in self.sweep_confusion]
        best = int(np.argmax(np.nan_to_num(sweep)))
        # The fixed threshold need not be one of the sweep.
        oracle = (sweep[best], round(float(SWEEP[best]), 2))
        if not sweep[best] > fixed:
            oracle = (fixed, self.threshold)
        return {
            "cam_miou": fixed,
            "cam_miou_oracle": oracle[0],
            "oracle_threshold": oracle[1],
            "pseudo_label_miou": metrics.miou(self.label_confusion),
            "masked_share": self.masked_share,
            "seconds": self.seconds,
            "images_per_second": self.computed / self.seconds if self.seconds else 0.0,
        }


class _Seed(NamedTuple):
    """What a seed is made and judged by, on the device.

    `maps` are (3, H, W) uint8: seed, label of the highest CAM, number of thresholds of `SWEEP`
    that it rises above. `image` (3, H, W) and `cam` (K', H, W) are kept where they are needed.
    """

    maps: Tensor
    image: Tensor | None
    cam: Tensor | None


def cams(
    network: CamNetwork,
    config: CamConfig,
    items: Sequence[Item],
    settings: CamSettings,
    device: torch.device,
) -> Iterator[tuple[Item, Tensor]]:
    """Yield each item with its (K', H, W) CAMs on `device`, the largest images first."""
    return computed(cam_maker(network, config, settings, device), items, device)


def cam_maker(
    network: CamNetwork, config: CamConfig, settings: CamSettings, device: torch.device
) -> Callable[[Sequence[Item], Tensor], list[Tensor]]:
    """Prepare a network, left in evaluation mode, for the CAMs of many images.

    Returns:
        What makes (K', H, W) CAMs of images of one size, (B, 3, H, W) uint8, in any thread.
    """
    network.eval()
    every = torch.arange(1, len(config.classes) + 1, device=device)
    prepared = folding.for_inference(
        network,
        lambda net, images: net.cam(images, every),
        device,
        engine.DTYPES[settings.precision],
    )

    def make(items: Sequence[Item], images: Tensor) -> list[Tensor]:
        ids = [torch.from_numpy(item.class_ids) for item in items]
        with engine.autocast(settings.precision, device):
            return multi_scale_cams(prepared, config, images, ids, settings.scales, settings.flip)

    return make


def regenerate(
    network: CamNetwork,
    config: CamConfig,
    items: Sequence[Item],
    labels: Path,
    scratch: Path,
    settings: CamSettings,
    threshold: float,
    crf: Crf,
    pictured: Collection[str],
    device: torch.device,
) -> Scores:
    """Make the pseudo-labels of one round (paper Algorithm 1, line 8) and score them.

    Each process of a run makes its share of them.

    Runs again after an interruption with the same arguments, it computes only the images
    that are not done.

    Args:
        network: Gives the CAMs; left in evaluation mode.
        config: Its configuration.
        items: Images of the split.
        labels: Folder of the palette PNGs, `<id>.png`.
        scratch: Folder of what a resumed pass needs: `progress.jsonl`, CAMs of `pictured`.
        settings: Scales, flip and precision of the CAMs.
        threshold: Height of the background plane.
        crf: Settings of the dCRF.
        pictured: Ids whose full-resolution CAMs are kept in `scratch`.
        device: Where the network is.

    Returns:
        Scores over all items, also those of an earlier, interrupted pass.

    Raises:
        UserError: An unreadable image, a failed write, or a worker that died.
    """
    start = time.perf_counter()
    num_labels = len(config.classes) + 1
    atomic.make_directory(labels)
    atomic.make_directory(scratch)
    for leftover in [*labels.glob(".tmp-*"), *scratch.glob(".tmp-*")]:
        leftover.unlink(missing_ok=True)
    with Journal(scratch / "progress.jsonl") as journal:
        journal.keep(path.stem for path in labels.glob("*.png"))
        missing, made = journal.share_out(items)

        make = cam_maker(network, config, settings, device)
        on_gpu = refines_on_gpu(crf, device)

        def seeds_of(batch: Sequence[Item], images: Tensor) -> list[_Seed]:
            found = []
            for item, image, cam in zip(batch, images, make(batch, images), strict=True):
                best, height = gpu_seeds.peak(cam, torch.from_numpy(item.class_ids))
                seed = gpu_seeds.cut(best, height, threshold)
                maps = torch.stack([seed, best, gpu_seeds.levels(height, SWEEP.tolist())])
                kept = cam if item.id in pictured else None
                found.append(_Seed(maps, image if on_gpu else None, kept))
            return found

        def launch(group: Sequence[tuple[Item, _Seed]]) -> list[Callable[[], RefineTask]]:
            refined = _refine_on_gpu(group, crf) if on_gpu else [None] * len(group)
            return [
                partial(
                    task,
                    item,
                    to_host(seed.maps),
                    None if seed.cam is None else to_host(seed.cam),
                    None if label is None else to_host(label),
                )
                for (item, seed), label in zip(group, refined, strict=True)
            ]

        def task(item: Item, maps: Host, cam: Host | None, label: Host | None) -> RefineTask:
            seed, best, levels = maps()
            ids = item.class_ids
            if cam is not None:
                files.write_cam(scratch / f"{item.id}.npz", cam(), ids, seed.shape)
            return RefineTask(
                item.id,
                item.image,
                seed,
                ids,
                crf,
                item.mask,
                labels / f"{item.id}.png",
                num_labels,
                Sweep(best, levels, len(SWEEP)),
                None if label is None else label(),
            )

        tasks = delivered(computed(seeds_of, missing, device), launch, group_size(device))
        in_threads = on_gpu or cpu_crf.in_threads(crf)
        for result in in_workers(refine_image, tasks, in_threads):
            journal.add(asdict(result))
        lines = journal.collect(items)
    distributed.share(labels, "*.png")
    distributed.share(scratch, "*.npz")

    seed_confusion = np.zeros((num_labels, num_labels), np.int64)
    label_confusion = np.zeros_like(seed_confusion)
    sweep_confusion = np.zeros((len(SWEEP), num_labels, num_labels), np.int64)
    for line in lines:
        seed_confusion += dense(line["seed_counts"], num_labels)
        label_confusion += dense(line["label_counts"], num_labels)
        for place, pixels in line["sweep"]:
            sweep_confusion.flat[place] += pixels
    return Scores(
        seed_confusion,
        label_confusion,
        sweep_confusion,
        threshold,
        scored=sum(item.mask is not None for item in items),
        masked_share=sum(line["masked"] for line in lines) / len(items),
        seconds=time.perf_counter() - start,
        computed=made,
    )


def score_seeds(
    network: CamNetwork,
    config: CamConfig,
    items: Sequence[Item],
    settings: CamSettings,
    threshold: float,
    device: torch.device,
) -> float:
    """Score seeds as `regenerate` does, without dCRF and without writing anything.

    Args:
        network: Gives the CAMs; left in evaluation mode.
        config: Its configuration.
        items: Images; those without a ground truth are left out.
        settings: Scales, flip and precision of the CAMs.
        threshold: Height of the background plane.
        device: Where the network is.

    Returns:
        The mIoU, `cam_miou` of `Scores.row`; nan without any mask.

    Raises:
        UserError: An unreadable image or mask.
    """
    num_labels = len(config.classes) + 1
    make = cam_maker(network, config, settings, device)

    def seeds_of(batch: Sequence[Item], images: Tensor) -> list[Tensor]:
        return [
            gpu_seeds.cut(*gpu_seeds.peak(cam, torch.from_numpy(item.class_ids)), threshold)
            for item, cam in zip(batch, make(batch, images), strict=True)
        ]

    def launch(group: Sequence[tuple[Item, Tensor]]) -> list[Callable[[], ScoreTask]]:
        return [partial(task, item, to_host(seed)) for item, seed in group]

    def task(item: Item, seed: Host) -> ScoreTask:
        assert item.mask is not None
        return ScoreTask(item.mask, seed(), num_labels)

    confusion = np.zeros((num_labels, num_labels), np.int64)
    scored = [item for item in items if item.mask is not None]
    own = distributed.mine(scored)
    tasks = delivered(computed(seeds_of, own, device), launch, group_size(device))
    for counts in in_workers(score, tasks, in_threads=True):
        confusion += counts
    return metrics.miou(distributed.sum_array(confusion))


def _refine_on_gpu(group: Sequence[tuple[Item, _Seed]], crf: Crf) -> list[Tensor]:
    from isim.gpu.crf import refine_batch

    return refine_batch(
        [seed.image for _, seed in group if seed.image is not None],
        [seed.maps[0] for _, seed in group],
        [item.class_ids for item, _ in group],
        crf,
    )
