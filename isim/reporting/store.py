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
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, unquote

from filelock import FileLock
from pydantic import BaseModel

from isim.errors import UserError, cut, printable, without_secrets
from isim.params import read_yaml
from isim.reporting import about, execution
from isim.reporting.execution import Execution, Key
from isim.runtime import memory
from isim.runtime.atomic import atomic_path, make_directory
from isim.runtime.identity import digest, md5
from isim.runtime.paths import home

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

EXPERIMENT = "isim"
# Without it MLflow opens its view of language models, which shows no training runs.
KIND = {"mlflow.experimentKind": "custom_model_development"}
# Limits of one log_batch request.
MAX_PARAMS, MAX_PARAM_LENGTH, MAX_TAG_LENGTH = 100, 6000, 7900
# Seconds to wait for another process that writes to the database.
_PATIENCE = 30
# Characters of an error's first line that are looked at.
_MOST_READ = 1 << 14
# Tags that the run of pictures has from its execution.
PICTURE_TAGS = ("isim.pipeline", "isim.project", "isim.version", "mlflow.user")
# MLflow imports them if it can, for data frames, sparse inputs of models and coloured error pages;
# without its servers (mlflow-skinny) it comes without them.
NOT_NEEDED = ("pandas", "pyarrow", "pygments", "scipy")

# Path and md5 of what a stage reads, by name.
Inputs = Mapping[str, tuple[Path, str]]


class Opened(NamedTuple):
    """Run of a stage as it was when opened, its parent, and the steps of what it holds by name.

    `pipeline` is what the project's files say of the execution that both belong to.
    """

    client: "MlflowClient"
    run: "StoredRun"
    parent_id: str
    pipeline: Execution
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
    with _reached(uri) as client:
        whole = read_yaml(root / "params.yaml")
        pipeline = execution.load(root, whole)
        shared = _shared_tags(root, digest(whole))
        with _lock(_folder_of(uri, root)):
            experiment = _experiment(client, uri, root)
            _mark_dead_runs(client, experiment, pipeline)
            parent = _parent(client, experiment, shared, whole)
            parent_id, name = str(parent.info.run_id), str(parent.info.run_name)
            own = _own_tags(stage, root, identity, label_set)
            own["mlflow.parentRunId"] = parent_id
            words = " ".join(filter(None, (stage, label_set)))
            child = _child(client, experiment, shared | own, f"{words} {name}")
        if not child.data.params:
            _log(client, child.info.run_id, {stage: params.model_dump()}, inputs)
        if parent.inputs is None or not parent.inputs.dataset_inputs:
            _log_data(client, parent_id, pipeline, inputs)
        opened = Opened(client, child, parent_id, pipeline, *_held(client, child, parent_id))
        carry(opened, (stage, label_set))
        return opened


def pictures_run(opened: Opened) -> str:
    """Find or create the run that holds the pictures of an execution and no parameter; its id."""
    client, parent = opened.client, opened.client.get_run(opened.parent_id)
    wanted = f"tags.stage = 'pictures' and tags.`mlflow.parentRunId` = '{opened.parent_id}'"
    for run in _all(client, parent.info.experiment_id, wanted):
        return str(run.info.run_id)
    kept = {k: v for k, v in parent.data.tags.items() if k in PICTURE_TAGS}
    tags = {**kept, "stage": "pictures", "mlflow.parentRunId": opened.parent_id}
    name = f"pictures {parent.info.run_name}"[:250]
    run = client.create_run(parent.info.experiment_id, tags=tags, run_name=name)
    client.set_terminated(run.info.run_id, "FINISHED")
    return str(run.info.run_id)


def refresh(root: Path) -> str:
    """Make the store ready for the user interface, and return its experiment's id.

    The database is created if there is none; runs whose process is gone are marked as such.

    Raises:
        UserError: The store cannot be reached, created or read.
    """
    uri = tracking_uri(root)
    with _reached(uri) as client:
        file = root / "params.yaml"
        pipeline = execution.load(root, read_yaml(file)) if file.exists() else None
        with _lock(_folder_of(uri, root)):
            experiment = _experiment(client, uri, root)
            _mark_dead_runs(client, experiment, pipeline)
    return experiment


