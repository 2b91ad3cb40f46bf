"""Stage evaluate: its figures against those computed elsewhere, and data without masks."""

import csv
import json
import shutil

import numpy as np
import pytest

from isim import metrics
from isim.data.dataset import load_prepared
from isim.data.files import read_cam, read_label_map, write_label_map
from isim.errors import UserError
from isim.labels import seeds
from isim.stages import evaluate


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_report(root, stage="evaluate"):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    text = (root / f"reports/{stage}/metrics.json").read_text()
    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def finished(finished_project, tmp_path, recorder):
    shutil.copytree(finished_project, tmp_path / "project")
    return tmp_path / "project"


def test_the_oracle_is_the_best_of_the_sweep_and_not_below_the_fixed(finished_project):
    report = read_report(finished_project)
    sweep = read_rows(finished_project / "reports/evaluate/sweep.csv")
    for split in ("train", "val"):
        rows = {r["threshold"]: float(r["cam_miou"]) for r in sweep if r["split"] == split}
        assert list(rows) == ["0.100", "0.200", "0.300", "0.400", "0.500"]
        assert rows["0.300"] == report[split]["cam_miou"]
        assert max(rows.values()) == report[split]["cam_miou_oracle"] >= rows["0.300"]
        assert rows[f"{report[split]['oracle_threshold']:.3f}"] == max(rows.values())


def test_a_round_scores_as_when_it_was_made(finished_project):
    """Counted anew from the PNGs, without the journal of train_cam."""
    report = read_report(finished_project)
    rounds = read_rows(finished_project / "reports/train_cam/rounds.csv")
    assert [row["round"] for row in rounds] == ["1", "2"]
    for row in rounds:
        again = report[f"round_{int(row['round']):02d}"]["pseudo_label_miou"]
        assert again == pytest.approx(float(row["pseudo_label_miou"]))


def test_figures_equal_a_plain_computation(finished_project, tiny):
    prepared = load_prepared(finished_project / "data/prepared", None)
    total = np.zeros((6, 6), np.int64)
    for item in prepared.split("val"):
        planes, ids, size = read_cam(finished_project / f"data/cams/val/{item.id}.npz")
        truth = read_label_map(item.mask)
        assert size == truth.shape
        # Bilinear upsampling by hand: pixel centers, edges held.
        axes = []
        for full, small in zip(size, planes.shape[1:], strict=True):
            centers = np.clip((np.arange(full) + 0.5) * small / full - 0.5, 0, small - 1)
            low = np.minimum(np.floor(centers).astype(int), small - 1)
            axes.append((low, np.minimum(low + 1, small - 1), centers - low))
        (t, b, v), (left, r, u) = axes
        rows = planes[:, t] * (1 - v)[None, :, None] + planes[:, b] * v[None, :, None]
        grown = rows[:, :, left] * (1 - u) + rows[:, :, r] * u
        seed = seeds.seed(grown.astype(np.float32), ids, tiny.evaluate.threshold)
        total += metrics.confusion_matrix(truth, seed, 6)
    report = read_report(finished_project)["val"]
    assert report["cam_miou"] == pytest.approx(metrics.miou(total), abs=1e-3)
    precision, recall = metrics.precision_recall(total)
    assert report["cam_precision"] == pytest.approx(precision, abs=1e-3)
    assert report["cam_recall"] == pytest.approx(recall, abs=1e-3)
    names = read_rows(finished_project / "reports/evaluate/per_class.csv")
    found = [float(row["iou"]) for row in names if row["source"] == "val_cam"]
    assert found == pytest.approx(metrics.iou(total).tolist(), abs=2e-3, nan_ok=True)


def drop_masks(root, split, keep):
    """Make `split` one where only the first `keep` images have a mask."""
    path = root / f"data/prepared/{split}.csv"
    lines = path.read_text().splitlines()
    kept = [",".join([*line.split(",")[:2], ""]) for line in lines[1 + keep :]]
    path.write_text("\n".join([*lines[: 1 + keep], *kept]) + "\n")


def test_images_without_a_mask_are_left_out(finished, tiny):
    drop_masks(finished, "val", keep=2)
    evaluate.run(tiny.evaluate, finished)
    report = read_report(finished)
    assert report["val"]["images"] == 2 and report["train"]["images"] == 16
    pixels = sum(
        int(row["pixels"])
        for row in read_rows(finished / "reports/evaluate/confusion.csv")
        if row["source"] == "val_cam_crf"
    )
    kept = load_prepared(finished / "data/prepared", None).split("val")[:2]
    assert pixels == sum((read_label_map(item.mask) != 255).sum() for item in kept)


