"""CAMs of many images: those of each one alone, in the order of their sizes."""

import pytest
import torch
import torch.nn.functional as F
from support.images import opened
from support.networks import config_of, frozen_network_of
from support.vits import shrink

from isim.models import frozen
from isim.models.inference import multi_scale_cams
from isim.passes import cams
from isim.passes.features import Features


@pytest.mark.usefixtures("on_gpu")
def test_cams_are_those_of_each_image_alone(here, models, items, tiny):
    found = list(cams.cams(here, *models["cam"], items, settings=tiny.train_cam))
    assert [int(item.id) for item, _ in found] == [0, 3, 5, 2, 1, 6, 4]
    scales = {"scales": tiny.train_cam.scales, "flip": tiny.train_cam.flip}
    for item, planes in found:
        ids = [torch.from_numpy(item.class_ids)]
        (alone,) = multi_scale_cams(*models["cam"], opened(item)[1], ids, **scales)
        # The network is folded for inference, which rounds otherwise.
        torch.testing.assert_close(planes, alone, rtol=0, atol=1e-3)


WALK = {"tau": 0.1, "beta": 3.0, "temperature": 1.0, "steps": 2}


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("affinity", ["none", "cosine", "attention"])
def test_cams_of_a_frozen_network_are_its_planes(affinity, here, items, tiny, monkeypatch):
    """On the grid, and of full size; the attention of each image is its own."""
    shrink(monkeypatch)
    changes = {"encoder": "test_vit", "sides": (64,), "stages": 1, "affinity": affinity, **WALK}
    network, config = frozen_network_of(**changes), config_of("frozen", **changes)
    cached = Features(here, network, config)
    cached.prepare(items)
    small = {item.id: planes for item, planes in cams.grids(here, cached, config, items)}
    assert list(small) == [item.id for item in items]
    for item, planes in cams.cams(here, cached, config, items, settings=tiny.train_cam):
        pixels, ids = opened(item)[1], torch.from_numpy(item.class_ids)
        maps = frozen.features(network.encoder, config, pixels)[0]
        attention = None
        if affinity == "attention":
            attention = frozen.attention(network.encoder, config, pixels)[0]
        expected = network.planes(maps, ids, config, attention)
        # Features are kept in half precision.
        torch.testing.assert_close(small[item.id], expected, rtol=0, atol=0.02)
        size = tuple(pixels.shape[2:])
        assert planes.shape == (len(ids), *size)
        if len(ids):
            grown = F.interpolate(small[item.id][None], size, mode="bilinear")[0]
            torch.testing.assert_close(planes, grown, rtol=0, atol=1e-6)
