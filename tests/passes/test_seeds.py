"""Seeds: written from stored CAMs, and scored as a round scores them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.images import opened, seeded

from isim.data.files import read_label_map
from isim.errors import UserError
from isim.labels.seeds import seeds as plain
from isim.passes import cams, seeds


def test_label_maps_are_those_of_the_stored_cams(whole, items, stored):
    paths, folder = whole("seeds.write")
    assert paths == {item.id: folder / f"seeds/{item.id}.png" for item in items}
    for item in items:
        assert np.array_equal(read_label_map(paths[item.id]), seeded(item, stored, 0.3))


@pytest.mark.usefixtures("on_gpu")
def test_seeds_are_scored_as_in_a_round_where_there_are_masks(run, items, tmp_path, read_ids):
    some = [*items[:2], *(replace(item, mask=None) for item in items[2:])]
    miou = run("seeds.score", tmp_path, some, threshold=0.5)
    assert sorted(read_ids) == ["00", "01"]
    round_ = run("pseudo_labels.regenerate", tmp_path, items[:2], threshold=0.5)
    assert miou == round_.row()["cam_miou"]


@pytest.mark.usefixtures("on_gpu")
def test_a_threshold_is_chosen_by_the_peaks_of_images_with_a_class(
    run, here, models, items, tiny, monkeypatch
):
    network, config = models["cam"]
    params = tiny.train_cam.model_copy(update={"threshold": "auto"})
    make = cams.maker(here, network, config, params)
    some = [item for item in items if item.image_label.any()][:3]
    peaks = [make([item], opened(item)[1])[0].amax(0).flatten() for item in some]
    nothing = replace(items[3], image_label=np.zeros_like(items[3].image_label))
    monkeypatch.setattr(seeds, "SOME", 3)
    found = seeds.choose_threshold(here, network, config, [*some, nothing], params=params)
    assert found == pytest.approx(plain.otsu(torch.cat(peaks).numpy()), abs=2 / plain.BINS)
    with pytest.raises(UserError, match="no image has a class"):
        seeds.choose_threshold(here, network, config, [nothing], params=params)
    # Probabilities have a threshold that means something.
    probable = replace(config, decoder_labels=True)
    assert seeds.choose_threshold(here, network, probable, [], params=params) == 0.5
    with pytest.raises(ValueError, match="not been chosen"):
        run("seeds.score", here.resume, items[:1], threshold="auto")
