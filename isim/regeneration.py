"""Regeneration of pseudo-labels: CAM, seed, dCRF, PNG and scores, streamed and overlapped.

On the CPU threads take whole images through the network, on a GPU this thread takes batches of
them, while helpers refine, write and score the last ones. Only a bounded number of images is in
flight, so memory does not grow with the data set.
"""

import contextlib
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isim import atomic, distributed, engine, metrics
from isim.data import files
from isim.data.dataset import Item
from isim.errors import UserError
from isim.gpu import seeds as gpu_seeds
from isim.journal import Journal
from isim.labels import crf as cpu_crf
from isim.models import folding
from isim.models.cam import CamConfig, CamNetwork
from isim.models.inference import multi_scale_cams
from isim.params import Crf
from isim.workers import (
    RefineResult,
    RefineTask,
    ScoreTask,
    Sweep,
    dense,
    refine_image,
    score,
    start_worker,
)

# Thresholds that a round's CAMs are scored at, to find the best one on the ground truth.
SWEEP = np.round(np.arange(0.05, 0.601, 0.05), 2).astype(np.float32)
# Images between two trims of the heap, a gigabyte which is then cleared again: after every eighth
# image that costs about an eighth of the time, after every 64th 2 %.
TRIM_EVERY = 64

# Images whose results leave a GPU together, and whose dCRF is computed there together.
GROUP = 32
# Images decoded ahead of a GPU: two groups, so that it never waits for the disk.
DECODED_AHEAD = 2 * GROUP
# Pixels of the images that fill a large GPU (16 of VOC's), and the memory that a pixel is
# allowed: a wide network's maps at scale 2, several of which are alive at once.
FILLING_PIXELS = 3_000_000
BYTES_PER_PIXEL = 16_384

A = TypeVar("A")
B = TypeVar("B")
Host = Callable[[], NDArray[Any]]


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
        ids = [torch.from_numpy(class_ids(item)) for item in items]
        with engine.autocast(settings.precision, device):
            return multi_scale_cams(prepared, config, images, ids, settings.scales, settings.flip)

    return make


def computed(
    function: Callable[[Sequence[Item], Tensor], Sequence[B]],
    items: Sequence[Item],
    device: torch.device,
) -> Iterator[tuple[Item, B]]:
    """Run a network's function over images; yield each item with its result.

    On the CPU `engine.worker_count()` threads take an image each, with one OpenMP thread. On two
    cores that is as fast as threads inside each operation; results do not depend on their number,
    and other work fills whatever time is left. On a
    GPU this thread takes batches of images of one size, decoded ahead.

    The largest images come first: smaller ones then find room in the memory that those have
    freed, and images of one size follow one another, whose convolutions are prepared once.

    Args:
        function: Items of one size and their (B, 3, H, W) uint8 pixels on `device` to a result
            each; called in several threads at once on the CPU.
        items: Images.
        device: Where `function` computes.

    Raises:
        UserError: An unreadable image, or what `function` raises.
    """
    items = sorted(items, key=lambda item: _size_order(item.image))
    if device.type == "cpu":
        stream = _computed_in_threads(function, items)
    else:
        stream = _computed_in_batches(function, items, device)
    for number, result in enumerate(stream):
        if number % TRIM_EVERY == TRIM_EVERY - 1:
            engine.trim_freed_memory()
        yield result


def _computed_in_threads(
    function: Callable[[Sequence[Item], Tensor], Sequence[B]], items: Sequence[Item]
) -> Iterator[tuple[Item, B]]:
    def compute(item: Item) -> B:
        pixels = torch.from_numpy(files.read_image(item.image))
        return function([item], pixels.permute(2, 0, 1)[None])[0]

    threads = _threads(items)
    with engine.intra_op_threads(1), engine.keep_freed_memory():
        if threads == 0:
            yield from ((item, compute(item)) for item in items)
            return
        with cancelled_at_end(
            ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1))
        ) as pool:
            yield from ahead(pool, compute, items, 2 * threads)


def _threads(items: Sequence[Item]) -> int:
    """Threads that take whole images: as many as torch's, of which half the memory holds."""
    if not items or engine.worker_count() == 0:
        return 0
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    height, width = files.image_size(items[0].image)
    fitting = memory // distributed.local_world() // (BYTES_PER_PIXEL * height * width)
    return max(1, min(torch.get_num_threads(), fitting))


def _computed_in_batches(
    function: Callable[[Sequence[Item], Tensor], Sequence[B]],
    items: Sequence[Item],
    device: torch.device,
) -> Iterator[tuple[Item, B]]:
    def decode(item: Item) -> Tensor:
        pixels = torch.from_numpy(files.read_image(item.image))
        return pixels.pin_memory() if device.type == "cuda" else pixels

    most = batch_pixels(device)
    with cancelled_at_end(ThreadPoolExecutor(max(2, engine.worker_count()))) as pool:
        decoded = ahead(pool, decode, items, DECODED_AHEAD)
        for batch in _of_one_size(decoded, most):
            chosen = [item for item, _ in batch]
            pixels = [image.to(device, non_blocking=True) for _, image in batch]
            results = function(chosen, torch.stack(pixels).permute(0, 3, 1, 2))
            yield from zip(chosen, results, strict=True)


