"""Stage train_segmenter: what every label set leaves, and what settings change."""

import shutil

import pytest
from safetensors.torch import save_file
from support import projects
from support.networks import network_of
from support.sections import of_frozen

from isim import metrics
from isim.models import segmenter
from isim.passes import predictions, seeds
from isim.runtime import devices
from isim.training import batches, heads

NAMES = ("ground_truth", "seeds", "random_walk_crf", "round_02")
SPEED = ("seconds", "images_per_second", "waiting_share")


def report_of(root, name="round_02"):
    return projects.read_report(root, f"train_segmenter/{name}")


@pytest.fixture(scope="module")
def segmented(finished_project, tmp_path_factory, record, run):
    """A project with a segmenter of every label set, and what each told MLflow; never change it.

    The random walk's label maps of two images are left out; the split `inner` is a part of val.
    """
    root = tmp_path_factory.mktemp("segmented") / "project"
    shutil.copytree(finished_project, root)
    for path in sorted((root / "data/random_walk/train_crf").iterdir())[:2]:
        path.unlink()
    projects.put_inner_split(root, 3, "val")
    seen = {}
    with pytest.MonkeyPatch.context() as monkeypatch, devices.intra_op_threads(1):
        for name in NAMES:
            seen[name] = record(monkeypatch)
            run("train_segmenter", root, name)
    return root, seen


@pytest.mark.parametrize("name", NAMES)
def test_every_label_set_leaves_a_model_predictions_and_reports(name, segmented):
    root, seen = segmented
    config = segmenter.load(root / f"models/train_segmenter/{name}/model.safetensors")[1]
    assert config.method == "deeplabv3" and len(config.classes) == 5
    folder, reports = root / f"data/predictions/{name}", root / f"reports/train_segmenter/{name}"
    epochs = projects.read_rows(reports / "epochs.csv")
    assert [row["epoch"] for row in epochs] == ["1", "2"]
    assert list(epochs[0]) == ["epoch", "loss", "rate", *SPEED]
    assert projects.names_in(folder) == {"val", "val_crf"} | projects.CARDS
    per_class = projects.read_rows(reports / "per_class.csv")
    # As train of trainaug: a part is reported apart.
    for part, count in (("val", 8), ("inner", 3)):
        items, figures = projects.items_of(root, part), report_of(root, name)[part]
        assert figures["images"] == figures["scored_images"] == len(items) == count
        for crf, prefix in (("", ""), ("_crf", "crf_")):
            confusion = projects.confusion_of(items, folder / f"val{crf}")
            ious = [row["iou"] for row in per_class if row["source"] == f"{part}{crf}"]
            projects.assert_figures(prefix, confusion, figures, ious)
    assert projects.names_in(reports / "pictures") == {
        *("val", "loss", "per_class", "confusion_val", "confusion_inner")
    }
    shown = projects.names_in(reports / "pictures/val")
    assert seen[name].pictures == {(f"val/{id_}", 0) for id_ in shown} and len(shown) == 2
    assert {"loss", "val_miou", "val_crf_miou"} <= {key for key, _ in seen[name].figures}


def test_images_without_a_label_map_are_left_out_and_counted(segmented):
    reports = {name: report_of(segmented[0], name) for name in NAMES}
    counts = {n: (r["images"], r["images_without_labels"]) for n, r in reports.items()}
    assert counts == dict.fromkeys(NAMES, (16, 0)) | {"random_walk_crf": (14, 2)}
    labels = [reports[name]["labels"] for name in NAMES]
    assert labels[1:] == ["train", "train_crf", "round_02"]


def test_label_sets_give_different_segmenters_and_the_last_round_its_number_s(
    segmented, run, finished, capsys
):
    # VOC's test set, which is not there, is left out.
    report = run("train_segmenter", finished, "last_round", eval_splits=("val", "test"))
    assert "no images of split 'test'" in capsys.readouterr().out
    assert [name for name, row in report.items() if isinstance(row, dict)] == ["val"]

    def model(root, name):
        return (root / f"models/train_segmenter/{name}/model.safetensors").read_bytes()

    assert len({model(segmented[0], name) for name in NAMES}) == 4
    assert model(finished, "last_round") == model(segmented[0], "round_02")


