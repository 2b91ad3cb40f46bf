"""Images in a stream: through a network, off its device, and on to helpers.

On the CPU threads take whole images through the network, on a GPU this thread takes batches of
them, while helpers work on what came out. Only a bounded number of images is in flight, so memory
does not grow with the data set.
"""

import contextlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from isim import distributed, engine
from isim.data import files
from isim.data.dataset import Item
from isim.errors import UserError
from isim.params import Crf
from isim.workers import start_worker

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


def computed(
    function: Callable[[Sequence[Item], Tensor], Sequence[B]],
    items: Sequence[Item],
    device: torch.device,
) -> Iterator[tuple[Item, B]]:
    """Run a network's function over images; yield each item with its result.

    On the CPU as many threads as torch has take an image each, with one OpenMP thread. On two
    cores that is as fast as threads inside each operation; results do not depend on their number,
    and other work fills whatever time is left. On a GPU this thread takes batches of images of
    one size, decoded ahead.

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


def refines_on_gpu(crf: Crf, device: torch.device) -> bool:
    """Tell whether the dCRF is computed on the network's GPU."""
    return device.type == "cuda" and crf.backend in ("auto", "torch")


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


@contextlib.contextmanager
def cancelled_at_end(pool: Executor) -> Iterator[Executor]:
    """Shut a pool down at the end of the block, without what has not been started."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
