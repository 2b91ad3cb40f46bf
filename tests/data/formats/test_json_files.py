"""JSON of labels: objects of other forms are named, and a file that is none is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isim.data.formats import json_files
from isim.errors import UserError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.text("ab", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["image", "labels", "split", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_any_json_is_read_or_refused(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "labels.json"
    path.write_text(json.dumps(value))
    rows, told = (), ""
    try:
        rows = json_files.read(path, json_files.load(path)).rows
    except UserError as error:
        told = str(error)
    assert "\n" not in told
    for row in rows:
        assert row.image.strip() and (row.labels is None or "" not in row.labels)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("a.jpg", 'entry 1 is no object with `image` and `labels`; found: "a.jpg"'),
        ({"image": "a.jpg"}, "has no `image` or no `labels`"),
        ({"image": "a.jpg", "labels": {"x": 1}}, "its labels as a list of names"),
        ({"image": "", "labels": []}, "must name an image"),
        ({"image": "a", "labels": [], "split": 0}, "there is no split '0'"),
    ],
)
def test_objects_of_other_forms_are_problems(tmp_path, entry, words):
    (problem,) = json_files.read(tmp_path / "labels.json", [entry]).problems
    assert words in problem.what


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.json", b"{", "a.json is no readable JSON"),
        ("a.jsonl", b'{"image": "a", "labels": []}\n\nimage', "a.jsonl line 3 is no readable JSON"),
        ("a.json", b"\xff", "UTF-8"),
        ("a.json", b"[" * 100_000, "no readable JSON"),
    ],
)
def test_files_that_are_no_json_are_refused(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        json_files.load(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "a.json",
            '{"a.jpg": ["x"], "b": [], "a.jpg": ["y"]}',
            r"a\.json has the key 'a\.jpg' twice",
        ),
        (
            "a.jsonl",
            '{}\n{"image": "a", "image": "b"}',
            r"a\.jsonl line 2 has the key 'image' twice",
        ),
    ],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        json_files.load(tmp_path / name)
