"""Images in a stream through a network and off its device.

On the CPU threads take whole images through the network, on a GPU this thread takes batches of
them. Only a bounded number of images is in flight, so memory does not grow with the data set.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from isim.data import files
from isim.data.prepared import Item
from isim.runtime import devices, helpers, kernels, memory, processes

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

B = TypeVar("B")
# Items of one size and their (B, 3, H, W) uint8 pixels on the device to a result of each.
Function = Callable[[Sequence[Item], Tensor], Sequence[B]]
Tensors = Sequence[Tensor | None]
Compute = Function[Tensors]
# Items of any sizes and the tensors of each to other tensors of each.
OnGroup = Callable[[Sequence[Item], Sequence[Tensors]], Sequence[Tensors]]
Array = NDArray[Any]
# What waits for an image's tensors and returns them as arrays.
Arrays = Callable[[], Sequence[Array | None]]


def results(
    items: Sequence[Item], compute: Compute, on_group: OnGroup | None, device: torch.device
) -> Iterator[tuple[Item, Arrays]]:
    """Run a network over images and take what it gives off the device, a GPU's in groups.

    A GPU gets the next group's work before the last group's results are waited for. Order and
    errors are those of `computed`.
    """
    source = computed(compute, items, device)
    if not groups(device):
        yield from ((item, _leaving(tensors)) for item, tensors in source)
        return
    waiting: list[tuple[Item, Arrays]] = []
    while group := list(islice(source, GROUP)):
        chosen, made = zip(*group, strict=True)
        if on_group is not None:
            made = tuple(on_group(chosen, made))
        launched = [(item, _leaving(tensors)) for item, tensors in zip(chosen, made, strict=True)]
        yield from waiting
        waiting = launched
    yield from waiting


def computed(
    function: Function[B], items: Sequence[Item], device: torch.device
) -> Iterator[tuple[Item, B]]:
    """Run a network's function over images; yield each item with its result.

    On the CPU as many threads as torch has take an image each, with one OpenMP thread. On two
    cores that is as fast as threads inside each operation; results do not depend on their number,
    and other work fills whatever time is left. On a GPU this thread takes batches of images of
    one size, decoded ahead.

    The largest images come first: smaller ones then find room in the memory that those have
    freed, and images of one size follow one another, whose convolutions are prepared once.
    Raises UserError for an unreadable image, or what `function` raises.
    """

    def size_order(item: Item) -> tuple[int, int]:
        height, width = files.image_size(item.image)
        return -height * width, height

    items = sorted(items, key=size_order)
    if device.type == "cpu":
        stream = _computed_in_threads(function, items)
    else:
        stream = _computed_in_batches(function, items, device)
    for number, result in enumerate(stream):
        if number % TRIM_EVERY == TRIM_EVERY - 1:
            memory.trim_freed_memory()
        yield result


def _computed_in_threads(function: Function[B], items: Sequence[Item]) -> Iterator[tuple[Item, B]]:
    def compute(item: Item) -> tuple[Item, B]:
        pixels = torch.from_numpy(files.read_image(item.image))
        return item, function([item], pixels.permute(2, 0, 1)[None])[0]

    # Counted before the block, in which torch has one.
    threads, start = _threads(items), partial(torch.set_num_threads, 1)
    with devices.intra_op_threads(1), memory.keep_freed_memory():
        yield from helpers.in_threads(compute, items, threads=threads, start=start)


def _threads(items: Sequence[Item]) -> int:
    """Threads that take whole images: as many as torch's, of which half the memory holds."""
    if not items or helpers.worker_count() == 0:
        return 0
    memory_ = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    height, width = files.image_size(items[0].image)
    fitting = memory_ // processes.local_world() // (BYTES_PER_PIXEL * height * width)
    return max(1, min(torch.get_num_threads(), fitting))


def _computed_in_batches(
    function: Function[B], items: Sequence[Item], device: torch.device
) -> Iterator[tuple[Item, B]]:
    def decode(item: Item) -> tuple[Item, Tensor]:
        pixels = torch.from_numpy(files.read_image(item.image))
        return item, pixels.pin_memory() if device.type == "cuda" else pixels

    threads = max(2, helpers.worker_count())
    decoded = helpers.in_threads(decode, items, threads=threads, depth=DECODED_AHEAD)
    for (height, width), alike in groupby(decoded, lambda pair: pair[1].shape[:2]):
        count = max(1, batch_pixels(device) // (height * width))
        while batch := list(islice(alike, count)):
            chosen = [item for item, _ in batch]
            pixels = [image.to(device, non_blocking=True) for _, image in batch]
            found = function(chosen, torch.stack(pixels).permute(0, 3, 1, 2))
            yield from zip(chosen, found, strict=True)


def batch_pixels(device: torch.device) -> int:
    """Pixels of the images that a GPU computes at once: what fills it and its memory holds."""
    if device.type != "cuda":
        return FILLING_PIXELS
    total = torch.cuda.get_device_properties(device).total_memory
    return min(FILLING_PIXELS, total // BYTES_PER_PIXEL)


def groups(device: torch.device) -> bool:
    """Tell whether results leave the device in groups: a GPU's do."""
    return device.type != "cpu"


def refines(device: torch.device) -> bool:
    """Tell whether the dCRF is computed on the network's device, in batches: on a GPU."""
    return kernels.crf_used(device.type) == "torch"


def _leaving(tensors: Tensors) -> Arrays:
    """Start to copy tensors to the host; what is returned waits for them."""
    copies = [_to_host(tensor) for tensor in tensors]
    return lambda: [copy() for copy in copies]


def _to_host(tensor: Tensor | None) -> Callable[[], Array | None]:
    if tensor is None:
        return lambda: None
    if tensor.device.type != "cuda":
        return tensor.cpu().numpy
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copied.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    # The tensor's device need not be the current one (ISIM_DEVICE=cuda:1).
    event.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Array:
        event.synchronize()
        return copied.numpy()

    return wait
