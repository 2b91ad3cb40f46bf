"""MLflow as a sink: figures, tables and pictures of a stage.

No stage reads from the tracking store; what matters is in `reports/`, so that losing the server
loses no result. mlflow is imported inside functions only, here and in `store`: the import takes a
second, and `isim --help` must not pay for it.
"""

import contextlib
import functools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np
from pydantic import BaseModel

from isim.reporting import store
from isim.reporting.store import Inputs
from isim.runtime import processes
from isim.runtime.identity import md5, md5_of

# A log_batch call costs 6 ms (sqlite) to 58 ms (server): at most one every so many seconds.
FLUSH_SECONDS = 5.0
# A store that fails faster (a closed port) costs nothing to ask again, a silent one does.
SILENT_SECONDS = 1.0
# Limit of one log_batch request.
MAX_METRICS = 1000

logger = logging.getLogger(__name__)
_off = False
P = ParamSpec("P")
_Method = Callable[Concatenate["Run", P], None]


def _unless_lost(method: _Method[P]) -> _Method[P]:
    """Skip a method of a run when the store is lost; the first failure is one warning."""

    @functools.wraps(method)
    def call(run: "Run", /, *args: P.args, **kwargs: P.kwargs) -> None:
        if run._lost:
            return
        began = time.monotonic()
        try:
            method(run, *args, **kwargs)
        # Whatever a tracking back end raises (mlflow, requests, SQL, disk), training goes on.
        except Exception as error:
            if not run._told:
                logger.warning(
                    f"MLflow is lost ({store.reason(error)}); the {run._stage} stage goes on "
                    f"untracked, its figures are written to reports/{run._stage}"
                )
            run._lost = run._told = True
            run._silent = time.monotonic() - began > SILENT_SECONDS

    return call


