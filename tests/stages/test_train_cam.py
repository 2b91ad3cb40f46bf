"""Stage train_cam: what it leaves, and what its settings change."""

import numpy as np
import pytest
from support.projects import items_of, names_in, read_report, read_rows

from isim.models import cam
from isim.passes import classification
from isim.runtime.here import Here

ROUNDS = ("round_01", "round_02")
SPEED = {"seconds", "images_per_second", "waiting_share"}


def tables_of(root):
    names = ("rounds", "epochs", "miou", "per_class")
    return {name: read_rows(root / f"reports/train_cam/{name}.csv") for name in names}


def when(rows):
    return [(row["epoch"], row["round"]) for row in rows]


def test_networks_pseudo_labels_and_pictures_are_left(finished_project):
    weights = [
        cam.load(finished_project / f"models/train_cam/{name}.safetensors")[0].classifier.weight
        for name in ("model", *ROUNDS)
    ]
    assert len({tuple(weight.flatten().tolist()) for weight in weights}) == 3
    for name in ROUNDS:
        labels = names_in(finished_project / "data/pseudo_labels" / name)
        assert labels == {item.id for item in items_of(finished_project)}
    pictures = names_in(finished_project / "reports/train_cam/pictures")
    assert {"rounds", "miou", "losses"} < pictures and len(pictures) == 3 + 2


def test_tables_have_a_row_a_round_an_epoch_a_measurement_and_a_class(finished_project):
    tables, report = tables_of(finished_project), read_report(finished_project, "train_cam")
    rounds, mious = tables["rounds"], tables["miou"]
    assert [row["epoch"] for row in tables["epochs"]] == ["1", "2", "3"]
    assert when(rounds) == [("1", "1"), ("2", "2")] and when(mious) == [*when(rounds), ("3", "")]
    assert {"masked_share", "seconds"} <= rounds[0].keys()
    for column in ("cam_miou", "pseudo_label_miou"):
        assert [row[column] for row in mious[:2]] == [row[column] for row in rounds]
        assert report[column] == float(rounds[-1][column])
    assert 0 < float(mious[2]["cam_miou"]) < 1 and mious[2]["pseudo_label_miou"] == ""
    for row in rounds:
        classes = [c for c in tables["per_class"] if c["round"] == row["round"]]
        mean = np.nanmean([float(entry["cam_iou"]) for entry in classes])
        assert float(row["cam_miou"]) == pytest.approx(mean) and len(classes) == 6
    assert report["optimizer_profile"] == "custom"
    assert (report["images"], report["scored_images"], report["rounds"]) == (16, 16, 2)


def test_whole_images_are_classified_by_the_final_weights(finished_project):
    report = read_report(finished_project, "train_cam")
    last = tables_of(finished_project)["epochs"][-1]
    network, config = cam.load(finished_project / "models/train_cam/model.safetensors")
    here = Here(finished_project, report["precision"])
    for split, prefix in (("train", "final_train"), ("val", "val")):
        items = items_of(finished_project, split)
        found = classification.classify(here, network, config, items, longer_side=64)
        assert found == pytest.approx({k: report[f"{prefix}_{k}"] for k in found}, abs=1e-3)
    # The running figures of the last epoch's crops stay, under their names.
    names = [f"{prefix}_{name}" for prefix in ("train", "val") for name in found]
    assert [report[name] for name in names] == [float(last[name]) for name in names]


def test_the_baseline_makes_rounds_but_does_not_train_on_them(run, project):
    run("train_cam", project, method="cam", epochs=2)
    epochs = tables_of(project)["epochs"]
    assert {float(row["segmentation_loss"]) for row in epochs} == {0}
    assert (project / "data/pseudo_labels/round_01").is_dir()
    network, _ = cam.load(project / "models/train_cam/model.safetensors")
    assert network.decoder is network.head is None


def test_measurements_change_nothing_else(run, project, recorder):
    trained = []
    for every, epochs in ((0, [1, 4]), (1, [1, 2, 3, 4, 5])):
        run("train_cam", project, score_every=every, epochs=5, round_every=3)
        tables = tables_of(project)
        losses = [{k: v for k, v in row.items() if k not in SPEED} for row in tables["epochs"]]
        outs = [*project.glob("models/*/*"), *project.glob("data/pseudo_labels/*/*")]
        trained.append((losses, {path: path.read_bytes() for path in outs}))
        mious = {int(row["epoch"]): float(row["cam_miou"]) for row in tables["miou"]}
        assert list(mious) == epochs
    assert trained[0] == trained[1] and len(outs) == 3 + 2 * 16
    logged = {step: v for (k, step), v in recorder.figures.items() if k == "cam_miou_by_epoch"}
    assert logged == mious and ("pseudo_label_miou_by_epoch", 3) not in recorder.figures


def test_rounds_by_convergence(run, project):
    """Losses that cannot improve by 99 % have converged after patience + 1 epochs."""
    rule = {"round_rule": "convergence", "cap": 50, "patience": 1, "tolerance": 0.99}
    run("train_cam", project, epochs=4, **rule)
    assert when(tables_of(project)["rounds"]) == [("1", "1"), ("3", "2")]
