"""MLflow as a sink: one parent run a pipeline execution, one child a stage (never deeper).

The only module that imports mlflow, and only inside functions: the import takes seconds and
`isim --help` must not pay for it. No stage reads from the tracking store; figures that matter
are in `reports/`, so losing the server never loses a result.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from pydantic import BaseModel

from isim import distributed
from isim.atomic import atomic_path, make_directory, unwritable
from isim.errors import UserError
from isim.params import digest, home, read_yaml

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities import Run as StoredRun

EXPERIMENT = "isim"
# MLflow reserves the alias "latest".
MODEL_ALIAS = "current"
# A log_batch call costs 6 ms (sqlite) to 58 ms (server): at most one every so many seconds.
FLUSH_SECONDS = 5.0
# A store that fails faster (a closed port) costs nothing to ask again, a silent one does.
SILENT_SECONDS = 1.0
# Limits of one log_batch request.
MAX_METRICS, MAX_PARAMS, MAX_PARAM_LENGTH = 1000, 100, 6000

logger = logging.getLogger(__name__)


class Run:
    """What a stage may do with its MLflow run.

    No method raises when the store is lost: the first failure is one warning, then everything
    but metrics is dropped. Metrics stay buffered and are offered once more when the stage ends,
    unless the store was not lost but silent, which would hold the stage up again.

    Attributes:
        run_id: MLflow's id of the stage's run.
        resumed: True when an interrupted run of the same stage is continued; steps that it
            already holds are not logged twice.
    """

    def __init__(
        self, client: "MlflowClient", stage: str, root: Path, stored: "StoredRun", parent_id: str
    ) -> None:
        """Wrap `stored`, a run that `stage_run` has created or reopened."""
        self.run_id: str = stored.info.run_id
        self.resumed: bool = "isim.resumed" in stored.data.tags
        self._client = client
        self._stage = stage
        self._prefix = ".".join(filter(None, (stage, stored.data.tags.get("label_set"))))
        self._root = root
        self._parent_id = parent_id
        self._lost = False
        self._silent = False
        self._buffer: list[Metric] = []
        self._flushed_at = time.monotonic()
        self._metrics_seen = {
            (name, point.step)
            for name in stored.data.metrics
            for point in client.get_metric_history(self.run_id, name)
        }
        self._images_seen = _logged_images(client, self.run_id) if self.resumed else set()

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Record figures at a step (an epoch or a round; 0 when None). Sent in batches."""
        from mlflow.entities import Metric

        step = step or 0
        now = int(time.time() * 1000)
        for name, value in values.items():
            if (name, step) not in self._metrics_seen:
                self._metrics_seen.add((name, step))
                self._buffer.append(Metric(name, float(value), now, step))
        if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send the buffered figures now, so that the user interface shows them."""
        self._try(self._send_buffer)

    def image(self, key: str, image: np.ndarray, step: int) -> None:
        """Record a picture; pictures of one key form a slider over the steps.

        Args:
            key: Name of the picture; what MLflow does not allow in it becomes `_`.
            image: (H, W, 3) uint8 RGB.
            step: The round.
        """
        key = re.sub(r"[^A-Za-z0-9_\-./ ]", "_", key)
        if (key, step) not in self._images_seen:
            self._images_seen.add((key, step))
            self._try(lambda: self._client.log_image(self.run_id, image, key=key, step=step))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record `rows` (all with the keys of the first) as the table `<name>.json`.

        A table of the same name is replaced; MLflow's own log_table would append to it, and a
        resumed stage would then hold its rows twice.
        """
        columns = list(rows[0])
        # JSON has no NaN; the browser would refuse the whole table.
        data = [[_finite(row[column]) for column in columns] for row in rows]
        self._try(lambda: self._write_table(f"{name}.json", {"columns": columns, "data": data}))

    def headline(self, values: Mapping[str, float]) -> None:
        """Record final figures on the parent, the leaderboard, as `<stage>.<name>`, and here.

        Of a stage that runs for several label sets: as `<stage>.<label set>.<name>`.

        Here only those without a history: a last point at step 0 would spoil its curve.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        known = {name for name, _ in self._metrics_seen}
        self.metrics({name: value for name, value in values.items() if name not in known})
        copies = [
            Metric(f"{self._prefix}.{name}", float(value), now, 0) for name, value in values.items()
        ]
        self._try(lambda: self._client.log_batch(self._parent_id, metrics=copies))

    def tag(self, name: str, value: str) -> None:
        """Tag the run, e.g. with the precision that `auto` stood for on this machine."""
        self._try(lambda: self._client.set_tag(self.run_id, name, value))

    def artifact_file(self, path: Path) -> None:
        """Attach a file, under its own name."""
        self._try(lambda: self._client.log_artifact(self.run_id, str(path)))

    def register_model(self, name: str, path: Path) -> None:
        """Point the model registry at weights that DVC owns; nothing is copied.

        Args:
            name: Registered model; a new version of it gets the alias `current`.
            path: A file below the project folder; its md5, DVC's key, becomes a tag.
        """
        self._try(lambda: self._write_model_version(name, path))

    def _try(self, action: Callable[[], object]) -> None:
        if self._lost:
            return
        began = time.monotonic()
        try:
            action()
        # Whatever a tracking back end raises (mlflow, requests, SQL, disk), training goes on.
        except Exception as error:
            self._lost = True
            self._silent = time.monotonic() - began > SILENT_SECONDS
            logger.warning(
                "MLflow is lost (%s); the %s stage goes on untracked, its figures are written "
                "to reports/%s",
                _reason(error),
                self._stage,
                self._stage,
            )

    def _send_buffer(self) -> None:
        while self._buffer:
            self._client.log_batch(self.run_id, metrics=self._buffer[:MAX_METRICS])
            del self._buffer[:MAX_METRICS]
        self._flushed_at = time.monotonic()

    def _write_table(self, file: str, table: dict[str, Any]) -> None:
        self._client.log_dict(self.run_id, table, file)
        # This tag is how the user interface tells a table from any other JSON file.
        tag = "mlflow.loggedArtifacts"
        known = json.loads(self._client.get_run(self.run_id).data.tags.get(tag, "[]"))
        entry = {"path": file, "type": "table"}
        if entry not in known:
            self._client.set_tag(self.run_id, tag, json.dumps([*known, entry]))

    def _write_model_version(self, name: str, path: Path) -> None:
        if not self._client.search_registered_models(f"name = '{name}'"):
            self._client.create_registered_model(name)
        relative = path.resolve().relative_to(self._root.resolve()).as_posix()
        version = self._client.create_model_version(
            name, f"dvc:/{relative}", self.run_id, tags={"md5": md5(path), "path": relative}
        )
        self._client.set_registered_model_alias(name, MODEL_ALIAS, version.version)

    def _close(self, status: str) -> None:
        if self._silent:
            return
        # A lost server may be back: one more chance, quietly, for the figures and the status.
        was_lost, self._lost = self._lost, False
        with contextlib.suppress(Exception) if was_lost else contextlib.nullcontext():
            actions = (
                self._send_buffer,
                lambda: self._client.set_terminated(self.run_id, status),
                lambda: self._client.set_terminated(self._parent_id, status),
            )
            for action in actions:
                action() if was_lost else self._try(action)


class NoRun(Run):
    """The run of a process that is not rank 0: the same methods, and nothing is recorded."""

    def __init__(self) -> None:
        """Record nothing."""
        self.run_id = "none"
        self.resumed = False
        self._lost = True

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Do nothing."""

    def image(self, key: str, image: np.ndarray, step: int) -> None:
        """Do nothing."""

    def headline(self, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing."""


@contextlib.contextmanager
def stage_run(
    stage: str,
    params: BaseModel,
    root: Path,
    inputs: Mapping[str, Path],
    label_set: str = "",
) -> Iterator[Run]:
    """Open the run of one stage, below the run of the pipeline execution it belongs to.

    The parent is known by `$DVC_EXP_NAME`, else by the git commit and the whole of params.yaml.
    A stage that was interrupted continues its run; one that ended gets a new run and the older
    ones are tagged `isim.superseded_by`. The run ends FINISHED, FAILED (an exception) or KILLED
    (SIGTERM as SystemExit, Ctrl-C), and so does the parent, which the next stage reopens.

    Args:
        stage: The stage's word, also its name in dvc.yaml.
        params: The stage's section; logged flat as `<stage>.<name>`.
        root: Folder of params.yaml and dvc.yaml.
        inputs: Name -> file or directory under DVC whose md5 is recorded.
        label_set: Of a stage that runs once for each label set: a tag, which tells its runs
            apart, and the middle of its headline's names.

    Yields:
        The open run; of several processes rank 0 has it, the others one that records nothing.

    Raises:
        UserError: The tracking store cannot be reached at the start.
    """
    if not distributed.is_main():
        yield NoRun()
        return
    uri = tracking_uri(root)
    try:
        run = _open(uri, stage, params, root, inputs, label_set)
    except UserError:
        raise
    # Drivers, HTTP, SQL: each back end has its own exceptions, the user one remedy.
    except Exception as error:
        raise UserError(
            f"cannot use the MLflow tracking store {_without_password(uri)}: {_reason(error)}; "
            "start or mend it, or unset MLFLOW_TRACKING_URI to track in mlflow.db"
        ) from error
    try:
        yield run
    except Exception:
        run._close("FAILED")
        raise
    except BaseException:
        run._close("KILLED")
        raise
    run._close("FINISHED")


def tracking_uri(root: Path) -> str:
    """`$MLFLOW_TRACKING_URI`, else the database `mlflow.db` in the home of `root`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home(root) / 'mlflow.db'}"


