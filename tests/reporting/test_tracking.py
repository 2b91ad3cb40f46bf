"""What a stage records, and what it loses with the store: nothing that matters."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from isim.errors import UserError
from isim.experiments import preset
from isim.reporting import pictures, store, tracking
from isim.runtime import atomic, processes
from isim.runtime.identity import md5

PIXELS = np.zeros((4, 4, 3), np.uint8)


def test_the_histories_of_two_executions_can_be_compared(tracked):
    expected = {}
    for seed, gain in ((1, 0.1), (2, 0.05)):
        text = preset.text("tiny").replace("seed: 0", f"seed: {seed}")
        (tracked.root / "params.yaml").write_text(text)
        expected[str(seed)] = [(number, 0.3 + gain * number) for number in (1, 2, 3)]
        with tracked.open(seed=seed) as run:
            for number, miou in expected[str(seed)]:
                run.metrics({"cam_miou": miou, "pseudo_label_miou": 0.4}, step=number)
            run.headline({"cam_miou": miou, "seconds": 1.0})
    children, parents = (tracked.runs(stage=name) for name in ("train_cam", "pipeline"))
    found = {
        run.data.params["train_cam.seed"]: tracked.history(run.info.run_id, "cam_miou")
        for run in children
    }
    # The headline adds no point to the curve, but figures that have none.
    assert found == expected
    assert {run.data.metrics["seconds"] for run in children} == {1.0}
    ids = [run.info.run_id for run in parents]
    assert [run.data.tags["mlflow.parentRunId"] for run in children] == ids and len(set(ids)) == 2
    board = {p.data.params["train_cam.seed"]: p.data.metrics["train_cam.cam_miou"] for p in parents}
    assert board == pytest.approx({"1": 0.6, "2": 0.45})


def test_a_killed_stage_continues_its_run_without_doubling_steps(tracked):
    script = """
import os, signal, sys, numpy
from pathlib import Path
from isim import params
from isim.reporting import tracking
root = Path(sys.argv[1])
section = params.load(root / "params.yaml").train_cam
with tracking.stage_run("train_cam", section, root, inputs={}, identity="a") as run:
    for epoch in (1, 2, 3):
        run.metrics({"loss": 1 / epoch}, step=epoch)
    for key in ("pictures/a_1", "pictures/狐"):
        run.image(key, numpy.zeros((4, 4, 3), numpy.uint8), step=1)
    run.table("per_class", [{"round": 1}])
    run.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", script, str(tracked.root)]
    assert subprocess.call(command) == -signal.SIGKILL
    (killed,) = tracked.runs(stage="train_cam")
    assert killed.info.status == "RUNNING"
    # Another stage notices that the process is gone.
    with tracked.open("prepare"):
        assert tracked.runs(stage="train_cam")[0].info.status == "KILLED"
    with tracked.open() as run:
        assert run.resumed and run.run_id == killed.info.run_id
        # The checkpoint was of epoch 2: epoch 3 and the round's pictures come again.
        for epoch in (3, 4):
            run.metrics({"loss": 1 / epoch}, step=epoch)
        for key, number in (("a_1", 1), ("狐", 1), ("鴨", 1), ("a_1", 2)):
            run.image(f"pictures/{key}", PIXELS, step=number)
        run.table("per_class", [{"round": 1}, {"round": 2}])
    assert tracked.client.get_run(run.run_id).info.status == "FINISHED"
    assert tracked.history(run.run_id, "loss") == [(n, 1 / n) for n in (1, 2, 3, 4)]
    (shown,) = tracked.runs(stage="pictures")
    assert not shown.data.params
    images = [f.path for f in tracked.client.list_artifacts(shown.info.run_id, "images")]
    # Names in any script are pictures of their own.
    assert sum(path.endswith(".png") for path in images) == 4
    assert tracked.table(run, "per_class")["data"] == [[1], [2]]


@pytest.mark.parametrize("error", [UserError("x"), SystemExit(143), KeyboardInterrupt()])
def test_no_run_stays_running(tracked, error):
    status = "FAILED" if isinstance(error, Exception) else "KILLED"
    tracked.run(act=lambda run: run.metrics({"loss": 2.0}, step=1), error=error)
    (parent,) = tracked.runs(stage="pipeline")
    (child,) = tracked.runs(stage="train_cam")
    assert (child.info.status, parent.info.status) == (status, status)
    assert tracked.history(child.info.run_id, "loss") == [(1, 2.0)]
    # The next stage reopens the parent.
    with tracked.open("prepare"):
        assert tracked.runs(stage="pipeline")[0].info.status == "RUNNING"
    assert tracked.runs(stage="pipeline")[0].info.status == "KILLED"


