"""What all benchmarks share: images, alternated runs of two sides, one table.

A shared machine's seconds say little: two sides run in turn, and the result is the median of the
ratios of neighbouring runs, with the smallest and the largest beside it.
"""

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import numpy as np

from isim.data import files, shapes
from isim.data.dataset import Item
from isim.params import resolve_path

COLUMNS = ("part", "data", "reference", "isim", "ratio", "spread", "goal", "fidelity")


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds a unit of both sides, and the reference over isim.

    `goal` is what the ratio should be, `fidelity` says how equal the results are, in words.
    """

    part: str
    data: str
    reference: float
    isim: float
    ratio: float
    low: float
    high: float
    goal: str
    fidelity: str

    def cells(self) -> tuple[str, ...]:
        """Texts of the columns."""
        spread = f"{self.low:.2f} .. {self.high:.2f}"
        times = (_duration(self.reference), _duration(self.isim))
        return (
            *(self.part, self.data, *times),
            *(f"{self.ratio:.2f}", spread, self.goal, self.fidelity),
        )


def compare(
    part: str,
    data: str,
    reference: Callable[[], object],
    candidate: Callable[[], object],
    units: int,
    repeats: int,
    goal: str = "",
    fidelity: str = "",
) -> Row:
    """Run both sides in turn, after one run of each that is not counted.

    Args:
        part: What is compared.
        data: What on, in words.
        reference: The straightforward way.
        candidate: Ours.
        units: Images, or what else one call works through; seconds are divided by it.
        repeats: Counted runs of each.
        goal: What the ratio should be.
        fidelity: How equal the results are.
    """
    reference(), candidate()
    pairs = [(seconds(reference), seconds(candidate)) for _ in range(repeats)]
    ratios = sorted(slow / fast for slow, fast in pairs)
    slow, fast = (statistics.median(side) / units for side in zip(*pairs, strict=True))
    middle = statistics.median(ratios)
    return Row(part, data, slow, fast, middle, ratios[0], ratios[-1], goal, fidelity)


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


class Apart:
    """Actions in a process of their own, forked when this is made.

    For a reference that must not feel how isim sets up its process (malloc, threads). Make it
    before anything is computed: threads do not survive a fork.

    Args:
        setup: Called there before the first action; returns the actions by name.
    """

    def __init__(self, setup: Callable[[], dict[str, Callable[[], object]]]) -> None:
        """Fork the process."""
        context = multiprocessing.get_context("fork")
        self._here, there = context.Pipe()
        self._process = context.Process(target=self._serve, args=(setup, there), daemon=True)
        self._process.start()

    @staticmethod
    def _serve(setup: Callable[[], dict[str, Callable[[], object]]], there: Connection) -> None:
        name = there.recv_bytes().decode()
        actions = setup()
        while True:
            actions[name]()
            there.send_bytes(b"done")
            name = there.recv_bytes().decode()

    def run(self, name: str) -> None:
        """Run an action there and wait for its end."""
        self._here.send_bytes(name.encode())
        self._here.recv_bytes()


def report(rows: Sequence[Row]) -> None:
    """Print the rows as a table; for `make bench`, add them to the file `$ISIM_BENCH`."""
    print(table(rows), flush=True)
    if path := os.environ.get("ISIM_BENCH"):
        with Path(path).open("a") as stream:
            stream.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def table(rows: Sequence[Row]) -> str:
    """Markdown table of the rows."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """Processor and versions, one line."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cpus = f"{len(os.sched_getaffinity(0))} cores of {next(names, platform.machine())}"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpus}{gpu}, torch {torch.__version__}, Python {platform.python_version()}"


def items(count: int, folder: Path) -> list[Item]:
    """The first `count` images of the VOC sample, else generated ones of about its size.

    Real ones are found through `$ISIM_SHARED` (default ../shared). Generated ones, written below
    `folder`, are of the size of VOC's: generated small, enlarged, and given a photograph's noise,
    which decides how many lattice points a dCRF has.
    """
    devkit = resolve_path("$ISIM_SHARED/data/voc_sample", Path.cwd()) / "VOCdevkit/VOC2012"
    if not devkit.is_dir():
        devkit = folder / "VOCdevkit/VOC2012"
        if not devkit.is_dir():
            shapes.generate(folder, count, 1, 128, 0)
            _enlarge(devkit)
    names = (devkit / "ImageSets/Segmentation/train.txt").read_text().split()[:count]
    chosen = []
    for name in names:
        mask = devkit / f"SegmentationClass/{name}.png"
        label = np.zeros(20, np.float32)
        present = np.setdiff1d(np.unique(files.read_label_map(mask)), [0, 255])
        label[present - 1] = 1
        chosen.append(Item(name, devkit / f"JPEGImages/{name}.jpg", mask, label))
    return chosen


def data_name(chosen: Sequence[Item]) -> str:
    """Words for the table: how many images, real or generated."""
    real = "voc_sample" in str(chosen[0].image)
    return f"{len(chosen)} {'VOC' if real else 'generated'} images"


def _enlarge(devkit: Path) -> None:
    rng = np.random.default_rng(0)
    for path in (devkit / "JPEGImages").glob("*.jpg"):
        image = cv2.resize(files.read_image(path), (500, 375), interpolation=cv2.INTER_CUBIC)
        noisy = image + rng.normal(0, 6, image.shape)
        cv2.imwrite(str(path), noisy.clip(0, 255).astype(np.uint8)[..., ::-1])
    for path in (devkit / "SegmentationClass").glob("*.png"):
        mask = files.read_label_map(path)
        grown = cv2.resize(mask, (500, 375), interpolation=cv2.INTER_NEAREST)
        files.write_label_map(path, grown)


def _duration(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
