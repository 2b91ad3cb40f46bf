"""The table of a stage's figures comes back as it was; an old metrics.json reads like it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isim.runtime import figures

VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(
    lambda name: name not in ("seconds", "images_per_second")
)
NAMED = st.dictionaries(NAMES, VALUES, min_size=1, max_size=3)


@given(own=NAMED, splits=st.dictionaries(NAMES, NAMED, max_size=2))
def test_figures_come_back(own, splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    tree = own | splits
    figures.write(folder, tree, 1.5)
    assert figures.read(folder) == tree


@pytest.mark.parametrize("text", ["round_04", "12e45", "007", "=1+1", "-", "", "1.50"])
def test_a_text_stays_a_text(text, tmp_path):
    figures.write(tmp_path, {"labels": text}, 1.5)
    assert figures.read(tmp_path) == {"labels": text or None}


def test_times_are_apart(tmp_path):
    rows = {"miou": 0.5, "seconds": 3.0, "images_per_second": 2.0}
    figures.write(tmp_path, {"images": 6, "val": rows, "train": {"miou": 0.25}}, 7.5)
    assert figures.read(tmp_path) == {"images": 6, "val": {"miou": 0.5}, "train": {"miou": 0.25}}
    expected = "split,seconds,images_per_second\n,7.5,\nval,3.0,2.0\n"
    assert (tmp_path / "seconds.csv").read_text() == expected


def test_an_old_report_reads_alike_and_none_is_empty(tmp_path):
    assert figures.read(tmp_path) == {}
    old = {"images": 6, "splits": {"val": {"miou": 0.5}}}
    (tmp_path / "metrics.json").write_text(json.dumps(old))
    assert figures.read(tmp_path) == {"images": 6, "val": {"miou": 0.5}}
