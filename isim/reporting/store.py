"""MLflow store: where it is, and which runs of it a stage continues or begins.

One experiment, one parent run a pipeline execution, one child a stage, never deeper.
"""

import contextlib
import json
import logging
import os
import re
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock
from pydantic import BaseModel

from isim.errors import UserError
from isim.params import flatten, read_yaml
from isim.runtime import memory
from isim.runtime.atomic import atomic_path, make_directory
from isim.runtime.identity import digest, md5
from isim.runtime.paths import home

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

EXPERIMENT = "isim"
# Limits of one log_batch request.
MAX_PARAMS, MAX_PARAM_LENGTH = 100, 6000
# MLflow imports them if it can, for data frames, sparse inputs of models and coloured error pages;
# without its servers (mlflow-skinny) it comes without them.
NOT_NEEDED = ("pandas", "pyarrow", "pygments", "scipy")

# Path and md5 of what a stage reads, by name.
Inputs = Mapping[str, tuple[Path, str]]


class Opened(NamedTuple):
    """Run of a stage as it was when opened, its parent, and the steps of what it holds by name."""

    client: "MlflowClient"
    run: "StoredRun"
    parent_id: str
    metrics: set[tuple[str, int]]
    images: set[tuple[str, int]]


def open_run(
    stage: str, params: BaseModel, root: Path, *, inputs: Inputs, identity: str, label_set: str
) -> Opened:
    """Reopen or create a stage's run and its parent; the arguments are `tracking.stage_run`'s.

    Runs of this host whose process is gone are marked KILLED before (kill -9 gives a run no chance
    to end itself).

    Raises:
        UserError: The store cannot be reached, created or read.
    """
    uri = tracking_uri(root)
    try:
        with _mlflow() as mlflow:
            create_database(uri)
            client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
            whole = read_yaml(root / "params.yaml")
            shared = _shared_tags(root, digest(whole))
            with _lock(home(root)):
                experiment = _experiment(client, uri, root)
                _mark_dead_runs(client, experiment)
                parent_id = _parent(client, experiment, shared, whole)
                own = _own_tags(stage, root, identity, label_set)
                own["mlflow.parentRunId"] = parent_id
                child = _child(client, experiment, shared | own)
            if not child.data.params:
                _log(client, child.info.run_id, {stage: params.model_dump()}, inputs)
            return Opened(client, child, parent_id, *_held(client, child))
    except UserError:
        raise
    # Drivers, HTTP, SQL: each back end has its own exceptions, the user one remedy.
    except Exception as error:
        without_password = re.sub(r"//[^/@]*@", "//", uri)
        raise UserError(
            f"cannot use the MLflow tracking store {without_password}: {reason(error)}; "
            "start or mend it, or unset MLFLOW_TRACKING_URI to track in mlflow.db"
        ) from error


def tracking_uri(root: Path) -> str:
    """Return `$MLFLOW_TRACKING_URI`, else the database `mlflow.db` in the home of `root`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home(root) / 'mlflow.db'}"


def create_database(uri: str) -> None:
    """Create an SQLite tracking database unless it exists; other URIs are left alone.

    Processes that touch a fresh database together leave it half-migrated for good, and so does
    one that dies on the way: the tables are made in a temporary file, which is then renamed.

    Raises:
        UserError: The folder cannot be written, or the file is no database.
    """
    if not uri.startswith("sqlite:///") or uri.endswith(":memory:"):
        return
    path = Path(uri.removeprefix("sqlite:///")).resolve()
    with _lock(path.parent):
        if not path.exists():
            with _mlflow(), atomic_path(path) as temporary:
                from mlflow.db import upgrade

                upgrade.main([f"sqlite:///{temporary}"], standalone_mode=False)
    try:
        # MLflow retries to open a broken file for minutes.
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        raise UserError(
            f"cannot use the tracking database {path}: {error}; move it away or restore it"
        ) from error


def reason(error: BaseException) -> str:
    """Return the first line of an error, of nested HTTP errors the innermost."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    # requests wraps the cause three times.
    cause = re.search(r"""Caused by \w+\(["'](.*)["']\)\)""", text)
    return (cause[1] if cause else text)[:200].strip(". ")


@contextlib.contextmanager
def _mlflow() -> Iterator[Any]:
    """Import MLflow, and in the block what a store needs, in little more than half the CPU time.

    Less is imported, and no garbage is looked for meanwhile; modules that are there already stay.
    """
    # Set before the import, which reads them; whatever the user has set stays.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow would retry for minutes; one retry survives a dropped keep-alive connection.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    hidden = [name for name in NOT_NEEDED if name not in sys.modules]
    # Python's own way to say that there is no such module.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        with memory.uncollected():
            import mlflow

            # Failures arrive as exceptions; their logs, retries and tracebacks would come on top.
            for name in ("mlflow", "alembic", "urllib3.connectionpool"):
                logging.getLogger(name).setLevel(logging.ERROR)
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
            yield mlflow
    finally:
        for name in hidden:
            del sys.modules[name]


def _lock(folder: Path) -> FileLock:
    make_directory(folder / ".isim")
    return FileLock(folder / ".isim" / "tracking.lock")


def _shared_tags(root: Path, params_digest: str) -> dict[str, str]:
    """Tags of a parent and its children; `isim.pipeline` names the pipeline execution."""

    def git(*arguments: str) -> str:
        command, nowhere = ["git", *arguments], subprocess.DEVNULL
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.check_output(
                command, cwd=root, stderr=nowhere, encoding="utf-8"
            ).strip()
        return ""

    commit = git("rev-parse", "HEAD") or "nogit"
    experiment = os.environ.get("DVC_EXP_NAME", "").replace("'", "-")
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "isim.pipeline": experiment or f"{commit[:8]}-{params_digest}",
        "isim.params_digest": params_digest,
        "isim.host": socket.gethostname(),
        "isim.pid": str(os.getpid()),
        "isim.git_dirty": "true" if changes else "false",
        "mlflow.source.git.commit": commit,
    }


