"""Stage train_cam: what it leaves, and what its settings change."""

import shutil

import numpy as np
import pytest
from safetensors.torch import save_file
from support.projects import (
    CARDS,
    confusion_of,
    drop_masks,
    items_of,
    names_in,
    read_report,
    read_rows,
)
from support.sections import of_frozen

from isim import metrics, stage
from isim.data.files import read_cam
from isim.errors import UserError
from isim.models import cam
from isim.passes import classification, features
from isim.runtime import identity
from isim.runtime.here import Here

ROUNDS = ("round_01", "round_02")
OUTS = ("models/train_cam",)
SPEED = {"seconds", "images_per_second", "waiting_share"}


def tables_of(root):
    names = ("rounds", "epochs", "miou", "per_class")
    return {name: read_rows(root / f"reports/train_cam/{name}.csv") for name in names}


def labels_of(root, name="round_01"):
    folder = root / "data/pseudo_labels" / name
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


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
        assert labels == {item.id for item in items_of(finished_project)} | CARDS
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
    assert trained[0] == trained[1] and len(outs) == 3 + 2 * (16 + len(CARDS))
    logged = {step: v for (k, step), v in recorder.figures.items() if k == "cam_miou_by_epoch"}
    assert logged == mious and ("pseudo_label_miou_by_epoch", 3) not in recorder.figures


def test_rounds_by_convergence(run, project):
    """Losses that cannot improve by 99 % have converged after patience + 1 epochs."""
    rule = {"round_rule": "convergence", "cap": 50, "patience": 1, "tolerance": 0.99}
    run("train_cam", project, epochs=4, **rule)
    assert when(tables_of(project)["rounds"]) == [("1", "1"), ("3", "2")]


def test_method_frozen_leaves_what_every_method_leaves(by_frozen):
    heads = [
        cam.load(by_frozen / f"models/train_cam/{name}.safetensors")[0].head
        for name in ("classifier", *ROUNDS, "model")
    ]
    assert heads[0] is None
    weights = [tuple(head.scores.weight.flatten().tolist()) for head in heads[1:]]
    assert weights[0] != weights[1] == weights[2]
    report, tables = read_report(by_frozen, "train_cam"), tables_of(by_frozen)
    assert (report["method"], report["images"], report["rounds"]) == ("frozen", 16, 2)
    assert report["supervision"] == "none (random)"
    assert when(tables["rounds"]) == [("2", "1"), ("3", "2")]
    assert when(tables["miou"]) == [("1", ""), *when(tables["rounds"])]
    assert [row["epoch"] for row in tables["epochs"]] == ["1", "2", "3"]
    items = items_of(by_frozen)
    for name, row in zip(ROUNDS, tables["rounds"], strict=True):
        folder = by_frozen / "data/pseudo_labels" / name
        assert names_in(folder) == {item.id for item in items} | CARDS
        miou = metrics.miou(confusion_of(items, folder))
        assert float(row["pseudo_label_miou"]) == pytest.approx(miou)
    for split in ("final_train", "val"):
        assert 0 <= report[f"{split}_element_accuracy"] <= 1
    pictures = names_in(by_frozen / "reports/train_cam/pictures")
    assert {"rounds", "miou", "losses"} < pictures and len(pictures) == 3 + 2
    # Features of 16 images and of 8 held-out ones, for whatever comes next.
    assert len(list(by_frozen.glob(".isim/features/*/*.npy"))) == 16 + 8
    assert not (by_frozen / ".isim/resume/train_cam").exists()


def test_cams_of_method_frozen_are_exported(by_frozen):
    report = read_report(by_frozen, "export_cams")
    network, config = cam.load(by_frozen / "models/train_cam/model.safetensors")
    for split, count in (("train", 16), ("val", 8)):
        items = items_of(by_frozen, split)
        assert report[split]["images"] == len(items) == count
        for item in items:
            planes, ids, size = read_cam(by_frozen / f"data/cams/{split}/{item.id}.npz")
            assert (ids == item.class_ids).all() and size == (64, 64)
            assert (
                planes.shape == (len(ids), 16, 16) and (planes >= 0).all() and (planes <= 1).all()
            )
    assert config.head_kind == "mlp" and network.head is not None


