"""Stage train_affinity through the command: what it writes, and every kind of bad input."""

import csv
import json
import shutil
import signal
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file

from isim import cli, engine
from isim.data.dataset import load_prepared
from isim.data.files import read_cam, read_image, read_label_map
from isim.labels import crf, seeds
from isim.models import affinity, cam
from isim.stages import train_affinity

OUTS = ("models/train_affinity", "data/affinity_labels", "reports/train_affinity")
IGNORE = 255


@pytest.fixture
def exported(finished_project, tmp_path, recorder):
    """A project of the test's own, with CAMs but without affinity."""
    root = tmp_path / "project"
    shutil.copytree(finished_project, root)
    for name in (*OUTS, "data/random_walk", "reports/random_walk"):
        shutil.rmtree(root / name)
    return root


@pytest.fixture
def command(exported, monkeypatch, capsys):
    """A function that runs `isim train-affinity` in the project: exit code and error output."""
    monkeypatch.chdir(exported)
    # The entry point installs a handler for SIGTERM, which pytest must not keep.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["isim", "train-affinity"])

    def run():
        code = 0
        with engine.intra_op_threads(1):
            try:
                cli.main()
            except SystemExit as stop:
                code = stop.code or 0
        return code, capsys.readouterr().err

    return run


def set_parameters(root, **changes):
    path = root / "params.yaml"
    yaml = YAML()
    tree = yaml.load(path.read_text())
    assert changes.keys() <= tree["train_affinity"].keys()
    tree["train_affinity"] |= changes
    yaml.dump(tree, path)


def read_report(root):
    return json.loads((root / "reports/train_affinity/metrics.json").read_text())


def read_epochs(root):
    with (root / "reports/train_affinity/epochs.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


class TestFinished:
    def test_labels_are_what_two_plain_crfs_agree_on(self, finished_project, tiny):
        items = load_prepared(finished_project / "data/prepared", None).split("train")
        folder = finished_project / "data/affinity_labels"
        assert sorted(path.stem for path in folder.iterdir()) == sorted(i.id for i in items)
        pixels, sure, right, counted = 0, 0, 0, 0
        for item in items:
            planes, ids, size = read_cam(finished_project / f"data/cams/train/{item.id}.npz")
            # By Pillow, whose bilinear enlarging agrees with OpenCV's.
            full = [
                Image.fromarray(p).resize(size[::-1], Image.Resampling.BILINEAR) for p in planes
            ]
            grown = np.stack([np.asarray(plane) for plane in full])
            high, low = (
                crf.refine(
                    read_image(item.image),
                    seeds.seed(grown, ids, threshold),
                    ids,
                    tiny.train_affinity.crf,
                )
                for threshold in (0.3, 0.1)
            )
            label = read_label_map(folder / f"{item.id}.png")
            assert set(np.unique(label)) <= {0, *ids.tolist(), IGNORE}
            assert (np.where(high == low, high, IGNORE) == label).mean() > 0.99
            truth = read_label_map(item.mask)
            both = (label != IGNORE) & (truth != IGNORE)
            pixels, sure = pixels + label.size, sure + (label != IGNORE).sum()
            right, counted = right + (label == truth)[both].sum(), counted + both.sum()
        report = read_report(finished_project)
        assert report["sure_share"] == pytest.approx(sure / pixels) and sure < pixels
        assert report["sure_accuracy"] == pytest.approx(right / counted)

    def test_the_terms_of_the_loss_are_named(self, finished_project):
        rows = read_epochs(finished_project)
        assert [row["epoch"] for row in rows] == [1, 2, 3]
        for row in rows:
            terms = [row[f"{name}_loss"] for name in ("background", "foreground", "negative")]
            assert min(terms) > 0
            assert row["loss"] == pytest.approx(terms[0] / 4 + terms[1] / 4 + terms[2] / 2)
        report = read_report(finished_project)
        assert report["loss"] == rows[-1]["loss"] and report["images"] == 16

    def test_the_checkpoint_has_learned_all_but_its_stem(self, finished_project, tiny):
        path = finished_project / "models/train_affinity/model.safetensors"
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        network, config = affinity.load(path)
        assert (config.map_stride, config.radius) == (8, 5)
        engine.seed_all(tiny.train_affinity.seed)
        start = dict(affinity.build(config).named_parameters())
        changed = {n: not torch.equal(p, start[n]) for n, p in network.named_parameters()}
        stem = {name for name, p in network.named_parameters() if not p.requires_grad}
        assert stem and not any(changed[name] for name in stem)
        assert changed["head.mix.weight"] and changed["head.taps.0.weight"]

    def test_pictures_show_the_fixed_set_and_the_losses(self, finished_project):
        names = {p.name for p in (finished_project / "reports/train_affinity/pictures").iterdir()}
        assert "losses.png" in names and len(names) == 1 + 2


def test_crops_have_labels_of_the_map(finished_project, tiny):
    """Each pixel of the map lies on a crop's centre line: the label there."""
    items = load_prepared(finished_project / "data/prepared", None).split("train")
    params = tiny.train_affinity.model_copy(update={"crop": 44})
    config = affinity.AffinityConfig("resnet10t", 16, 8, 5, (0.5,) * 3, (0.5,) * 3)

    def label(id_):
        return finished_project / f"data/affinity_labels/{id_}.png"

    crops = train_affinity.AffinityCrops(items, params, config, label)
    full = train_affinity.CropDataset(items, 44, config.mean, config.std, 0, [label])
    full.use_labels(0)
    for index in range(4):
        drawn, whole = crops[index], full[index]
        assert torch.equal(drawn["image"], whole["image"])
        assert drawn["label"].shape == (6, 6) and drawn["label"].dtype == torch.uint8
        expected = torch.nn.functional.interpolate(
            whole["label"][None, None].float(), (6, 6), mode="nearest-exact"
        )
        assert torch.equal(drawn["label"], expected[0, 0].byte())


def test_training_on_good_cams_lowers_the_loss(exported, command, put_true_cams, recorder):
    put_true_cams(exported)
    set_parameters(exported, rate=0.03, epochs=12)
    assert command() == (0, "")
    report, rows = read_report(exported), read_epochs(exported)
    assert report["sure_accuracy"] > 0.95 and report["sure_miou"] > 0.85
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"]
    assert recorder.figures["negative_loss", 12] == rows[-1]["negative_loss"]


def test_the_encoder_of_train_cam_is_a_start(exported, command):
    # Nothing learns: what is saved is the start.
    set_parameters(exported, weights="train_cam", rate=0.0, epochs=1)
    assert command() == (0, "")
    network, _ = affinity.load(exported / "models/train_affinity/model.safetensors")
    trained, _ = cam.load(exported / "models/train_cam/model.safetensors")
    assert not (exported / ".isim/resume/train_affinity").exists()
    for name, value in trained.encoder.state_dict().items():
        assert torch.equal(network.encoder.state_dict()[name], value), name


def test_data_without_any_mask_runs_through(exported, command):
    path = exported / "data/prepared/train.csv"
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *(row.rpartition(",")[0] + "," for row in rows)]) + "\n")
    set_parameters(exported, epochs=1)
    assert command() == (0, "")
    report = read_report(exported)
    assert report["sure_accuracy"] is None and 0 < report["sure_share"] < 1


