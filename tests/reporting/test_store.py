"""Which runs a stage continues or begins, and stores that cannot be used."""

import contextlib
import http.server
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient

from isim.errors import UserError
from isim.experiments import preset
from isim.reporting import execution, store
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
    # Two stages are not the pipeline.
    assert {run.info.status for run in children} == {"FINISHED"}
    assert parent.info.status == "KILLED" and "train_cam" in parent.data.tags["isim.missing"]
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
    assert parent.info.run_name == "deeplabcam resnet10t seed 0 (wary-eels)"
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
    assert parent.data.tags["isim.pipeline"].startswith(git("rev-parse", "HEAD")[:8])
    remote = "https://ann:ghp_secret@example.org/a.git"
    git("remote", "add", "origin", remote)
    git("config", "user.name", "Ann")
    tracked.run("prepare")
    (run,) = tracked.runs(stage="prepare")
    assert run.data.tags["mlflow.user"] == "Ann"
    assert run.data.tags["mlflow.source.git.repoURL"] == "https://***@example.org/a.git"


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
    assert sorted(run.info.status for run in runs) == [*["FINISHED"] * 4, "KILLED"]
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


@pytest.mark.parametrize(
    "address",
    [
        "http://me:{}@127.0.0.1:{}",
        "http://me@127.0.0.1:{1}/?password={0}",
        "postgresql://me:{}@127.0.0.1:{}/isim",
        "postgresql://127.0.0.1:{1}/isim?password={0}",
    ],
)
@pytest.mark.parametrize("secret", ["s3cret", "p@ssw0rd", "pa/ssw0rd", "pa%2Fssw0rd"])
def test_a_store_out_of_reach_is_one_line_without_secrets(
    address, secret, tracked, free_port, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.format(secret, free_port))
    told = tracked.refused("unset MLFLOW_TRACKING_URI")
    assert "\n" not in told and len(told) < 300
    assert not [part for part in (secret, "s3cret", "ssw0rd") if part in told]


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


@pytest.mark.parametrize(
    "name", ["a%20b", "what?", "a#b", "two words", "狐 ä", "a%b?x=1&y", "it's", "u@h:1", 'a"b;c']
)
def test_any_name_of_a_folder_will_do(name, tmp_path, project_at):
    root = tmp_path / name
    project = project_at(root)
    project.run(act=lambda run: run.artifact_file(root / "params.yaml"))
    assert len(project.runs(stage="train_cam")) == 1
    assert list((root / "mlartifacts").rglob("params.yaml"))
    # Nothing beside it, as in a folder whose name ends at a question mark.
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert store.database_file(store.tracking_uri(root)) == root / "mlflow.db"


@pytest.mark.parametrize(
    ("told", "remedy"),
    [
        ("database is locked", "another process holds it: wait"),
        ("database or disk is full", "free space"),
        ("attempt to write a readonly database", "fix the permissions"),
        ("file is not a database", ""),
    ],
)
def test_a_whole_database_that_is_not_to_be_had_now_is_not_to_be_moved(
    told, remedy, tracked, monkeypatch
):
    """A user who moved away one that is locked would lose sight of all runs."""
    hint = "(raised as a result of Query-invoked autoflush; consider using a no_autoflush block)"
    said = RuntimeError(f"{hint}\n(sqlite3.OperationalError) {told}\n[SQL: INSERT]")

    def fail(*_arguments):
        raise said

    monkeypatch.setattr(store, "_experiment", fail)
    with pytest.raises(UserError, match=f"{told}; {remedy or 'start or mend it'}"):
        store.refresh(tracked.root)


def test_a_locked_database_is_waited_for_and_not_to_be_moved(tracked, monkeypatch):
    path = tracked.root / "mlflow.db"
    with tracked.open():
        pass
    monkeypatch.setattr(store, "_PATIENCE", 0.1)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="locked; another process holds it: wait") as told:
            store.create_database(store.database_uri(path))
    assert "move it away" not in str(told.value)


def test_a_database_is_made_in_a_folder_of_any_name(tmp_path):
    path = tmp_path / "what? 100%20" / "mlflow.db"
    store.create_database(store.database_uri(path))
    assert [found.name for found in tmp_path.iterdir()] == ["what? 100%20"]
    assert path.stat().st_size > 0


