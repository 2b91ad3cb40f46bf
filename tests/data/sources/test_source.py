"""The check of a data set lists every problem at once and counts what is only odd."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from support.sources import problems_of

from isim.data.files import write_label_map
from isim.data.problems import Problem
from isim.data.sources.source import Entry, Source, Treatment, check_labels, examine, verify
from isim.runtime.identity import md5

CLASSES = ("ant", "bee", "cow")
PLAIN = np.zeros((10, 12), np.uint8)


def entry(folder, name, mask=None, labels=("ant",), problems=()):
    image = folder / f"{name}.jpg"
    Image.new("RGB", (12, 10)).save(image)
    path = None if mask is None else folder / f"{name}.png"
    if path:
        write_label_map(path, mask)
    return Entry(image, path, labels, tuple(Problem(what, what) for what in problems))


def source(entries, problems=(), splits=None):
    found = tuple(Problem("odd", what) for what in problems)
    return Source(CLASSES, entries, splits or {"train": tuple(entries)}, found)


def test_all_problems_are_listed_at_once(tmp_path):
    wrong = PLAIN.copy()
    wrong[0, :3] = (4, 254, 255)
    entries = {
        "fine": entry(tmp_path, "fine", PLAIN),
        "lost": Entry(tmp_path / "lost.jpg", None, ("ant",)),
        "cut": entry(tmp_path, "cut"),
        "small": entry(tmp_path, "small", PLAIN[:-1]),
        "values": entry(tmp_path, "values", wrong),
        "text": entry(tmp_path, "text", PLAIN),
        "label": entry(tmp_path, "label", problems=("labels of label are bad",)),
    }
    entries["cut"].image.write_bytes(entries["fine"].image.read_bytes()[:-30])
    entries["text"].mask.write_text("no PNG")
    splits = {"train": tuple(entries), "val": ()}
    head, *lines = problems_of(source(entries, ["a bad list"], splits))
    assert head == "the data has 8 problems; mend it and run `isim prepare` again"
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
    for line, part in zip(lines, expected, strict=True):
        assert part in line


def test_what_is_unreadable_is_left_out_with_a_warning_where_that_is_asked_for(tmp_path):
    entries = {
        "fine": entry(tmp_path, "fine", PLAIN),
        "lost": Entry(tmp_path / "lost.jpg", None, ("ant",)),
        "text": entry(tmp_path, "text", PLAIN),
    }
    entries["text"].mask.write_text("no PNG")
    found = examine(source(entries), Treatment(skip=True))
    assert list(found.source.entries) == list(found.results) == ["fine", "text"]
    assert found.source.splits == {"train": ("fine", "text")}
    assert found.results["text"].mask is None and found.results["fine"].mask is not None
    assert [(p.severity, p.file) for p in found.problems] == [
        ("warning", str(tmp_path / "lost.jpg")),
        ("warning", str(tmp_path / "text.png")),
    ]
    assert all(problem.what.endswith("; left out") for problem in found.problems)


@given(
    hnp.arrays(np.uint8, (10, 12), elements=st.sampled_from([0, 1, 2, 3, 255])),
    st.sets(st.sampled_from(CLASSES)),
)
def test_files_are_hashed_pixels_and_disagreements_counted(tmp_path_factory, mask, labels):
    item = entry(tmp_path_factory.mktemp("pair"), "a", mask, tuple(labels))
    result = verify(source({"a": item}))["a"]
    hashed = [(path, path.stat().st_size, md5(path)) for path in (item.image, item.mask)]
    assert result.files == hashed
    assert result.pixels.tolist() == [(mask == index).sum() for index in range(4)]
    shown = {CLASSES[index - 1] for index in (1, 2, 3) if (mask == index).any()}
    assert set(result.bare) == labels - shown
    assert set(result.more) == shown - labels


def test_labels_of_an_image():
    assert check_labels(("ant", "cow"), CLASSES, "x") == ()
    (none,) = check_labels((), CLASSES, "x")
    assert none.what == "x names no class: an image without a label"
    unknown = check_labels(("fly", "ant", "elk", "Bee"), CLASSES, "x")
    assert [problem.what for problem in unknown] == [
        "x: unknown class 'Bee'; did you mean 'bee'?",
        "x: unknown class 'elk'",
        "x: unknown class 'fly'",
    ]
