"""Predictions: the same wherever the network and its dCRF are computed."""

import numpy as np
import pytest
import torch

from isim import engine, prediction, stream
from isim.data.dataset import load_prepared
from isim.errors import UserError
from isim.labels import crf
from isim.models import segmenter
from isim.prediction import PredictionSettings, predict

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    config = segmenter.SegmenterConfig(
        method="deeplabv2",
        encoder="resnet10t",
        output_stride=16,
        encoder_norm="batch",
        decoder_channels=16,
        classes=tuple("abcde"),
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
    )
    torch.manual_seed(0)
    network = segmenter.build(config)
    for branch in network.head.branches:
        torch.nn.init.normal_(branch.weight, std=0.1)
    return network.eval(), config


@pytest.fixture
def run(model, prepared_project, tiny, monkeypatch):
    """Predict the split `val` into a folder; returns its label maps and scores."""
    items = load_prepared(prepared_project / "data/prepared", None).split("val")
    settings = PredictionSettings((1.0, 0.5), True, "fp32", tiny.train_segmenter.crf)

    def predicted(folder, workers):
        monkeypatch.setenv("ISIM_WORKERS", str(workers))
        folder.mkdir()
        found = predict(
            *model,
            items,
            folder / "labels",
            folder / "refined",
            folder / "journal",
            settings,
            CPU,
            {"val": {item.id for item in items}},
        )["val"]
        maps = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.png")}
        assert len(maps) == 2 * len(items)
        return maps, found

    with engine.intra_op_threads(1):
        yield predicted


def same(first, second):
    return (
        first[0] == second[0]
        and (first[1].confusion == second[1].confusion).all()
        and (first[1].refined_confusion == second[1].refined_confusion).all()
    )


def test_helpers_change_nothing(run, tmp_path):
    alone = run(tmp_path / "alone", 0)
    assert (alone[1].confusion != alone[1].refined_confusion).any()
    assert same(run(tmp_path / "three", 3), alone)


def test_the_gpu_s_groups_make_the_same_label_maps(run, tmp_path, monkeypatch):
    """The path of a GPU on CPU tensors, its dCRF played by that of the CPU."""
    alone = run(tmp_path / "alone", 0)
    groups = []

    def refine_soft_batch(images, probabilities, settings):
        groups.append(len(images))
        arrays = [np.ascontiguousarray(image.permute(1, 2, 0)) for image in images]
        # Rounded as on their way to the CPU's dCRF.
        planes = [found.half().float().numpy() for found in probabilities]
        return [
            torch.from_numpy(crf.refine_soft(image, found, settings))
            for image, found in zip(arrays, planes, strict=True)
        ]

    monkeypatch.setattr("isim.gpu.crf.refine_soft_batch", refine_soft_batch)
    monkeypatch.setattr(prediction, "refines_on_gpu", lambda *_: True)
    monkeypatch.setattr(prediction, "group_size", lambda _: 3)
    monkeypatch.setattr(prediction, "computed", stream._computed_in_batches)
    monkeypatch.setattr("isim.workers.crf", None)
    assert same(run(tmp_path / "gpu", 2), alone)
    assert max(groups) == 3 and 3 * (len(groups) - 1) < sum(groups) <= 3 * len(groups)


def test_probabilities_that_are_no_numbers_are_refused(run, model, tmp_path, monkeypatch):
    branch = model[0].head.branches[0]
    monkeypatch.setattr(branch, "weight", torch.nn.Parameter(branch.weight * float("nan")))
    with pytest.raises(
        UserError, match="not finite.*lower train_segmenter.optimizer.rate"
    ) as caught:
        run(tmp_path / "nan", 2)
    assert "\n" not in str(caught.value)