def test_tables_and_figures_survive_nan(tracked):
    with tracked.open() as run:
        run.metrics({"miou": float("nan")}, step=1)
        run.table("per_class", [{"class": "duck", "iou": float("nan")}])
        run.table("per_class", [{"class": "duck", "iou": float("inf")}, {"class": "fox", "iou": 1}])
    expected = {"columns": ["class", "iou"], "data": [["duck", None], ["fox", 1]]}
    assert tracked.table(run, "per_class") == expected
    # What is not known is no point of a curve.
    assert tracked.history(run.run_id, "miou") == []
    tags = tracked.client.get_run(run.run_id).data.tags
    known = json.loads(tags["mlflow.loggedArtifacts"])
    assert known == [{"path": "per_class.json", "type": "table"}]


def test_registered_weights_can_be_fetched(tracked, tmp_path, monkeypatch):
    """Each version has its own, whatever DVC puts in the place of the file."""
    from mlflow.artifacts import download_artifacts

    # A folder of the project may lie on another disk.
    (tmp_path / "disk").mkdir()
    (tracked.root / "models").symlink_to(tmp_path / "disk")
    weights = tracked.root / "models/model.safetensors"
    (tracked.root / "data/prepared").mkdir(parents=True)
    (tracked.root / "data/prepared/dataset.json").write_text('{"classes": ["duck", "狐"]}')
    for content in (b"one", b"two"):
        atomic.write_bytes(weights, content)
        run = tracked.run(act=lambda run: run.register_model("cam", weights))
    version = tracked.client.get_model_version_by_alias("cam", "current")
    assert (int(version.version), version.run_id) == (2, run.run_id)
    assert (
        version.tags["md5"] == md5(weights) and version.tags["path"] == "models/model.safetensors"
    )
    assert json.loads(version.tags["classes"]) == ["duck", "狐"]
    assert "duck, 狐" in version.description
    assert "train_cam" in tracked.client.get_registered_model("cam").description
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.tracking_uri(tracked.root))
    for name, content in (("cam/1", b"one"), ("cam@current", b"two")):
        found = download_artifacts(f"models:/{name}", dst_path=tmp_path / content.decode())
        assert [path.read_bytes() for path in Path(found).rglob("*.safetensors")] == [content]


def test_a_server_lost_on_the_way_is_one_warning(tracked, serve, free_port, monkeypatch, caplog):
    command = f"-m mlflow server --workers 1 --host 127.0.0.1 --port {free_port}"
    uri = ["--backend-store-uri", f"sqlite:///{tracked.root}/mlflow.db"]
    server = serve([sys.executable, *command.split(), *uri], os.environ)
    address = f"http://127.0.0.1:{free_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    weights = tracked.root / "model.safetensors"
    weights.write_bytes(b"weights")
    with tracked.open() as run:
        run.metrics({"loss": 0.5}, step=1)
        # Names of a user's own files.
        run.image("pictures/Ä (1)", PIXELS, step=1)
        run.table("per_class", [{"class": "duck", "iou": 0.5}])
        run.register_model("cam", weights)
        run.flush()
        assert not caplog.records
        client = MlflowClient(address)
        assert client.get_run(run.run_id).data.metrics == {"loss": 0.5}
        assert client.get_model_version_by_alias("cam", "current").run_id == run.run_id
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        for epoch in range(2, 50):
            run.metrics({"loss": 1 / epoch}, step=epoch)
            run.flush()
            run.image("pictures/a", PIXELS, step=epoch)
        run.headline({"cam_miou": 0.5})
    (told,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "MLflow is lost" in told and "reports/train_cam" in told


@pytest.mark.parametrize("silent", [False, True])
def test_a_store_gets_lost_figures_if_it_was_not_silent(silent, tracked, monkeypatch, caplog):
    def lost(*_arguments, **_options):
        raise OSError("lost")

    monkeypatch.setattr(tracking, "SILENT_SECONDS", 0.0 if silent else 1.0)
    with tracked.open() as run:
        with monkeypatch.context() as patch:
            patch.setattr(run._client, "log_batch", lost)
            run.metrics({"loss": 0.5}, step=1)
            run.flush()
        run.metrics({"loss": 0.25}, step=2)
        run.headline({"miou": 0.5})
    assert len(caplog.records) == 1
    status = tracked.client.get_run(run.run_id).info.status
    assert status == ("RUNNING" if silent else "FINISHED")
    assert tracked.history(run.run_id, "loss") == ([] if silent else [(1, 0.5), (2, 0.25)])
    (parent,) = tracked.runs(stage="pipeline")
    assert parent.data.metrics == ({} if silent else {"train_cam.miou": 0.5})


def test_only_the_first_process_is_tracked(tracked, free_port, monkeypatch):
    monkeypatch.setattr(processes, "_group", processes._Group(rank=1, world=2))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port}")
    with tracked.open() as run:
        run.metrics({"a": 1.0}, step=1)
        run.headline({"a": 1.0})
        run.table("t", [{"a": 1}])
        run.tag("a", "b")
        run.image("a", PIXELS, step=0)
        run.artifact_file(tracked.root / "none")
        run.register_model("m", tracked.root / "none")
        run.flush()


