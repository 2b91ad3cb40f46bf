"""The contract of all passes: one that is interrupted goes on, and nothing else matters."""

import re
from dataclasses import replace

import pytest
import torch

from isim.errors import UserError
from isim.passes.journal import Journal

KEPT = ["affinity_labels.make", "predictions.predict", "pseudo_labels.regenerate", "scores.cams"]
KEPT += ["scores.labels", "seeds.write", "stored_cams.export", "walks.walk", "walks.walk_dense"]
BY_FROZEN = ("predictions.predict", "pseudo_labels.regenerate", "stored_cams.export")
KEPT += [f"{name} frozen" for name in BY_FROZEN]
# The results of others are gone with the run anyway.
ALL = [*KEPT, "classification.classify", "seeds.score", "seeds.score frozen"]
TIMES = r"'(seconds|images_per_second)': ([\d.e+-]+|nan)"


def made(result, folder):
    """A result as text, in which nan is nan, without times and folder; files by path."""
    paths = (path for path in sorted(folder.rglob("*.*")) if path.suffix != ".jsonl")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    text = re.sub(TIMES, "", repr(getattr(result, "lines", result)))
    # JSON knows no tuples.
    return text.replace(str(folder), "").translate(str.maketrans("()", "[]")), files


@pytest.mark.parametrize("name", KEPT)
def test_one_that_a_full_disk_ends_goes_on_later(name, run, whole, tmp_path, monkeypatch):
    expected, add, added = made(*whole(name)), Journal.add, []

    def add_until_full(journal, line, full=True):
        if full and len(added) == 3:
            journal._file.close()
            journal._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        add(journal, line)
        added.append(line["id"])

    monkeypatch.setattr(Journal, "add", add_until_full)
    with pytest.raises(UserError, match=r"^cannot write .*\.jsonl: No space left.*$"):
        run(name, tmp_path)
    monkeypatch.setattr(Journal, "add", lambda *given: add_until_full(*given, full=False))
    assert made(run(name, tmp_path), tmp_path) == expected
    assert sorted(added) == [f"0{number}" for number in range(7)], "each was finished once"


@pytest.mark.parametrize("name", ALL)
def test_helpers_change_nothing(name, run, whole, tmp_path, monkeypatch):
    expected = made(*whole(name))
    monkeypatch.setenv("ISIM_WORKERS", "3")
    torch.set_num_threads(2)
    assert made(run(name, tmp_path), tmp_path) == expected
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", ALL)
def test_without_masks_it_makes_the_same_and_counts_nothing(name, run, whole, tmp_path, items):
    result, files = made(
        run(name, tmp_path, [replace(item, mask=None) for item in items]), tmp_path
    )
    expected, expected_files = made(*whole(name))
    assert len(list(tmp_path.rglob("*.jsonl"))) == (name in KEPT)
    assert files == expected_files or name == "scores.cams"
    assert (result == expected) == (name in ("seeds.write", "classification.classify"))
    name = name.removesuffix(" frozen")
    assert ("nan" in result) == (name in ("affinity_labels.make", "seeds.score"))
    assert name != "stored_cams.export" or "miou" not in result
