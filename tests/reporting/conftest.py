"""A project whose runs are tracked, and tracking servers."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient

from isim.errors import UserError
from isim.experiments import preset
from isim.reporting import store, tracking

PARAMS = preset.parameters("tiny")


class Project:
    """A folder with a database and parameters, but no git."""

    def __init__(self, root):
        self.root = root
        self.client = MlflowClient(store.database_uri(root / "mlflow.db"))

    def open(self, stage="train_cam", *, root=None, identity="a", label_set="", **changes):
        section = getattr(PARAMS, stage).model_copy(update=changes)
        inputs = {"prepared": (self.root / "data", "0123456789abcdef0123456789abcdef.dir")}
        about = {"inputs": inputs, "identity": identity, "label_set": label_set}
        return tracking.stage_run(stage, section, root or self.root, **about)

    def run(self, stage="train_cam", act=lambda run: None, error=None, **changes):
        """A run in which a stage did something, and then met an error."""
        told = pytest.raises(type(error)) if error else contextlib.nullcontext()
        with told, self.open(stage, **changes) as run:
            act(run)
            if error:
                raise error
        return run

    def refused(self, words):
        """The error, with these words, before a stage that is not tracked."""
        with pytest.raises(UserError, match=words) as caught, self.open():
            pytest.fail("the stage ran")
        return str(caught.value)

    def runs(self, **tags):
        """Runs with these tags, oldest first."""
        experiment = self.client.get_experiment_by_name("isim").experiment_id
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        return self.client.search_runs([experiment], wanted, order_by=["attributes.start_time ASC"])

    def table(self, run, name):
        def refuse(constant):
            raise AssertionError(f"{constant} is no JSON")

        path = self.client.download_artifacts(run.run_id, f"{name}.json")
        return json.loads(Path(path).read_text(), parse_constant=refuse)

    def history(self, run_id, name):
        return [(p.step, p.value) for p in self.client.get_metric_history(run_id, name)]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    names = ("TRACKING_URI", "HTTP_REQUEST_MAX_RETRIES", "HTTP_REQUEST_TIMEOUT")
    for name in ("DVC_ROOT", "DVC_EXP_NAME", *(f"MLFLOW_{name}" for name in names)):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory):
    """Making the tables takes seconds: once, then copied."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    store.create_database(f"sqlite:///{path}")
    return path


@pytest.fixture
def project_at(fresh_database):
    """A function that makes a project in a folder, or finds the one that is there."""

    def make(root):
        if not (root / "mlflow.db").exists():
            root.mkdir(exist_ok=True)
            shutil.copy(fresh_database, root / "mlflow.db")
            (root / "params.yaml").write_text(preset.text("tiny"))
        return Project(root)

    return make


@pytest.fixture
def tracked(tmp_path, project_at):
    return project_at(tmp_path)


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def serve(free_port, tmp_path_factory):
    """A function that starts an MLflow server at `free_port`; it returns when that answers."""
    folder = tmp_path_factory.mktemp("server")
    started = []

    def start(command, environment):
        own = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true"}
        with (folder / "log").open("w") as log:
            own = {"env": environment | own, "stdout": log, "stderr": log}
            process = subprocess.Popen(command, cwd=folder, start_new_session=True, **own)
        started.append(process)
        end = time.monotonic() + 180
        while True:
            # Errors of urllib are OSErrors.
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{free_port}/health", timeout=5)
                return process
            waiting = process.poll() is None and time.monotonic() < end
            assert waiting, (folder / "log").read_text()
            time.sleep(0.2)

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
