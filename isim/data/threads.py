"""A function over many files in threads: Pillow, hashing and the disk all release the GIL."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")


def in_threads(function: Callable[[T], R], items: Sequence[T], title: str) -> Iterator[R]:
    """Yield `function(item)` in the order of `items`, with a progress bar on a terminal.

    Args:
        function: Called in a thread; its first exception is raised here.
        items: What to call it with.
        title: Text of the progress bar.
    """
    executor = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
    try:
        results = executor.map(function, items)
        yield from tqdm(results, desc=title, total=len(items), unit="image", disable=None)
    finally:
        # Without the cancellation Ctrl-C would wait for thousands of images.
        executor.shutdown(cancel_futures=True)