def test_another_seed_and_threshold_of_method_frozen_compute_no_features(
    by_frozen, copies, run, recorder, tiny, monkeypatch
):
    root, changes = copies(by_frozen), of_frozen(tiny.train_cam, rounds=0, threshold=0.4)
    network, _ = cam.load(root / "models/train_cam/model.safetensors")
    # Random weights are other ones for every seed.
    save_file(network.encoder.model.state_dict(), root / "w.safetensors")
    monkeypatch.setattr(features.frozen, "features", lambda *_: pytest.fail("computed again"))
    report = run("train_cam", root, seed=1, weights="w.safetensors", **changes)
    assert report["rounds"] == 1 and names_in(root / "data/pseudo_labels") == {"round_01"}
    network, config = cam.load(root / "models/train_cam/model.safetensors")
    assert network.head is None and config.affinity == "cosine"
    assert {step for name, step in recorder.figures if name == "cam_miou"} == {1}


def test_method_frozen_needs_no_masks(run, project, tiny):
    for split in ("train", "val"):
        drop_masks(project, split)
    report = run("train_cam", project, **of_frozen(tiny.train_cam, rounds=1))
    assert report["scored_images"] == 0 and report["cam_miou"] is None
    assert len(names_in(project / "data/pseudo_labels/round_01") - CARDS) == 16
    assert read_rows(project / "reports/train_cam/miou.csv") == []


def test_attention_of_a_convolutional_encoder_is_refused(run, project, tiny):
    changes = of_frozen(tiny.train_cam, affinity="attention")
    with pytest.raises(UserError, match="affinity attention needs a plain vision transformer"):
        run("train_cam", project, **changes)
    assert not (project / "data/pseudo_labels").exists()


def test_the_loop_starts_where_the_frozen_one_ended(by_frozen, copies, run, recorder):
    """The decoder learns from the first epoch on, and labels the first round."""
    root = copies(by_frozen)
    shutil.copytree(root / "data/pseudo_labels/round_02", root / "start")
    run("train_cam", root, method="deeplabcam", start="start", decoder_labels=True, epochs=2)
    epochs = tables_of(root)["epochs"]
    assert all(float(row["segmentation_loss"]) > 0 for row in epochs)
    assert when(tables_of(root)["rounds"]) == [("1", "1")]
    labels = labels_of(root)
    config = cam.load(root / "models/train_cam/model.safetensors")[1]
    assert config.decoder_labels
    # Those of the classifier's CAMs are others.
    run("train_cam", root, method="deeplabcam", start="start", epochs=2)
    assert labels.keys() == labels_of(root).keys() and labels != labels_of(root)


def test_maps_to_start_from_must_be_there(run, project):
    (project / "start").mkdir()
    with pytest.raises(UserError, match=r"^train_cam\.start: .* has no label map of 16 of 16 im"):
        run("train_cam", project, start="start")
    assert not (project / "data/pseudo_labels").exists()


@pytest.mark.parametrize("method", ["cam", "frozen"])
@pytest.mark.parametrize(("name", "value"), [("decoder_labels", True), ("start", "labels")])
def test_what_a_decoder_learns_needs_one(method, name, value, tiny):
    values = tiny.train_cam.model_dump() | {"method": method, name: value}
    with pytest.raises(ValueError, match=f"{name}: method {method} has no decoder; use deepl"):
        type(tiny.train_cam).model_validate(values)


def test_the_loop_does_not_start_from_what_it_writes(tiny):
    values = tiny.train_cam.model_dump() | {"start": "./data/pseudo_labels/round_01"}
    with pytest.raises(ValueError, match=r"start \(.*\) is where this stage writes .* copy"):
        type(tiny.train_cam).model_validate(values)