def create_database(uri: str) -> None:
    """Create an SQLite tracking database unless it exists; other URIs are left alone.

    Processes that touch a fresh database together leave it half-migrated for good, and so does
    one that dies on the way: the tables are made in a temporary file, which is then renamed.

    Raises:
        UserError: The folder cannot be written, or the file is no database.
    """
    path = _sqlite_path(uri)
    if path is None:
        return
    with _lock(path.parent):
        if path.exists():
            _check_database(path)
            return
        _import_mlflow()
        from mlflow.db import upgrade

        with atomic_path(path) as temporary:
            upgrade.main([f"sqlite:///{temporary}"], standalone_mode=False)


def md5(path: Path) -> str:
    """The md5 that DVC gives a file or a directory (`.dir` appended), read from the contents.

    Raises:
        OSError: The path cannot be read.
    """
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    files = sorted(
        file.relative_to(path)
        for file in path.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    )
    listing = [{"md5": md5(path / file), "relpath": file.as_posix()} for file in files]
    listing.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


def _open(
    uri: str,
    stage: str,
    params: BaseModel,
    root: Path,
    inputs: Mapping[str, Path],
    label_set: str,
) -> Run:
    mlflow = _import_mlflow()
    create_database(uri)
    hashes = {name: md5(path) for name, path in inputs.items() if path.exists()}
    git = _git_state(root)
    whole = _params_file(root)
    params_digest = _digest(whole) if whole else digest(params)
    key = os.environ.get("DVC_EXP_NAME", "").replace("'", "-") or (
        f"{git['commit'][:8]}-{params_digest}"
    )
    shared = {
        "isim.pipeline": key,
        "isim.params_digest": params_digest,
        "isim.host": socket.gethostname(),
        "isim.pid": str(os.getpid()),
        "isim.git_dirty": git["dirty"],
        "mlflow.source.git.commit": git["commit"],
    }
    own = shared | {
        "stage": stage,
        "isim.stage_digest": _stage_digest(stage, params, root, hashes, label_set),
        "isim.dvc_lock": md5(root / "dvc.lock") if (root / "dvc.lock").exists() else "none",
        "mlflow.source.name": f"isim {stage.replace('_', '-')}",
        "mlflow.source.type": "LOCAL",
    }
    if label_set:
        own["label_set"] = label_set
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    with _lock(home(root)):
        experiment = _experiment(client, uri, root)
        _mark_dead_runs(client, experiment)
        parent = _parent(client, experiment, key, shared, _flatten("", whole or {}))
        child = _child(client, experiment, parent, stage, own)
    if not child.data.params:
        _log_start(client, child.info.run_id, _flatten(stage, params.model_dump()), inputs, hashes)
    return Run(client, stage, root, child, parent.info.run_id)


