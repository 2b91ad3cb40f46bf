"""Progress of long work: what, how many of how many, how fast, and the time that is left.

Whoever loops over many things says so once, by `track` or `task`; here alone lines and bars are
written. While a stage is `watched`, a thread writes a line whenever none was written for
`EVERY` seconds, also in a log file, and also while one thing takes longer than that. In a terminal
bars show the same all the time.
"""

import contextlib
import io
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import TextIO, TypeVar

from tqdm import tqdm

from isim import errors

T = TypeVar("T")

# Seconds between two lines, at most.
EVERY = 10.0
# Seconds between two looks at the clock: a line comes at most so much too late.
LOOK = 0.5


@dataclass
class Task:
    """Work under way.

    Attributes:
        title: What it is; empty where the task around it says that.
        total: How many there are; None: unknown.
        unit: What is counted, in the singular; empty: nothing is.
        start: When it began, in seconds.
        done: How many are done, those that an earlier run did included.
        before: How many of them that were.
        inside: Seconds of the tasks that ran inside this one.
    """

    title: str
    total: float | None
    unit: str
    start: float
    bar: tqdm
    done: float = 0
    before: float = 0
    inside: float = 0.0

    def add(self, count: float = 1) -> None:
        """Count what is done."""
        self.done += count
        self.bar.update(count)

    def text(self, now: float) -> str:
        """Tell, in a few words, how far the task is."""
        seconds = now - self.start
        if not self.unit:
            return f"{self.title}, {duration(seconds)}" if self.title else duration(seconds)
        many = "" if self.total == 1 else "s"
        unit = self.unit if self.unit.isupper() else f"{self.unit}{many}"
        parts = [f"{self.done:,.0f} {unit}"]
        if self.total is not None:
            parts = [f"{self.done:,.0f} of {self.total:,.0f} {unit}"]
        new = self.done - self.before
        if new and seconds:
            parts.append(_rate(new / seconds))
            if self.total is not None:
                parts.append(f"{duration((self.total - self.done) * seconds / new)} left")
        return f"{self.title}: {', '.join(parts)}" if self.title else ", ".join(parts)


@dataclass(frozen=True)
class Ended:
    """A task that has ended: titles from the outermost to its own, and seconds of it alone."""

    titles: tuple[str, ...]
    unit: str
    done: float
    seconds: float


@dataclass
class _Teller:
    """Tasks under way, and when the last line was written."""

    clock: Callable[[], float] = time.monotonic
    tasks: list[Task] = field(default_factory=list)
    ended: list[Ended] | None = None
    name: str = ""
    began: float = 0.0
    told: float = 0.0
    # Where lines go while what is printed is swallowed.
    aside: TextIO | None = None

    def write(self, line: str) -> None:
        self.told = self.clock()
        out = self.aside or sys.stdout
        with tqdm.external_write_mode(file=out):
            # At once, also into a file: a reader looks there for what is going on.
            print(line, file=out, flush=True)

    def look(self) -> None:
        """Write a line if it is time for one; in a terminal bars show it already."""
        now = self.clock()
        shown = [task for task in list(self.tasks) if not task.bar.disable]
        for task in shown:
            task.bar.refresh()
        if now - self.told >= EVERY and not shown:
            self.write(self.line(now))

    def line(self, now: float) -> str:
        """Name the stage and, from the outermost on, the tasks that are under way."""
        tasks = list(self.tasks)
        # A title that is a heading for what is told after it has no time of its own.
        words = [
            task.title if not task.unit and task is not tasks[-1] else task.text(now)
            for task in tasks
        ]
        return ": ".join(filter(None, (self.name, *(words or [duration(now - self.began)]))))


_teller = _Teller()


def tell(line: str) -> None:
    """Print a line, at once; inside of `quiet` nothing."""
    if _teller.aside is None:
        _teller.write(errors.printable(line))


@contextlib.contextmanager
def task(
    title: str, total: float | None = None, unit: str = "", *, before: float = 0
) -> Iterator[Task]:
    """Announce a task for the block; `Task.add` counts what is done of it, in the given unit.

    An earlier run did `before` of them.
    """
    teller = _teller
    shown = {"desc": title, "total": total, "initial": before, "leave": False}
    # None: in a terminal.
    hidden = None if unit and teller.aside is None else True
    bar = tqdm(**shown, unit=unit or "it", disable=hidden)
    new = Task(title, total, unit, teller.clock(), bar, before, before)
    teller.tasks.append(new)
    try:
        yield new
    finally:
        seconds = teller.clock() - new.start
        bar.close()
        place = teller.tasks.index(new)
        around = teller.tasks[:place]
        if around:
            around[-1].inside += seconds
        if teller.ended is not None:
            titles = (*(task.title for task in around), title)
            teller.ended.append(Ended(titles, unit, new.done - before, seconds - new.inside))
        del teller.tasks[place]


def track(
    stream: Iterable[T], title: str = "", total: float | None = None, unit: str = "image"
) -> Iterator[T]:
    """Yield the values of a stream, counting those that the caller is done with.

    `total` is by default the stream's length, where it has one.
    """
    if total is None and isinstance(stream, Sized):
        total = len(stream)
    with task(title, total, unit) as counted:
        for value in stream:
            yield value
            counted.add()


@contextlib.contextmanager
def watched(name: str) -> Iterator[None]:
    """Write a line at least every `EVERY` seconds of the block, that begins with `name`."""
    teller, end = _teller, threading.Event()
    teller.name, teller.began = name, teller.clock()
    teller.told = teller.began

    def watch() -> None:
        while not end.wait(LOOK):
            # What cannot be written (a log on a full disk) the main thread will tell.
            with contextlib.suppress(OSError):
                teller.look()

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        teller.name = ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow what is printed and warned of inside the block, but for the lines of progress."""
    _teller.aside, before = sys.stdout, logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
        _teller.aside = None


@contextlib.contextmanager
def recorded() -> Iterator[list[Ended]]:
    """Collect the tasks that end inside the block."""
    before, _teller.ended = _teller.ended, []
    try:
        yield _teller.ended
    finally:
        _teller.ended = before


def clock() -> float:
    """Read the clock of all tasks, in seconds."""
    return _teller.clock()


def duration(seconds: float) -> str:
    """Write a time as people say it: 8 s, 1 min 52 s, 2 h 5 min."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _rate(rate: float) -> str:
    return f"{rate:,.1f} a second" if rate >= 1 else f"{1 / rate:.1f} s each"
