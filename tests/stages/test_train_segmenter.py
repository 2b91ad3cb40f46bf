"""Stage train_segmenter through the command: every label set, and every kind of bad input."""

import csv
import json
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file

from isim import cli, engine, metrics, params, results
from isim.data.dataset import load_prepared
from isim.data.files import read_cam, read_image, read_label_map, write_label_map
from isim.labels import crf
from isim.labels.seeds import grow
from isim.models import segmenter
from isim.models.inference import multi_scale_probabilities
from isim.stages import train_segmenter

NAMES = ("ground_truth", "seeds", "random_walk_crf", "round_02")
SPEED = ("seconds", "images_per_second", "waiting_share")
PATHS = {name: params.label_set_path(name) for name in (*NAMES, "last_round")}


def change(root, **changes):
    """Set values of the section `train_segmenter`, those of the optimizer too."""
    path = root / "params.yaml"
    yaml = YAML()
    tree = yaml.load(path.read_text())
    section = tree["train_segmenter"]
    for name, value in changes.items():
        (section if name in section else section["optimizer"])[name] = value
    with path.open("w") as file:
        yaml.dump(tree, file)


def list_label_sets(root, names=NAMES):
    path = root / "params.yaml"
    yaml = YAML()
    tree = yaml.load(path.read_text())
    tree["label_sets"] = [{"name": name, "path": PATHS[name]} for name in names]
    with path.open("w") as file:
        yaml.dump(tree, file)


def walked(root):
    """Leave out the random walk's label maps of two images."""
    for path in sorted((root / "data/random_walk/train_crf").iterdir())[:2]:
        path.unlink()


@pytest.fixture(scope="module")
def segmented(finished_project, tmp_path_factory):
    """A project with a segmenter of every label set; never change it, copy it."""
    from conftest import TINY, _record

    root = tmp_path_factory.mktemp("segmented") / "project"
    shutil.copytree(finished_project, root)
    walked(root)
    list_label_sets(root)
    seen = {}
    with pytest.MonkeyPatch.context() as monkeypatch, engine.intra_op_threads(1):
        for name in NAMES:
            seen[name] = _record(monkeypatch)
            train_segmenter.run(TINY.train_segmenter, name, root)
    return root, seen


@pytest.fixture
def project(finished_project, tmp_path, recorder):
    """A project of the test's own, in which all but the segmenters is finished."""
    root = tmp_path / "project"
    shutil.copytree(finished_project, root)
    list_label_sets(root, PATHS)
    return root


@pytest.fixture
def command(project, monkeypatch, capsys):
    """A function that runs `isim train-segmenter NAME`: exit code and error output."""
    monkeypatch.chdir(project)
    # The entry point installs a handler for SIGTERM, which pytest must not keep.
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(name="round_02"):
        monkeypatch.setattr(sys, "argv", ["isim", "train-segmenter", name])
        code = 0
        with engine.intra_op_threads(1):
            try:
                cli.main()
            except SystemExit as stop:
                code = stop.code or 0
        return code, capsys.readouterr().err

    return run


def read_report(root, name):
    return json.loads((root / f"reports/train_segmenter/{name}/metrics.json").read_text())


def items_of(root, split):
    return load_prepared(root / "data/prepared", None).split(split)


