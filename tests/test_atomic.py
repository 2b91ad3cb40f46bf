"""A file or folder is complete under its name or absent."""

import csv
import errno
import json

import pytest

from isim import atomic
from isim.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new/a.bin"
    with atomic.atomic_path(path) as temporary:
        temporary.write_bytes(b"one")
        assert not path.exists() and temporary.suffix == ".bin"
    assert path.read_bytes() == b"one" and names(path.parent) == ["a.bin"]
    assert path.stat().st_mode & 0o777 == 0o644, "shared caches read it"


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(error, tmp_path):
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")
    with pytest.raises(type(error)), atomic.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_full_disk_names_the_file_and_the_fix(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(UserError, match=r"cannot write .*a\.txt: No space left.*free space"):
        with atomic.atomic_path(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "write",
    [
        lambda path: atomic.write_text(path, "a"),
        lambda path: atomic.write_csv(path, [{"a": 1}]),
        lambda path: atomic.atomic_path(path).__enter__(),
    ],
)
def test_a_folder_in_the_place_of_a_file_is_told_as_such(write, tmp_path):
    (tmp_path / "out.d").mkdir()
    with pytest.raises(
        UserError, match=r"cannot write .*out\.d: it is a folder; choose the name of a file"
    ):
        write(tmp_path / "out.d")
    assert names(tmp_path) == ["out.d"] and names(tmp_path / "out.d") == []


@pytest.mark.parametrize(
    "write",
    [
        lambda path: atomic.write_text(path, "a"),
        lambda path: atomic.make_directory(path),
        lambda path: atomic.copy_tree(path.parent.parent / "source", path),
        lambda path: atomic.atomic_directory(path).__enter__(),
    ],
)
def test_a_folder_that_cannot_be_made_is_named(write, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file"):
        write(tmp_path / "file/out")
    assert names(tmp_path) == ["file", "source"]


def test_json_without_nan(tmp_path):
    value = {
        "a": float("nan"),
        "b": [1.5, float("inf"), {"c": (float("nan"), "nan", 3)}],
        "d": True,
    }
    atomic.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    expected = {"a": None, "b": [1.5, None, {"c": [None, "nan", 3]}], "d": True}
    assert json.loads(text) == expected and "NaN" not in text and text.endswith("}\n")


def test_csv_comes_back(tmp_path):
    rows = [{"id": "a,b", "miou": 0.1}, {"id": 'q"', "miou": float("nan")}]
    atomic.write_csv(tmp_path / "a.csv", rows)
    with (tmp_path / "a.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{k: str(v) for k, v in row.items()} for row in rows]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    source, target = tmp_path / "source", tmp_path / "deep/target"
    (source / "sub").mkdir(parents=True)
    (source / "sub/a").write_text("new")
    (target / "old").mkdir(parents=True)
    # What a killed copy left.
    (tmp_path / "deep/.tmp-target").mkdir()
    (tmp_path / "deep/.tmp-target/half").touch()
    atomic.copy_tree(source, target)
    assert names(target) == ["sub"] and (target / "sub/a").read_text() == "new"
    assert names(tmp_path / "deep") == ["target"]
    with atomic.atomic_directory(target) as building:
        (building / "b").touch()
        assert names(target) == ["sub"]
    assert names(target) == ["b"] and names(tmp_path / "deep") == ["target"]
    with pytest.raises(KeyError), atomic.atomic_directory(target) as building:
        (building / "c").touch()
        raise KeyError
    assert names(target) == ["b"] and names(tmp_path / "deep") == ["target"]
