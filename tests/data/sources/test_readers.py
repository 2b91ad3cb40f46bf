"""The contract of data sources: whatever is read, the same holds of what comes out."""

from functools import partial
from pathlib import PurePosixPath
from typing import get_args

import numpy as np
import pytest
from support.sources import SOURCES, contents, make, problems_of, section

from isim.data.files import image_size, read_label_map
from isim.data.sources import readers
from isim.data.sources.source import verify
from isim.errors import UserError
from isim.params import Prepare


@pytest.fixture(params=SOURCES)
def read(request, tmp_path, make_devkit):
    """A function that reads one of the sources from the folder `raw` and prepares `out`."""
    params = section(request.param)
    make(request.param, tmp_path / "raw", make_devkit)
    root = "out" if params.source in readers.GENERATED else "raw"
    return partial(readers.read, params, tmp_path / root, tmp_path / "out")


def test_every_source_is_known_to_the_parameters_and_has_a_case_here():
    names = set(get_args(Prepare.model_fields["source"].annotation))
    assert names == set(readers.READERS) == {change["source"] for change in SOURCES.values()}
    assert names >= readers.GENERATED


def test_ids_are_plain_files_exist_labels_are_known_and_splits_are_not_empty(read, tmp_path):
    source = read()
    assert source.problems == ()
    assert len(set(source.classes)) == len(source.classes) > 0
    assert "background" not in source.classes
    for name, entry in source.entries.items():
        path = PurePosixPath(name)
        assert not path.is_absolute() and not any(part.startswith(".") for part in path.parts)
        assert entry.problems == ()
        for path in filter(None, (entry.image, entry.mask)):
            assert path.is_file()
            assert path.is_relative_to(tmp_path / "raw") or path.is_relative_to(tmp_path / "out")
        if entry.labels is not None:
            assert list(entry.labels) == sorted(set(entry.labels))
            assert set(entry.labels) <= set(source.classes)
    assert {"train", "val"} <= set(source.splits)
    for ids in source.splits.values():
        assert ids and len(set(ids)) == len(ids)
    assert {name for ids in source.splits.values() for name in ids} == set(source.entries)
    assert all(source.entries[name].labels is not None for name in source.splits["train"])
    # Masks fit their images and show known classes.
    assert list(verify(source)) == list(source.entries)
    for entry in filter(lambda entry: entry.mask, source.entries.values()):
        mask = read_label_map(entry.mask)
        assert mask.shape == image_size(entry.image)
        assert set(np.unique(mask)) <= {*range(len(source.classes) + 1), 255}


def test_the_same_data_gives_the_same_source_and_nothing_is_written_elsewhere(read, tmp_path):
    raw = contents(tmp_path / "raw")
    source, made = read(), contents(tmp_path / "out")
    assert read() == source
    assert contents(tmp_path / "out") == made
    assert contents(tmp_path / "raw") == raw
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "raw"}


def test_all_problems_are_told_at_once_and_counted(read):
    source = read()
    first, *_, last = source.entries.values()
    first.image.write_bytes(first.image.read_bytes()[:-30])
    last.image.unlink()
    head, cut, lost = problems_of(source)
    assert head == "the data has 2 problems; mend it and run `isim prepare` again"
    assert f"{first.image} is unreadable" in cut and f"{last.image} is missing" in lost


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in readers.GENERATED])
def test_data_that_is_not_there_is_one_line(name, tmp_path):
    with pytest.raises(UserError, match=r"raw/VOC|raw/ann|raw") as caught:
        readers.read(section(name), tmp_path / "raw", tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_data_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied", "lists")

    monkeypatch.setitem(readers.READERS, "voc", denied)
    with pytest.raises(UserError, match="cannot read lists: Permission denied; fix"):
        readers.read(section("voc"), tmp_path, tmp_path)
