"""Stage train_affinity: what it leaves, what it learns, and where it starts."""

import json
import shutil

import torch
from support.projects import items_of, names_in, put_true_cams, read_report, read_rows

from isim.models import affinity, cam


def test_a_network_labels_and_a_row_an_epoch_are_left(finished_project):
    _, config = affinity.load(finished_project / "models/train_affinity/model.safetensors")
    assert (config.map_stride, config.radius) == (8, 5)
    ids = {item.id for item in items_of(finished_project)}
    assert names_in(finished_project / "data/affinity_labels") == ids
    rows = read_rows(finished_project / "reports/train_affinity/epochs.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    report = read_report(finished_project, "train_affinity")
    last = {name: float(value) for name, value in rows[-1].items() if name.endswith("loss")}
    assert last.items() <= report.items() and len(last) == 4
    assert 0 < report["sure_share"] < 1 and 0 < report["sure_accuracy"] <= 1
    assert report["images"] == 16 and report["supervision"] == "none (random)"


def test_training_on_good_cams_lowers_the_loss(run, finished, recorder):
    put_true_cams(finished)
    report = run("train_affinity", finished, rate=0.03, epochs=12)
    assert report["sure_accuracy"] > 0.95 and report["sure_miou"] > 0.85
    assert report["loss"] == recorder.figures["loss", 12] < 0.75 * recorder.figures["loss", 1]
    shown = names_in(finished / "reports/train_affinity/pictures") - {"losses"}
    assert recorder.pictures == {(f"pictures/{id_}", 0) for id_ in shown}


def test_the_encoder_of_train_cam_is_a_start(run, finished):
    # Nothing learns: what is saved is the start.
    run("train_affinity", finished, weights="train_cam", rate=0.0, epochs=1)
    network, _ = affinity.load(finished / "models/train_affinity/model.safetensors")
    trained, _ = cam.load(finished / "models/train_cam/model.safetensors")
    for name, value in trained.encoder.state_dict().items():
        assert torch.equal(network.encoder.state_dict()[name], value), name


def test_nothing_is_trained_where_the_walk_takes_another_affinity(run, finished, capsys):
    """All outs are there, as DVC wants them, and neither CAMs nor weights are looked at."""
    shutil.rmtree(finished / "data/cams")
    reports = finished / "reports/train_affinity"
    before = names_in(reports)
    report = run("train_affinity", finished, affinity="cosine", weights="gone")
    why = "random_walk.affinity is cosine, which needs no AffinityNet"
    assert report == {"skipped": why}
    assert capsys.readouterr().out == f"train_affinity: skipped, as {why}\n"
    (note,) = (finished / "models/train_affinity").iterdir()
    assert json.loads(note.read_text()) == report and note.name == "skipped.json"
    assert names_in(finished / "data/affinity_labels") == names_in(reports / "pictures") == set()
    assert names_in(reports) == before and read_rows(reports / "epochs.csv") == []