def _import_mlflow() -> Any:  # noqa: ANN401 - the module, imported late
    # Set before the import, which reads them; whatever the user has set stays.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    # MLflow would retry for minutes; one retry survives a dropped keep-alive connection.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow

    # Failures arrive as exceptions; their logs, retries and tracebacks would come on top.
    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    return mlflow


def _lock(folder: Path) -> FileLock:
    path = folder / ".isim" / "tracking.lock"
    make_directory(path.parent)
    try:
        path.touch()
    except OSError as error:
        raise unwritable(path, error) from error
    return FileLock(path)


def _sqlite_path(uri: str) -> Path | None:
    path = uri.removeprefix("sqlite:///")
    return Path(path).resolve() if path != uri and path != ":memory:" else None


def _check_database(path: Path) -> None:
    # MLflow retries to open a broken file for minutes.
    try:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        raise UserError(
            f"cannot use the tracking database {path}: {error}; move it away or restore it"
        ) from error


def _experiment(client: "MlflowClient", uri: str, root: Path) -> str:
    known = client.get_experiment_by_name(EXPERIMENT)
    if known is not None:
        return str(known.experiment_id)
    # A server knows where its artifacts belong; beside a database they would land in the
    # working directory, which `dvc exp run --temp` deletes.
    remote = uri.startswith(("http://", "https://"))
    artifacts = None if remote else (home(root) / "mlartifacts").as_uri()
    return str(client.create_experiment(EXPERIMENT, artifact_location=artifacts))