def no_cams(root):
    shutil.rmtree(root / "data/cams/train")
    return "add train to export_cams.splits"


def one_cam_missing(root):
    victim = sorted((root / "data/cams/train").iterdir())[7]
    victim.unlink()
    return victim.name


def a_cam_of_another_image(root):
    """Of the same size, other classes."""
    items = load_prepared(root / "data/prepared", None).split("train")
    other = next(i for i in items if (i.image_label != items[0].image_label).any())
    folder = root / "data/cams/train"
    shutil.copy(folder / f"{other.id}.npz", folder / f"{items[0].id}.npz")
    return "other classes"


def other_weights(root):
    save_file(timm.create_model("mobilenetv2_100").state_dict(), root / "w.safetensors")
    set_parameters(root, weights="w.safetensors")
    return "train_affinity.weights: w.safetensors is of another architecture than resnet10t"


def other_encoder(root):
    set_parameters(root, weights="train_cam", encoder="mobilenetv2_100")
    return "train_affinity.encoder"


def no_network(root):
    (root / "models/train_cam/model.safetensors").unlink()
    set_parameters(root, weights="train_cam")
    return "isim train-cam"


def parameters(expected, **changes):
    return lambda root: set_parameters(root, **changes) or expected


BAD_INPUT = {
    "no CAMs of the split": no_cams,
    "a CAM is missing": one_cam_missing,
    "a CAM of another image": a_cam_of_another_image,
    "missing weights": parameters("train_affinity.weights: no file", weights="gone.safetensors"),
    "weights of another architecture": other_weights,
    "another encoder than train_cam's": other_encoder,
    "another normalisation than train_cam's": parameters(
        "train_affinity.input_norm: ", weights="train_cam", input_norm="unit"
    ),
    "no network to start from": no_network,
    "unknown encoder": parameters("train_affinity.encoder: timm has no", encoder="resnet11"),
    "unknown split": parameters("no split 'trainaug'", split="trainaug"),
    "rates too high": parameters("train_affinity.rate", rate=1e30),
    "planes in the wrong order": parameters(
        "must be above background_threshold (0.3)", background_threshold=0.3
    ),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_no_outs(kind, exported, command):
    expected = BAD_INPUT[kind](exported)
    code, err = command()
    assert code == 2, err
    assert err.startswith("isim: error: ") and err.count("\n") == 1, err
    assert expected in err and "train_cam.encoder" not in err and "train_cam.weights" not in err
    assert [name for name in OUTS if (exported / name).exists()] == []