def batch_pixels(device: torch.device) -> int:
    """Pixels of the images that a GPU computes at once: what fills it and its memory holds."""
    if device.type != "cuda":
        return FILLING_PIXELS
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(FILLING_PIXELS, memory // BYTES_PER_PIXEL)


def _of_one_size(
    stream: Iterable[tuple[Item, Tensor]], most: int
) -> Iterator[list[tuple[Item, Tensor]]]:
    """Batches of neighbours of one size, of `most` pixels or a single image."""
    batch: list[tuple[Item, Tensor]] = []
    for item, image in stream:
        pixels = image.shape[0] * image.shape[1]
        if batch and (image.shape != batch[0][1].shape or (len(batch) + 1) * pixels > most):
            yield batch
            batch = []
        batch.append((item, image))
    if batch:
        yield batch


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
        missing, made = journal.share_out(items)

        make = cam_maker(network, config, settings, device)
        on_gpu = refines_on_gpu(crf, device)

        def seeds_of(batch: Sequence[Item], images: Tensor) -> list[_Seed]:
            found = []
            for item, image, cam in zip(batch, images, make(batch, images), strict=True):
                best, height = gpu_seeds.peak(cam, torch.from_numpy(class_ids(item)))
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
            ids = class_ids(item)
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
            gpu_seeds.cut(*gpu_seeds.peak(cam, torch.from_numpy(class_ids(item))), threshold)
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


def refines_on_gpu(crf: Crf, device: torch.device) -> bool:
    """Tell whether the dCRF is computed on the network's GPU."""
    return device.type == "cuda" and crf.backend in ("auto", "torch")


def _refine_on_gpu(group: Sequence[tuple[Item, _Seed]], crf: Crf) -> list[Tensor]:
    from isim.gpu.crf import refine_batch

    return refine_batch(
        [seed.image for _, seed in group if seed.image is not None],
        [seed.maps[0] for _, seed in group],
        [class_ids(item) for item, _ in group],
        crf,
    )


def to_host(tensor: Tensor) -> Host:
    """Start to copy a tensor to the host; what is returned waits for it and returns the array."""
    if tensor.device.type != "cuda":
        return tensor.cpu().numpy
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copied.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    # The tensor's device need not be the current one (ISIM_DEVICE=cuda:1).
    event.record(torch.cuda.current_stream(tensor.device))

    def wait() -> NDArray[Any]:
        event.synchronize()
        return copied.numpy()

    return wait


def group_size(device: torch.device) -> int:
    """How many results leave a device together, for `delivered`: one the CPU, many a GPU."""
    return 1 if device.type == "cpu" else GROUP


def delivered(
    stream: Iterable[A],
    launch: Callable[[Sequence[A]], Sequence[Callable[[], B]]],
    size: int,
) -> Iterator[B]:
    """Take results off a device in groups, in order.

    A GPU gets the next group's work before the last group's results are waited for.

    Args:
        stream: Results on the device, of `computed`.
        launch: What is still to be done with a group there: returns for each what waits for the
            end and hands it over.
        size: Of a group; a single result is handed over at once.
    """
    source = iter(stream)
    waiting: Sequence[Callable[[], B]] = []
    while group := list(islice(source, size)):
        launched = launch(group)
        if size == 1:
            waiting, launched = launched, []
        for finish in waiting:
            yield finish()
        waiting = launched
    for finish in waiting:
        yield finish()


def refine_all(tasks: Iterable[RefineTask], crf: Crf) -> Iterator[RefineResult]:
    """Run `refine_image` over a stream of tasks with the settings `crf`, as `in_workers` does."""
    return in_workers(refine_image, tasks, cpu_crf.in_threads(crf))


def in_workers(function: Callable[[A], B], tasks: Iterable[A], in_threads: bool) -> Iterator[B]:
    """Run a function of `workers` over a stream, `engine.worker_count()` times at once.

    Or in this thread when the count is 0. Results come in the order of the tasks; twice as many
    tasks as workers are in flight.

    Args:
        function: For processes of a module that imports no torch, which each would load.
        tasks: What to call it with; sent to the workers.
        in_threads: Whether it releases the GIL, so that threads do; else processes are started.

    Raises:
        UserError: From a task, or when a worker died.
    """
    workers = engine.worker_count()
    if workers == 0:
        yield from map(function, tasks)
        return
    pool: Executor
    if in_threads:
        pool = ThreadPoolExecutor(workers)
    else:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
    try:
        with cancelled_at_end(pool):
            for _, result in ahead(pool, function, tasks, 2 * workers):
                yield result
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died (out of memory?); run the same command again with a "
            f"smaller ISIM_WORKERS than {workers}: finished images are kept"
        ) from error


@contextlib.contextmanager
def cancelled_at_end(pool: Executor) -> Iterator[Executor]:
    """Shut a pool down at the end of the block, without what has not been started."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def ahead(
    pool: Executor,
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
