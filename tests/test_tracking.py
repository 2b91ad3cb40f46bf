import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from isim import params, tracking
from isim.errors import UserError

ROOT = Path(__file__).parents[1]
PARAMS = params.load(ROOT / "params.yaml")
# What a child process of a test runs before its own code.
HEAD = f"""
import os, signal, sys
from pathlib import Path
from isim import params, tracking
PARAMS = params.load(Path({str(ROOT / "params.yaml")!r}))
ROOT = Path(sys.argv[1])
"""


@pytest.fixture(scope="module")
def fresh_database(tmp_path_factory):
    """Making the tables takes seconds: once, then copied."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    tracking.create_database(f"sqlite:///{path}")
    return path


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    names = ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_EXP_NAME")
    for name in (*names, "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root(tmp_path, fresh_database):
    """A project folder with a database, parameters and an input, but no git."""
    shutil.copy(fresh_database, tmp_path / "mlflow.db")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.csv").write_text("id\n1\n")
    return tmp_path


def open_run(root, stage="train_cam", section=PARAMS.train_cam):
    return tracking.stage_run(stage, section, root, {"prepared": root / "data"})


def client_of(root):
    return MlflowClient(f"sqlite:///{root / 'mlflow.db'}")


def runs_of(client, **tags):
    experiment = client.get_experiment_by_name("isim")
    wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    return client.search_runs(
        [experiment.experiment_id], wanted, order_by=["attributes.start_time ASC"]
    )


def history(client, run, name):
    return [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, name)]


def set_parameter(root, name, value):
    text = (root / "params.yaml").read_text()
    assert f"\n  {name}: " in text
    lines = [
        f"  {name}: {value}" if line.startswith(f"  {name}: ") else line
        for line in text.splitlines()
    ]
    (root / "params.yaml").write_text("\n".join(lines) + "\n")
    return params.load(root / "params.yaml")


def test_the_histories_of_two_executions_can_be_compared(root):
    expected = {}
    for epochs, gain in ((60, 0.10), (65, 0.05)):
        section = set_parameter(root, "epochs", epochs).train_cam
        with open_run(root, section=section) as run:
            for number in (1, 2, 3):
                figures = {"cam_miou": 0.3 + gain * number, "pseudo_label_miou": 0.4}
                run.metrics(figures, step=number)
            run.headline({"cam_miou": figures["cam_miou"]})
        expected[str(epochs)] = [(number, 0.3 + gain * number) for number in (1, 2, 3)]
    client = client_of(root)
    children = runs_of(client, stage="train_cam")
    found = {r.data.params["train_cam.epochs"]: history(client, r, "cam_miou") for r in children}
    # The headline adds no point to the curve.
    assert found == expected
    parents = runs_of(client, stage="pipeline")
    assert len(parents) == 2
    assert {c.data.tags["mlflow.parentRunId"] for c in children} == {p.info.run_id for p in parents}
    board = {p.data.params["train_cam.epochs"]: p.data.metrics for p in parents}
    assert board["60"]["train_cam.cam_miou"] == pytest.approx(0.6)
    assert board["65"]["train_cam.cam_miou"] == pytest.approx(0.45)


def test_stages_of_one_execution_share_a_parent_and_go_no_deeper(root):
    with open_run(root, "prepare", PARAMS.prepare):
        pass
    with open_run(root, "evaluate", PARAMS.evaluate) as run:
        run.headline({"cam_miou": 0.5})
    client = client_of(root)
    (parent,) = runs_of(client, stage="pipeline")
    assert "mlflow.parentRunId" not in parent.data.tags
    assert parent.info.status == "FINISHED"
    (child,) = runs_of(client, stage="evaluate")
    (prepare,) = runs_of(client, stage="prepare")
    assert child.data.metrics == {"cam_miou": 0.5}
    for stored in (child, prepare):
        assert stored.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert stored.info.status == "FINISHED"
    # Flat, nested sections included; the parent holds all sections, a child its own.
    assert child.data.params["evaluate.crf.steps"] == "10"
    assert "prepare.source" not in child.data.params
    assert parent.data.params["train_cam.scales"] == str(list(PARAMS.train_cam.scales))
    (dataset,) = (entry.dataset for entry in child.inputs.dataset_inputs)
    assert (dataset.name, dataset.digest) == ("prepared", tracking.md5(root / "data"))


def test_label_sets_have_runs_of_their_own(root):
    """One that was killed is gone on with, though another one has run since."""
    figures = {"seeds": 0.2, "round_02": 0.3}

    def open_segmenter(name):
        section = PARAMS.train_segmenter
        return tracking.stage_run("train_segmenter", section, root, {}, name)

    with pytest.raises(KeyboardInterrupt), open_segmenter("seeds") as run:
        raise KeyboardInterrupt
    killed = run.run_id
    for name in ("round_02", "seeds"):
        with open_segmenter(name) as run:
            assert run.resumed == (name == "seeds")
            assert (run.run_id == killed) == (name == "seeds")
            run.headline({"val_miou": figures[name]})
    client = client_of(root)
    runs = runs_of(client, stage="train_segmenter")
    assert {run.data.tags["label_set"] for run in runs} == set(figures) and len(runs) == 2
    assert not any("isim.superseded_by" in run.data.tags for run in runs)
    assert len({run.data.tags["isim.stage_digest"] for run in runs}) == 2
    (parent,) = runs_of(client, stage="pipeline")
    for name, figure in figures.items():
        assert parent.data.metrics[f"train_segmenter.{name}.val_miou"] == figure


def test_a_stage_run_again_supersedes_its_older_run(root):
    for _ in range(3):
        with open_run(root) as run:
            run.metrics({"loss": 1.0}, step=1)
            assert not run.resumed
    client = client_of(root)
    first, second, third = runs_of(client, stage="train_cam")
    assert first.data.tags["isim.superseded_by"] == second.info.run_id
    assert second.data.tags["isim.superseded_by"] == third.info.run_id
    assert "isim.superseded_by" not in third.data.tags
    assert len(runs_of(client, stage="pipeline")) == 1


def test_a_killed_stage_continues_its_run_without_doubling_steps(root):
    script = """