@pytest.mark.parametrize("name", NAMES)
def test_every_label_set_leaves_a_model_predictions_and_reports(name, segmented):
    root, seen = segmented
    network, config = segmenter.load(root / f"models/train_segmenter/{name}/model.safetensors")
    assert config.method == "deeplabv3" and len(config.classes) == 5
    ids = sorted(item.id for item in items_of(root, "val"))
    folder = root / f"data/predictions/{name}"
    assert sorted(path.name for path in folder.iterdir()) == ["val", "val_crf"]
    for split in ("val", "val_crf"):
        assert sorted(path.stem for path in (folder / split).iterdir()) == ids
    reports = root / f"reports/train_segmenter/{name}"
    with (reports / "epochs.csv").open(newline="") as file:
        epochs = list(csv.DictReader(file))
    assert [row["epoch"] for row in epochs] == ["1", "2"]
    assert list(epochs[0]) == ["epoch", "loss", "rate", *SPEED]
    # The first epoch's last step: the second of four, or with 14 images the first of two.
    factor = 1.0 if name == "random_walk_crf" else (1 - 1 / 4) ** 0.9
    assert float(epochs[0]["rate"]) == pytest.approx(0.01 * factor)
    with (reports / "per_class.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * 6
    names = {path.name for path in (reports / "pictures").iterdir()}
    assert names == {"val", "loss.png", "per_class.png", "confusion_val.png"}
    shown = {path.stem for path in (reports / "pictures/val").iterdir()}
    assert len(shown) == 2
    assert seen[name].pictures == {(f"val/{id_}", 0) for id_ in shown}
    assert {"loss", "val_miou", "val_crf_miou"} <= {name for name, _ in seen[name].figures}
    assert not (root / ".isim/resume/train_segmenter" / name).exists()


def test_a_test_set_that_is_not_there_is_left_out(project, tiny, capsys):
    both = tiny.train_segmenter.model_copy(update={"eval_splits": ("val", "test")})
    train_segmenter.run(both, "round_02", project)
    assert "no images of split 'test'" in capsys.readouterr().out
    assert list(read_report(project, "round_02")["splits"]) == ["val"]


def test_images_without_a_label_map_are_left_out_and_counted(segmented):
    counts = {
        name: (report["images"], report["images_without_labels"])
        for name, report in ((name, read_report(segmented[0], name)) for name in NAMES)
    }
    assert counts.pop("random_walk_crf") == (14, 2)
    assert set(counts.values()) == {(16, 0)}
    labels = {name: read_report(segmented[0], name)["labels"] for name in NAMES[2:]}
    assert labels == {"random_walk_crf": "train_crf", "round_02": "round_02"}


@pytest.mark.parametrize(("name", "folder"), [("", "train"), ("_crf", "train_crf")])
def test_the_walk_and_what_the_crf_made_of_it_are_two_label_sets(name, folder, segmented):
    root = segmented[0]
    sources = train_segmenter._sources(f"random_walk{name}", "train", items_of(root, "train"), root)
    assert {path.parent for path in sources.values()} == {root / "data/random_walk" / folder}


def test_the_last_round_is_the_one_of_the_highest_number(segmented, tmp_path):
    items = items_of(segmented[0], "train")
    for name in ("round_02", "round_99", "round_100", "round_x", "rounds"):
        folder = tmp_path / "data/pseudo_labels" / name
        folder.mkdir(parents=True)
        (folder / f"{items[0].id}.png").touch()
    sources = train_segmenter._sources("last_round", "train", items, tmp_path)
    assert list(sources.values()) == [tmp_path / f"data/pseudo_labels/round_100/{items[0].id}.png"]


def test_the_last_round_and_its_number_give_the_same_segmenter(segmented, project, command):
    assert command("last_round") == (0, "")
    model, same = (
        root / f"models/train_segmenter/{name}/model.safetensors"
        for root, name in ((segmented[0], "round_02"), (project, "last_round"))
    )
    assert model.read_bytes() == same.read_bytes()


def test_label_sets_give_different_segmenters(segmented):
    states = {
        (segmented[0] / f"models/train_segmenter/{name}/model.safetensors").read_bytes()
        for name in NAMES
    }
    assert len(states) == 4


def test_predictions_and_scores_are_those_of_the_definition(segmented, tiny):
    root, _ = segmented
    network, config = segmenter.load(root / "models/train_segmenter/ground_truth/model.safetensors")
    engine.place(network, torch.device("cpu"))
    section = tiny.train_segmenter
    precision = read_report(root, "ground_truth")["precision"]
    before, after = np.zeros((6, 6), int), np.zeros((6, 6), int)
    for item in items_of(root, "val"):
        image, truth = read_image(item.image), read_label_map(item.mask)
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        with engine.intra_op_threads(1), engine.autocast(precision, torch.device("cpu")):
            planes = multi_scale_probabilities(network, config, pixels, (1.0, 0.5), True).numpy()
        prediction = read_label_map(root / f"data/predictions/ground_truth/val/{item.id}.png")
        refined = read_label_map(root / f"data/predictions/ground_truth/val_crf/{item.id}.png")
        assert (prediction == planes.argmax(0)).all()
        # Rounded to float16 on the way: a pixel on the edge of two labels may fall either way.
        exact = crf.refine_soft(image, planes, section.crf)
        assert (refined == exact).mean() > 0.995
        before += metrics.confusion_matrix(truth, prediction, 6)
        after += metrics.confusion_matrix(truth, refined, 6)
    figures = read_report(root, "ground_truth")["splits"]["val"]
    assert figures["miou"] == pytest.approx(metrics.miou(before))
    assert figures["crf_miou"] == pytest.approx(metrics.miou(after))
    assert (figures["images"], figures["scored_images"]) == (8, 8)


def test_seeds_are_thresholded_cams(project, monkeypatch, tiny):
    used = {}

    def train_epoch(network, optimizer, crops, *_):
        for item in crops.dataset.items:
            used[item.id] = read_label_map(crops.dataset.labels[0](item.id))
        return {"loss": 1.0, "rate": 0.0, "seconds": 1.0, "images_per_second": 1.0}

    monkeypatch.setattr("isim.segmenter_training.train_epoch", train_epoch)
    section = tiny.train_segmenter.model_copy(update={"threshold": 0.6, "epochs": 1})
    train_segmenter.run(section, "seeds", project)
    assert len(used) == 16
    for id_, label in used.items():
        planes, ids, size = read_cam(project / f"data/cams/train/{id_}.npz")
        planes = grow(planes, size)
        expected = np.where(planes.max(0) > 0.6, ids[planes.argmax(0)], 0)
        assert (label == expected).all()
    assert any(label.any() for label in used.values())


def test_without_dcrf_there_is_nothing_of_it(project, command):
    change(project, crf_after=False, method="deeplabv2", epochs=1)
    assert command() == (0, "")
    assert [path.name for path in (project / "data/predictions/round_02").iterdir()] == ["val"]
    assert "crf_miou" not in read_report(project, "round_02")["splits"]["val"]


def test_helpers_change_nothing_but_the_time(segmented, project, command, monkeypatch):
    monkeypatch.setenv("ISIM_WORKERS", "1")
    assert command("ground_truth") == (0, "")
    for folder in ("models/train_segmenter", "data/predictions"):
        for path in (segmented[0] / folder / "ground_truth").rglob("*.*"):
            same = project / path.relative_to(segmented[0])
            assert same.read_bytes() == path.read_bytes(), path


def test_a_split_without_masks_is_predicted_and_not_scored(project, command):
    path = project / "data/prepared/val.csv"
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *(row.rpartition(",")[0] + "," for row in rows)]) + "\n")
    change(project, epochs=1)
    assert command() == (0, "")
    assert len(list((project / "data/predictions/round_02/val").iterdir())) == 8
    figures = read_report(project, "round_02")["splits"]["val"]
    assert figures["scored_images"] == 0 and figures["miou"] is None
    lines = [line.split() for line in results.table(project).splitlines()]
    assert ["round_02", "val", "-", "-"] in lines


