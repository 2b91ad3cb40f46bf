"""Regions and their polygons: filled again, they are what they were."""

import cv2
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as masks

from isim.data.formats.regions import centre_polygons, edge_polygons, regions

MAPS = arrays.arrays(
    np.uint8,
    st.tuples(st.integers(1, 14), st.integers(1, 14)),
    elements=st.sampled_from([0, 0, 1, 1, 1, 2, 255]),
)


@given(MAPS, st.sampled_from(["parts", "classes"]))
def test_regions_are_all_pixels_of_classes(label, instances):
    found = np.zeros_like(label)
    for region in regions(label, instances):
        whole = region.whole(label.shape)
        assert region.area == whole.sum() and not found[whole > 0].any()
        assert region.plane.any(0).all() or instances == "classes"
        found[whole > 0] = region.class_id
    assert (found == np.where(label == 255, 0, label)).all()


@settings(deadline=None)
@given(MAPS)
def test_edges_of_pixels_are_exact(label):
    height, width = label.shape
    for region in regions(label, "parts"):
        rings = [ring.ravel().tolist() for ring in edge_polygons(region)]
        assert all(len(ring) >= 8 for ring in rings)
        plane = masks.decode(masks.merge(masks.frPyObjects(rings, height, width)))
        assert (plane == region.whole(label.shape)).all()


@given(MAPS)
def test_centres_of_pixels_filled_with_their_border_cover_a_part(label):
    for region in regions(label, "parts"):
        truth, plane = region.whole(label.shape), np.zeros_like(label)
        for ring in centre_polygons(region):
            assert len(ring) >= 3
            cv2.fillPoly(plane, [ring.astype(np.int32)], 1)
        # Bridges are drawn, too: one pixel wide, they may cross a notch or another hole.
        assert (plane[truth > 0] == 1).all()
        assert ((plane != truth).sum() <= 2 * len(label)) or truth.all()
