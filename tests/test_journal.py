"""The journal survives kills in the middle of a line."""

import json

import pytest

from isim.errors import UserError
from isim.journal import Journal


def line(name, value=0):
    return {"id": name, "value": value}


def test_lines_come_back_and_the_last_of_an_image_counts(tmp_path):
    with Journal(tmp_path / "j") as journal:
        assert journal.lines == {}
        journal.add(line("a", 1))
        # Flushed at once: another reader, as after kill -9, sees it.
        assert json.loads((tmp_path / "j").read_text()) == line("a", 1)
        journal.add(line("b", 2))
        journal.add(line("a", 3))
    with Journal(tmp_path / "j") as journal:
        assert journal.lines == {"a": line("a", 3), "b": line("b", 2)}


@pytest.mark.parametrize("kept", range(1, 21))
def test_a_torn_last_line_is_cut_off_and_the_next_is_whole(tmp_path, kept):
    path = tmp_path / "j"
    torn = json.dumps(line("bär", 2)) + "\n"
    path.write_text(json.dumps(line("a", 1)) + "\n" + torn[:kept])
    with Journal(path) as journal:
        assert journal.lines == {"a": line("a", 1)}
        journal.add(line("c", 3))
    with Journal(path) as journal:
        assert journal.lines == {"a": line("a", 1), "c": line("c", 3)}


def test_only_images_whose_outputs_are_there_are_kept(tmp_path):
    with Journal(tmp_path / "j") as journal:
        for name in "abc":
            journal.add(line(name))
        journal.keep(iter(["a", "c", "x"]))
        assert list(journal.lines) == ["a", "c"]


def test_a_full_disk_and_a_missing_folder_are_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot write .*nowhere/j: No such file"):
        Journal(tmp_path / "nowhere/j")
    with Journal(tmp_path / "j") as journal:
        journal._file = open("/dev/full", "ab", buffering=0)
        with pytest.raises(UserError, match="cannot write .*j: No space left"):
            journal.add(line("a"))
        assert journal.lines == {}


def test_a_disk_that_takes_half_a_line_is_full(tmp_path):
    class Filling:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[: len(data) // 2])

        def close(self):
            self.file.close()

    with Journal(tmp_path / "j") as journal:
        journal.add(line("a"))
        journal._file = Filling(journal._file)
        with pytest.raises(UserError, match="cannot write .*j: No space left"):
            journal.add(line("b"))
    with Journal(tmp_path / "j") as journal:
        assert journal.lines == {"a": line("a")}
