"""The journal survives kills in the middle of a line, and disks that fill up there."""

import json
from types import SimpleNamespace

import pytest

from isim.errors import UserError
from isim.passes.journal import Journal

A, B, C = ({"id": name, "value": value} for name, value in (("a", 1), ("bär", 2), ("c", 3)))


@pytest.mark.parametrize("name", ["j", "j.2", "j.10"])
@pytest.mark.parametrize("kept", range(1, 21))
def test_a_torn_last_line_is_cut_off_and_the_next_is_whole(tmp_path, kept, name):
    text = json.dumps(A | {"value": 0}) + "\n" + json.dumps(A) + "\n"
    (tmp_path / name).write_text(text + json.dumps(B)[:kept])
    with Journal(tmp_path / "j") as journal:
        assert journal.read() == {"a": A}
        journal.add(C)
        # Unbuffered: it is there for whoever comes after kill -9.
        assert journal.read() == {"a": A, "c": C}
    assert (tmp_path / name).read_text().startswith(text)


def test_a_disk_that_takes_half_a_line_is_full(tmp_path):
    with Journal(tmp_path / "j") as journal:
        file = journal._file
        journal._file = SimpleNamespace(write=lambda d: file.write(d[:9]), close=file.close)
        with pytest.raises(UserError, match=r"^cannot write .*j: No space left.*$"):
            journal.add(A)
        assert journal.read() == {}