def _mark_dead_runs(client: "MlflowClient", experiment: str) -> None:
    # kill -9 gives a run no chance to end itself.
    here = f"tags.`isim.host` = '{socket.gethostname()}'"
    for run in client.search_runs([experiment], f"attributes.status = 'RUNNING' and {here}"):
        if not _alive(int(run.data.tags["isim.pid"])):
            client.set_terminated(run.info.run_id, "KILLED")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _parent(
    client: "MlflowClient",
    experiment: str,
    key: str,
    tags: Mapping[str, str],
    params: Mapping[str, str],
) -> "StoredRun":
    same = (
        f"tags.`isim.pipeline` = '{key}' and tags.stage = 'pipeline' "
        f"and tags.`isim.params_digest` = '{tags['isim.params_digest']}'"
    )
    found = client.search_runs([experiment], same, max_results=1)
    if found:
        _reopen(client, found[0].info.run_id, tags)
        return found[0]
    run = client.create_run(experiment, tags={**tags, "stage": "pipeline"}, run_name=key)
    _log_params(client, run.info.run_id, params)
    return run


def _child(
    client: "MlflowClient",
    experiment: str,
    parent: "StoredRun",
    stage: str,
    tags: Mapping[str, str],
) -> "StoredRun":
    parent_id = parent.info.run_id
    older = client.search_runs(
        [experiment],
        f"tags.`mlflow.parentRunId` = '{parent_id}' and tags.stage = '{stage}'",
        order_by=["attributes.start_time DESC"],
    )
    current = [
        run
        for run in older
        if "isim.superseded_by" not in run.data.tags
        and run.data.tags.get("label_set") == tags.get("label_set")
    ]
    for run in current:
        ours = run.data.tags["isim.host"] == socket.gethostname()
        running = run.info.status == "RUNNING" and ours
        same = run.data.tags["isim.stage_digest"] == tags["isim.stage_digest"]
        if same and run.info.status != "FINISHED" and not running:
            _reopen(client, run.info.run_id, {**tags, "isim.resumed": "true"})
            return client.get_run(run.info.run_id)
    # The legend of a comparison shows names only: a stage's word would stand there twice.
    new = client.create_run(
        experiment,
        tags={**tags, "mlflow.parentRunId": parent_id},
        run_name=" ".join(filter(None, (stage, tags.get("label_set"), tags["isim.pipeline"]))),
    )
    for run in current:
        client.set_tag(run.info.run_id, "isim.superseded_by", new.info.run_id)
    return new


