"""Classification figures: those of whole images one at a time."""

import numpy as np
import pytest
import torch
from support.images import opened
from support.networks import config_of, frozen_network_of
from torchvision.transforms.v2 import functional as TF

from isim import metrics
from isim.errors import UserError
from isim.models import frozen
from isim.models.common import normalize
from isim.passes import classification
from isim.passes.features import Features


@torch.no_grad()
@pytest.mark.usefixtures("on_gpu")
def test_figures_are_those_of_whole_images(run, models, items, tmp_path, monkeypatch):
    (network, config), rows = models["cam"], []
    for item in items:
        pixels = opened(item)[1]
        size = [max(32, round(side * 96 / max(pixels.shape))) for side in pixels.shape[2:]]
        views = normalize(TF.resize(pixels, size, antialias=True), config.mean, config.std)
        rows.append(network(views, False)[0][0].numpy())
    labels = np.stack([item.image_label for item in items])
    expected = metrics.classification_figures(labels, np.stack(rows))
    network.train()
    assert run("classification.classify", tmp_path) == pytest.approx(expected, abs=1e-6)
    assert run("classification.classify", tmp_path, ()) == {} and not network.training
    monkeypatch.setattr(network, "forward", lambda images, _: (images.mean((2, 3)) / 0, None))
    with pytest.raises(UserError, match=r"^.*not finite.*train_cam\.optimizer.*$"):
        run("classification.classify", tmp_path)


def test_figures_of_a_frozen_network_are_those_of_its_features(here, items):
    network, config, rows = frozen_network_of(), config_of("frozen"), []
    cached = Features(here, network, config)
    cached.prepare(items)
    for item in items:
        maps = frozen.features(network.encoder, config, opened(item)[1])[0].half()
        scores = network.class_scores(network.standardise(maps.flatten(1).T))
        rows.append(scores.mean(0).numpy())
    labels = np.stack([item.image_label for item in items])
    expected = metrics.classification_figures(labels, np.stack(rows))
    assert classification.frozen(cached, items) == pytest.approx(expected, abs=1e-6)
    assert classification.frozen(cached, ()) == {}
    network.classifier.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="scores are not finite"):
        classification.frozen(cached, items)
