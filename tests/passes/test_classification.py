"""Classification figures: those of whole images one at a time."""

from dataclasses import replace

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


@pytest.mark.parametrize("pooling", ["gap", "mil"])
def test_figures_of_a_frozen_network_are_those_of_its_features(pooling, here, items, monkeypatch):
    network, config, rows = frozen_network_of(), config_of("frozen", pooling=pooling), []
    cached = Features(here, network, config)
    cached.prepare(items)
    for item in items:
        maps = frozen.features(network.encoder, config, opened(item)[1])[0].half()
        scores = network.class_scores(network.standardise(maps.flatten(1).T))
        highest = scores.sort(0, descending=True).values[: round(0.1 * len(scores))]
        rows.append((highest if pooling == "mil" else scores).mean(0).numpy())
    labels = np.stack([item.image_label for item in items])
    expected = metrics.classification_figures(labels, np.stack(rows))
    assert classification.frozen(cached, items) == pytest.approx(expected, abs=1e-6)
    assert classification.frozen(cached, ()) == {}
    # A graph would hold the features of all images.
    kept, logits = [], cached.network.logits
    monkeypatch.setattr(
        cached.network, "logits", lambda *given: kept.append(logits(*given)) or kept[-1]
    )
    classification.frozen(cached, items)
    assert not any(one.requires_grad for one in kept)
    network.classifier.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="scores are not finite"):
        classification.frozen(cached, items)


def test_a_tag_is_disputed_where_it_looks_like_those_of_the_other_kind(items):
    """However sure the network is of a class in general: only the order counts."""
    tagged = [1, 1, 1, 0, 0, 0]
    pairs = zip(items, tagged, strict=False)
    some = [replace(item, image_label=np.float32([tag, 1])) for item, tag in pairs]
    logits = np.float32([[3, 0], [2, 0], [-3, 0], [-2, 0], [-2.5, 0], [2.9, 0]])
    found = classification.disputed(some, logits - [4, 0], ("cat", "dog"))
    # All are tagged as dogs: nothing tells how an image without one looks.
    assert {row["class"] for row in found} == {"cat"}
    assert [(row["id"], row["tagged"]) for row in found] == [
        (some[5].id, 0),
        (some[2].id, 1),
    ]
    assert found[0]["probability"] > found[0]["usual"] and found[1]["probability"] < 0.01
    assert classification.disputed([], np.zeros((0, 2)), ("cat", "dog")) == []