def _reopen(client: "MlflowClient", run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
    client.update_run(run_id, status="RUNNING")


def _log_start(
    client: "MlflowClient",
    run_id: str,
    params: Mapping[str, str],
    inputs: Mapping[str, Path],
    hashes: Mapping[str, str],
) -> None:
    from mlflow.entities import Dataset, DatasetInput

    _log_params(client, run_id, params)
    # A DVC directory md5 with its `.dir` is 36 characters, just what a dataset digest may hold.
    datasets = [
        DatasetInput(Dataset(name, hash_, "dvc", json.dumps({"path": str(inputs[name])})))
        for name, hash_ in hashes.items()
    ]
    if datasets:
        client.log_inputs(run_id, datasets)


def _log_params(client: "MlflowClient", run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    entries = [Param(name, value[:MAX_PARAM_LENGTH]) for name, value in params.items()]
    for start in range(0, len(entries), MAX_PARAMS):
        client.log_batch(run_id, params=entries[start : start + MAX_PARAMS])


def _flatten(prefix: str, tree: Mapping[str, Any]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping):
            flat |= _flatten(name, value)
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _params_file(root: Path) -> dict[str, Any] | None:
    path = root / "params.yaml"
    return read_yaml(path) if path.exists() else None


def _stage_digest(
    stage: str, params: BaseModel, root: Path, hashes: Mapping[str, str], label_set: str
) -> str:
    # What DVC's run-cache looks at: parameters, data and, from dvc.yaml, code. The same digest
    # therefore means the same figures.
    state: dict[str, Any] = {"stage": stage, "params": digest(params), "inputs": dict(hashes)}
    if label_set:
        state["label_set"] = label_set
    if (root / "dvc.yaml").exists():
        declared = read_yaml(root / "dvc.yaml").get("stages", {}).get(stage, {}).get("deps", [])
        paths = [root / str(dependency) for dependency in declared]
        state["deps"] = {str(p.relative_to(root)): md5(p) for p in paths if p.exists()}
    return _digest(state)


def _digest(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def _git_state(root: Path) -> dict[str, str]:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit or "nogit", "dirty": "true" if changes else "false"}


def _logged_images(client: "MlflowClient", run_id: str) -> set[tuple[str, int]]:
    # MLflow names them <key, / as ~>+step+<step>+timestamp+...
    names = [Path(file.path).name for file in client.list_artifacts(run_id, "images")]
    found = [re.match(r"(.+?)\+step\+(\d+)\+", name) for name in names]
    return {(match[1].replace("~", "/"), int(match[2])) for match in found if match}


def _finite(value: Any) -> Any:  # noqa: ANN401 - any table cell
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reason(error: BaseException) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0]
    # requests wraps the cause three times; the innermost part says it.
    cause = re.search(r"""Caused by \w+\(["'](.*)["']\)\)""", text)
    return (cause[1] if cause else text)[:200].strip(". ")


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)