def _own_tags(stage: str, root: Path, identity: str, label_set: str) -> dict[str, str]:
    lock = root / "dvc.lock"
    tags = {
        "stage": stage,
        "isim.stage_digest": identity,
        "isim.dvc_lock": md5(lock) if lock.exists() else "none",
        "mlflow.source.name": f"isim {stage.replace('_', '-')}",
        "mlflow.source.type": "LOCAL",
    }
    return tags | {"label_set": label_set} if label_set else tags


def _experiment(client: "MlflowClient", uri: str, root: Path) -> str:
    from mlflow.exceptions import MlflowException

    known = client.get_experiment_by_name(EXPERIMENT)
    if known is None:
        # A server knows where its artifacts belong; beside a database they would land in the
        # working directory, which `dvc exp run --temp` deletes.
        remote = uri.startswith(("http://", "https://"))
        artifacts = None if remote else (home(root) / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=artifacts))
        except MlflowException:
            # Another project may have created it on the same store just now.
            known = client.get_experiment_by_name(EXPERIMENT)
            if known is None:
                raise
    return str(known.experiment_id)


def _mark_dead_runs(client: "MlflowClient", experiment: str) -> None:
    here = f"tags.`isim.host` = '{socket.gethostname()}'"
    for run in client.search_runs([experiment], f"attributes.status = 'RUNNING' and {here}"):
        try:
            os.kill(int(run.data.tags["isim.pid"]), 0)
        except ProcessLookupError:
            client.set_terminated(run.info.run_id, "KILLED")
        except PermissionError:
            pass  # a living process of another user


def _parent(
    client: "MlflowClient", experiment: str, tags: Mapping[str, str], params: Mapping[str, Any]
) -> str:
    """Reopen or create the run of the pipeline execution; return its id."""
    names = ("isim.pipeline", "isim.params_digest")
    same = " and ".join(f"tags.`{name}` = '{tags[name]}'" for name in names)
    found = client.search_runs([experiment], f"tags.stage = 'pipeline' and {same}", max_results=1)
    if found:
        return _reopen(client, found[0], tags)
    tags = {**tags, "stage": "pipeline"}
    run = client.create_run(experiment, tags=tags, run_name=tags["isim.pipeline"])
    _log(client, run.info.run_id, params, {})
    return str(run.info.run_id)


def _child(client: "MlflowClient", experiment: str, tags: Mapping[str, str]) -> "StoredRun":
    """Reopen the newest unfinished run of the same identity, else supersede what there is."""
    names = ("mlflow.parentRunId", "stage")
    same = " and ".join(f"tags.`{name}` = '{tags[name]}'" for name in names)
    older = client.search_runs([experiment], same, order_by=["attributes.start_time DESC"])
    current = [
        run
        for run in older
        if "isim.superseded_by" not in run.data.tags
        and run.data.tags.get("label_set") == tags.get("label_set")
    ]
    for run in current:
        # One of another host may be dead; of this host the dead are marked.
        ours = run.data.tags["isim.host"] == socket.gethostname()
        ended = run.info.status == "FINISHED" or (run.info.status == "RUNNING" and ours)
        if not ended and run.data.tags["isim.stage_digest"] == tags["isim.stage_digest"]:
            return client.get_run(_reopen(client, run, {**tags, "isim.resumed": "true"}))
    # The legend of a comparison shows names only: a stage's word would stand there twice.
    words = (tags["stage"], tags.get("label_set"), tags["isim.pipeline"])
    new = client.create_run(experiment, tags=dict(tags), run_name=" ".join(filter(None, words)))
    for run in current:
        client.set_tag(run.info.run_id, "isim.superseded_by", new.info.run_id)
    return new


def _reopen(client: "MlflowClient", run: "StoredRun", tags: Mapping[str, str]) -> str:
    from mlflow.entities import RunTag

    run_id = str(run.info.run_id)
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
    client.update_run(run_id, status="RUNNING")
    return run_id


def _log(client: "MlflowClient", run_id: str, params: Mapping[str, Any], inputs: Inputs) -> None:
    from mlflow.entities import Dataset, DatasetInput, Param

    entries = [
        Param(name, (value if isinstance(value, str) else json.dumps(value))[:MAX_PARAM_LENGTH])
        for name, value in flatten(params).items()
    ]
    for start in range(0, len(entries), MAX_PARAMS):
        client.log_batch(run_id, params=entries[start : start + MAX_PARAMS])
    # A DVC directory md5 with its `.dir` is 36 characters, just what a dataset digest may hold.
    datasets = [
        DatasetInput(Dataset(name, hash_, "dvc", json.dumps({"path": str(path)})))
        for name, (path, hash_) in inputs.items()
    ]
    if datasets:
        client.log_inputs(run_id, datasets)


def _held(client: "MlflowClient", run: "StoredRun") -> tuple[set[tuple[str, int]], ...]:
    """Look up what a resumed run holds: names and steps of figures, keys and steps of pictures."""
    if "isim.resumed" not in run.data.tags:
        return set(), set()
    run_id = run.info.run_id
    metrics = {
        (name, point.step)
        for name in run.data.metrics
        for point in client.get_metric_history(run_id, name)
    }
    # MLflow names them <key, / as ~>+step+<step>+timestamp+...
    names = [Path(file.path).name for file in client.list_artifacts(run_id, "images")]
    found = [re.match(r"(.+?)\+step\+(\d+)\+", name) for name in names]
    return metrics, {(match[1].replace("~", "/"), int(match[2])) for match in found if match}
