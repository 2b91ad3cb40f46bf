"""Beginning and end of every stage, said once.

A stage that is opened holds its lock, knows what its result depends on, works in a resume folder
of its own, and has an MLflow run; outs and reports come to their places together at its end.
`start` runs a stage by its word, in as many processes as the environment asks for.
"""

import contextlib
import gc
import importlib
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from isim.data import files, prepared
from isim.data.prepared import Item
from isim.errors import UserError
from isim.params import Params, load
from isim.reporting import pictures, tracking
from isim.runtime import (
    atomic,
    checkpoint,
    finished,
    helpers,
    identity,
    kernels,
    launcher,
    memory,
    processes,
    progress,
    recorded,
)
from isim.runtime import figures as record
from isim.runtime.here import Here
from isim.runtime.paths import home

logger = logging.getLogger(__name__)
# Folder of the reports in the resume folder.
_REPORTS = "reports"
_PICTURES = "pictures"
# Parameters that say how a run is watched, and change nothing that it makes.
_WATCHED = {"pictures", "score_every"}


class Published(Exception):
    """Outs of an earlier run of this identity were published again: nothing is left to do."""


@dataclass
class Stage(Here):
    """An open stage.

    Attributes:
        tracked: Its MLflow run; in all processes but the first one that records nothing.
        root: Project folder.
        reports: Folder that its reports are written to; their place is `reports/<stage>`.
        hashes: md5 of each input, by name.
        held: Files outside of the resume folder that are deleted when the result is recorded.
        keeps: Whether the outs are kept until DVC has recorded them.
        since: When it was opened, by the monotonic clock in seconds.
    """

    tracked: tracking.Run = field(default_factory=tracking.NoRun)
    root: Path = Path()
    reports: Path = Path()
    hashes: Mapping[str, str] = field(default_factory=dict)
    held: list[Path] = field(default_factory=list)
    keeps: bool = True
    _outs: dict[str, str] = field(default_factory=dict)
    _models: dict[str, str] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)

    def publish(self, outs: Mapping[str, str]) -> None:
        """Name files and folders of the resume folder, and what they replace in the project.

        They come there, with the reports, when the stage has ended well: all together, or none.
        """
        self._outs |= {out: made for made, out in outs.items()}

    def register(self, name: str, model: str) -> None:
        """Point MLflow's registry at a file below the project folder, once it is published."""
        self._models[name] = model

    def report(self, *writes: Callable[["Stage"], None]) -> None:
        """Call functions with this stage, once: in the first process, when all have come here.

        Files of an interrupted run are gone then.
        """
        processes.barrier()
        if processes.is_main():
            shutil.rmtree(self.reports, ignore_errors=True)
            for write in writes:
                write(self)

    @contextlib.contextmanager
    def drawing(self, name: str) -> Iterator[Path]:
        """Yield the path of the picture `name`; a failure inside the block is one warning.

        Figures, tables and outs are published all the same.
        """
        path = self.reports / _PICTURES / name
        # DVC wants the folder, whether there is anything in it or not.
        atomic.make_directory(self.reports / _PICTURES)
        try:
            yield path
        except Exception as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            logger.warning(f"{self.name}: picture {name} is left out: {reason}")

    def table(
        self, name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()
    ) -> None:
        """Write rows to the reports as `<name>.csv`, and to MLflow as the table `name`.

        Where there may be no row, `columns` name the file's, and MLflow gets no table. Raises
        UserError when the file cannot be written.
        """
        atomic.write_csv(self.reports / f"{name}.csv", rows, () if rows else columns)
        if rows:
            self.tracked.table(name, rows)

    def figures(
        self,
        figures: Mapping[str, Any],
        headline: Mapping[str, float | Mapping[str, float]],
        *,
        timed: bool = True,
    ) -> None:
        """Write all figures as `runtime.figures` does, and the `headline` as metrics.json.

        By the latter runs are compared: `dvc metrics show`, `dvc exp show`. What is not known is
        left out there. Both may have figures of splits, by split. A stage that is not `timed`
        leaves the same files whenever it is run. Raises UserError when a file cannot be written.
        """
        seconds = round(time.monotonic() - self.since, 1) if timed else None
        record.write(self.reports, figures, seconds)
        atomic.write_json(self.reports / "metrics.json", _known(headline))

    def card(
        self,
        made: str,
        params: BaseModel,
        names: Sequence[str],
        figures: Mapping[str, Any],
        **more: Any,  # noqa: ANN401 - any JSON values
    ) -> None:
        """Put classes.json and card.json into a folder of label maps in the resume folder.

        They tell whoever has the folder alone what it is: labels `names` 0..L-1; isim, stage,
        parameters, md5 of what was read, figures and `more`. Equal runs write equal cards. Raises
        UserError when a file cannot be written.
        """
        if not processes.is_main():
            return
        about = {"isim": version("isim"), "made_by": self.name, **more}
        about |= {"figures": record.without_times(figures), "inputs": dict(self.hashes)}
        about["parameters"] = params.model_dump(mode="json", exclude=_WATCHED)
        atomic.write_json(self.resume / made / "classes.json", files.class_list(names))
        atomic.write_json(self.resume / made / "card.json", about)

    def show(
        self,
        splits: Mapping[str, Sequence[Item]],
        count: int,
        results: Callable[[str, Item], Mapping[str, Path]],
    ) -> None:
        """Write strips of `count` images a split to the reports, and to MLflow as squares.

        The name of a split is "" where there is but one. `results` gives captions and files of a
        split's image, as `pictures.strip` takes them.
        """
        atomic.make_directory(self.reports / _PICTURES)
        for split, items in splits.items():
            for item in pictures.choose(items, count):
                with self.drawing(f"{split}/{item.id}.png".lstrip("/")) as path:
                    found = results(split, item)
                    pictures.write_png(path, pictures.strip(item, found))
                    square = pictures.strip(item, found, columns=2)
                    self.tracked.image(f"{split or 'pictures'}/{item.id}", square, step=0)

    def log(self, name: str, figures: Mapping[str, float], step: int | None = None) -> None:
        """Record figures in MLflow, each after `<name>_` if there is a name."""
        start = f"{name}_" if name else ""
        self.tracked.metrics({f"{start}{key}": v for key, v in figures.items()}, step=step)

    def log_epoch(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log the last of an epoch's rows.

        A resumed run logs every row again: it may have a new MLflow run, and one that goes on
        drops the steps that it holds.
        """
        row = {name: value for name, value in rows[-1].items() if name != "epoch"}
        self.tracked.metrics(row, step=len(rows))

    def _finished(self, place: str) -> finished.Finished:
        """Collect all outs; `place` is that of the reports, below the project folder."""
        written = {path.name for path in self.reports.glob("*")}
        outs = self._outs | {f"{place}/{name}": f"{_REPORTS}/{name}" for name in sorted(written)}
        # Those of an earlier run.
        gone = [] if _PICTURES in written else [f"{place}/{_PICTURES}"]
        return finished.Finished(str(self.root.resolve()), outs, gone, [str(p) for p in self.held])


def _known(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is not finite: DVC shows it as a word among numbers."""
    whole = {k: _known(v) if isinstance(v, Mapping) else v for k, v in figures.items()}
    return {k: v for k, v in whole.items() if v != {} and (isinstance(v, dict) or isfinite(v))}


@contextlib.contextmanager
def opened(
    word: str,
    params: BaseModel,
    root: Path,
    *,
    reads: Mapping[str, Path],
    label_set: str = "",
    state: str = "",
) -> Iterator[Stage]:
    """Open a stage: identity, resume folder, MLflow run; at the end publish its outs and reports.

    An interrupted run of the same identity goes on in its resume folder. After the block the folder
    is removed, unless the block failed; under DVC what was published is kept until DVC has recorded
    it (`runtime.finished`). Raises Published when such outs were published again, and UserError
    when images are not those that were prepared, the hosts of this run differ, the tracking store
    cannot be reached, or a folder cannot be written.

    Args:
        word: The stage's word.
        params: Its section; a field `precision` tells that it runs networks.
        root: Project folder.
        reads: Name -> file or folder that the result depends on; what does not exist is left out.
        label_set: Name of one, where the stage runs once for each.
        state: What the result depends on beside these.
    """
    if prepared.FOLDER in reads:
        _require_unchanged(root)
    words = tuple(filter(None, (word, label_set)))
    base = home(root) / ".isim"
    # Before the inputs are hashed: what changes then is seen at the end.
    before = recorded.of_stage(root, reads)
    here = Stage(
        base,
        getattr(params, "precision", "fp32"),
        " ".join(words),
        root=root,
        hashes=_hashes(reads),
    )
    key, place = _identity(here, words, params, state), "/".join(("reports", *words))
    runs = base.joinpath("resume", *words)
    _publish_again(runs, key, root)
    here.resume = checkpoint.resume_folder(runs, key)
    here.reports = here.resume / _REPORTS
    inputs = {name: (reads[name], md5) for name, md5 in here.hashes.items()}
    run = tracking.stage_run(word, params, root, inputs=inputs, identity=key, label_set=label_set)
    with contextlib.ExitStack() as stack:
        with progress.task("opens its MLflow run"):
            here.tracked = stack.enter_context(run)
        if hasattr(params, "precision"):
            here.tracked.tag("precision", here.precision)
            here.tracked.tag("device", str(here.device))
        yield here
        processes.barrier()
        if processes.is_main():
            if before is not None:
                before.require_same(here.hashes)
            done = here._finished(place)
            done.publish(here.resume)
            for name, model in here._models.items():
                here.tracked.register_model(name, root / model)
    if processes.is_main():
        if finished.under_dvc() and here.keeps:
            done.settle(here.resume)
        else:
            done.remove(here.resume)
    processes.barrier()


def _publish_again(runs: Path, key: str, root: Path) -> None:
    """Publish what an earlier run of this identity has made, if DVC has not recorded that.

    Raises Published then, in all processes. States of other runs are removed.
    """
    again = False
    if processes.is_main():
        finished.drop_others(runs, root, key)
        state = finished.Finished.read(runs / key)
        if state is not None and not state.settled:
            finished.unmark(runs / key)
        elif state is not None and state.is_whole(runs / key):
            # That of another copy of the project is as good.
            state.root = str(root.resolve())
            state.publish(runs / key)
            if finished.under_dvc():
                state.settle(runs / key)
            again = True
        elif state is not None:
            state.remove(runs / key)
    if processes.broadcast(again):
        raise Published


def _require_unchanged(root: Path) -> None:
    """Check the images in the first process: all read the same files."""
    told = ""
    if processes.is_main():
        try:
            prepared.require_unchanged(root)
        except UserError as error:
            told = str(error)
    if told := processes.broadcast(told):
        raise UserError(told)


def _hashes(reads: Mapping[str, Path]) -> dict[str, str]:
    """Hash the inputs, in the first process: all read the same folder."""
    return processes.broadcast(identity.of_inputs(reads) if processes.is_main() else {})


def _identity(here: Stage, words: tuple[str, ...], params: BaseModel, state: str) -> str:
    """Digest what the result depends on: parameters, inputs, code, and what computes it."""
    # Numbers of threads and processes change the last bits alone: a run may go on with others.
    machine = here.machine if hasattr(params, "precision") else kernels.crf_backend()
    values = {"stage": words, "params": params.model_dump(mode="json")}
    own = f"{identity.of_code(words[0])} {identity.digest(values)} {machine}"
    if len(set(processes.gather(own))) > 1:
        raise UserError(
            "the hosts of this run differ in parameters, code, torch or kind of device; bring them "
            "to the same state (one virtual environment in the shared folder does)"
        )
    inputs = dict(here.hashes) | ({"state": state} if state else {})
    return identity.digest({"inputs": inputs, "own": own})


@contextlib.contextmanager
def alone(name: str, folder: Path) -> Iterator[None]:
    """Wait until no other run of a stage (for a label set) for this repository is under way.

    The resume state of a stage belongs to the repository, and several runs can want it:
    `dvc exp run --temp` beside `dvc repro`, several workers of `dvc queue start`, or a stage
    that outlived its DVC.
    """
    from filelock import FileLock, Timeout

    path = folder / f"{name}.lock"
    atomic.make_directory(folder)
    lock = FileLock(path)

    def acquire() -> bool:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        except OSError as error:
            raise atomic.unwritable(path, error) from error
        return True

    told = False
    with progress.task("waits for another run of it to end"):
        while not processes.broadcast(acquire() if processes.is_main() else True):
            if not told and processes.is_main():
                print(f"isim: waiting for another run of {name} to end ({path})", file=sys.stderr)
            told = True
            time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()


def start(word: str, root: Path, *arguments: str) -> None:
    """Run the stage `word` of a project with its section of params.yaml and, maybe, a label set.

    Raises UserError as the stage; a wrong parameter is told before the stage is imported.
    """
    told = progress.watched(" ".join((word, *arguments)))
    base = home(root) / ".isim"
    with processes.started(base), told:
        params = load(root / "params.yaml")
        for name in arguments:
            require_label_set(params, name)
        if word != "prepare" and (options := launcher.options()):
            launcher.launch(options, [word.replace("_", "-"), *arguments])
        # Wrong variables are told at once, not by the first dCRF after hours.
        kernels.crf_backend()
        helpers.worker_count()
        # What the stage reads is then what its identity is made of.
        with alone("-".join((word, *arguments)), base):
            # As they are after the wait.
            recorded.remember(root)
            params = load(root / "params.yaml")
            if processes.is_main():
                _look_after(base, root, (word, *arguments))
            with memory.uncollected(), progress.task("loads its libraries"):
                stage: Any = importlib.import_module(f"isim.stages.{word}")
            gc.freeze()
            try:
                stage.run(getattr(params, word), *arguments, root)
            except Published:
                progress.tell(
                    f"{' '.join((word, *arguments))}: an earlier run has computed all, and dvc.lock"
                    " has not come to hold it since: published again"
                )
            finally:
                recorded.forget()


def _look_after(base: Path, root: Path, own: tuple[str, ...]) -> None:
    """Finish or drop what other runs of stages have left behind; nobody touches it meanwhile."""
    from filelock import FileLock, Timeout

    resume = base / "resume"
    with contextlib.ExitStack() as stack:

        def lock(runs: Path) -> bool:
            words = runs.relative_to(resume).parts
            if words == own:
                return True
            try:
                stack.enter_context(FileLock(base / f"{'-'.join(words)}.lock", timeout=0))
            except (Timeout, OSError):
                return False
            return True

        finished.look_after(resume, root, lock)


def require_label_set(params: Params, name: str) -> None:
    """Check that `label_sets` of the parameters has this one. Raises UserError if not."""
    known = [entry.name for entry in params.label_sets]
    if name not in known:
        raise UserError(
            f"no label set '{name}' in params.yaml; label_sets has {', '.join(known) or 'none'}"
        )
