"""CAMs of many images: those of each one alone, in the order of their sizes."""

import pytest
import torch
from support.images import opened

from isim.models.inference import multi_scale_cams
from isim.passes import cams


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
