"""Whatever bytes a table has, it is read or refused in one line; cells are parted as they are."""

import csv
import io
import time

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
    assert [problem.what for problem in found.problems] == ["labels.csv: column 'note' is not used"]


def test_rows_tell_where_they_are(path):
    path.write_text('\nimage,labels\n\n"a\nb.jpg",x\nc.jpg,y\n')
    rows = tables.read(path).rows
    assert [row.where for row in rows] == ["labels.csv line 5", "labels.csv line 6"]


def test_columns_of_classes_that_also_are_not_zero_and_one(path):
    path.write_text(
        "image,cat,width,dog,split,Is Crowd,name\n"
        "a,1,640,true,val,0,p\nb,0,480,false,,1,q\nc,1.0,,NO,,0,1\n"
    )
    found = tables.read(path)
    assert [row.labels for row in found.rows] == [("cat", "dog"), (), ("cat",)]
    assert [row.split for row in found.rows] == ["val", "", ""]
    assert found.notes == ("labels.csv: a column a class (cat, dog)",)
    told = {(problem.kind, problem.what, problem.error) for problem in found.problems}
    why = ": its name is not that of a class; rename it if it is one"
    assert told == {
        ("columns that are not used", f"labels.csv: column '{name}' is not used{more}", False)
        for name, more in (("width", ""), ("Is Crowd", why), ("name", ""))
    }


@pytest.mark.parametrize("cell", ["0.9", "2", "nan", "maybe"])
def test_an_odd_cell_deletes_no_class(path, cell):
    path.write_text(f"image,cat,dog\na,1,0\nb,0,1\nc,{cell},1\n")
    found = tables.read(path)
    (problem,) = found.problems
    assert problem.error and problem.what.startswith(
        f"labels.csv line 4 column 'cat': '{cell}' is neither 0 nor 1; mend it"
    )
    assert found.rows[0].labels == ("cat",)


def test_a_second_column_of_labels_is_told(path):
    path.write_text("image,class,labels\na,x,y\n")
    found = tables.read(path)
    assert found.rows[0].labels == ("y",)
    (problem,) = found.problems
    assert problem.kind == "second column of labels" and not problem.error
    assert "column 'class' is not used: the labels are those of 'labels'" in problem.what


@pytest.mark.parametrize(
    ("lines", "number"),
    [
        (["a,x", 'b,"x', "c,y"], 3),
        (["a,x", 'b,"x', 'c,"y"', "d,x"], 3),
        (['"a","x', '"b","y"', '"c","y"'], 2),
        (["a,x", "b,y", 'c,"x'], 4),
        (["a,x", 'b,"y', *["c,x"] * 40_000], 3),
    ],
)
def test_a_quote_that_is_not_closed_takes_no_rows(path, lines, number):
    path.write_text("\n".join(["image,labels", *lines, ""]))
    with pytest.raises(UserError, match=rf"labels.csv: unclosed quote, line {number}; close it"):
        tables.read(path)


def test_quotes_in_cells_are_no_fault(path):
    path.write_text('image,labels\na,"x""y"\nb,5" disk\nc,"x\ny"\nd,"x"y\n')
    assert [row.labels for row in tables.read(path).rows] == [
        ('x"y',), ('5" disk',), ("x\ny",), ("xy",),
    ]  # fmt: skip


def test_an_unknown_split_is_a_problem(path):
    path.write_text("image,labels,split\na,x,train\nb,y,later\n")
    (problem,) = tables.read(path).problems
    assert problem.what == "labels.csv line 3: there is no split 'later'; write train, val or test"


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        ("\"('cat', 'dog')\"", ("cat", "dog")),
        ("\"{'cat', 'dog'}\"", ("cat", "dog")),
        ('"(""cat"",)"', ("cat",)),
        ('"""cat"";""dog"""', ("cat", "dog")),
        ("'cat'", ("cat",)),
        # Names of their own.
        ("cat (old)", ("cat (old)",)),
        ("(old)", ("(old)",)),
        ("dogs'", ("dogs'",)),
        ("('a' 'b')", ("('a' 'b')",)),
        ("()", ()),
    ],
)
def test_what_programs_put_around_names_is_taken_off(path, cell, names):
    path.write_text(f"image,labels\na.jpg,{cell}\n")
    (row,) = tables.read(path).rows
    assert row.labels == names


@pytest.mark.parametrize("end", [")", " x", ",", "", " " * 10_000])
def test_a_cell_of_many_names_is_read_at_once(end):
    names = [f"c{number}" for number in range(10_000)]
    for between in (" ", ", "):
        cell = f"({between.join(map(repr, names))}{end}"
        start = time.perf_counter()
        found = tables._names(cell, ())
        assert time.perf_counter() - start < 0.5
        assert found == (names if (between, end) == (", ", ")") else [cell.strip()])


def test_columns_of_one_name_and_cells_that_may_be_unknown_are_told(path):
    path.write_text("image,cat,dog, cat\na,1,0,0\nb,0,1,-1\n")
    twice, unknown = tables.read(path).problems
    assert twice.error and twice.what == "labels.csv has 2 columns 'cat'; rename one"
    assert not unknown.error and "1 cells are -1 beside 0; both are taken for no" in unknown.what
    path.write_text("image,cat,dog\na,1,-1\nb,-1,1\n")
    assert tables.read(path).problems == ()
