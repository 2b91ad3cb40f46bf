"""trainaug is VOC train plus SBD without VOC val; masks become palette PNGs."""

import hashlib

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from isim.data import sbd, voc
from isim.data.files import read_label_map
from isim.data.source import verify
from isim.errors import UserError

SPLITS = {"train": ["2008_000001", "2008_000002"], "val": ["2008_000003"]}


def write_mat(path, mask):
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"Segmentation": mask, "CategoriesPresent": np.unique(mask[mask > 0])}
    savemat(path, {"GTcls": entry})


@pytest.fixture
def data(tmp_path, make_devkit):
    """SBD holds one image of each VOC split, one that only the devkit's XML knows, one alone."""
    devkit = make_devkit(tmp_path / "VOC2012", SPLITS | {"other": ["2008_000008"]})
    (devkit / "ImageSets/Segmentation/other.txt").unlink()
    (devkit / "SegmentationClass/2008_000008.png").unlink()
    dataset = tmp_path / "benchmark_RELEASE/dataset"
    mask = np.zeros((24, 32), np.uint8)
    mask[5:9, 5:9], mask[10:20, 10:20] = 3, 12
    for name in ("2008_000001", "2008_000003", "2008_000008", "2008_000009"):
        write_mat(dataset / "cls" / f"{name}.mat", mask)
    (dataset / "img").mkdir()
    Image.new("RGB", (32, 24)).save(dataset / "img/2008_000009.jpg")
    return devkit, dataset, mask


def test_trainaug(tmp_path, data):
    devkit, dataset, mask = data
    before = voc.read_devkit(devkit, voc.CLASSES)
    source = sbd.add_trainaug(before, devkit, dataset, tmp_path / "masks")
    assert source.splits["trainaug"] == ("2008_000001", "2008_000002", "2008_000008", "2008_000009")
    assert {name: source.splits[name] for name in SPLITS} == before.splits
    # VOC's own images keep VOC's masks.
    assert source.entries["2008_000001"] == before.entries["2008_000001"]
    known, alone = source.entries["2008_000008"], source.entries["2008_000009"]
    assert known.image == devkit / "JPEGImages/2008_000008.jpg"
    assert known.labels == ("cat", "person")
    assert alone.image == dataset / "img/2008_000009.jpg"
    assert alone.labels == ("bird", "dog")
    for entry in (known, alone):
        assert np.array_equal(read_label_map(entry.mask), mask)
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == [
        "2008_000008.png",
        "2008_000009.png",
    ]
    checked = verify(source)
    assert checked["2008_000008"].labels_without_pixels == 2
    assert checked["2008_000008"].pixels_without_label == 2


def test_bad_masks_are_problems(tmp_path, data):
    devkit, dataset, mask = data
    (dataset / "cls/2008_000008.mat").write_text("no MATLAB")
    write_mat(dataset / "cls/2008_000009.mat", np.full_like(mask, 21))
    source = voc.read_devkit(devkit, voc.CLASSES)
    source = sbd.add_trainaug(source, devkit, dataset, tmp_path / "masks")
    with pytest.raises(UserError) as caught:
        verify(source)
    assert "2008_000008.mat is unreadable" in str(caught.value)
    assert "2008_000009.png has values outside 0..20 and 255: 21" in str(caught.value)


def test_damaged_and_foreign_mat_files(tmp_path):
    mask = np.ones((5, 5), np.uint8)
    write_mat(tmp_path / "good.mat", mask)
    assert np.array_equal(sbd.read_mat(tmp_path / "good.mat"), mask)
    savemat(tmp_path / "other.mat", {"x": mask})
    write_mat(tmp_path / "float.mat", mask.astype(float))
    (tmp_path / "cut.mat").write_bytes((tmp_path / "good.mat").read_bytes()[:200])
    for name in ("other", "float", "cut", "missing"):
        with pytest.raises(UserError, match=f"{name}.mat is unreadable"):
            sbd.read_mat(tmp_path / f"{name}.mat")


def test_no_masks(tmp_path, data):
    devkit, _, _ = data
    source = voc.read_devkit(devkit, voc.CLASSES)
    with pytest.raises(UserError, match="holds no .mat masks"):
        sbd.add_trainaug(source, devkit, tmp_path, tmp_path / "masks")


def test_official_list_is_recognised_in_any_order(monkeypatch):
    assert not sbd.is_official(("2008_1", "2007_2"))
    digest = hashlib.sha256(b"20072\n20081").hexdigest()
    monkeypatch.setattr(sbd, "OFFICIAL_TRAINAUG", digest[:16])
    assert sbd.is_official(("2008_1", "2007_2"))
    assert not sbd.is_official(("2008_1",))


def test_sbd_is_not_fetched_unasked(tmp_path):
    with pytest.raises(UserError, match="benchmark.tgz exists.*prepare.download: true"):
        sbd.find_sbd(tmp_path, download=False)
