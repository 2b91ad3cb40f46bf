"""Regeneration of pseudo-labels: CAM, seed, dCRF, PNG and scores, streamed and overlapped.

The network computes the next CAMs while worker processes refine the last ones. Only a bounded
number of images is in flight, so memory does not grow with the data set.
"""

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isim import atomic, distributed, engine, metrics
from isim.data import files
from isim.data.dataset import Item
from isim.errors import UserError
from isim.journal import Journal
from isim.labels import seeds
from isim.models.cam import CamConfig, CamNetwork
from isim.models.inference import multi_scale_cam
from isim.params import Crf
from isim.workers import RefineResult, RefineTask, dense, refine_image, start_worker

# Thresholds that a round's CAMs are scored at, to find the best one on the ground truth.
SWEEP = np.round(np.arange(0.05, 0.601, 0.05), 2).astype(np.float32)
# Images between two trims of the heap: measured after every image, trimming costs about 20 % of a
# regeneration's time, hence about 2.5 % after every eighth.
TRIM_EVERY = 8

A = TypeVar("A")
B = TypeVar("B")


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


def class_ids(item: Item) -> NDArray[np.int64]:
    """Labels 1..K of an image's classes, ascending. Raises UserError where they are unknown."""
    return np.flatnonzero(item.known_label) + 1


def cams(
    network: CamNetwork,
    config: CamConfig,
    items: Sequence[Item],
    settings: CamSettings,
    device: torch.device,
) -> Iterator[tuple[Item, Tensor]]:
    """Yield each item with its (K', H, W) CAMs on `device`, in the order of `images`."""
    network.eval()
    for item, pixels in images(items, device):
        ids = torch.from_numpy(class_ids(item)).to(device)
        with engine.autocast(settings.precision, device):
            cam = multi_scale_cam(network, config, pixels, ids, settings.scales, settings.flip)
        yield item, cam


def images(items: Sequence[Item], device: torch.device) -> Iterator[tuple[Item, Tensor]]:
    """Yield each item with its (3, H, W) uint8 pixels on `device`, decoded ahead.

    The largest images come first: smaller ones then find room in the memory that those have
    freed, and images of one size follow one another, whose convolutions are prepared once.

    Raises:
        UserError: An unreadable image.
    """
    items = sorted(items, key=lambda item: _size_order(item.image))
    with ThreadPoolExecutor(2) as pool:
        stream = ahead(pool, lambda item: files.read_image(item.image), items, 4)
        for number, (item, image) in enumerate(stream):
            if number % TRIM_EVERY == 0:
                engine.trim_freed_memory()
            yield item, torch.from_numpy(image).to(device).permute(2, 0, 1)


def _size_order(image: Path) -> tuple[int, int]:
    height, width = files.image_size(image)
    return -height * width, height


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
        missing, computed = journal.share_out(items)

        sweeps: dict[str, list[list[int]]] = {}

        def tasks() -> Iterator[RefineTask]:
            for item, cam in cams(network, config, missing, settings, device):
                ids = class_ids(item)
                planes = cam.cpu().numpy()
                if item.id in pictured:
                    files.write_cam(scratch / f"{item.id}.npz", planes, ids, planes.shape[1:])
                best, height = seeds.peak(planes, ids)
                if item.mask is not None:
                    truth = files.read_truth(item.mask, height.shape, num_labels)
                    sweeps[item.id] = _sweep_counts(truth, best, height, num_labels)
                seed = seeds.cut(best, height, threshold)
                out = labels / f"{item.id}.png"
                yield RefineTask(item.id, item.image, seed, ids, crf, item.mask, out, num_labels)

        for result in refine_all(tasks()):
            journal.add({**asdict(result), "sweep": sweeps.pop(result.id, [])})
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
        computed=computed,
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
    confusion = np.zeros((num_labels, num_labels), np.int64)
    scored = [item for item in items if item.mask is not None]
    for item, cam in cams(network, config, distributed.mine(scored), settings, device):
        seed = seeds.seed(cam.cpu().numpy(), class_ids(item), threshold)
        if item.mask is not None:
            truth = files.read_truth(item.mask, seed.shape, num_labels)
            confusion += metrics.confusion_matrix(truth, seed, num_labels)
    return metrics.miou(distributed.sum_array(confusion))


def _sweep_counts(
    truth: NDArray[np.uint8],
    best: NDArray[np.uint8],
    height: NDArray[np.float32],
    num_labels: int,
) -> list[list[int]]:
    """Non-zero counts of the (T, L, L) matrices of one image, as [flat index, pixels]."""
    confusion = metrics.sweep_confusion(truth, best, height, SWEEP, num_labels).ravel()
    return [[int(place), int(confusion[place])] for place in np.flatnonzero(confusion)]


def refine_all(tasks: Iterable[RefineTask]) -> Iterator[RefineResult]:
    """Run `refine_image` over a stream, as `in_workers` does."""
    return in_workers(refine_image, tasks)


def in_workers(function: Callable[[A], B], tasks: Iterable[A]) -> Iterator[B]:
    """Run a function of `workers` over a stream, `engine.worker_count()` times at once.

    In as many processes, or in this one when the count is 0. Results come in the order of the
    tasks; twice as many tasks as workers are in flight.

    Args:
        function: Of a module that imports no torch, which every worker would load.
        tasks: What to call it with; sent to the workers.

    Raises:
        UserError: From a task, or when a worker died.
    """
    workers = engine.worker_count()
    if workers == 0:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
    try:
        for _, result in ahead(pool, function, tasks, 2 * workers):
            yield result
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died (out of memory?); run the same command again with a "
            f"smaller ISIM_WORKERS than {workers}: finished images are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(
    pool: ProcessPoolExecutor | ThreadPoolExecutor,
    function: Callable[[A], B],
    stream: Iterable[A],
    depth: int,
) -> Iterator[tuple[A, B]]:
    """Map in order with at most `depth` calls submitted ahead of the consumer."""
    source = iter(stream)
    waiting: deque[tuple[A, Future[B]]] = deque()
    for value in islice(source, depth):
        waiting.append((value, pool.submit(function, value)))
    while waiting:
        value, future = waiting.popleft()
        # Before the next value, which can take long: what is finished is handed over at once.
        yield value, future.result()
        for following in islice(source, 1):
            waiting.append((following, pool.submit(function, following)))
