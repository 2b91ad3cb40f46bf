"""A round's pseudo-labels and scores: those of the definition."""

import numpy as np
import pytest
import torch
from support.images import counted, opened

from isim import metrics
from isim.data.files import read_cam, read_label_map
from isim.labels.crf import refine as crf
from isim.labels.seeds import seeds
from isim.models.inference import multi_scale_cams
from isim.passes.pseudo_labels import SWEEP, Scores
from isim.reporting import pictures


@pytest.mark.usefixtures("on_gpu")
def test_labels_and_scores_are_those_of_the_definition(run, models, items, tiny, tmp_path):
    scores, params = run("pseudo_labels.regenerate", tmp_path), tiny.train_cam
    labels, scales = [], {"scales": params.scales, "flip": params.flip}
    shown = pictures.choose(items, params.pictures)
    assert sorted(path.stem for path in tmp_path.glob("a/*.npz")) == [item.id for item in shown]
    for item in items:
        (image, pixels, _), ids = opened(item), item.class_ids
        (planes,) = multi_scale_cams(*models["cam"], pixels, [torch.from_numpy(ids)], **scales)
        labels.append([seeds.seed(planes.numpy(), ids, t) for t in (params.threshold, *SWEEP)])
        made = read_label_map(tmp_path / f"pseudo_labels/a/{item.id}.png")
        # The network is folded for inference, which rounds otherwise.
        assert (made != crf.refine(image, labels[-1][0], ids, params.crf)).mean() < 0.002
        if item in shown:
            kept, _, size = read_cam(tmp_path / f"a/{item.id}.npz")
            assert np.allclose(kept, planes, atol=1e-3) and size == planes.shape[1:]
    expected = np.array([counted(items, maps) for maps in zip(*labels, strict=True)])
    wrong = expected - [scores.seed_confusion, *scores.sweep_confusion]
    assert np.abs(wrong).sum() < 0.002 * expected.sum()
    assert (scores.label_confusion == counted(items, tmp_path / "pseudo_labels/a")).all()
    assert scores.masked_share == 1 / len(items)


@pytest.mark.usefixtures("on_gpu")
def test_without_a_crf_the_seeds_are_the_labels(run, items, tmp_path):
    scores = run("pseudo_labels.regenerate frozen", tmp_path, threshold=0.5, refined=False)
    assert (scores.label_confusion == scores.seed_confusion).all()
    assert (scores.label_confusion == counted(items, tmp_path / "pseudo_labels/a")).all()
    refined = run("pseudo_labels.regenerate frozen", tmp_path / "other", threshold=0.5)
    assert (refined.seed_confusion == scores.seed_confusion).all()
    assert (refined.label_confusion != scores.label_confusion).any()


def test_the_row_and_the_classes_are_figures_of_the_counts():
    seed, label, *sweep = np.random.default_rng(0).integers(1, 9, (2 + len(SWEEP), 3, 3))
    sweep[4] += 9 * np.eye(3, dtype=int)
    found = Scores(seed, label, np.array(sweep), 0.3, 0.25, 0.4, {"seconds": 2.0})
    mious = [metrics.miou(confusion) for confusion in (seed, sweep[4], label)]
    assert list(found.row().values()) == [*mious[:2], 0.25, mious[2], 0.3, 0.25, 0.4, 2.0]
    columns = {"cam_iou": seed, "pseudo_label_iou": label}
    assert found.per_class("xy") == metrics.iou_table(("background", "x", "y"), columns)
    # The fixed threshold need not be one of the sweep: it may be better than all.
    best = Scores(np.eye(3, dtype=int), label, np.array(sweep), 0.3, 0.25, 0.4, {}).row()
    assert (best["cam_miou_oracle"], best["oracle_threshold"]) == (1.0, 0.3)
