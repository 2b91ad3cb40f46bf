"""Stage random_walk: its label maps and figures against those computed elsewhere, bad input."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from isim import engine, metrics, results
from isim.data.dataset import load_prepared
from isim.data.files import read_cam, read_image, read_label_map
from isim.errors import UserError
from isim.gpu.random_walk import walk_batch
from isim.labels import crf, random_walk, seeds
from isim.models import affinity
from isim.models.inference import normalize
from isim.stages import random_walk as stage


def read_report(root):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    text = (root / "reports/random_walk/metrics.json").read_text()
    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def trained(finished_project, tmp_path, recorder):
    """A project of the test's own, without a random walk."""
    root = tmp_path / "project"
    shutil.copytree(finished_project, root)
    for name in ("data/random_walk", "reports/random_walk"):
        shutil.rmtree(root / name)
    return root


def walk(root, section, **changes):
    with engine.intra_op_threads(1):
        stage.run(section.model_copy(update=changes), root)


def labels_of(root, split="train"):
    folder = root / f"data/random_walk/{split}"
    return {path.stem: read_label_map(path) for path in sorted(folder.iterdir())}


def items_of(root, split="train"):
    return load_prepared(root / "data/prepared", None).split(split)


@pytest.mark.parametrize("background", ["power", "constant"])
def test_label_maps_are_those_of_the_dense_power(background, trained, tiny):
    walk(
        trained,
        tiny.random_walk,
        background=background,
        steps_log2=4,
        precision="fp32",
        crf_after=False,
    )
    network, config = affinity.load(trained / "models/train_affinity/model.safetensors")
    found = labels_of(trained)
    assert not (trained / "data/random_walk/train_crf").exists()
    assert "walk_crf_miou" not in read_report(trained)["train"]
    for item in items_of(trained):
        pixels = torch.from_numpy(read_image(item.image)).permute(2, 0, 1)[None]
        with torch.no_grad(), engine.intra_op_threads(1):
            near = network(normalize(pixels, config.mean, config.std))[0].numpy()
        planes, ids, size = read_cam(trained / f"data/cams/train/{item.id}.npz")
        # Stride 4 to 8: the mean of two by two.
        small = planes.reshape(len(ids), 8, 2, 8, 2).mean((2, 4))
        pixels = np.eye(64, dtype=np.float32).reshape(64, 8, 8)
        dense = random_walk.walk(pixels, random_walk.transition(near, 5, 8), 0).reshape(64, 64)
        dense = np.linalg.matrix_power(dense, 2**4)
        behind = (1 - small.max(0)) ** 16
        flat = np.concatenate([behind[None], small]).reshape(-1, 64)
        walked = (flat @ dense).reshape(-1, 8, 8).astype(np.float32)
        plane = walked[0] if background == "power" else 0.3
        expected = random_walk.label_map(walked[1:], ids, size, plane)
        assert (found[item.id] != expected).mean() < 0.005


@pytest.mark.parametrize("background", ["power", "constant"])
def test_a_device_that_walks_itself_finds_the_same(background, trained, tiny, monkeypatch):
    walk(trained, tiny.random_walk, background=background)
    alone, report = labels_of(trained), read_report(trained)["train"]
    calls = []

    def spy(planes, *arguments):
        calls.append(len(planes))
        return walk_batch(planes, *arguments)

    monkeypatch.setattr(stage, "WALKING", {"cpu"})
    monkeypatch.setattr(stage, "TOGETHER", 3)
    monkeypatch.setattr("isim.gpu.random_walk.walk_batch", spy)
    walk(trained, tiny.random_walk, background=background)
    assert max(calls) == 3 and sum(calls) >= len(alone)
    found = labels_of(trained)
    assert np.mean([(found[name] == label).mean() for name, label in alone.items()]) > 0.999
    assert read_report(trained)["train"]["walk_miou"] == pytest.approx(
        report["walk_miou"], abs=1e-3
    )


def test_the_walk_differs_from_the_seed_and_keeps_to_the_labelled_classes(
    trained, tiny, put_true_cams
):
    put_true_cams(trained)
    walk(trained, tiny.random_walk, background="constant")
    found = labels_of(trained)
    for item in items_of(trained):
        planes, ids, size = read_cam(trained / f"data/cams/train/{item.id}.npz")
        assert set(np.unique(found[item.id])) <= {0, *ids.tolist()}
        seed = seeds.seed(random_walk.resize(planes, size), ids, 0.3)
        assert (found[item.id] != seed).mean() > 0.01
        # Objects spread, but do not go away.
        assert (found[item.id] > 0)[seed > 0].mean() > 0.8


def test_a_walk_of_one_short_step_is_the_seed(trained, tiny, put_true_cams):
    """A high exponent leaves every pixel to itself: what is left is the map's stride."""
    put_true_cams(trained)
    walk(trained, tiny.random_walk, background="constant", steps_log2=0, beta=1000)
    found = labels_of(trained)
    for item in items_of(trained):
        planes, ids, size = read_cam(trained / f"data/cams/train/{item.id}.npz")
        small = planes.reshape(len(ids), 8, 2, 8, 2).mean((2, 4))
        expected = seeds.seed(random_walk.resize(small, size), ids, 0.3)
        assert (found[item.id] != expected).mean() < 0.02


