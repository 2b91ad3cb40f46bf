"""Helpers of a process: threads that map a function over a stream, and loader processes."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

from isim.runtime import ending, paths, processes, progress

# Seconds between two looks whether a signal has come.
LOOK = 0.1

A = TypeVar("A")
B = TypeVar("B")


def worker_count() -> int:
    """Return the number of helpers of this process: `$ISIM_WORKERS`, else its share of the cores.

    Raises UserError when `$ISIM_WORKERS` is no number of at least 0.
    """
    chosen = paths.number_of("ISIM_WORKERS", 0, 1024)
    if chosen is None:
        return max(1, len(os.sched_getaffinity(0)) // processes.local_world())
    return chosen


def in_threads(
    function: Callable[[A], B],
    stream: Iterable[A],
    title: str = "",
    *,
    threads: int | None = None,
    depth: int | None = None,
    start: Callable[[], object] | None = None,
) -> Iterator[B]:
    """Yield `function(value)` for each value of a stream, in order, computed ahead in threads.

    The stream, of any length, is read in the caller's thread: a next value when a result was
    taken. The first exception is raised here, and calls that have not begun are dropped.

    There are `worker_count()` threads unless `threads` says otherwise (0: the caller's alone), and
    as many calls ahead as `depth` says, or two a thread. `start` is called first in each thread. A
    `title` is what the progress of the results is told under.
    """
    if title:
        total = len(stream) if isinstance(stream, Sized) else None
        results = in_threads(function, stream, threads=threads, depth=depth, start=start)
        yield from progress.track(results, title, total)
        return
    if threads is None:
        threads = worker_count()
    if not threads:
        yield from map(function, stream)
        return
    pool = ThreadPoolExecutor(threads, initializer=start)
    source, waiting = iter(stream), deque[Future[B]]()
    try:
        for value in islice(source, depth or 2 * threads):
            waiting.append(pool.submit(function, value))
        while waiting:
            # Before the next value, which can take long: what is finished is handed over at once.
            yield waiting[0].result()
            waiting.popleft()
            waiting.extend(pool.submit(function, value) for value in islice(source, 1))
    finally:
        # Ctrl-C would otherwise wait for all of them.
        pool.shutdown(wait=False, cancel_futures=True)
        under_way = [future for future in waiting if not future.cancelled()]
        # What the function uses is closed after this; but a read may never return.
        while wait(under_way, LOOK).not_done and not ending.begun():
            pass
        if not ending.begun():
            pool.shutdown()


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold Ctrl-C, SIGTERM and SIGHUP back until the block ends: around what forks processes.

    Python drops what a signal's handler raises within the hooks of a fork, and the run would go
    on. Processes forked inside have handlers that do nothing; `start_loader` gives them others.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # Under nohup the terminal's end stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for caught in received:
            signal.raise_signal(caught)


def start_loader(_: int) -> None:
    """Prepare a forked loader process: its parent handles the terminal's signals, SIGTERM ends it.

    It is killed when its parent is gone, also in a read that never returns.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    processes.end_with_parent(signal.SIGKILL)
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)
