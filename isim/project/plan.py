"""Plan of a run: minutes of every stage, disk and memory, before the first one begins.

All stages run in a folder of their own on a few of the project's images, with the project's
parameters, but fewer steps and epochs, twice: the first time everything that is done once a machine
or a process is done. What the second time took, loop by loop (`isim.runtime.progress` knows them),
grows with the number of images, steps or epochs; the rest is the same for any number.
"""

import contextlib
import dataclasses
import importlib
import inspect
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from isim.data.sources import readers
from isim.data.sources.source import Source
from isim.params import Params, TrainCam
from isim.project import pipeline
from isim.reporting import tracking
from isim.runtime import devices, memory, progress
from isim.runtime.paths import resolve_path
from isim.runtime.progress import Ended
from isim.training import heads

# Images of the dry run, and of the one before it that nothing is measured of.
IMAGES, FIRST = 16, 4
# Its steps of a head, where there are more.
STEPS = 10
# Its epochs: of a training, and of a CAM network, with a warm-up, a round and a measurement.
EPOCHS, CAM_EPOCHS, WARM_UP, MEASURED = 2, 4, 2, 3
# What a stage loads and opens before it begins.
_START = """\
import sys
from pathlib import Path
import isim.stages.train_cam
from isim.reporting import plots, store
store.create_database(f"sqlite:///{sys.argv[1]}/mlflow.db")
"""