with tracking.stage_run("train_cam", PARAMS.train_cam, ROOT, {"prepared": ROOT / "data"}) as run:
    import numpy
    for epoch in (1, 2, 3):
        run.metrics({"loss": 1 / epoch}, step=epoch)
    run.image("pictures/a_1", numpy.zeros((4, 4, 3), numpy.uint8), step=1)
    run.table("per_class", [{"round": 1}])
    run.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", HEAD + script, str(root)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    client = client_of(root)
    (killed,) = runs_of(client, stage="train_cam")
    assert killed.info.status == "RUNNING"

    # Another stage notices that the process is gone.
    with open_run(root, "prepare", PARAMS.prepare):
        assert client.get_run(killed.info.run_id).info.status == "KILLED"
    with open_run(root) as run:
        assert run.resumed and run.run_id == killed.info.run_id
        # The checkpoint was of epoch 2: epoch 3 and the round's pictures come again.
        for epoch in (3, 4):
            run.metrics({"loss": 1 / epoch}, step=epoch)
        for number in (1, 2):
            run.image("pictures/a_1", np.zeros((4, 4, 3), np.uint8), step=number)
        run.table("per_class", [{"round": 1}, {"round": 2}])
    (child,) = runs_of(client, stage="train_cam")
    assert child.info.status == "FINISHED"
    assert history(client, child, "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    images = [f.path for f in client.list_artifacts(child.info.run_id, "images")]
    assert sum(path.endswith(".png") for path in images) == 2
    table = client.download_artifacts(child.info.run_id, "per_class.json")
    assert json.loads(Path(table).read_text())["data"] == [[1], [2]]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("x"), "FAILED"),
        (UserError("x"), "FAILED"),
        (SystemExit(143), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
    ],
)
def test_no_run_stays_running(root, error, status):
    with pytest.raises(type(error)), open_run(root) as run:
        run.metrics({"loss": 2.0}, step=1)
        raise error
    client = client_of(root)
    (child,) = runs_of(client, stage="train_cam")
    (parent,) = runs_of(client, stage="pipeline")
    assert (child.info.status, parent.info.status) == (status, status)
    assert history(client, child, "loss") == [(1, 2.0)]
    # The next stage reopens the parent.
    with open_run(root, "prepare", PARAMS.prepare):
        assert client.get_run(parent.info.run_id).info.status == "RUNNING"
    assert client.get_run(parent.info.run_id).info.status == "FINISHED"


def test_changed_data_or_code_does_not_continue_an_interrupted_run(root):
    (root / "code.py").write_text("a = 1\n")
    (root / "dvc.yaml").write_text(
        "stages:\n  train_cam:\n    cmd: x\n    deps:\n      - code.py\n"
    )
    seen = set()
    for file, text in (("code.py", "a = 2\n"), ("data/a.csv", "id\n2\n"), ("other.py", "")):
        (root / file).write_text(text)
        with pytest.raises(KeyboardInterrupt), open_run(root) as run:
            seen.add((run.run_id, run.resumed))
            raise KeyboardInterrupt
    # The first two changes start anew, the last is none of the stage's business.
    assert [resumed for _, resumed in seen].count(False) == 2
    assert len({run_id for run_id, _ in seen}) == 2