def test_a_split_inside_a_tested_one_is_reported_apart(project, command, put_inner_split):
    put_inner_split(project, 5)
    change(project, epochs=1, eval_splits=["train"])
    assert command() == (0, "")
    report = read_report(project, "round_02")["splits"]
    folder = project / "data/predictions/round_02"
    assert sorted(path.name for path in folder.iterdir()) == ["train", "train_crf"]
    for split, prefix in (("train", ""), ("train_crf", "crf_")):
        for part, count in (("train", 16), ("inner", 5)):
            total = np.zeros((6, 6), int)
            for item in items_of(project, part):
                prediction = read_label_map(folder / split / f"{item.id}.png")
                total += metrics.confusion_matrix(read_label_map(item.mask), prediction, 6)
            assert report[part][f"{prefix}miou"] == pytest.approx(metrics.miou(total))
            assert report[part]["images"] == report[part]["scored_images"] == count


def test_the_result_table_has_the_segmenters_of_the_list(segmented, tmp_path):
    root = segmented[0]
    lines = [line.split() for line in results.table(root).splitlines()]
    for name in NAMES:
        figures = read_report(root, name)["splits"]["val"]
        percent = [f"{100 * figures[key]:.1f}" for key in ("miou", "crf_miou")]
        assert [name, "val", *percent] in lines
    shutil.copytree(root / "reports", tmp_path / "reports")
    shutil.copy(root / "params.yaml", tmp_path)
    shutil.rmtree(tmp_path / "reports/train_segmenter/seeds")
    list_label_sets(tmp_path, [name for name in NAMES if name != "random_walk_crf"])
    found = {line.split()[0] for line in results.table(tmp_path).splitlines() if line}
    assert {"round_02", "ground_truth"} <= found and not {"seeds", "random_walk_crf"} & found


