"""Tools of all benchmarks: images, sides that run in turn, one table.

A shared machine's seconds say little: two sides run in turn, and the result is the median of the
ratios of neighbouring runs, with the smallest and the largest beside it.

`ISIM_BENCH_AVX512=0` lets all of them run as on a CPU with AVX2 alone.
"""

import contextlib
import ctypes
import functools
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from isim.data import files
from isim.data.prepared import Item
from isim.data.sources import shapes
from isim.metrics import BACKGROUND, IGNORE
from isim.params import Shapes
from isim.runtime.paths import resolve_path

COLUMNS = ("part", "data", "reference", "isim", "ratio", "spread", "goal", "fidelity")


class Case(NamedTuple):
    """Words of a line: what is compared, on which data, and how equal the results are.

    `goal` tells what the ratio should be.
    """

    part: str
    data: str
    goal: str = ""
    fidelity: str = ""


class Row(NamedTuple):
    """A line of the table: median seconds a unit of both sides, and the reference over isim."""

    case: Case
    reference: float
    isim: float
    ratio: float
    low: float
    high: float

    def cells(self) -> tuple[str, ...]:
        """Texts of the columns."""
        part, data, goal, fidelity = self.case
        times = (_duration(self.reference), _duration(self.isim), f"{self.ratio:.2f}")
        return part, data, *times, f"{self.low:.2f} .. {self.high:.2f}", goal, fidelity


def row(case: Case, reference: Sequence[float], isim: Sequence[float]) -> Row:
    """Compare the seconds a unit of neighbouring runs."""
    ratios = [slow / fast for slow, fast in zip(reference, isim, strict=True)]
    slow, fast, ratio = (statistics.median(values) for values in (reference, isim, ratios))
    return Row(case, slow, fast, ratio, min(ratios), max(ratios))


def compare(
    case: Case,
    reference: Callable[[], object],
    candidate: Callable[[], object],
    *,
    units: int,
    repeats: int,
) -> Row:
    """Run both sides in turn, after one run of each that is not counted.

    Args:
        case: Words for the table.
        reference: The straightforward way.
        candidate: Ours.
        units: Images, or what else one call works through; seconds are divided by it.
        repeats: Counted runs of each, fewer where `rounds` ends before.
    """
    reference(), candidate()
    pairs = [(seconds(reference) / units, seconds(candidate) / units) for _ in rounds(repeats)]
    return row(case, [slow for slow, _ in pairs], [fast for _, fast in pairs])


def rounds(most: int) -> Iterator[int]:
    """Count to `most`; from the second round on only while `make bench` has time left."""
    until = float(os.environ.get("ISIM_BENCH_UNTIL", "inf"))
    start = time.monotonic()
    for number in range(most):
        now = time.monotonic()
        if number and now + (now - start) / number > until:
            return
        yield number


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@contextlib.contextmanager
def crf_backend(name: str) -> Iterator[None]:
    """Compute the block's dense CRFs by a backend, as `$ISIM_CRF` chooses it."""
    before = os.environ.get("ISIM_CRF", "")
    os.environ["ISIM_CRF"] = name
    try:
        yield
    finally:
        os.environ["ISIM_CRF"] = before


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
            stream.writelines(f"{json.dumps(found)}\n" for found in rows)


def read_rows(path: Path) -> list[Row]:
    """Read what `report` has added to a file."""
    lines = map(json.loads, path.read_text().splitlines())
    return [Row(Case(*case), *figures) for case, *figures in lines]


def table(rows: Sequence[Row]) -> str:
    """Markdown table of the rows."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(found.cells() for found in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def without_avx512() -> None:
    """Let torch and the kernels run as on a CPU with AVX2 and neither AVX-512 nor bf16.

    Call it before torch computes anything.
    """
    import torch

    compiler = os.environ.get("CXX") or "g++"
    os.environ |= {
        "CXX": compiler if "-mno-avx512f" in compiler else f"{compiler} -mno-avx512f",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
    # Asked by isim, which chooses the precision by it.
    torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False


if os.environ.get("ISIM_BENCH_AVX512") == "0":
    without_avx512()


def instruction_sets() -> str:
    """Name the vectors that torch's CPU operations use, and bf16 where `auto` chooses it."""
    import torch

    from isim.runtime import devices

    vectors = torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX-512")
    bf16 = devices.resolve_precision("auto", torch.device("cpu")) == "bf16"
    return f"{vectors} + bf16" if bf16 else vectors


@functools.cache
def peak() -> tuple[float, float]:
    """Measure what a core reaches: multiply-adds, in FLOP/s, and a copy of memory, in bytes/s."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    flags = ("-O3", "-march=native", "-fPIC", "-shared")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "peak.so"
        source = Path(__file__).parent / "peak.cpp"
        subprocess.run([*compiler, *flags, str(source), "-o", str(built)], check=True)
        library = ctypes.CDLL(str(built))
    library.flops.restype = library.bytes.restype = ctypes.c_double
    return library.flops(), library.bytes()


def shares(action: Callable[[], object], flops: float, moved: float) -> str:
    """Put into words how much of what a core reaches an action needs.

    By CPU seconds, the least of three runs, which neighbours disturb less than wall time.

    Args:
        action: Runs on any number of this process's threads.
        flops: Floating-point operations of it.
        moved: Bytes that it must read and write at least, outside the caches.
    """
    taken = []
    for _ in rounds(3):
        start = time.process_time()
        action()
        taken.append(time.process_time() - start)
    done = (flops / min(taken), moved / min(taken))
    arithmetic, memory = (100 * rate / most for rate, most in zip(done, peak(), strict=True))
    return f"{arithmetic:.0f} % of the multiply-adds, {memory:.0f} % of the memory"


def machine() -> str:
    """Processor, instruction sets and versions, one line."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cpus = f"{len(os.sched_getaffinity(0))} cores of {next(names, platform.machine())}"
    cpus += f" ({instruction_sets()})"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpus}{gpu}, torch {torch.__version__}, Python {platform.python_version()}"


def items(count: int, folder: Path) -> list[Item]:
    """List the first `count` images of the VOC sample, else generated ones of about its size.

    Real ones are found through `$ISIM_SHARED` (default ../shared). Generated ones, written below
    `folder`, are of the size of VOC's: generated small, enlarged, and given a photograph's noise,
    which decides how many lattice points a dCRF has.
    """
    devkit = resolve_path("$ISIM_SHARED/data/voc_sample", Path.cwd()) / "VOCdevkit/VOC2012"
    if not devkit.is_dir():
        devkit = folder / "VOCdevkit/VOC2012"
        if not devkit.is_dir():
            shapes.generate(folder, Shapes(train=count, val=1, size=128), 0)
            _enlarge(devkit)
    names = (devkit / "ImageSets/Segmentation/train.txt").read_text().split()[:count]
    chosen = []
    for name in names:
        mask = devkit / f"SegmentationClass/{name}.png"
        label = np.zeros(20, np.float32)
        present = np.setdiff1d(np.unique(files.read_label_map(mask)), [BACKGROUND, IGNORE])
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
        files.write_label_map(path, np.asarray(grown, np.uint8))


def _duration(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