@dataclass
class Timed:
    """Times of a stage in the dry run: its loops, and all of it, in seconds."""

    word: str
    loops: list[Ended] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Estimates of a run.

    Attributes:
        images: Of the project.
        tried: Of the dry run.
        stages: Seconds of each stage, in order; one of each label set.
        features, again, results, models: Bytes on disk; `again` is what is kept for later runs.
        memory: Bytes of a process.
        device: What networks run on.
    """

    images: int
    tried: int
    stages: dict[str, float]
    features: float
    again: float
    results: float
    models: float
    memory: float
    device: str

    def lines(self) -> list[str]:
        """Write the plan."""
        width = max(map(len, self.stages))
        rows = [
            f"  {name:<{width}}  {progress.duration(seconds):>13}"
            for name, seconds in self.stages.items()
        ]
        total = progress.duration(sum(self.stages.values()))
        return [
            f"plan, from a dry run of {self.tried} of {self.images} images here ({self.device}):",
            *rows,
            f"  {'all stages':<{width}}  {total:>13}",
            f"  disk: {_size(self.features)} features of frozen encoders and {_size(self.again)} "
            f"kept for later runs (.isim, may be deleted), {_size(self.results)} label maps and "
            f"CAMs, {_size(self.models)} networks",
            f"  memory: {_size(self.memory)}",
        ]


def make(params: Params, root: Path) -> Plan:
    """Try a project's stages out on a few of its images, and tell what a run takes.

    Raises UserError when a stage cannot run on them: its own error.
    """
    start = progress.clock()
    with tempfile.TemporaryDirectory(prefix="isim-plan-") as name, _own_place():
        folder = Path(name)
        began, dry, small = _start_seconds(folder), DryRun(folder), smaller(_absolute(params, root))
        DryRun(folder, FIRST).run(small)
        for path in (folder / "data", folder / ".isim"):
            shutil.rmtree(path)
        timed = dry.run(small)
        ratio = dry.images / dry.kept
        stages = {name: began + estimate(one, params, ratio) for name, one in timed.items()}
        stages["prepare"] += dry.listing
        kinds = [ratio * _bytes(kind) for kind in (folder / ".isim/features").glob("*")]
        features, largest = sum(kinds), max(kinds, default=0.0)
        again = ratio * _bytes(folder / ".isim/results") + _bytes(folder / ".isim/previous")
        results, models = ratio * _bytes(folder / "data"), _bytes(folder / "models")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # Patches that a training of heads holds, and their copy while they are put together.
    held = 2 * min(heads.BUDGET, largest)
    device = devices.default()
    precision = devices.resolve_precision(params.train_cam.precision, device)
    told = f"{device}, {precision}; it took {progress.duration(progress.clock() - start)}"
    given = {
        "features": features,
        "again": again,
        "results": results,
        "models": models,
        "memory": peak + held,
    }
    return Plan(dry.images, dry.kept, stages, device=told, **given)


def smaller(params: Params) -> Params:
    """Parameters of the dry run: fewer steps and epochs; the images are as they are."""

    def changed(section: Any, **values: Any) -> Any:  # noqa: ANN401 - any section
        return section.model_copy(update=values)

    def fewer(head: Any) -> Any:  # noqa: ANN401 - a section of heads
        return changed(head, steps=min(head.steps, STEPS))

    cam, segmenter = params.train_cam, params.train_segmenter
    if not cam.starts_from_labels:
        # There is no previous network in the folder of a dry run.
        cam = changed(cam, start="none")
    cam = changed(cam, frozen=changed(cam.frozen, head=fewer(cam.frozen.head)))
    if cam.method != "frozen":
        every = MEASURED if cam.score_every else 0
        cam = changed(
            cam,
            **{"epochs": CAM_EPOCHS, "warmup_epochs": WARM_UP, "round_rule": "frequency"},
            **{"round_every": CAM_EPOCHS, "score_every": every},
        )
    segmenter = changed(segmenter, epochs=EPOCHS, head=fewer(segmenter.head))
    affinity = changed(params.train_affinity, epochs=EPOCHS)
    sections = {"train_cam": cam, "train_affinity": affinity, "train_segmenter": segmenter}
    return params.model_copy(update=sections)


def _absolute(params: Params, root: Path) -> Params:
    """Paths of the parameters, which are relative to the project, as absolute ones."""
    changes: dict[str, Any] = {}
    if params.prepare.source not in readers.GENERATED:
        where = {"root": str(resolve_path(params.prepare.root, root))}
        changes["prepare"] = params.prepare.model_copy(update=where)
    for word in ("train_cam", "train_affinity", "train_segmenter"):
        section = getattr(params, word)
        paths = {}
        if section.weights not in ("imagenet", "none", "train_cam"):
            paths["weights"] = str(resolve_path(section.weights, root))
        if isinstance(section, TrainCam) and section.starts_from_labels:
            paths["start"] = str(resolve_path(section.start, root))
        changes[word] = section.model_copy(update=paths)
    return params.model_copy(update=changes)


@dataclass
class DryRun:
    """Stages on some of a project's images, in a folder of their own.

    Attributes:
        folder: The folder.
        wanted: About how many images.
        images, kept: How many there are, and how many of them are tried.
        listing: Seconds in which the data were listed, all of them.
    """

    folder: Path
    wanted: int = IMAGES
    images: int = 0
    kept: int = 0
    listing: float = 0.0
    _began: float = 0.0

    def run(self, params: Params) -> dict[str, Timed]:
        """Run all stages; returns the times of each, and of each label set. Errors are theirs."""
        pipe = YAML(typ="safe").load(pipeline.COPY.read_text(encoding="utf-8"))
        timed: dict[str, Timed] = {}
        with progress.task("dry run", len(pipe["stages"]), "stage") as tried, progress.quiet():
            for word in pipe["stages"]:
                for name, call in self._calls(word, params).items():
                    self._began = progress.clock()
                    with progress.recorded() as loops, tracking.off():
                        call()
                    timed[name] = Timed(word, loops, progress.clock() - self._began)
                tried.add()
        # The list is read whole: it is no part of what grows with the images.
        timed["prepare"].seconds -= self.listing
        return timed

    def _calls(self, word: str, params: Params) -> dict[str, Callable[[], None]]:
        """Calls that a stage is run by, by their names: one, or one of each label set."""
        with memory.uncollected():
            stage = importlib.import_module(f"isim.stages.{word}")
        section = getattr(params, word)
        if word == "prepare":
            return {word: partial(stage.run, section, self.folder, keep=self._keep)}
        if len(inspect.signature(stage.run).parameters) == 2:
            return {word: partial(stage.run, section, self.folder)}
        # A later round's labels are as many as the first one's, which a few epochs make.
        few = params.train_cam.method != "frozen" and params.train_cam.epochs == CAM_EPOCHS
        names = {
            one.name: "round_01" if few and one.name.startswith("round_") else one.name
            for one in params.label_sets
        }
        return {
            f"{word} {told}": partial(stage.run, section, name, self.folder)
            for told, name in names.items()
        }

    def _keep(self, source: Source) -> Source:
        self.listing = progress.clock() - self._began
        kept = some(source, self.wanted)
        self.images, self.kept = len(source.entries), len(kept.entries)
        return kept


def some(source: Source, count: int) -> Source:
    """Take about `count` images of a source, spread over splits, masks, tags and sizes of files."""
    places = {id_: split for split, ids in source.splits.items() for id_ in ids}

    def order(id_: str) -> tuple[str, bool, bool, int, str]:
        entry, size = source.entries[id_], 0
        with contextlib.suppress(OSError):
            size = entry.image.stat().st_size
        return places[id_], entry.mask is None, not entry.labels, size, id_

    listed = sorted(places, key=order)
    every = max(1, len(listed) / count)
    chosen = {listed[int((number + 0.5) * every)] for number in range(min(count, len(listed)))}
    # Every split has two, for the statistics of a batch, and a mask if any image of it has.
    for ids in (ids for ids in source.splits.values() if ids):
        wanted = [id_ for id_ in listed if id_ in set(ids)]
        chosen |= set(wanted[:2])
    kept = {
        split: tuple(id_ for id_ in ids if id_ in chosen) for split, ids in source.splits.items()
    }
    entries = {id_: entry for id_, entry in source.entries.items() if id_ in chosen}
    return dataclasses.replace(source, entries=entries, splits=kept)


def estimate(timed: Timed, params: Params, ratio: float) -> float:
    """Seconds of a stage on all images, `ratio` times as many as were tried."""
    loops = sum(loop.seconds * _times(loop, timed.word, params, ratio) for loop in timed.loops)
    rest = timed.seconds - sum(loop.seconds for loop in timed.loops)
    return max(0.0, rest) + loops


def _times(loop: Ended, word: str, params: Params, ratio: float) -> float:
    """Tell how many times as much a loop has to do in all of the run as in the dry run."""
    section: Any = getattr(params, word)
    first, last = loop.titles[0], loop.titles[-1]
    trained = word == "train_cam" and section.method != "frozen"
    if loop.unit == "step" and (epoch := re.fullmatch(r"epoch (\d+)", last)):
        return ratio * _epochs(int(epoch[1]), section, warmed=trained)
    if loop.unit == "step":
        head = section.frozen.head if word == "train_cam" else section.head
        return float(head.steps / min(head.steps, STEPS)) if last == "head" else 1
    if not loop.unit:
        return 1
    if loop.unit == "epoch":
        return float(section.epochs / (CAM_EPOCHS if trained else EPOCHS))
    rounds = params.train_cam.certain_rounds if params.train_cam.method != "frozen" else 1
    # In a round, in a measurement between rounds, after every epoch.
    if trained and first == "training":
        if any(re.match(r"round_", title) for title in loop.titles):
            return ratio * rounds
        if "scores" in loop.titles:
            return float(ratio * max(0, section.epochs // section.score_every - rounds))
        return float(ratio * section.epochs / CAM_EPOCHS)
    return ratio * (rounds if re.match(r"labels/round_", last) else 1)


def _epochs(number: int, section: Any, *, warmed: bool) -> int:  # noqa: ANN401 - any training
    """Tell how many epochs are like the one of this number: the first of a kind is like none."""
    if not warmed:
        return int(section.epochs) if number == EPOCHS else 0
    if number == WARM_UP:
        return int(section.warmup_epochs)
    return int(section.epochs - section.warmup_epochs) if number == CAM_EPOCHS else 0


def _start_seconds(folder: Path) -> float:
    """Measure how long a stage takes to load what it needs, in a process of its own."""
    command = [sys.executable, "-c", _START, str(folder)]
    # The first one may compile the libraries' pages, and read them from a cold disk.
    for _ in range(2):
        start = progress.clock()
        with progress.task("start of a stage"):
            subprocess.run(command, check=True, capture_output=True)
    return progress.clock() - start


@contextlib.contextmanager
def _own_place() -> Iterator[None]:
    """Hide a DVC that this runs in: state must not go to its project."""
    before = os.environ.pop("DVC_ROOT", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["DVC_ROOT"] = before


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
