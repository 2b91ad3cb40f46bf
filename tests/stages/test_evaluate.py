"""Stage evaluate: its figures against those computed elsewhere, data without masks, no torch."""

import subprocess
import sys

import numpy as np
import pytest
from support import projects
from support.runs import environment

from isim import metrics
from isim.data.files import read_label_map, write_label_map


def confusions_of(root):
    """(6, 6) counts by source."""
    found = {}
    for row in projects.read_rows(root / "reports/evaluate/confusion.csv"):
        found.setdefault(row["source"], []).append(int(row["pixels"]))
    return {source: np.reshape(counts, (6, 6)) for source, counts in found.items()}


def test_the_oracle_is_the_best_of_the_sweep_and_not_below_the_fixed(finished_project):
    report = projects.read_report(finished_project, "evaluate")
    sweep = projects.read_rows(finished_project / "reports/evaluate/sweep.csv")
    for split in ("train", "val"):
        rows = {r["threshold"]: float(r["cam_miou"]) for r in sweep if r["split"] == split}
        assert list(rows) == ["0.100", "0.200", "0.300", "0.400", "0.500"]
        assert rows["0.300"] == report[split]["cam_miou"]
        assert max(rows.values()) == report[split]["cam_miou_oracle"] >= rows["0.300"]
        assert rows[f"{report[split]['oracle_threshold']:.3f}"] == max(rows.values())


def test_figures_and_classes_are_those_of_the_confusion_matrices(finished_project):
    report = projects.read_report(finished_project, "evaluate")
    per_class = projects.read_rows(finished_project / "reports/evaluate/per_class.csv")
    confusions, labels = confusions_of(finished_project), finished_project / "data/pseudo_labels"
    for source, confusion in confusions.items():
        split, crf = source.removesuffix("_crf").removesuffix("_cam"), source.endswith("_crf")
        name = "pseudo_label_" if split == source else "cam_crf_" if crf else "cam_"
        ious = [row["iou"] for row in per_class if row["source"] == source]
        projects.assert_figures(name, confusion, report[split], ious)
    # Counted anew from the PNGs, a round scores as when it was made.
    for row in projects.read_rows(finished_project / "reports/train_cam/rounds.csv"):
        name = f"round_0{row['round']}"
        assert (
            confusions[name]
            == projects.confusion_of(projects.items_of(finished_project), labels / name)
        ).all()
        made = float(row["pseudo_label_miou"])
        assert report[name]["pseudo_label_miou"] == pytest.approx(made)


def test_images_without_a_mask_are_left_out(run, finished):
    projects.drop_masks(finished, "val", keep=2)
    report = run("evaluate", finished)
    assert report["val"]["images"] == 2 and report["train"]["images"] == 16
    some = [read_label_map(item.mask) for item in projects.items_of(finished, "val")[:2]]
    assert confusions_of(finished)["val_cam_crf"].sum() == (np.stack(some) != 255).sum()
    # Masks that count no pixel are like no masks.
    for item in projects.items_of(finished, "train"):
        write_label_map(item.mask, np.full((64, 64), 255, np.uint8))
    report = run("evaluate", finished)["train"]
    assert report["cam_miou"] is None and report["cam_miou_oracle"] is None


def test_a_split_inside_a_scored_one_is_reported_apart(run, finished, recorder):
    """As train of trainaug: its figures are those of its images alone."""
    projects.put_inner_split(finished, 5)
    report = run("evaluate", finished)
    assert (report["train"]["images"], report["inner"]["images"]) == (16, 5)
    assert "round_02_inner" in report and "round_02_val" not in report
    assert {"inner_cam", "inner_cam_crf", "round_01_inner"} <= confusions_of(finished).keys()
    total = projects.confusion_of(
        projects.items_of(finished, "inner"), finished / "data/pseudo_labels/round_02"
    )
    found = report["round_02_inner"]["pseudo_label_miou"]
    assert found == recorder.figures["inner_pseudo_label_miou", 2]
    assert found == pytest.approx(metrics.miou(total))
    folder = finished / "reports/evaluate/pictures"
    parts, rounds = ("train", "inner", "val"), ("round_01", "round_02")
    scored = [f"{part}_cam{crf}" for part in parts for crf in ("", "_crf")]
    scored += [f"{name}{part}" for name in rounds for part in ("", "_inner")]
    drawn = {f"confusion_{name}" for name in scored}
    assert projects.names_in(folder) == {"train", "val", "per_class"} | drawn
    shown = {(f"{s}/{id_}", 0) for s in ("train", "val") for id_ in projects.names_in(folder / s)}
    assert recorder.pictures == shown and len(shown) == 4
    # The same figures as when the inner split is all that there is.
    projects.drop_masks(finished, "train", keep=5)
    assert run("evaluate", finished)["train"] == report["inner"]


SCORE = """
import contextlib, sys
from pathlib import Path
from isim import params
from isim.reporting import tracking
from isim.stages import evaluate
tracking.stage_run = lambda *_, **__: contextlib.nullcontext(tracking.NoRun())
evaluate.run(params.load(Path("params.yaml")).evaluate, Path())
print(*sys.modules)
"""


def test_scoring_loads_no_network(finished):
    """Else it would be run again with every change of one, and start slowly."""
    command, given = [sys.executable, "-c", SCORE], {"cwd": finished, "env": environment()}
    done = subprocess.run(command, capture_output=True, text=True, check=True, **given)
    used = set(done.stdout.split())
    networks = {"torch", "torchvision", "timm", "segmentation_models_pytorch"}
    assert "matplotlib" in used and not networks & used
