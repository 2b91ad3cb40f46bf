"""CAMs stored at a stride: the areas of the full ones, whatever the image's size."""

import numpy as np
import pytest
from support.images import counted, seeded

from isim import metrics
from isim.data.files import read_cam
from isim.labels.seeds import seeds
from isim.passes import cams


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_stored_cams_are_the_areas_of_the_full_ones(stride, run, here, models, items, tiny):
    report, params = run("stored_cams.export", here.resume, stride=stride), tiny.export_cams
    folder, labels = here.resume / "cams/train", {}
    for item, full in cams.cams(here, *models["cam"], items, settings=params):
        stored, ids, size = read_cam(folder / f"{item.id}.npz")
        h, w = (-(-side // stride) for side in size)
        assert (ids == item.class_ids).all() and stored.shape == (len(ids), h, w)
        if full.shape == (len(ids), h * stride, w * stride):
            means = full.view(len(ids), h, stride, w, stride).mean((2, 4))
            # In half precision.
            np.testing.assert_allclose(stored, means, rtol=0, atol=1e-3)
        labels[item.id] = seeds.seed(full.numpy(), ids, params.threshold)
    before = metrics.miou(counted(items, [labels[item.id] for item in items]))
    after = metrics.miou(counted(items, [seeded(item, folder, params.threshold) for item in items]))
    assert report["images"] == len(items) and report["cam_miou_full_size"] == before
    # Those of `evaluate`, which enlarges by another library.
    assert report["cam_miou_stored"] == pytest.approx(after, abs=2e-3)
    assert report["stride_difference"] == report["cam_miou_stored"] - before
