"""Classification figures: those of whole images one at a time."""

import numpy as np
import pytest
import torch
from support.images import opened
from torchvision.transforms.v2 import functional as TF

from isim import metrics
from isim.errors import UserError
from isim.models.inference import normalize


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
