"""Seeds: written from stored CAMs, and scored as a round scores them."""

from dataclasses import replace

import numpy as np
import pytest
from support.images import seeded

from isim.data.files import read_label_map


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
