"""Whatever bytes a table has, it is read or refused in one line; cells are parted as they are."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isim.data.formats import tables
from isim.errors import UserError

PIECES = ["image", "labels", "split", "a.jpg", "cat", "1", "0", "\n", "\r\n", ",", ";", "\t", "|"]
TEXTS = st.lists(st.sampled_from([*PIECES, '"', "'", " ", "\x00", "ä", "\ufeff", "[", "]", "sep="]))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("table") / "labels.csv"


def read_or_refuse(path, data):
    path.write_bytes(data)
    rows, told = (), str(path)
    try:
        rows = tables.read(path).rows
    except UserError as error:
        told = str(error)
    assert "\n" not in told and str(path) in told
    for row in rows:
        assert list(row.labels) == sorted(set(row.labels)) and "" not in row.labels
        assert row.split in ("", "train", "val", "test")


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(path, data):
    read_or_refuse(path, data)


@given(
    st.sampled_from(["image,labels\n", "image;a;b\n", ""]),
    TEXTS,
    st.sampled_from(["utf-8", "utf-16"]),
)
def test_any_text_is_read_or_refused(path, header, pieces, encoding):
    read_or_refuse(path, (header + "".join(pieces)).encode(encoding))


NAMES = st.text("abcäß -_.0", min_size=1).map(str.strip).filter(bool)


@given(
    st.dictionaries(NAMES, st.sets(NAMES, max_size=3), min_size=1, max_size=6),
    st.sampled_from(",;\t|"),
    st.sampled_from(";|,"),
)
def test_what_was_written_is_read(path, given, delimiter, mark):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(["note", "File", "Tags"])
    writer.writerows(["1", name, mark.join(sorted(labels))] for name, labels in given.items())
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    found = tables.read(path)
    assert {row.image: set(row.labels) for row in found.rows} == given
    assert found.problems == ()


def test_rows_tell_where_they_are(path):
    path.write_text('\nimage,labels\n\n"a\nb.jpg",x\nc.jpg,y\n')
    rows = tables.read(path).rows
    assert [row.where for row in rows] == ["labels.csv line 5", "labels.csv line 6"]


def test_columns_of_classes_that_also_are_not_zero_and_one(path):
    path.write_text("image,cat,width,dog,split\na,1,640,true,val\nb,0,480,false,\nc,1.0,,NO,\n")
    found = tables.read(path)
    assert [row.labels for row in found.rows] == [("cat", "dog"), (), ("cat",)]
    assert [row.split for row in found.rows] == ["val", "", ""]
    assert found.notes == (
        "labels.csv: columns not used: width",
        "labels.csv: a column a class (cat, dog)",
    )


def test_an_unknown_split_is_a_problem(path):
    path.write_text("image,labels,split\na,x,train\nb,y,later\n")
    (problem,) = tables.read(path).problems
    assert problem.what == "labels.csv line 3: there is no split 'later'; write train, val or test"