def test_experiments_of_dvc_are_kept_at_home(root, tmp_path_factory, monkeypatch):
    copy = tmp_path_factory.mktemp("temporary copy")
    shutil.copytree(root / "data", copy / "data")
    shutil.copy(root / "params.yaml", copy)
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.setenv("DVC_EXP_NAME", "wary-eels")
    with open_run(copy) as run:
        run.image("a", np.zeros((4, 4, 3), np.uint8), step=1)
    assert sorted(p.name for p in copy.iterdir()) == ["data", "params.yaml"]
    client = client_of(root)
    (parent,) = runs_of(client, **{"isim.pipeline": "wary-eels", "stage": "pipeline"})
    assert parent.info.run_name == "wary-eels"
    assert list((root / "mlartifacts").rglob("*.png"))


def test_git_state_is_recorded(root):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    git("add", "params.yaml")
    git("commit", "-qm", "a")
    (root / "dvc.lock").write_text("schema: '2.0'\n")
    with open_run(root):
        pass
    (root / "params.yaml").write_text((root / "params.yaml").read_text() + "# a comment\n")
    with open_run(root):
        pass
    client = client_of(root)
    clean, dirty = runs_of(client, stage="train_cam")
    assert clean.data.tags["isim.git_dirty"] == "false"
    assert dirty.data.tags["isim.git_dirty"] == "true"
    assert clean.data.tags["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
    assert clean.data.tags["isim.dvc_lock"] == tracking.md5(root / "dvc.lock")
    # A comment changes no parameter: still the same execution.
    (parent,) = runs_of(client, stage="pipeline")
    assert parent.info.run_name.startswith(git("rev-parse", "HEAD")[:8])


def test_tables_and_figures_survive_nan(root):
    with open_run(root) as run:
        run.metrics({"miou": float("nan")}, step=1)
        run.table("per_class", [{"class": "duck", "iou": float("nan")}])
        run.table("per_class", [{"class": "duck", "iou": float("inf")}, {"class": "fox", "iou": 1}])
    client = client_of(root)
    path = client.download_artifacts(run.run_id, "per_class.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    table = json.loads(Path(path).read_text(), parse_constant=refuse)
    assert table == {"columns": ["class", "iou"], "data": [["duck", None], ["fox", 1]]}
    assert len(client.get_metric_history(run.run_id, "miou")) == 1
    tagged = json.loads(client.get_run(run.run_id).data.tags["mlflow.loggedArtifacts"])
    assert tagged == [{"path": "per_class.json", "type": "table"}]


def test_the_registry_points_to_weights_of_dvc(root):
    weights = root / "models/model.safetensors"
    weights.parent.mkdir()
    for content in (b"one", b"two"):
        weights.write_bytes(content)
        with open_run(root) as run:
            run.register_model("cam", weights)
    version = client_of(root).get_model_version_by_alias("cam", "current")
    assert int(version.version) == 2
    assert version.source == "dvc:/models/model.safetensors"
    assert version.tags["md5"] == tracking.md5(weights)
    assert version.run_id == run.run_id


def test_md5_is_that_of_dvc(tmp_path):
    data = tmp_path / "data"
    for name in ("b.txt", "a/c.txt", "a.txt", "a/d/ä.txt"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(name)
    (data / "__pycache__").mkdir()
    (data / "__pycache__/x.pyc").write_text("x")
    (tmp_path / ".dvcignore").write_text("__pycache__\n")
    # The process's own `dvc` may be any; this is the one of the environment.
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    subprocess.run([*dvc, "add", "-q", "data"], cwd=tmp_path, check=True)
    assert f"md5: {tracking.md5(data)}\n" in (tmp_path / "data.dvc").read_text()


def test_four_processes_may_touch_a_fresh_database_together(tmp_path):
    script = """
with tracking.stage_run("prepare", PARAMS.prepare, ROOT, {}) as run:
    run.metrics({"figure": float(sys.argv[2])}, step=1)
from mlflow.telemetry.utils import is_telemetry_disabled
print("torch" in sys.modules, is_telemetry_disabled())
"""
    # MLflow switches its telemetry off by itself in tests.
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "PYTEST_CURRENT_TEST")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HEAD + script, str(tmp_path), str(number)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    answers = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, answers
    # Migrations and MLflow talk a lot; none of it reaches the user. No torch, no telemetry.
    assert answers == [("False True\n", "")] * 4
    client = client_of(tmp_path)
    children = runs_of(client, stage="prepare")
    assert sorted(r.data.metrics["figure"] for r in children) == [0, 1, 2, 3]
    assert {r.info.status for r in children} == {"FINISHED"}
    assert len(runs_of(client, stage="pipeline")) == 1
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_creation_that_dies_leaves_no_database(tmp_path, monkeypatch):
    from mlflow.db import upgrade

    def die(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(upgrade, "main", die)
    with pytest.raises(KeyboardInterrupt):
        tracking.create_database(f"sqlite:///{tmp_path}/mlflow.db")
    assert [p.name for p in tmp_path.iterdir()] == [".isim"]


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_unreachable_server_is_an_error_at_the_start(root, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{closed_port()}")
    with pytest.raises(UserError, match="unset MLFLOW_TRACKING_URI") as caught, open_run(root):
        pytest.fail("the stage ran")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_failing_server_is_asked_twice_only(root, monkeypatch):
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
        with pytest.raises(UserError), open_run(root):
            pytest.fail("the stage ran")
        server.shutdown()
    # MLflow's own seven retries take four minutes.
    assert len(asked) == 2


@pytest.mark.parametrize("content", [b"no database at all " * 100, None])
def test_an_unusable_database_is_an_error_at_the_start(root, content):
    (root / "mlflow.db").unlink()
    if content is None:
        (root / ".isim").write_text("a file where a folder should be")
    else:
        (root / "mlflow.db").write_bytes(content)
    with pytest.raises(UserError, match=str(root)), open_run(root):
        pytest.fail("the stage ran")


@pytest.fixture
def server(tmp_path_factory, fresh_database):
    """A real `mlflow server` process; yields it and its address."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(fresh_database, folder / "mlflow.db")
    port = closed_port()
    command = f"-m mlflow server --workers 1 --host 127.0.0.1 --port {port}"
    process = subprocess.Popen(
        [sys.executable, *command.split(), "--backend-store-uri", "sqlite:///mlflow.db"],
        cwd=folder,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, "mlflow server ended"
                time.sleep(0.2)
        yield process, address
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_lost_on_the_way_is_one_warning(root, server, monkeypatch, caplog):
    process, address = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    weights = root / "model.safetensors"
    weights.write_bytes(b"weights")
    with open_run(root) as run:
        run.metrics({"loss": 0.5}, step=1)
        # Names of a user's own files.
        run.image("pictures/Ä (1)", np.zeros((4, 4, 3), np.uint8), step=1)
        run.table("per_class", [{"class": "duck", "iou": 0.5}])
        run.register_model("cam", weights)
        run.flush()
        assert not caplog.records
        client = MlflowClient(address)
        assert history(client, client.get_run(run.run_id), "loss") == [(1, 0.5)]
        assert client.get_model_version_by_alias("cam", "current").run_id == run.run_id
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for epoch in range(2, 50):
            run.metrics({"loss": 1 / epoch}, step=epoch)
            run.flush()
            run.image("pictures/a", np.zeros((4, 4, 3), np.uint8), step=epoch)
        run.headline({"cam_miou": 0.5})
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "MLflow is lost" in record.getMessage()
    assert "reports/train_cam" in record.getMessage()


def lose(run, figures):
    """Let the store fail while `figures` of step 1 are sent, and be back afterwards."""

    def lost(*_arguments, **_options):
        raise OSError("lost")

    real, run._client.log_batch = run._client.log_batch, lost
    run.metrics(figures, step=1)
    run.flush()
    run._client.log_batch = real


def test_a_store_that_comes_back_gets_the_figures_at_the_end(root, caplog):
    with open_run(root) as run:
        lose(run, {"loss": 0.5})
        run.metrics({"loss": 0.25}, step=2)
    assert len(caplog.records) == 1
    client = client_of(root)
    (child,) = runs_of(client, stage="train_cam")
    assert child.info.status == "FINISHED"
    assert history(client, child, "loss") == [(1, 0.5), (2, 0.25)]


def test_a_silent_store_holds_the_stage_up_once_only(root, monkeypatch):
    monkeypatch.setattr(tracking, "SILENT_SECONDS", 0.0)
    with open_run(root) as run:
        lose(run, {"loss": 0.5})
    client = client_of(root)
    (child,) = runs_of(client, stage="train_cam")
    assert history(client, child, "loss") == []
    assert child.info.status == "RUNNING"


def test_importing_the_module_imports_neither_mlflow_nor_torch():
    script = (
        "import sys, isim.tracking; print([m for m in ('mlflow', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"
