"""The check of a data set lists every problem at once and counts what is only odd."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from isim.data.files import write_label_map
from isim.data.source import Entry, Source, check_labels, verify
from isim.errors import UserError

CLASSES = ("ant", "bee", "cow")


def entry(folder, name, mask=None, labels=("ant",), size=(10, 12), problems=()):
    image = folder / f"{name}.jpg"
    Image.new("RGB", size[::-1]).save(image)
    if mask is None:
        return Entry(image, None, labels, problems)
    write_label_map(folder / f"{name}.png", mask)
    return Entry(image, folder / f"{name}.png", labels, problems)


def source(entries, problems=(), splits=None):
    return Source(CLASSES, entries, splits or {"train": tuple(entries)}, tuple(problems))


def test_all_problems_are_listed_at_once(tmp_path):
    plain = np.zeros((10, 12), np.uint8)
    wrong = plain.copy()
    wrong[0, :3] = (4, 254, 255)
    entries = {
        "fine": entry(tmp_path, "fine", plain),
        "lost": Entry(tmp_path / "lost.jpg", None, ("ant",)),
        "cut": entry(tmp_path, "cut"),
        "small": entry(tmp_path, "small", plain[:-1]),
        "values": entry(tmp_path, "values", wrong),
        "text": entry(tmp_path, "text", plain),
        "label": entry(tmp_path, "label", problems=("labels of label are bad",)),
    }
    entries["cut"].image.write_bytes(entries["fine"].image.read_bytes()[:-30])
    entries["text"].mask.write_text("no PNG")
    with pytest.raises(UserError) as caught:
        verify(source(entries, ["a bad list"], {"train": tuple(entries), "val": ()}))
    lines = str(caught.value).splitlines()
    assert lines[0] == "the data has 8 problems; mend it and run `isim prepare` again"
    expected = [
        "a bad list",
        "split 'val' is empty",
        "lost.jpg is missing",
        "cut.jpg is unreadable (",
        "small.png is 12x9 pixels, its image small.jpg 12x10",
        "values.png has values outside 0..3 and 255: 4, 254",
        "text.png is unreadable (not an image)",
        "labels of label are bad",
    ]
    for line, part in zip(lines[1:], expected, strict=True):
        assert part in line


def test_a_long_list_is_capped():
    with pytest.raises(UserError) as caught:
        verify(Source(CLASSES, {}, {}, tuple(f"problem {n}" for n in range(60))))
    lines = str(caught.value).splitlines()
    assert len(lines) == 52
    assert lines[50].strip() == "problem 49"
    assert lines[51].strip() == "and 10 more"


@given(
    hnp.arrays(np.uint8, (6, 7), elements=st.sampled_from([0, 1, 2, 3, 255])),
    st.sets(st.sampled_from(CLASSES)),
)
def test_pixels_and_disagreements_are_counted(tmp_path_factory, mask, labels):
    folder = tmp_path_factory.mktemp("pair")
    item = entry(folder, "a", mask, tuple(labels), mask.shape)
    result = verify(source({"a": item}))["a"]
    assert result.pixels.tolist() == [(mask == index).sum() for index in range(4)]
    shown = {CLASSES[index - 1] for index in (1, 2, 3) if (mask == index).any()}
    assert result.labels_without_pixels == len(labels - shown)
    assert result.pixels_without_label == len(shown - labels)


def test_files_are_hashed(tmp_path):
    item = entry(tmp_path, "a", np.zeros((10, 12), np.uint8))
    item.image.write_bytes(item.image.read_bytes())
    files = verify(source({"a": item}))["a"].files
    assert [path for path, _, _ in files] == [item.image, item.mask]
    assert [size for _, size, _ in files] == [path.stat().st_size for path, _, _ in files]
    assert len({md5 for _, _, md5 in files}) == 2
    assert all(len(md5) == 32 for _, _, md5 in files)


def test_labels_of_an_image():
    assert check_labels(("ant", "cow"), CLASSES, "x") == ()
    assert check_labels((), CLASSES, "x") == ("x names no class: an image without a label",)
    assert check_labels(("fly", "ant", "elk"), CLASSES, "x") == (
        "x: unknown class 'elk'",
        "x: unknown class 'fly'",
    )