@contextlib.contextmanager
def _reached(uri: str) -> Iterator["MlflowClient"]:
    """Yield a client of a store, whose database is made if need be.

    Whatever the store raises in the block becomes a UserError that names it.
    """
    try:
        with _mlflow() as mlflow:
            create_database(uri)
            yield mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    except UserError:
        raise
    # Drivers, HTTP, SQL: each back end has its own exceptions, the user one remedy.
    except Exception as error:
        own = "start or mend it, or unset MLFLOW_TRACKING_URI to track in mlflow.db"
        remedy = _remedy_of(error) or own
        if (code := _http_status(error)) in (401, 403):
            remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to an account of it"
        told = f"HTTP {code}" if code in (401, 403) else reason(error)
        raise UserError(
            f"cannot use the MLflow tracking store {cut(without_secrets(uri), 120)}: "
            f"{cut(told, 100)}; {remedy}"
        ) from error


def tracking_uri(root: Path) -> str:
    """Return `$MLFLOW_TRACKING_URI`, else the database `mlflow.db` in the home of `root`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or database_uri(home(root) / "mlflow.db")


def database_uri(path: Path) -> str:
    """Return the URI of an SQLite file, whatever the names of its folders hold."""
    if not set("%?") & set(str(path)):
        return f"sqlite:///{path}"
    # Behind a question mark SQLAlchemy reads options. Under the short name of the driver MLflow
    # would make a folder of the quoted text.
    quoted = quote(str(path))
    if _are_unquoted():
        return f"sqlite+pysqlite:///{quoted}"
    return f"sqlite+pysqlite:///file:{quoted}?uri=true"


def _are_unquoted() -> bool:
    """Tell whether SQLAlchemy takes the file of a URI for quoted, as it does since version 2.1."""
    from sqlalchemy.engine import make_url

    return make_url("sqlite:///a%20b").database == "a b"


def database_file(uri: str) -> Path | None:
    """Return the SQLite file of a URI; None for servers, other databases and those in memory."""
    found = re.match(r"sqlite(?:\+pysqlite)?:///(?P<path>[^?]+)(?P<options>\?.*)?$", uri, re.DOTALL)
    if found is None or ":memory:" in found["path"]:
        return None
    text = found["path"]
    if "uri=true" in (found["options"] or ""):
        text = unquote(text.removeprefix("file:"))
    elif "%" in text and _are_unquoted():
        text = unquote(text)
    return Path(text).resolve()


def create_database(uri: str) -> None:
    """Create an SQLite tracking database unless it exists; other URIs are left alone.

    Processes that touch a fresh database together leave it half-migrated for good, and so does
    one that dies on the way: the tables are made in a temporary file, which is then renamed.

    Raises:
        UserError: The folder cannot be written, or the file is no database.
    """
    path = database_file(uri)
    if path is None:
        return
    with _lock(path.parent):
        if not path.exists():
            with _mlflow(), atomic_path(path) as temporary:
                from mlflow.db import upgrade

                upgrade.main([database_uri(temporary)], standalone_mode=False)
    try:
        # MLflow retries to open a broken file for minutes.
        with contextlib.closing(sqlite3.connect(path, timeout=_PATIENCE)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        remedy = _remedy_of(error) or "move it away or restore it"
        raise UserError(f"cannot use the tracking database {path}: {error}; {remedy}") from error


def _remedy_of(error: BaseException) -> str:
    """Tell what mends a database that is whole, but not to be had now; empty for other faults."""
    told = str(error)
    if "database is locked" in told:
        return "another process holds it: wait until that has ended, and run the same command again"
    if "disk is full" in told:
        return "free space and run the same command again"
    if "readonly database" in told:
        return "fix the permissions of the file and its folder, and run the same command again"
    return ""


def reason(error: BaseException) -> str:
    """Return the first line of an error, of nested HTTP errors the innermost; without secrets."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    # SQLAlchemy's hint on its own use, before what went wrong.
    first = lines[1 if lines[0].startswith("(raised as a result of") and len(lines) > 1 else 0]
    # A server may answer with a megabyte, and a few words are shown.
    text = without_secrets(cut(first, _MOST_READ))
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