def test_seeds_are_cut_at_the_threshold_and_weights_of_a_decoder_recorded(
    run, finished, monkeypatch
):
    write, used = seeds.write, []
    monkeypatch.setattr(seeds, "write", lambda *given: used.append(given[2:]) or write(*given))
    state = network_of("deeplabv3", classes=tuple("abcde")).state_dict()
    save_file(state, finished / "w.safetensors")
    changes = {"weights": "w.safetensors", "allow_decoder_weights": True}
    report = run("train_segmenter", finished, "seeds", threshold=0.6, epochs=1, **changes)
    assert report["decoder_weights"] == "missing: none; unexpected: none"
    cams = {i.id: finished / f"data/cams/train/{i.id}.npz" for i in projects.items_of(finished)}
    assert used == [(cams, 0.6)]


def test_method_frozen_predicts_by_a_head_on_the_features(by_frozen, copies, run, recorder, tiny):
    root = copies(by_frozen)
    projects.put_inner_split(root, 3, "val")
    known = {path.name for path in root.glob(".isim/features/*/*.npy")}
    report = run("train_segmenter", root, "last_round", **of_frozen(tiny.train_segmenter))
    assert (report["method"], report["labels"]) == ("frozen", "round_02")
    assert report["supervision"] == "none (random)"
    # The loop has computed the features.
    assert {path.name for path in root.glob(".isim/features/*/*.npy")} == known
    network, config = segmenter.load(root / "models/train_segmenter/last_round/model.safetensors")
    assert config.head_kind == "mlp" and len(config.classes) == 5
    assert network.classifier.weight.any() and network.centre.any()
    (epoch,) = projects.read_rows(root / "reports/train_segmenter/last_round/epochs.csv")
    assert epoch["epoch"] == "1" and float(epoch["loss"]) == report["loss"] > 0
    for part, count in (("val", 8), ("inner", 3)):
        items, figures = projects.items_of(root, part), report[part]
        assert figures["images"] == len(items) == count
        for crf, prefix in (("", ""), ("_crf", "crf_")):
            confusion = projects.confusion_of(items, root / f"data/predictions/last_round/val{crf}")
            assert figures[f"{prefix}miou"] == pytest.approx(metrics.miou(confusion))
    assert {"loss", "val_miou", "val_crf_miou"} <= {key for key, _ in recorder.figures}


def test_method_frozen_goes_on_after_its_head_was_trained(
    by_frozen, copies, run, recorder, tiny, monkeypatch
):
    whole, root, found = copies(by_frozen), copies(by_frozen), {}
    changes = of_frozen(tiny.train_segmenter)
    run("train_segmenter", whole, "ground_truth", **changes)
    for module, name in ((heads, "label_grids"), (heads, "train_head"), (predictions, "predict")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                run("train_segmenter", root, "ground_truth", **changes)
    monkeypatch.setattr(heads, "train_head", lambda *_, **__: pytest.fail("trained again"))
    run("train_segmenter", root, "ground_truth", **changes)
    for project in (whole, root):
        outs = [
            *project.glob("models/train_segmenter/*/*"),
            *project.glob("data/predictions/*/*/*"),
        ]
        found[project] = {path.relative_to(project): path.read_bytes() for path in outs}
    assert found[whole] == found[root] and len(found[root]) == 1 + 2 * 8


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["last_round", "seeds", "ground_truth"])
def test_masks_that_are_trusted_take_the_place_of_labels(name, run, finished, monkeypatch, capsys):
    projects.drop_masks(finished, "train", keep=3)
    used = {}

    def of_crops(*_, labels, **__):
        for item in projects.items_of(finished)[:3]:
            used[item.id] = labels[0](item.id)
        raise KeyboardInterrupt

    monkeypatch.setattr(batches, "of_crops", of_crops)
    masks = {item.id: item.mask for item in projects.items_of(finished)[:5]}
    for trust in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run("train_segmenter", finished, name, trust_masks=trust)
        trusted = [id_ for id_, path in used.items() if path == masks[id_]]
        assert len(trusted) == (3 if trust or name == "ground_truth" else 0)
        told = "3 of 16 images are trained on with their masks"
        assert (told in capsys.readouterr().out) == (trust and name != "ground_truth")


def test_a_report_counts_trusted_masks(run, finished):
    projects.drop_masks(finished, "train", keep=2)
    report = run("train_segmenter", finished, "last_round", trust_masks=True, epochs=1)
    assert report["trusted_masks"] == 2 and report["images"] == 16
    bounds = report["val"]
    assert bounds["miou_low"] <= bounds["miou"] <= bounds["miou_high"]