class Run:
    """MLflow run of a stage, and all that the stage may do with it.

    No method raises when the store is lost: the first failure is one warning, then everything
    but metrics is dropped. Metrics stay buffered and are offered once more when the stage ends,
    unless the store was not lost but silent, which would hold the stage up again. When an
    interrupted run goes on (`resumed`), what it holds of a step is not recorded twice.
    """

    _lost = _silent = _told = False

    def __init__(self, stage: str, root: Path, opened: store.Opened) -> None:
        """Wrap a run that `store.open_run` has created or reopened."""
        self._client, run, self._parent_id, self._metrics_seen, self._images_seen = opened
        self.run_id = run.info.run_id
        self.resumed = "isim.resumed" in run.data.tags
        self._stage = stage
        self._prefix = ".".join(filter(None, (stage, run.data.tags.get("label_set"))))
        self._root = root
        # For each run: name, value, milliseconds, step.
        self._buffers: dict[str, list[tuple[str, float, int, int]]]
        self._buffers = {self.run_id: [], self._parent_id: []}
        self._flushed_at = time.monotonic()

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record figures at a step (an epoch or a round; 0 when None). Sent in batches."""
        if self._silent:
            return
        step = step or 0
        new = {n: value for n, value in values.items() if (n, step) not in self._metrics_seen}
        self._metrics_seen |= {(name, step) for name in new}
        self._keep(self.run_id, new, step)
        if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def headline(self, values: Mapping[str, float]) -> None:
        """Record final figures on the parent, the leaderboard, as `<stage>.[<label set>.]<name>`.

        Those without a history are recorded here, too: a last point at step 0 would spoil a curve.
        """
        if self._silent:
            return
        known = {name for name, _ in self._metrics_seen}
        self.metrics({name: value for name, value in values.items() if name not in known})
        self._keep(self._parent_id, {f"{self._prefix}.{n}": v for n, v in values.items()}, 0)

    def _keep(self, run_id: str, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        # What is not known, as a mIoU without masks, is no point of a curve.
        known = {name: float(value) for name, value in values.items() if isfinite(value)}
        self._buffers[run_id] += [(name, value, now, step) for name, value in known.items()]

    @_unless_lost
    def flush(self) -> None:
        """Send the buffered figures now, so that the user interface shows them."""
        from mlflow.entities import Metric

        for run_id, points in self._buffers.items():
            while points:
                batch = [Metric(*point) for point in points[:MAX_METRICS]]
                self._client.log_batch(run_id, metrics=batch)
                del points[:MAX_METRICS]
        self._flushed_at = time.monotonic()

    @_unless_lost
    def image(self, key: str, image: np.ndarray, step: int) -> None:
        """Record an (H, W, 3) uint8 RGB picture; those of one key form a slider over the steps."""
        # MLflow allows few characters in keys; a digest keeps those with others distinct.
        allowed = re.sub(r"[^A-Za-z0-9_\-./ ]", "_", key)
        if allowed != key:
            allowed += f" {md5_of(key.encode())[:6]}"
        if (allowed, step) not in self._images_seen:
            self._images_seen.add((allowed, step))
            self._client.log_image(self.run_id, image, key=allowed, step=step)

    @_unless_lost
    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record `rows` (all with the keys of the first) as the table `<name>.json`.

        A table of the same name is replaced; MLflow's own log_table would append to it, and a
        resumed stage would then hold its rows twice.
        """
        columns = list(rows[0])
        # JSON has no NaN; the browser would refuse the whole table.
        cells = [[row[column] for column in columns] for row in rows]
        data = [[None if isinstance(c, float) and not isfinite(c) else c for c in r] for r in cells]
        file, tag = f"{name}.json", "mlflow.loggedArtifacts"
        self._client.log_dict(self.run_id, {"columns": columns, "data": data}, file)
        # This tag is how the user interface tells a table from any other JSON file.
        known = json.loads(self._client.get_run(self.run_id).data.tags.get(tag, "[]"))
        entry = {"path": file, "type": "table"}
        if entry not in known:
            self._client.set_tag(self.run_id, tag, json.dumps([*known, entry]))

    @_unless_lost
    def tag(self, name: str, value: str) -> None:
        """Tag the run, e.g. with the precision that `auto` stood for on this machine."""
        self._client.set_tag(self.run_id, name, value)

    @_unless_lost
    def artifact_file(self, path: Path) -> None:
        """Attach a file, under its own name."""
        self._client.log_artifact(self.run_id, str(path))

    @_unless_lost
    def register_model(self, name: str, path: Path) -> None:
        """Point the registry at weights that DVC owns, by path and md5, DVC's key; copy nothing.

        They are a new version of the model `name`, which gets the alias `current`.
        """
        if not self._client.search_registered_models(f"name = '{name}'"):
            self._client.create_registered_model(name)
        relative = path.resolve().relative_to(self._root.resolve()).as_posix()
        version = self._client.create_model_version(
            name, f"dvc:/{relative}", self.run_id, tags={"md5": md5(path), "path": relative}
        )
        # MLflow reserves the alias "latest".
        self._client.set_registered_model_alias(name, "current", version.version)

    def close(self, status: str) -> None:
        """End the run and its parent with FINISHED, FAILED or KILLED; called by `stage_run`."""
        if not self._silent:
            # A lost server may be back: one more chance for the figures and the status.
            self._lost = False
            self.flush()
            self._terminate(status)

    @_unless_lost
    def _terminate(self, status: str) -> None:
        for run_id in (self.run_id, self._parent_id):
            self._client.set_terminated(run_id, status)


class NoRun(Run):
    """Run of a process that is not the first: the same methods, and nothing is recorded."""

    _lost = _silent = True

    def __init__(self) -> None:
        """Be lost from the start."""


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Record nothing of stages that run inside the block: a dry run is no result."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


@contextlib.contextmanager
def stage_run(
    stage: str, params: BaseModel, root: Path, *, inputs: Inputs, identity: str, label_set: str = ""
) -> Iterator[Run]:
    """Open the run of one stage, below the run of the pipeline execution it belongs to.

    The parent is known by `$DVC_EXP_NAME`, else by the git commit and the whole of params.yaml.
    A stage that was interrupted continues its run if `identity`, the digest of all that the result
    depends on, is the same; one that ended gets a new run and the older ones are tagged
    `isim.superseded_by`. The run ends FINISHED, FAILED (an exception) or KILLED (SIGTERM as
    SystemExit, Ctrl-C), and so does the parent, which the next stage reopens. Only the first of
    several processes is tracked.

    `params`, the stage's section, is logged flat; `label_set` tells the runs of a stage apart that
    runs once for each of them.

    Raises:
        UserError: The tracking store cannot be reached at the start.
    """
    if _off or not processes.is_main():
        yield NoRun()
        return
    opened = store.open_run(
        stage, params, root, inputs=inputs, identity=identity, label_set=label_set
    )
    run, status = Run(stage, root, opened), "KILLED"
    try:
        yield run
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        run.close(status)