def test_figures_are_counted_from_the_label_maps_before_and_after_the_crf(
    trained, tiny, put_true_cams
):
    put_true_cams(trained)
    walk(trained, tiny.random_walk, background="constant")
    report = read_report(trained)["train"]
    assert report["images"] == 16
    with (trained / "reports/random_walk/per_class.csv").open(newline="") as file:
        per_class = list(csv.DictReader(file))
    for split, name in (("train", "walk"), ("train_crf", "walk_crf")):
        labels = labels_of(trained, split)
        assert len(labels) == 16
        total = np.zeros((6, 6), np.int64)
        for item in items_of(trained):
            truth = read_label_map(item.mask)
            total += metrics.confusion_matrix(truth, labels[item.id], 6)
        assert report[f"{name}_miou"] == pytest.approx(metrics.miou(total))
        precision, recall = metrics.precision_recall(total)
        assert report[f"{name}_precision"] == pytest.approx(precision)
        assert report[f"{name}_recall"] == pytest.approx(recall)
        found = [float(row[f"{name}_iou"]) for row in per_class]
        assert found == pytest.approx(metrics.iou(total).tolist(), nan_ok=True)
    before, after = (labels_of(trained, split) for split in ("train", "train_crf"))
    for item in items_of(trained):
        image, settings = read_image(item.image), tiny.random_walk.crf
        refined = crf.refine(image, before[item.id], item.class_ids, settings)
        assert np.array_equal(after[item.id], refined)
    assert any((before[id_] != after[id_]).any() for id_ in before)


def test_a_split_inside_a_walked_one_is_reported_apart(trained, tiny, recorder, put_inner_split):
    """As train of trainaug: its figures are those of its images alone."""
    put_inner_split(trained, 5)
    walk(trained, tiny.random_walk)
    report = read_report(trained)
    assert (report["train"]["images"], report["inner"]["images"]) == (16, 5)
    assert "val" not in report and not (trained / "data/random_walk/inner").exists()
    with (trained / "reports/random_walk/per_class.csv").open(newline="") as file:
        per_class = [row for row in csv.DictReader(file) if row["split"] == "inner"]
    for split, name in (("train", "walk"), ("train_crf", "walk_crf")):
        labels, total = labels_of(trained, split), np.zeros((6, 6), np.int64)
        for item in items_of(trained, "inner"):
            truth = read_label_map(item.mask)
            total += metrics.confusion_matrix(truth, labels[item.id], 6)
        found = report["inner"][f"{name}_miou"]
        assert found == pytest.approx(metrics.miou(total)) != report["train"][f"{name}_miou"]
        assert recorder.figures[f"inner_{name}_miou", None] == found
        ious = [float(row[f"{name}_iou"]) for row in per_class]
        assert ious == pytest.approx(metrics.iou(total).tolist(), nan_ok=True)
    figures = report["inner"]
    shown = ["inner", *(f"{100 * figures[f'{name}_miou']:.1f}" for name in ("walk", "walk_crf"))]
    assert shown in [line.split() for line in results.table(trained).splitlines()]


def test_pictures_and_headline(trained, tiny, recorder):
    walk(trained, tiny.random_walk)
    folder = trained / "reports/random_walk/pictures/train"
    assert len(list(folder.iterdir())) == 2 and len(recorder.pictures) == 2
    assert recorder.figures["train_walk_miou", None] == read_report(trained)["train"]["walk_miou"]
    assert not (trained / ".isim/resume/random_walk").exists()


def test_helper_processes_change_nothing(trained, tiny, finished_project, monkeypatch):
    monkeypatch.setenv("ISIM_WORKERS", "1")
    walk(trained, tiny.random_walk)
    for split in ("train", "train_crf"):
        for path in (finished_project / f"data/random_walk/{split}").iterdir():
            again = trained / f"data/random_walk/{split}/{path.name}"
            assert again.read_bytes() == path.read_bytes()


def test_several_splits_and_images_without_a_mask(trained, tiny):
    for split in ("train", "val"):
        path = trained / f"data/prepared/{split}.csv"
        head, *rows = path.read_text().splitlines()
        kept = 3 if split == "val" else 0
        rows[kept:] = [row.rpartition(",")[0] + "," for row in rows[kept:]]
        path.write_text("\n".join([head, *rows]) + "\n")
    walk(trained, tiny.random_walk, splits=("train", "val"), crf_after=False)
    report = read_report(trained)
    assert report["train"]["walk_miou"] is None and report["val"]["walk_miou"] > 0
    assert (len(labels_of(trained)), len(labels_of(trained, "val"))) == (16, 8)


def test_bad_input_names_what_to_do(trained, tiny):
    model = trained / "models/train_affinity/model.safetensors"
    unknown = tiny.random_walk.model_copy(update={"splits": ("trainaug",)})
    with pytest.raises(UserError, match="no split 'trainaug'"):
        stage.run(unknown, trained)
    shutil.move(trained / "data/cams/train", trained / "elsewhere")
    with pytest.raises(UserError, match=r"add train to export_cams\.splits"):
        stage.run(tiny.random_walk, trained)
    shutil.move(trained / "elsewhere", trained / "data/cams/train")
    victim = items_of(trained)[3]
    victim.image.write_bytes(victim.image.read_bytes()[:200])
    with pytest.raises(UserError, match=victim.image.name):
        walk(trained, tiny.random_walk)
    save_file({"weight": torch.zeros(1)}, model)
    with pytest.raises(UserError, match="isim train-affinity"):
        stage.run(tiny.random_walk, trained)
    assert not (trained / "data/random_walk").exists()


@pytest.mark.parametrize("blocked", [".isim/resume", "data/random_walk", "reports/random_walk"])
def test_a_folder_that_cannot_be_written_is_named(blocked, trained, tiny):
    (trained / blocked).parent.mkdir(exist_ok=True)
    shutil.rmtree(trained / blocked, ignore_errors=True)
    (trained / blocked).touch()
    with pytest.raises(UserError, match=f"cannot write .*{blocked}"):
        walk(trained, tiny.random_walk)
