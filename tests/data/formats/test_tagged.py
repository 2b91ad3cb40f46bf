"""The vocabulary of label files: names of columns, natural order, encodings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isim.data.formats import tagged


@pytest.mark.parametrize(
    ("header", "place"),
    [(["id", "File Name"], 1), (["x", "ID"], 1), (["IMG-PATH", "y"], 0), (["x", "y"], None)],
)
def test_columns_are_found_by_the_likeliest_name(header, place):
    assert tagged.column(header, tagged.IMAGE_NAMES) == place


def test_natural_order():
    names = ["b10", "B2", "a", "10", "9", "Ä", "b2", "1"]
    assert sorted(names, key=tagged.natural) == ["1", "9", "10", "a", "B2", "b2", "b10", "Ä"]


@given(st.lists(st.text()))
def test_natural_order_is_one_of_any_names(names):
    assert sorted(sorted(names), key=tagged.natural) == sorted(names[::-1], key=tagged.natural)


def test_labels_are_stripped_composed_and_distinct():
    assert tagged.distinct([" b", "a\u0308", "ä", "", "b "]) == ("b", "ä")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_of_any_line_ends(tmp_path, encoding):
    (tmp_path / "a").write_bytes("ä\r\nb\rc\n".encode(encoding))
    assert tagged.text_of(tmp_path / "a") == "ä\nb\nc\n"