@pytest.mark.parametrize("method", ["cam", "frozen"])
def test_a_threshold_is_chosen_at_every_round_and_kept_with_the_network(method, run, project, tiny):
    changes = of_frozen(tiny.train_cam) if method == "frozen" else {"method": "cam"}
    report = run("train_cam", project, **changes | {"threshold": "auto"})
    rows = tables_of(project)["rounds"]
    config = cam.load(project / "models/train_cam/model.safetensors")[1]
    assert report["threshold"] == float(rows[-1]["threshold"]) == config.threshold
    assert all(0 < float(row["threshold"]) < 1 for row in rows)
    assert (config.threshold == 0.5) == (method == "frozen") and config.threshold != 0.3
    assert run("export_cams", project, threshold="auto")["threshold"] == config.threshold
    scored = run("evaluate", project, threshold="auto")
    assert scored["train"]["threshold"] == pytest.approx(config.threshold, abs=1e-6)
    assert scored["train"]["cam_miou"] is not None


def test_a_run_starts_from_the_network_of_the_last_one(run, project, copies, recorder):
    """The first run of a project begins as without; the second one with what the first learnt."""
    changes = {"method": "deeplabcam", "epochs": 2}
    plain = copies(project)
    run("train_cam", plain, **changes)
    first = run("train_cam", project, start="previous", **changes)
    assert first["started_from"] == "none" and labels_of(project) == labels_of(plain)
    published = identity.md5(project / "models/train_cam/model.safetensors")
    second = run("train_cam", project, start="previous", **changes)
    assert (second["started_from"], second["started_from_round"]) == (published[:8], 1)
    assert second["train_element_accuracy"] != first["train_element_accuracy"]
    assert [path.name for path in (project / ".isim/previous").iterdir()] == [
        "train_cam.safetensors"
    ]


def test_a_run_from_the_last_network_that_dvc_lost_is_published_again(
    run, project, recorder, monkeypatch
):
    """What it began with is held as long as its result is: else it would be another run."""
    changes = {"method": "deeplabcam", "epochs": 2, "start": "previous"}
    monkeypatch.setenv("DVC_STAGE", "train_cam")
    first, network = run("train_cam", project, **changes), project / "models/train_cam"
    digest = identity.md5(network)
    shutil.rmtree(network)
    with pytest.raises(stage.Published):
        run("train_cam", project, **changes)
    assert identity.md5(network) == digest and read_report(project, "train_cam") == first
    outs = "".join(f"{{path: {name}, md5: {identity.md5(project / name)}}}" for name in OUTS)
    (project / "dvc.lock").write_text(f"stages: {{train_cam: {{outs: [{outs}]}}}}")
    stage._look_after(project / ".isim", project, ("train_cam",))
    names = [path.name for path in (project / ".isim/previous").iterdir()]
    assert names == ["train_cam.safetensors"]
    assert run("train_cam", project, **changes)["started_from"] != "none"


def test_the_last_head_labels_the_first_round_of_method_frozen(
    by_frozen, copies, run, recorder, tiny
):
    root, changes = copies(by_frozen), of_frozen(tiny.train_cam, rounds=1, threshold=0.999)
    # Above the threshold there is next to nothing: the classifier labels no object.
    share = []
    for start in ("none", "previous"):
        shutil.rmtree(root / ".isim/previous")
        shutil.copytree(by_frozen / ".isim/previous", root / ".isim/previous")
        run("train_cam", root, start=start, **changes)
        share.append(float(tables_of(root)["rounds"][-1]["coverage"]))
    assert share[0] != share[1]
    # What changes no weight may change: the scales that heads answer at, and the walk.
    other = changes["frozen"].affinity == "none"
    changes["frozen"] = changes["frozen"].model_copy(
        update={"affinity": "cosine" if other else "none"}
    )
    changes["features"] = changes["features"].model_copy(update={"scales": (0.75, 1.0)})
    shutil.rmtree(root / ".isim/previous")
    shutil.copytree(by_frozen / ".isim/previous", root / ".isim/previous")
    assert run("train_cam", root, start="previous", **changes)["started_from"] != "none"
