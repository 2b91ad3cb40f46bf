"""Overlays: colours where the mask is, a legend of what occurs, a bounded size."""

import numpy as np
import pytest
from PIL import Image

from isim.data.files import voc_palette
from isim.data.formats import overlay


def test_colours_lie_on_the_mask_and_nothing_else_changes(written, labels):
    entry, palette = written.entries[0], voc_palette()
    image, label = entry.read(), labels["a"]
    found = overlay.drawn(image, label, written.names)[: label.shape[0]]
    assert (found[label == 0] == image[label == 0]).all()
    inside = label > 0
    mixed = (image[inside].astype(int) + palette[label[inside]]) / 2
    edge = (found[inside] == palette[label[inside]]).all(1)
    assert edge.any() and not edge.all()
    assert np.abs(found[inside] - mixed)[~edge].max() <= 1


def test_the_legend_has_the_classes_that_occur(written):
    palette, image = voc_palette(), np.zeros((40, 300, 3), np.uint8)
    label = np.zeros((40, 300), np.uint8)

    def colours(label):
        legend = overlay.drawn(image, label, written.names)[40:]
        return {tuple(row) for row in legend.reshape(-1, 3).tolist()}

    apple, cat = (tuple(palette[number].tolist()) for number in (1, 3))
    assert not {apple, cat} & colours(label)
    label[:5, :5] = 3
    assert cat in colours(label) and apple not in colours(label)


@pytest.mark.parametrize(
    ("name", "drawn"),
    [("猫", r"\u732b"), ("a\nb", r"a\u000ab"), ("Käfer", "Käfer"), ("$x$", "$x$")],
)
def test_a_name_of_another_script_is_its_code_points(name, drawn):
    image, label = np.zeros((40, 300, 3), np.uint8), np.ones((40, 300), np.uint8)
    names = [["background", text] for text in (name, drawn, "else")]
    found, same, other = (overlay.drawn(image, label, known) for known in names)
    assert (found == same).all() and not (found.shape == other.shape and (found == other).all())


def test_a_photograph_is_made_small_and_a_narrow_one_has_lines(written):
    label = np.zeros((3000, 4000), np.uint8)
    label[:100], label[200:300], label[400:500] = 1, 2, 3
    image = np.zeros((*label.shape, 3), np.uint8)
    assert overlay.drawn(image, label, written.names).shape == (1200 + 22, 1600, 3)
    narrow = overlay.drawn(image[::50, ::50], label[::50, ::50], written.names)
    assert narrow.shape == (60 + 3 * 22, 80, 3)


def test_each_image_has_a_jpeg(written, tmp_path):
    assert overlay.write_overlays(written, tmp_path) == 3
    for entry in written.entries:
        with Image.open(tmp_path / f"{entry.id}.jpg") as picture:
            assert picture.format == "JPEG" and picture.width == entry.label().shape[1]
