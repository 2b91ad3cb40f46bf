"""A file or folder is complete under its name or absent."""

import csv
import errno
import io
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from isim.errors import UserError
from isim.runtime import atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new/a.bin"
    with atomic.atomic_path(path) as temporary:
        temporary.write_bytes(b"one")
        assert not path.exists() and temporary.suffix == ".bin"
    assert path.read_bytes() == b"one" and names(path.parent) == ["a.bin"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_the_umask_says_who_may_read(umask, tmp_path):
    before = os.umask(umask)
    try:
        atomic.write_text(tmp_path / "new/a", "")
        atomic.write_bytes(tmp_path / "b", b"", durable=True)
        with atomic.atomic_directory(tmp_path / "folder") as building:
            (building / "c").touch()
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == wanted, path


@pytest.mark.parametrize("stands", [Path.touch, lambda path: path.symlink_to(path.parent)])
def test_a_folder_takes_the_place_of_folders_alone(stands, tmp_path):
    stands(tmp_path / "out")
    with (
        pytest.raises(UserError, match=r"out: it is a (file|link), no folder; move it away"),
        atomic.atomic_directory(tmp_path / "out"),
    ):
        pass
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("number", "told", "remedy"),
    [
        (errno.EROFS, "Read-only file system", "free space or fix the permissions of data"),
        # A folder that is a mount point cannot be renamed.
        (errno.EBUSY, "Device or resource busy", "a disk may be mounted there: mount it at data,"),
        (errno.ENOTDIR, "it is a link, no folder; move it away", ""),
    ],
)
def test_what_cannot_be_written_has_one_remedy(number, told, remedy):
    message = str(atomic.unwritable(Path("data/cams"), OSError(number, told)))
    assert message.startswith(f"cannot write data/cams: {told}") and message.count(";") == 1
    assert remedy in message and message.endswith("and run the same command again")


@pytest.mark.parametrize(
    ("error", "raised", "told"),
    [
        (KeyError("x"), KeyError, "x"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            UserError,
            r"cannot write .*a\.txt: No space left.*free space",
        ),
    ],
)
def test_a_failure_leaves_what_was_there(error, raised, told, tmp_path):
    def fail():
        with atomic.atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise error

    atomic.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(raised, match=told):
        fail()
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


def file(path):
    atomic.atomic_path(path).__enter__()


def rows(path):
    atomic.write_csv(path, [{"a": 1}])


def folder(path):
    atomic.atomic_directory(path).__enter__()


@pytest.mark.parametrize("write", [file, rows, folder, atomic.make_directory])
def test_a_place_that_cannot_be_written_is_named(write, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "out.d").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*file"):
        write(tmp_path / "file/out")
    if write in (file, rows):
        told = r"cannot write .*out\.d: it is a folder; choose the name of a file"
        with pytest.raises(UserError, match=told):
            write(tmp_path / "out.d")
    assert names(tmp_path) == ["file", "out.d"] and names(tmp_path / "out.d") == []


def test_json_without_nan(tmp_path):
    nan = float("nan")
    value = {"a": nan, "b": [1.5, float("inf"), {"c": (nan, "nan", 3)}], "d": True}
    atomic.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    expected = {"a": None, "b": [1.5, None, {"c": [None, "nan", 3]}], "d": True}
    assert json.loads(text) == expected and "NaN" not in text and text.endswith("}\n")


def test_csv_comes_back(tmp_path):
    rows = [{"id": "a,b", "miou": 0.1}, {"id": 'q"', "miou": float("nan")}]
    atomic.write_csv(tmp_path / "a.csv", rows)
    with (tmp_path / "a.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [rows[0] | {"miou": "0.1"}, rows[1] | {"miou": ""}]
    atomic.write_csv(tmp_path / "b.csv", [], ("id", "miou"))
    assert (tmp_path / "b.csv").read_text() == "id,miou\n"


@given(st.lists(st.text(), min_size=1))
@example(["=1+1", "'=1+1", "+a", "-b", "@c", "\tx", "\r=1", "'", "''-", "-5", "+.5", "a\n=1", ""])
def test_texts_come_back_and_none_is_a_formula(texts):
    rows = [{"id": text, "b": 1} for text in texts]
    written = atomic.csv_text(rows)
    assert [row["id"] for row in atomic.parse_csv(written)] == texts
    for row in csv.DictReader(io.StringIO(written, newline="")):
        assert not row["id"].startswith(tuple("=+-@\t\r\n")) or math.isfinite(float(row["id"]))


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target, half = tmp_path / "deep/target", tmp_path / "deep/.tmp-target/half"
    (target / "old").mkdir(parents=True)

    def replace(error=None):
        # A killed process has left half a folder.
        half.parent.mkdir()
        half.touch()
        with atomic.atomic_directory(target) as building:
            (building / "new").touch()
            assert names(target) == ["old"] and names(building) == ["new"]
            if error:
                raise error

    with pytest.raises(KeyError):
        replace(KeyError())
    assert names(target) == ["old"] and names(target.parent) == ["target"]
    replace()
    assert names(target) == ["new"] and names(target.parent) == ["target"]
