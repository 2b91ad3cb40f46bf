"""MLflow as a sink: figures, tables and pictures of a stage.

No stage reads from the tracking store; what matters is in `reports/`, so that losing the server
loses no result. mlflow is imported inside functions only, here and in `store`: the import takes a
second, and `isim --help` must not pay for it.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Concatenate, ParamSpec
from urllib.parse import unquote, urlparse

import numpy as np
from pydantic import BaseModel

from isim.reporting import about, store
from isim.reporting.store import Inputs
from isim.runtime import processes
from isim.runtime.identity import md5

# A log_batch call costs 6 ms (sqlite) to 58 ms (server): at most one every so many seconds.
FLUSH_SECONDS = 5.0
# A store that fails faster (a closed port) costs nothing to ask again, a silent one does.
SILENT_SECONDS = 1.0
# A call that takes longer has waited for a server: it is not asked whether it is there.
WAITED_SECONDS = 3.5
# Limit of one log_batch request.
MAX_METRICS = 1000
# Pictures of the reports that go to MLflow, at most.
MOST_PICTURES = 60
SHEET = "contact_sheet.png"

logger = logging.getLogger(__name__)
_off = False
P = ParamSpec("P")
_Method = Callable[Concatenate["Run", P], None]


def _unless_lost(method: _Method[P]) -> _Method[P]:
    """Skip a method of a run when the store is lost; leave out what the store does not take."""

    @functools.wraps(method)
    def call(run: "Run", /, *args: P.args, **kwargs: P.kwargs) -> None:
        if run._lost:
            return
        began = time.monotonic()
        try:
            method(run, *args, **kwargs)
        # Whatever a tracking back end raises (mlflow, requests, SQL, disk), training goes on.
        except Exception as error:
            seconds = time.monotonic() - began
            if _refused(error) or (method.__name__ not in _ALWAYS and run._answers(seconds)):
                named = next((str(arg) for arg in args if isinstance(arg, str | Path)), "")
                run._leave_out(" ".join((_WORDS.get(method.__name__, "status"), named)), error)
            else:
                run._lose(error, seconds)

    return call


# What a method records, for messages.
_WORDS = {
    "flush": "figures",
    "image": "picture",
    "table": "table",
    "tag": "tag",
    "artifact_file": "file",
    "register_model": "model",
    "_publish": "pictures",
    "_describe": "description",
}
# What is kept and offered again, where a store fails that may come back.
_ALWAYS = {"flush", "_terminate"}


def _refused(error: Exception) -> bool:
    """Tell whether a store that is there has said no: a name, a value or a deleted run."""
    status = getattr(error, "get_http_status_code", None)
    if status is None:
        return isinstance(error, TypeError | ValueError)
    return 400 <= status() < 500 and status() not in (408, 429)


class Run:
    """MLflow run of a stage, and all that the stage may do with it.

    No method raises. What the store refuses (a picture, a name) is left out: the first is a
    warning, the others are counted at the end. When the store is lost, that is one warning, then
    everything but metrics is dropped; metrics stay buffered and are offered once more when the
    stage ends, unless the store was not lost but silent, which would hold the stage up again. When
    an interrupted run goes on (`resumed`), what it holds of a step is not recorded twice.
    """

    _lost = _silent = _told = False

    def __init__(self, stage: str, root: Path, opened: store.Opened) -> None:
        """Wrap a run that `store.open_run` has created or reopened."""
        self._opened, self._client, self._parent_id = opened, opened.client, opened.parent_id
        self._metrics_seen, self._images_seen = opened.metrics, opened.images
        run = opened.run
        self.run_id = run.info.run_id
        self.resumed = "isim.resumed" in run.data.tags
        self._stage = stage
        self._key = (stage, run.data.tags.get("label_set", ""))
        self._prefix = ".".join(filter(None, self._key))
        self._root = root
        self._left_out: list[str] = []
        self._pictures_id = ""
        self._gone: set[str] = set()
        self._figures: dict[str, float] = {}
        # For each run: name, value, milliseconds, step.
        self._buffers: dict[str, list[tuple[str, float, int, int]]]
        self._buffers = {self.run_id: [], self._parent_id: []}
        self._flushed_at = time.monotonic()

    def _answers(self, seconds: float) -> bool:
        """Tell whether the store is there, after a call that failed in so many seconds."""
        if seconds > WAITED_SECONDS:
            return False
        try:
            self._client.get_run(self.run_id)
        except Exception:
            return False
        return True

    def _leave_out(self, what: str, error: Exception) -> None:
        what, why = about.clean(what).strip()[:100], store.reason(error)
        for run_id in (self.run_id, self._parent_id):
            if run_id not in self._gone and self._is_deleted(run_id):
                self._gone.add(run_id)
                what, why = f"run {run_id}", "it was deleted"
                logger.warning(
                    f"MLflow's run {run_id} of the {self._stage} stage was deleted; the stage goes "
                    f"on, its figures are in reports/{self._stage}; to restore it: "
                    f"mlflow runs restore --run-id {run_id}"
                )
        if not self._left_out and not self._gone:
            logger.warning(
                f"MLflow does not take the {what} ({why}); it is left out, the {self._stage} stage "
                "goes on"
            )
        self._left_out.append(what)

    def _is_deleted(self, run_id: str) -> bool:
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "deleted")
        except Exception as error:
            return _refused(error)

    def _lose(self, error: Exception, seconds: float) -> None:
        if not self._told:
            logger.warning(
                f"MLflow is lost ({store.reason(error)}); the {self._stage} stage goes on "
                f"untracked, its figures are written to reports/{self._stage}"
            )
        self._lost = self._told = True
        self._silent = seconds > SILENT_SECONDS

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
        keys = {name: store.key_of(name, 250) for name in known}
        self._buffers[run_id] += [(keys[name], value, now, step) for name, value in known.items()]
        if run_id == self.run_id:
            self._figures |= known

    @_unless_lost
    def flush(self) -> None:
        """Send the buffered figures now, so that the user interface shows them."""
        from mlflow.entities import Metric

        for run_id, points in self._buffers.items():
            while points and run_id not in self._gone:
                batch = [Metric(*point) for point in points[:MAX_METRICS]]
                try:
                    self._client.log_batch(run_id, metrics=batch)
                except Exception as error:
                    if not _refused(error):
                        raise
                    self._one_by_one(run_id, batch, error)
                del points[:MAX_METRICS]
        self._flushed_at = time.monotonic()

    def _one_by_one(self, run_id: str, batch: Sequence[Any], error: Exception) -> None:
        """Send figures of which the store refuses some; errors other than refusals pass."""
        if self._is_deleted(run_id):
            self._leave_out("figures", error)
            return
        for point in batch:
            try:
                self._client.log_batch(run_id, metrics=[point])
            except Exception as refused:
                if not _refused(refused):
                    raise
                self._leave_out(f"figure {point.key}", refused)

    @_unless_lost
    def image(self, key: str, image: np.ndarray, step: int) -> None:
        """Record an (H, W, 3) uint8 RGB picture; those of one key form a slider over the steps.

        They are in the execution's run of pictures: beside a picture the user interface lists all
        parameters of its run, and that one has none. Sliders begin at step 0.
        """
        allowed = store.key_of(f"{self._prefix}/{key}")
        if (allowed, step) not in self._images_seen:
            if not self._pictures_id:
                self._pictures_id = store.pictures_run(self._opened)
            self._client.log_image(self._pictures_id, image, key=allowed, step=step)
            self._images_seen.add((allowed, step))

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
        file, tag = f"{store.key_of(name)}.json", "mlflow.loggedArtifacts"
        self._client.log_dict(self.run_id, {"columns": columns, "data": data}, file)
        # This tag is how the user interface tells a table from any other JSON file.
        known = json.loads(self._client.get_run(self.run_id).data.tags.get(tag, "[]"))
        entry = {"path": file, "type": "table"}
        if entry not in known:
            self._client.set_tag(self.run_id, tag, json.dumps([*known, entry]))

    @_unless_lost
    def tag(self, name: str, value: str) -> None:
        """Tag the run, e.g. with the precision that `auto` stood for on this machine."""
        self._client.set_tag(self.run_id, name, about.clean(value)[: store.MAX_TAG_LENGTH])

    @_unless_lost
    def artifact_file(self, path: Path) -> None:
        """Attach a file, under its own name."""
        self._client.log_artifact(self.run_id, str(path))

    @_unless_lost
    def register_model(self, name: str, path: Path) -> None:
        """Make weights, with what they need, a new version of the model `name`, alias `current`.

        `models:/<name>@current` then fetches the file: a link to it where the artifacts are on the
        same disk, else a copy. Its md5, DVC's key, and its path in the project are tags.
        """
        from mlflow.exceptions import MlflowException

        # As the project names it: `models` may be a link to another disk.
        relative = path.absolute().relative_to(self._root.absolute()).as_posix()
        self._attach(path, "model")
        pipeline, names = self._opened.pipeline, about.classes(self._root)
        what = f"{about.name(pipeline.params)}, trained by isim {about.release()}"
        with contextlib.suppress(MlflowException):
            # Where it exists, maybe since just now, this is refused.
            self._client.create_registered_model(
                name, description=f"Weights of the stage {self._prefix}; DVC keeps {relative}."
            )
        tags = {"md5": md5(path), "path": relative, "isim.version": about.release()}
        tags |= {"classes": json.dumps(names, ensure_ascii=False), "stage": self._stage}
        version = self._client.create_model_version(
            name,
            f"runs:/{self.run_id}/model",
            self.run_id,
            tags={key: about.clean(value)[:90_000] for key, value in tags.items()},
            description=about.clean(
                f"{what}; {len(names)} classes: {', '.join(names)}. Fetch it by "
                f"mlflow.artifacts.download_artifacts('models:/{name}/<version>')."
            )[:4000],
        )
        # MLflow reserves the alias "latest".
        self._client.set_registered_model_alias(name, "current", version.version)

    def _attach(self, path: Path, folder: str) -> None:
        """Put a file among the run's artifacts, by a hard link where that is possible."""
        where = urlparse(self._client.get_run(self.run_id).info.artifact_uri)
        if where.scheme in ("", "file"):
            target = Path(unquote(where.path)) / folder / path.name
            with contextlib.suppress(OSError):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                os.link(path, target)
                return
            shutil.copy2(path, target)
            return
        self._client.log_artifact(self.run_id, str(path), folder)

    def close(self, status: str) -> None:
        """End the run with FINISHED, FAILED or KILLED; called by `stage_run`.

        Its parent is FINISHED when all stages of the pipeline are (`store.close_parent`).
        """
        if not self._silent:
            # A lost server may be back: one more chance for the figures and the status.
            self._lost = False
            self.flush()
            if status == "FINISHED":
                self._publish()
            self._describe()
            self._terminate(status)
            self._end_parent(status)
        if len(self._left_out) > 1:
            logger.warning(
                f"MLflow did not take {len(self._left_out)} things of the {self._stage} stage: "
                f"{', '.join(self._left_out[:5])}{', ...' if len(self._left_out) > 5 else ''}"
            )

    @_unless_lost
    def _publish(self) -> None:
        """Record the pictures of the reports: all in one folder, and as a contact sheet."""
        from isim.reporting import gallery

        folder = self._root.joinpath("reports", *filter(None, self._key), "pictures")
        paths = gallery.found(folder, MOST_PICTURES)
        for path in paths:
            place = path.parent.relative_to(folder).parts
            self._client.log_artifact(self.run_id, str(path), "/".join(("pictures", *place)))
        if (sheet := gallery.sheet(paths, folder)) is not None:
            self._client.log_image(self.run_id, sheet, artifact_file=SHEET)
            self._client.set_tag(self.run_id, "isim.sheet", SHEET)

    @_unless_lost
    def _describe(self) -> None:
        """Write what the user interface shows first: method, data, pictures, figures."""
        params, tags = self._opened.pipeline.params, self._client.get_run(self.run_id).data.tags
        pictures = {}
        if sheet := tags.get("isim.sheet"):
            pictures[self._prefix] = store.picture_address(self.run_id, sheet)
        data = about.data_set(self._root, params)
        text = about.description(params, data, self._figures, pictures=pictures)
        self._client.set_tag(self.run_id, "mlflow.note.content", text)

    @_unless_lost
    def _terminate(self, status: str) -> None:
        self._client.set_terminated(self.run_id, status)

    @_unless_lost
    def _end_parent(self, status: str) -> None:
        if status == "FINISHED":
            store.carry(self._opened, self._key)
        store.close_parent(self._opened, self._key, status)


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
    SystemExit, Ctrl-C); the parent, which the next stage reopens, is FINISHED when all stages are.
    Only the first of several processes is tracked.

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
