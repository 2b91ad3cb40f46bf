"""VOC 2012: its devkit is found wherever it lies, and the real one is read."""

import os
from pathlib import Path

import pytest
from support.sources import SPLITS, section

from isim.data.sources import voc
from isim.errors import UserError


@pytest.mark.parametrize("place", ["VOCdevkit/VOC2012", "VOC2012", "."])
def test_devkit_is_found_below_root_or_as_root(tmp_path, make_devkit, place):
    devkit = make_devkit(tmp_path / place, SPLITS)
    image = voc.read(section("voc"), tmp_path, tmp_path).entries["a"].image
    assert image == devkit / "JPEGImages/a.jpg"


def test_sbd_is_not_fetched_unasked(tmp_path, make_devkit):
    make_devkit(tmp_path, SPLITS)
    with pytest.raises(UserError, match=r"benchmark\.tgz exists.*set prepare.download: true"):
        voc.read(section("voc with sbd"), tmp_path, tmp_path)


def test_class_names_are_those_of_voc():
    assert len(voc.CLASSES) == 20
    assert tuple(sorted(voc.CLASSES)) == voc.CLASSES
    assert [voc.CLASSES[id_] for id_ in (0, 14, 19)] == ["aeroplane", "person", "tvmonitor"]


def test_real_sample(tmp_path):
    default = Path(__file__).parents[4] / "shared"
    root = Path(os.environ.get("ISIM_SHARED", default)) / "data" / "voc_sample"
    if not root.is_dir():
        pytest.skip(f"the VOC sample is not at {root}; set ISIM_SHARED")
    source = voc.read(section("voc"), root, tmp_path)
    assert {name: len(ids) for name, ids in source.splits.items()} == {"train": 562, "val": 240}
    assert source.problems == source.notes == ()
    for entry in source.entries.values():
        assert entry.labels and entry.problems == () and entry.mask is not None