def _http_status(error: BaseException) -> int:
    """Return the HTTP status that an MLflow error stands for; 0 if it tells none."""
    told = re.search(r"error code (\d{3})", str(error))
    return int(told[1]) if told else 0


def _lock(folder: Path) -> FileLock:
    make_directory(folder / ".isim")
    return FileLock(folder / ".isim" / "tracking.lock")


def _folder_of(uri: str, root: Path) -> Path:
    """Folder of the lock: projects that share a database file wait for each other."""
    path = database_file(uri)
    return home(root) if path is None else path.parent


def _shared_tags(root: Path, params_digest: str) -> dict[str, str]:
    """Tags of a parent and its children; `isim.pipeline` names the pipeline execution."""
    commit = about.git(root, "rev-parse", "HEAD")
    experiment = os.environ.get("DVC_EXP_NAME", "").replace("'", "-")
    changes = about.git(root, "status", "--porcelain", "--untracked-files=no")
    remote = about.git(root, "remote", "get-url", "origin")
    tags = {
        "isim.pipeline": experiment or "-".join(filter(None, (commit[:8], params_digest))),
        "isim.params_digest": params_digest,
        "isim.project": str(home(root)),
        "isim.host": socket.gethostname(),
        **_process_tags(os.getpid()),
        "isim.version": about.release(),
        "mlflow.user": about.author(root),
        "mlflow.source.type": "LOCAL",
    }
    if commit:
        tags |= {
            "isim.git_dirty": "true" if changes else "false",
            "mlflow.source.git.commit": commit,
        }
    if remote:
        tags["mlflow.source.git.repoURL"] = remote
    return _cleaned(tags)


def _process_tags(pid: int) -> dict[str, str]:
    return {"isim.pid": str(pid), "isim.process": execution.started(pid)}


def _cleaned(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: about.clean(value)[:MAX_TAG_LENGTH] for name, value in tags.items()}


def _own_tags(stage: str, root: Path, identity: str, label_set: str) -> dict[str, str]:
    lock = root / "dvc.lock"
    tags = {
        "stage": stage,
        "isim.stage_digest": identity,
        "isim.dvc_lock": md5(lock) if lock.exists() else "none",
        "mlflow.source.name": f"isim {about.release()} {stage.replace('_', '-')}",
    }
    return tags | {"label_set": label_set} if label_set else tags


def _experiment(client: "MlflowClient", uri: str, root: Path) -> str:
    from mlflow.exceptions import MlflowException

    # Beside a database file; of a server only the server knows where they belong. In the working
    # directory, where they would land, `dvc exp run --temp` deletes them.
    folder = _folder_of(uri, root) / "mlartifacts"
    remote = uri.startswith(("http://", "https://"))
    known = client.get_experiment_by_name(EXPERIMENT)
    if known is None:
        artifacts = None if remote else folder.as_uri()
        try:
            return str(client.create_experiment(EXPERIMENT, artifacts, tags=KIND))
        except MlflowException:
            # Another project may have created it on the same store just now.
            known = client.get_experiment_by_name(EXPERIMENT)
            if known is None:
                raise
    number = str(known.experiment_id)
    if known.lifecycle_stage == "deleted":
        own = not os.environ.get("MLFLOW_TRACKING_URI")
        where = "MLFLOW_TRACKING_URI=sqlite:///mlflow.db " if own else ""
        raise UserError(
            f"the MLflow experiment {EXPERIMENT}, where runs are recorded, was deleted; restore it "
            f"by {where}mlflow experiments restore --experiment-id {number}"
        )
    if KIND.keys() - known.tags.keys():
        for name, value in KIND.items():
            client.set_experiment_tag(number, name, value)
    if not remote and known.artifact_location != folder.as_uri():
        _move_artifacts(uri, root, known.artifact_location, folder.as_uri())
    return number