def test_importing_modules_does_not_import_what_they_may_never_need():
    for modules, later in (("tracking plots", "PIL"), ("pictures results voc_server", "")):
        names = ", ".join(f"isim.reporting.{module}" for module in modules.split())
        script = f"import sys, {names}; print(*sys.modules)"
        imported = subprocess.check_output([sys.executable, "-c", script], text=True).split()
        assert not {"matplotlib", "mlflow", "torch", *later.split()} & set(imported)


def test_what_the_store_refuses_is_left_out_alone(tracked, caplog, monkeypatch):
    real = MlflowClient.log_image

    def log_image(client, run_id, image, **about):
        if "bad" in about.get("key", ""):
            raise OSError("File name too long")
        real(client, run_id, image, **about)

    monkeypatch.setattr(MlflowClient, "log_image", log_image)
    with tracked.open() as run:
        for name in ("bad 1", "good", "bad 2", "狐" * 200):
            run.image(name, PIXELS, step=0)
        run.metrics({"mIoU of 狐": 0.5, "m" * 400: 0.25, "loss": 1.0})
        run.tag("a" * 400, "b")
        run.tag("precision", "fp32\0" + "x" * 10_000)
        run.table("per_class", [{"class": "\udcff", "iou": 0.5}])
        run.artifact_file(tracked.root / "none")
        run.headline({"miou": 0.5})
    kept = tracked.client.get_run(run.run_id)
    assert kept.info.status == "FINISHED" and kept.data.metrics["loss"] == 1.0
    assert len(kept.data.metrics) == 4 and kept.data.tags["precision"].startswith("fp32")
    (shown,) = tracked.runs(stage="pictures")
    images = tracked.client.list_artifacts(shown.info.run_id, "images")
    assert sum(file.path.endswith(".png") for file in images) == 2
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(told) == 2 and "picture bad 1" in told[0] and "bad 2" in told[1]
    assert not any("lost" in text for text in told)


@pytest.mark.parametrize("which", ["stage", "parent"])
def test_a_run_deleted_on_the_way_is_told_with_the_remedy(which, tracked, caplog):
    with tracked.open() as run:
        (parent,) = tracked.runs(stage="pipeline")
        gone = run.run_id if which == "stage" else parent.info.run_id
        tracked.client.delete_run(gone)
        for step in range(3):
            run.metrics({"loss": 1.0}, step=step)
            run.flush()
        run.headline({"miou": 0.5})
    told = [
        r.getMessage()
        for r in caplog.records
        if f"mlflow runs restore --run-id {gone}" in r.getMessage()
    ]
    assert len(told) == 1 and "\n" not in told[0]
    kept = run.run_id if which == "parent" else parent.info.run_id
    assert tracked.client.get_run(kept).data.metrics
    # The next stage finds none of it in its way.
    tracked.run("prepare")


def test_pictures_of_the_reports_are_shown_first(tracked):
    folder = tracked.root / "reports/train_cam/pictures"
    for name in ("a/狐.png", "b.png"):
        pictures.write_png(folder / name, np.zeros((40, 60, 3), np.uint8))
    run = tracked.run(act=lambda run: run.headline({"cam_miou": 0.5}))
    client = tracked.client
    found = {file.path for file in client.list_artifacts(run.run_id)}
    assert {"contact_sheet.png", "pictures"} <= found
    listed = client.list_artifacts(run.run_id, "pictures")
    assert {file.path for file in listed} == {"pictures/a", "pictures/b.png"}
    (parent,) = tracked.runs(stage="pipeline")
    for text in (
        client.get_run(one).data.tags["mlflow.note.content"]
        for one in (run.run_id, parent.info.run_id)
    ):
        assert f"get-artifact?path=contact_sheet.png&run_uuid={run.run_id}" in text
        assert "deeplabcam" in text and "0.5" in text
