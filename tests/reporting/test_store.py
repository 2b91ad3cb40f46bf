"""Which runs a stage continues or begins, and stores that cannot be used."""

import http.server
import os
import shutil
import subprocess
import sys
import threading

import pytest
from mlflow import MlflowClient

from isim.experiments import preset
from isim.reporting import store
from isim.runtime.identity import md5


def tags_of(runs, name):
    return [run.data.tags.get(name) for run in runs]


def test_stages_of_one_execution_share_a_parent_and_go_no_deeper(tracked):
    for stage in ("prepare", "evaluate"):
        tracked.run(stage)
    (parent,) = tracked.runs(stage="pipeline")
    assert "mlflow.parentRunId" not in parent.data.tags
    (child,) = tracked.runs(stage="evaluate")
    children = [child, *tracked.runs(stage="prepare")]
    assert set(tags_of(children, "mlflow.parentRunId")) == {parent.info.run_id}
    assert [run.info.status for run in tracked.runs()] == ["FINISHED"] * 3
    # Flat, nested sections included; the parent holds all sections, a child its own.
    assert child.data.params["evaluate.crf.steps"] == parent.data.params["crf.steps"] == "2"
    assert "prepare.source" not in child.data.params
    assert parent.data.params["train_cam.scales"] == "[1.0, 0.5]"
    (dataset,) = (entry.dataset for entry in child.inputs.dataset_inputs)
    assert (dataset.name, dataset.digest) == ("prepared", "0123456789abcdef0123456789abcdef.dir")


def test_label_sets_have_runs_of_their_own(tracked):
    """One that was killed is gone on with, though another one has run since."""

    def train(name, error=None):
        own = {"identity": name, "label_set": name}
        return tracked.run("train_segmenter", lambda r: r.headline({"miou": 0.5}), error, **own)

    assert not train("seeds", KeyboardInterrupt()).resumed
    assert not train("round_02").resumed and train("seeds").resumed
    runs = tracked.runs(stage="train_segmenter")
    assert tags_of(runs, "label_set") == ["seeds", "round_02"]
    assert tags_of(runs, "isim.superseded_by") == [None, None]
    (parent,) = tracked.runs(stage="pipeline")
    names = {f"train_segmenter.{name}.miou" for name in ("seeds", "round_02")}
    assert set(parent.data.metrics) == names


def test_a_stage_run_again_supersedes_its_older_run(tracked):
    assert not any(tracked.run().resumed for _ in range(3))
    runs = tracked.runs(stage="train_cam")
    following = [runs[1].info.run_id, runs[2].info.run_id, None]
    assert tags_of(runs, "isim.superseded_by") == following
    assert len(tracked.runs(stage="pipeline")) == 1


def test_a_run_of_another_identity_is_not_continued(tracked):
    a, b, again = (tracked.run(error=KeyboardInterrupt(), identity=name) for name in "abb")
    assert [run.resumed for run in (a, b, again)] == [False, False, True]
    assert a.run_id != b.run_id == again.run_id


def test_experiments_of_dvc_are_kept_at_home(tracked, tmp_path_factory, monkeypatch):
    copy = tmp_path_factory.mktemp("temporary copy")
    shutil.copy(tracked.root / "params.yaml", copy)
    monkeypatch.setenv("DVC_ROOT", str(tracked.root))
    monkeypatch.setenv("DVC_EXP_NAME", "wary-eels")
    tracked.run(act=lambda run: run.artifact_file(copy / "params.yaml"), root=copy)
    assert [p.name for p in copy.iterdir()] == ["params.yaml"]
    (parent,) = tracked.runs(**{"isim.pipeline": "wary-eels", "stage": "pipeline"})
    assert parent.info.run_name == "wary-eels"
    assert list((tracked.root / "mlartifacts").rglob("params.yaml"))


def test_git_state_is_recorded(tracked):
    root = tracked.root

    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.check_output(command, cwd=root, text=True).strip()

    git("init", "-q")
    git("add", "params.yaml")
    git("commit", "-qm", "a")
    (root / "dvc.lock").write_text("schema: '2.0'\n")
    tracked.run()
    (root / "params.yaml").write_text((root / "params.yaml").read_text() + "# a comment\n")
    tracked.run()
    runs = tracked.runs(stage="train_cam")
    assert tags_of(runs, "isim.git_dirty") == ["false", "true"]
    assert tags_of(runs, "mlflow.source.git.commit")[0] == git("rev-parse", "HEAD")
    assert tags_of(runs, "isim.dvc_lock")[0] == md5(root / "dvc.lock")
    # A comment changes no parameter: still the same execution.
    (parent,) = tracked.runs(stage="pipeline")
    assert parent.info.run_name.startswith(git("rev-parse", "HEAD")[:8])


def test_an_experiment_that_another_project_has_just_created_is_used(tracked, monkeypatch):
    asked, real = [], MlflowClient.get_experiment_by_name

    def get(client, name):
        asked.append(name)
        if len(asked) > 1:
            return real(client, name)
        client.create_experiment(name)
        return None

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", get)
    tracked.run()
    assert len(tracked.runs(stage="train_cam")) == 1


def test_four_processes_may_touch_a_fresh_database_together(tmp_path):
    """Nothing of what MLflow can do without is imported, or missing afterwards."""
    (tmp_path / "params.yaml").write_text(preset.text("tiny"))
    script = """
import gc, sys
from pathlib import Path
from isim import params
from isim.reporting import tracking
root = Path(sys.argv[1])
section = params.load(root / "params.yaml").prepare
with tracking.stage_run("prepare", section, root, inputs={}, identity="a") as run:
    run.metrics({"figure": float(sys.argv[2])}, step=1)
from mlflow.telemetry.utils import is_telemetry_disabled
print([name for name in ("torch", "pandas") if name in sys.modules])
import pandas
print(is_telemetry_disabled(), gc.isenabled())
"""
    # MLflow switches its telemetry off by itself in tests.
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "PYTEST_CURRENT_TEST")}
    command, pipe = [sys.executable, "-c", script, str(tmp_path)], subprocess.PIPE
    processes = [
        subprocess.Popen([*command, n], env=environment, stdout=pipe, stderr=pipe, text=True)
        for n in "0123"
    ]
    # Migrations and MLflow talk a lot; none of it reaches the user.
    assert [process.communicate() for process in processes] == [("[]\nTrue True\n", "")] * 4
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("isim").experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 5
    figures = sorted(figure for run in runs for figure in run.data.metrics.values())
    assert figures == [0, 1, 2, 3]
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_creation_that_dies_leaves_no_database(tmp_path, monkeypatch):
    def die(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlflow.db.upgrade.main", die)
    with pytest.raises(KeyboardInterrupt):
        store.create_database(f"sqlite:///{tmp_path}/mlflow.db")
    assert [p.name for p in tmp_path.iterdir()] == [".isim"]


def test_an_unreachable_server_is_an_error_at_the_start(tracked, free_port, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port}")
    told = tracked.refused("unset MLFLOW_TRACKING_URI")
    assert "\n" not in told and "secret" not in told


def test_a_failing_server_is_asked_twice_only(tracked, monkeypatch):
    asked = []

    class Failing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *_arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        tracked.refused("cannot use the MLflow tracking store")
        server.shutdown()
    # MLflow's own seven retries take four minutes.
    assert len(asked) == 2


@pytest.mark.parametrize("name", ["mlflow.db", ".isim"])
def test_an_unusable_database_is_an_error_at_the_start(tracked, name):
    (tracked.root / "mlflow.db").unlink()
    (tracked.root / name).write_text("neither database nor folder " * 100)
    tracked.refused(str(tracked.root))