def _move_artifacts(uri: str, root: Path, before: str, now: str) -> None:
    """Let a project that was moved or copied find and write its artifacts in its own folder."""
    path = database_file(uri)
    # A store that others share stays where it was made.
    if path is None or path != home(root) / "mlflow.db" or not before.endswith("/mlartifacts"):
        return
    places = {
        "experiments": ("artifact_location",),
        "runs": ("artifact_uri",),
        "model_versions": ("source", "storage_location"),
    }
    # MLflow has no call for it, and keeps absolute addresses in these columns.
    with contextlib.closing(sqlite3.connect(path, timeout=_PATIENCE)) as connection, connection:
        for table, columns in places.items():
            for column in columns:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (now, len(before) + 1, before, len(before) + 1, f"{before}/"),
                )
    place = printable(str(path.parent / "mlartifacts"))
    logging.getLogger(__name__).warning(
        f"the project was moved: MLflow's artifacts are those of {place} now"
    )


def _mark_dead_runs(
    client: "MlflowClient", experiment: str, pipeline: Execution | None = None
) -> None:
    """Mark runs of this host whose process is gone: KILLED, or a parent whose pipeline is done.

    A parent is RUNNING while the DVC lives that will run its next stage.
    """
    here = f"tags.`isim.host` = '{socket.gethostname()}'"
    for run in _all(client, experiment, f"attributes.status = 'RUNNING' and {here}"):
        tags = run.data.tags
        if execution.alive(tags.get("isim.pid", ""), tags.get("isim.process", "")):
            continue
        status = "KILLED"
        if tags.get("stage") == "pipeline" and pipeline is not None:
            same = tags.get("isim.params_digest") == digest(pipeline.params)
            ran = _ran(client, experiment, run.info.run_id)[0]
            if same and "isim.missing" in tags and not pipeline.missing(ran):
                status = "FINISHED"
                client.set_tag(run.info.run_id, "isim.missing", "")
        client.set_terminated(run.info.run_id, status)


def _all(client: "MlflowClient", experiment: str, wanted: str) -> Iterator["StoredRun"]:
    """Search all pages."""
    token = None
    while True:
        page = client.search_runs(
            [experiment],
            wanted,
            max_results=1000,
            page_token=token,
            order_by=["attributes.start_time DESC"],
        )
        yield from page
        if not (token := page.token):
            return


def _ran(
    client: "MlflowClient", experiment: str, parent_id: str
) -> tuple[dict[Key, float], dict[Key, "StoredRun"]]:
    """Look up the stages of an execution that ended well: when they began, and their runs."""
    runs: dict[Key, StoredRun] = {}
    for run in _all(client, experiment, f"tags.`mlflow.parentRunId` = '{parent_id}'"):
        if "isim.superseded_by" not in run.data.tags and run.info.status == "FINISHED":
            key = (run.data.tags.get("stage", ""), run.data.tags.get("label_set", ""))
            runs.setdefault(key, run)
    return {key: float(run.info.start_time) for key, run in runs.items()}, runs


def carry(opened: Opened, just: Key) -> None:
    """Record figures of stages that DVC skipped on the parent, from their reports, once."""
    from mlflow.entities import Metric

    client, parent_id = opened.client, opened.parent_id
    ran, _ = _ran(client, opened.run.info.experiment_id, parent_id)
    known = client.get_run(parent_id).data.metrics
    now = int(time.time() * 1000)
    points = [
        Metric(f"{'.'.join(filter(None, key))}.{name}", value, now, 0)
        for key, figures in opened.pipeline.skipped(ran, just).items()
        for name, value in figures.items()
    ]
    new = [point for point in points if point.key not in known]
    for start in range(0, len(new), 1000):
        client.log_batch(parent_id, metrics=new[start : start + 1000])