def remove(*names):
    def spoil(root):
        for name in names:
            shutil.rmtree(root / name)

    return spoil


def no_labels(root):
    for path in (root / "data/pseudo_labels/round_02").iterdir():
        path.unlink()


def one_label(root):
    for path in sorted((root / "data/pseudo_labels/round_02").iterdir())[1:]:
        path.unlink()


def other_classes(root):
    for path in (root / "data/pseudo_labels/round_02").iterdir():
        write_label_map(path, np.full((64, 64), 6, np.uint8))


def a_cam_of_another_image(root):
    """Of the same size, other classes."""
    items = items_of(root, "train")
    other = next(i for i in items if (i.image_label != items[0].image_label).any())
    folder = root / "data/cams/train"
    shutil.copy(folder / f"{other.id}.npz", folder / f"{items[0].id}.npz")


def decoder_weights(root):
    torch.manual_seed(0)
    network = segmenter.build(
        segmenter.SegmenterConfig(
            "deeplabv3", "resnet10t", 16, "batch", 16, tuple("abcde"), (0.5,) * 3, (0.2,) * 3
        )
    )
    save_file(network.state_dict(), root / "w.safetensors")
    change(root, weights="w.safetensors")


BAD_INPUT = {
    "a round that was not made": (remove("data/pseudo_labels"), "round_02", "isim train-cam"),
    "no CAMs": (remove("data/cams"), "seeds", "isim export-cams"),
    "a CAM of another image": (a_cam_of_another_image, "seeds", "other classes than"),
    "no random walk": (remove("data/random_walk"), "random_walk_crf", "isim random-walk"),
    "no dCRF after it": (
        remove("data/random_walk/train_crf"),
        "random_walk_crf",
        "for split 'train', with crf_after: true",
    ),
    "no round at all": (remove("data/pseudo_labels"), "last_round", "isim train-cam"),
    "nothing prepared": (remove("data/prepared"), "round_02", "isim prepare"),
    "no label map": (no_labels, "round_02", "none of the 16 images of split 'train'"),
    "one label map": (one_label, "round_02", "train_segmenter.batch"),
    "labels of other classes": (other_classes, "round_02", "holds label 6 of 0..5"),
    "an unknown name": (None, "round_03", "no label set 'round_03' in params.yaml"),
    "decoder weights": (decoder_weights, "round_02", "allow_decoder_weights"),
    "an unknown split": (lambda r: change(r, split="all"), "round_02", "no split 'all'"),
    "an unknown encoder": (lambda r: change(r, encoder="resnet11"), "round_02", "no encoder"),
    "a rate too high": (
        lambda r: change(r, rate=1e30),
        "round_02",
        "lower train_segmenter.optimizer.rate",
    ),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_no_outs(kind, project, command):
    spoil, name, expected = BAD_INPUT[kind]
    if spoil:
        spoil(project)
    code, err = command(name)
    assert code == 2, err
    assert err.startswith("isim: error: ") and err.count("\n") == 1, err
    assert expected in err
    for folder in ("models", "reports"):
        assert not (project / folder / "train_segmenter").exists()
    assert not (project / "data/predictions").exists()


def test_decoder_weights_that_are_allowed_are_recorded(project, command):
    decoder_weights(project)
    change(project, allow_decoder_weights=True, epochs=1)
    assert command() == (0, "")
    assert read_report(project, "round_02")["decoder_weights"] == {"missing": [], "unexpected": []}


def test_weights_that_are_not_finite_after_the_last_step_are_found(project, command, monkeypatch):
    step = torch.optim.SGD.step

    def wild(self, *arguments):
        step(self, *arguments)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.SGD, "step", wild)
    change(project, epochs=1, batch=16)
    code, err = command()
    assert code == 2 and err.count("\n") == 1
    assert "are not finite" in err and "train_segmenter.optimizer.rate" in err
