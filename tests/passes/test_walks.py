"""Random walks: label maps of the dense power, before and after dCRF."""

import numpy as np
import pytest
import torch
from support.images import counted, opened

from isim.data.files import read_cam, read_label_map
from isim.labels.crf import refine as crf
from isim.labels.walk import walk
from isim.models.inference import normalize
from isim.passes import counts


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("background", ["power", "constant"])
def test_labels_are_of_the_dense_power(background, run, models, items, stored, tiny, tmp_path):
    # Whose sides are multiples of the map's stride.
    whole = [items[place] for place in (0, 3, 4)]
    lines = run("walks.walk", tmp_path, whole, background=background, steps_log2=4).lines
    network, config = models["affinity"]
    plain, after = tmp_path / "labels/train", tmp_path / "labels/train_crf"
    for item in whole:
        image, pixels, _ = opened(item)
        with torch.no_grad():
            near = network(normalize(pixels, config.mean, config.std))[0].numpy()
        planes, ids, size = read_cam(stored / f"{item.id}.npz")
        h, w = (side // 8 for side in size)
        # From stride 4 to 8: the mean of two by two.
        small = planes.reshape(len(ids), h, 2, w, 2).mean((2, 4))
        flat = np.concatenate([(1 - small.max(0))[None] ** 16, small]).reshape(-1, h * w)
        each_pixel = np.eye(h * w, dtype=np.float32).reshape(h * w, h, w)
        step = walk.walk(each_pixel, walk.transition(near, 5, 8), 0).reshape(h * w, h * w)
        planes = (flat @ np.linalg.matrix_power(step, 2**4)).reshape(-1, h, w).astype(np.float32)
        plane = planes[0] if background == "power" else 0.3
        label, refined = (read_label_map(path / f"{item.id}.png") for path in (plain, after))
        assert (label != walk.label_map(planes[1:], ids, size, plane)).mean() < 0.005
        assert np.array_equal(refined, crf.refine(image, label, ids, tiny.random_walk.crf))
    for name, path in (("walk", plain), ("walk_crf", after)):
        assert np.array_equal(counts.total(lines, name, (4, 4)), counted(whole, path))