def close_parent(opened: Opened, just: Key, status: str) -> None:
    """End the parent as its pipeline is: FINISHED with all stages done, RUNNING while DVC goes on.

    Otherwise it is what the stage is, FAILED or KILLED; KILLED, too, after a stage that was run by
    itself. `isim.missing` names the stages that are to come.
    """
    from mlflow.entities import RunTag

    client, parent_id = opened.client, opened.parent_id
    # What DVC has recorded since the stage began.
    pipeline = execution.load(opened.pipeline.root, opened.pipeline.params)
    ran, runs = _ran(client, opened.run.info.experiment_id, parent_id)
    missing = pipeline.missing(ran, just if status == "FINISHED" else None)
    tags = {"isim.missing": ", ".join(missing)}
    driver = pipeline.goes_on(missing) if missing and status == "FINISHED" else None
    if driver is not None:
        tags |= {"isim.pid": str(driver.pid), "isim.process": driver.start}
    parent = client.get_run(parent_id)
    lines = [f"Missing so far: {', '.join(missing)}."] if missing else []
    shown = {key: run for key, run in runs.items() if "isim.sheet" in run.data.tags}
    order = [step.key for step in pipeline.steps]
    pictures = {
        " ".join(filter(None, key)): picture_address(run.info.run_id, run.data.tags["isim.sheet"])
        for key, run in sorted(shown.items(), key=lambda one: -_place(order, one[0]))
    }
    root = pipeline.root
    data = about.data_set(root, pipeline.params)
    tags["mlflow.note.content"] = about.description(
        pipeline.params, data, parent.data.metrics, pictures=pictures, lines=lines
    )
    cleaned = _cleaned(tags)
    client.log_batch(parent_id, tags=[RunTag(name, value) for name, value in cleaned.items()])
    if driver is not None:
        client.update_run(parent_id, status="RUNNING")
    elif missing and status == "FINISHED":
        client.set_terminated(parent_id, "KILLED")
    else:
        client.set_terminated(parent_id, status)


def _place(order: list[Key], key: Key) -> int:
    return order.index(key) if key in order else -1


def picture_address(run_id: str, path: str) -> str:
    """Return the address, in the user interface, of a picture among a run's artifacts."""
    return f"get-artifact?path={quote(path)}&run_uuid={run_id}"


def _parent(
    client: "MlflowClient", experiment: str, tags: Mapping[str, str], params: Mapping[str, Any]
) -> "StoredRun":
    """Reopen or create the run of the pipeline execution."""
    same = f"tags.stage = 'pipeline' and tags.`isim.params_digest` = '{tags['isim.params_digest']}'"
    for run in _all(client, experiment, same):
        # Compared here: names of folders and experiments may hold what a search cannot quote.
        names = ("isim.pipeline", "isim.project")
        if all(run.data.tags.get(name, tags[name]) == tags[name] for name in names):
            return client.get_run(_reopen(client, run, tags))
    source = f"isim {tags['isim.version']}"
    tags = {**tags, "stage": "pipeline", "mlflow.source.name": source}
    name = _name(client, experiment, params)
    run = client.create_run(experiment, tags=tags, run_name=name)
    _log(client, run.info.run_id, params, {})
    return run


def _name(client: "MlflowClient", experiment: str, params: Mapping[str, Any]) -> str:
    """Name an execution by what differs from others: method, encoder, seed, and what else does."""
    name = about.name(params)
    start = name.replace("'", "").replace("%", "")
    wanted = f"tags.stage = 'pipeline' and attributes.run_name LIKE '{start}%'"
    found = client.search_runs([experiment], wanted, max_results=1)
    parts = [name, *(about.differences(params, found[0].data.params) if found else ())]
    if experiment_name := os.environ.get("DVC_EXP_NAME"):
        parts.append(f"({about.clean(experiment_name)})")
    return " ".join(parts)[:250]