def test_masks_that_count_no_pixel_are_like_no_masks(finished, tiny):
    for item in load_prepared(finished / "data/prepared", None).split("val"):
        write_label_map(item.mask, np.full((64, 64), 255, np.uint8))
    evaluate.run(tiny.evaluate, finished)
    report = read_report(finished)["val"]
    assert report["cam_miou"] is None and report["cam_miou_oracle"] is None


def test_the_sweep_does_not_pass_its_end(finished, tiny):
    uneven = tiny.evaluate.model_copy(
        update={"sweep_start": 0.1, "sweep_stop": 0.5, "sweep_step": 0.15}
    )
    evaluate.run(uneven, finished)
    rows = read_rows(finished / "reports/evaluate/sweep.csv")
    thresholds = {row["threshold"] for row in rows}
    assert thresholds == {"0.100", "0.250", "0.300", "0.400"}


def test_a_cam_that_is_missing_is_named(finished, tiny):
    victim = sorted((finished / "data/cams/val").iterdir())[3]
    victim.unlink()
    shutil.rmtree(finished / "reports/evaluate")
    with pytest.raises(UserError, match=f"{victim.name}.*isim export-cams"):
        evaluate.run(tiny.evaluate, finished)
    assert not (finished / "reports/evaluate/metrics.json").exists()


def test_a_cam_of_another_image_is_refused(finished, tiny):
    """Of the same size, other classes."""
    items = load_prepared(finished / "data/prepared", None).split("val")
    other = next(i for i in items if (i.image_label != items[0].image_label).any())
    folder = finished / "data/cams/val"
    shutil.copy(folder / f"{other.id}.npz", folder / f"{items[0].id}.npz")
    with pytest.raises(UserError, match=rf"{items[0].id}\.npz is of .* other classes"):
        evaluate.run(tiny.evaluate, finished)


def test_pictures_of_an_earlier_state_go(finished, tiny):
    pictures = finished / "reports/evaluate/pictures"
    (pictures / "old").mkdir()
    for name in ("old/a.png", "confusion_round_09.png"):
        (pictures / name).touch()
    evaluate.run(tiny.evaluate, finished)
    names = {path.name for path in pictures.iterdir()}
    assert "old" not in names and "confusion_round_09.png" not in names
    assert {"train", "val", "per_class.png", "confusion_round_02.png"} <= names


def test_cams_of_a_split_that_is_none_any_more_are_named(finished, tiny):
    shutil.copytree(finished / "data/cams/val", finished / "data/cams/old")
    with pytest.raises(UserError, match="no split 'old'.* train, val"):
        evaluate.run(tiny.evaluate, finished)


@pytest.mark.parametrize(
    ("side", "label", "expected"),
    [
        (64, 6, "holds label 6 of 0..5; .* make the label maps again"),
        (64, 255, "holds label 255 of 0..5"),
        (32, 0, "is 32x32 pixels but .* is 64x64"),
    ],
)
def test_a_round_of_other_data_is_named(side, label, expected, finished, tiny):
    path = sorted((finished / "data/pseudo_labels/round_02").iterdir())[3]
    write_label_map(path, np.full((side, side), label, np.uint8))
    with pytest.raises(UserError, match=f"label map .*{path.name} {expected}"):
        evaluate.run(tiny.evaluate, finished)


def test_without_cams_the_command_that_makes_them_is_named(project, tiny):
    with pytest.raises(UserError, match="isim export-cams"):
        evaluate.run(tiny.evaluate, project)


def test_a_split_inside_a_scored_one_is_reported_apart(finished, tiny, put_inner_split):
    """As train of trainaug: its figures are those of its images alone."""
    prepared = finished / "data/prepared"
    put_inner_split(finished, 5)
    evaluate.run(tiny.evaluate, finished)
    report = read_report(finished)
    assert (report["train"]["images"], report["inner"]["images"]) == (16, 5)
    assert "round_02_inner" in report and "round_02_val" not in report
    apart = {row["source"] for row in read_rows(finished / "reports/evaluate/confusion.csv")}
    assert {"inner_cam", "inner_cam_crf", "round_01_inner"} <= apart
    total = np.zeros((6, 6), np.int64)
    for item in load_prepared(prepared, None).split("inner"):
        label = read_label_map(finished / f"data/pseudo_labels/round_02/{item.id}.png")
        total += metrics.confusion_matrix(read_label_map(item.mask), label, 6)
    assert report["round_02_inner"]["pseudo_label_miou"] == pytest.approx(metrics.miou(total))
    # The same figures as when the inner split is all that there is.
    drop_masks(finished, "train", keep=5)
    evaluate.run(tiny.evaluate, finished)
    alone = read_report(finished)["train"]
    assert alone == report["inner"]
