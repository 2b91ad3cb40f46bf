"""Predictions: label maps and scores of the definition, before and after dCRF."""

import pytest
import torch
import torch.nn.functional as F
from support.images import counted, opened

from isim import metrics
from isim.data.files import read_label_map
from isim.errors import UserError
from isim.labels.crf import refine as crf
from isim.models import frozen
from isim.models.inference import multi_scale_probabilities
from isim.passes import predictions


@pytest.mark.usefixtures("on_gpu")
def test_label_maps_and_scores_are_those_of_the_definition(run, models, items, tiny, tmp_path):
    found, params = run("predictions.predict", tmp_path), tiny.train_segmenter
    plain, refined = (tmp_path / "predictions" / name for name in ("train", "train_crf"))
    scales = {"scales": params.test_scales, "flip": params.test_flip}
    for item in items:
        image, pixels, _ = opened(item)
        soft = multi_scale_probabilities(*models["deeplabv2"], pixels[0], **scales).numpy()
        before, after = (read_label_map(path / f"{item.id}.png") for path in (plain, refined))
        # The network is folded for inference, and probabilities travel in half the bytes.
        assert (before != soft.argmax(0)).mean() < 0.002
        assert (after != crf.refine_soft(image, soft, params.crf)).mean() < 0.02
    for name, some in (("train", items), ("inner", items[:3])):
        part, row = found[name], found[name].row()
        assert (part.confusion == counted(some, plain)).all()
        assert (part.refined_confusion == counted(some, refined)).all()
        assert row["images"] == row["scored_images"] == len(some)
        assert row["miou"] == metrics.miou(part.confusion) != row["crf_miou"]
    assert list(predictions.confusions(found)) == ["train", "train_crf", "inner", "inner_crf"]


@pytest.mark.usefixtures("on_gpu")
def test_label_maps_of_a_frozen_network_are_those_of_its_features(run, models, items, tmp_path):
    network, config = models["frozen_segmenter"]
    found = run("predictions.predict frozen", tmp_path)
    folder = tmp_path / "predictions/train"
    for item in items:
        pixels = opened(item)[1]
        maps = frozen.features(network.encoder, config, pixels)[0]
        grid = network.probabilities(maps)
        soft = F.interpolate(grid[None], pixels.shape[2:], mode="bilinear")[0]
        label = read_label_map(folder / f"{item.id}.png")
        assert (label != soft.argmax(0).numpy()).mean() < 0.02
    assert (found["train"].confusion == counted(items, folder)).all()
    assert found["train"].row()["miou"] != found["train"].row()["crf_miou"]


def test_probabilities_that_are_no_numbers_are_refused(run, tmp_path, monkeypatch):
    broken = torch.full((4, 8, 8), torch.nan)
    monkeypatch.setattr(predictions, "multi_scale_probabilities", lambda *_, **__: broken)
    with pytest.raises(UserError, match=r"^.*not finite.*lower train_segmenter\.optimizer\.rate$"):
        run("predictions.predict", tmp_path)
    assert not list(tmp_path.rglob("*.png"))