def _child(
    client: "MlflowClient", experiment: str, tags: Mapping[str, str], name: str
) -> "StoredRun":
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
        ours = run.data.tags.get("isim.host") == socket.gethostname()
        ended = run.info.status == "FINISHED" or (run.info.status == "RUNNING" and ours)
        if not ended and run.data.tags.get("isim.stage_digest") == tags["isim.stage_digest"]:
            return client.get_run(_reopen(client, run, {**tags, "isim.resumed": "true"}))
    # The legend of a comparison shows names only: a stage's word alone would stand there twice.
    new = client.create_run(experiment, tags=dict(tags), run_name=name[:250])
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
        Param(key_of(name, 240), value[:MAX_PARAM_LENGTH])
        for name, value in about.texts(params).items()
    ]
    for start in range(0, len(entries), MAX_PARAMS):
        client.log_batch(run_id, params=entries[start : start + MAX_PARAMS])
    # A DVC directory md5 with its `.dir` is 36 characters, just what a dataset digest may hold.
    datasets = [
        DatasetInput(Dataset(name, hash_[:36], "dvc", _source(path)))
        for name, (path, hash_) in inputs.items()
    ]
    if datasets:
        client.log_inputs(run_id, datasets)


def _log_data(client: "MlflowClient", run_id: str, pipeline: Execution, inputs: Inputs) -> None:
    """Tell of an execution which images it is about, as soon as a stage has read them."""
    from mlflow.entities import Dataset, DatasetInput

    for path, hash_ in inputs.values():
        if (pipeline.root / "data/prepared") in (path, *path.parents):
            name = about.data_set(pipeline.root, pipeline.params)
            client.log_inputs(
                run_id, [DatasetInput(Dataset(name, hash_[:36], "dvc", _source(path)))]
            )
            return


def _source(path: Path) -> str:
    return json.dumps({"path": about.clean(str(path))})


def key_of(name: str, most: int = 100) -> str:
    """Write a name of any script with what MLflow allows in keys; names that differ stay so."""
    allowed = re.sub(r"[^A-Za-z0-9_\-./ ]", "_", name)
    # What MLflow would take for a place outside the run's folder, or a file system refuses.
    parts = [part.strip(" ") for part in allowed.split("/")]
    odd = any(part.strip(".") == "" or part.startswith(".") for part in parts)
    if allowed == name and not odd and len(allowed) <= most and parts == allowed.split("/"):
        return name
    kept = "/".join(part.lstrip(".") or "_" for part in parts)[: most - 17].rstrip(" ./")
    return f"{kept or '_'} {digest({'name': name.encode('utf-8', 'surrogatepass').hex()})}"


def _held(
    client: "MlflowClient", run: "StoredRun", parent_id: str
) -> tuple[set[tuple[str, int]], ...]:
    """Look up what a resumed run holds: names and steps of figures, keys and steps of pictures."""
    if "isim.resumed" not in run.data.tags:
        return set(), set()
    metrics = {
        (name, point.step)
        for name in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, name)
    }
    names: list[str] = []
    wanted = f"tags.stage = 'pictures' and tags.`mlflow.parentRunId` = '{parent_id}'"
    for pictures in _all(client, run.info.experiment_id, wanted):
        # Pictures of an artifact store that is gone may come twice; the run goes on.
        with contextlib.suppress(Exception):
            files = client.list_artifacts(pictures.info.run_id, "images")
            names += [Path(file.path).name for file in files]
    # MLflow names them <key, / as ~>+step+<step>+timestamp+...
    found = [re.match(r"(.+?)\+step\+(\d+)\+", name) for name in names]
    return metrics, {(match[1].replace("~", "/"), int(match[2])) for match in found if match}