def test_a_moved_project_keeps_its_artifacts_with_it(tracked, project_at, tmp_path_factory):
    old = tracked.root
    weights = old / "model.safetensors"
    weights.write_bytes(b"weights")

    def act(run):
        run.artifact_file(old / "params.yaml")
        run.register_model("cam", weights)

    before = tracked.run(act=act).run_id
    new = tmp_path_factory.mktemp("moved") / "project"
    shutil.copytree(old, new)
    shutil.rmtree(old / "mlartifacts")
    moved = project_at(new)
    run = moved.run(act=lambda run: run.artifact_file(new / "params.yaml"), identity="b")
    assert not (old / "mlartifacts").exists()
    for run_id in (before, run.run_id):
        where = moved.client.get_run(run_id).info.artifact_uri
        assert where.startswith((new / "mlartifacts").as_uri())
        found = moved.client.download_artifacts(run_id, "params.yaml")
        assert Path(found).read_text() == (new / "params.yaml").read_text()


def test_a_deleted_experiment_is_one_line_with_the_remedy(tracked, monkeypatch):
    tracked.run()
    number = tracked.client.get_experiment_by_name("isim").experiment_id
    tracked.client.delete_experiment(number)
    told = tracked.refused("was deleted")
    assert len(told) < 300 and "\n" not in told
    command = told.partition("restore it by ")[2]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", command], cwd=tracked.root, env=environment, check=True)
    tracked.run()


def test_a_process_that_took_the_number_of_another_is_not_its_run(tracked):
    """As in containers, where each first process is number 1."""
    with tracked.open() as run:
        pass
    client = tracked.client
    for start, status in ((execution.started(os.getpid()), "RUNNING"), ("a boot 1", "KILLED")):
        client.set_tag(run.run_id, "isim.pid", str(os.getpid()))
        client.set_tag(run.run_id, "isim.process", start)
        client.update_run(run.run_id, status="RUNNING")
        store.refresh(tracked.root)
        assert client.get_run(run.run_id).info.status == status


def test_two_projects_may_start_on_one_fresh_store(tmp_path, monkeypatch):
    """Each has an execution of its own, though nothing but the folder tells them apart."""
    script = """
import sys
from pathlib import Path
from isim import params
from isim.reporting import tracking
root = Path(sys.argv[1])
section = params.load(root / "params.yaml").prepare
weights = root / "w.safetensors"
weights.write_bytes(b"w")
with tracking.stage_run("prepare", section, root, inputs={}, identity="a") as run:
    run.register_model("cam", weights)
"""
    uri = f"sqlite:///{tmp_path / 'shared.db'}"
    kept = {k: v for k, v in os.environ.items() if k not in ("CI", "PYTEST_CURRENT_TEST")}
    pipe, processes = subprocess.PIPE, []
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "params.yaml").write_text(preset.text("tiny"))
        command = [sys.executable, "-c", script, str(tmp_path / name)]
        env = kept | {"MLFLOW_TRACKING_URI": uri}
        processes.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True))
    assert [process.communicate() for process in processes] == [("", "")] * 2
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("isim").experiment_id])
    assert len({run.data.tags["isim.project"] for run in runs}) == 2 and len(runs) == 4
    assert len(client.search_model_versions("name = 'cam'")) == 2


def test_names_tell_what_differs(tracked):
    for old, new in (("", ""), ("seed: 0", "seed: 1"), ("warmup_epochs: 1", "warmup_epochs: 2")):
        text = preset.text("tiny")
        assert old in text
        (tracked.root / "params.yaml").write_text(text.replace(old, new))
        tracked.run()
    names = [run.info.run_name for run in tracked.runs(stage="pipeline")]
    base = "deeplabcam resnet10t seed"
    assert names == [f"{base} 0", f"{base} 1", f"{base} 0 warmup_epochs 2"]
    children = [run.info.run_name for run in tracked.runs(stage="train_cam")]
    assert children == [f"train_cam {name}" for name in names]


@pytest.mark.parametrize(
    "text", ["a_1", "狐", "鴨", "a/b", "a//b", "../x", "..", " a", "a ", "x" * 300]
)
def test_keys_are_taken_and_distinct(text):
    key = store.key_of(text)
    assert re.fullmatch(r"[A-Za-z0-9_\-./ ]{1,100}", key)
    assert not {"", ".", ".."} & set(key.split("/")) or text == "a//b"


@given(st.text(max_size=120), st.text(max_size=120))
def test_different_names_have_different_keys(one, other):
    assert (store.key_of(one) == store.key_of(other)) == (one == other)
