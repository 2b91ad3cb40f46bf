"""trainaug is VOC train plus SBD without VOC val; masks become palette PNGs."""

import numpy as np
import pytest
from scipy.io import savemat
from support.sources import make_sbd, problems_of, write_mat

from isim.data.files import read_label_map
from isim.data.sources import sbd
from isim.data.sources.devkit import read_devkit
from isim.data.sources.source import verify
from isim.data.sources.voc import CLASSES
from isim.errors import UserError
from isim.runtime.identity import sha256

SPLITS = {"train": ["2008_1", "2008_2"], "val": ["2008_3"]}
TRAINAUG = ("2008_1", "2008_2", "2008_8", "2008_9")
MASK = np.zeros((24, 32), np.uint8)
MASK[5:9, 5:9], MASK[10:20, 10:20] = 3, 12


@pytest.fixture
def devkit(tmp_path, make_devkit):
    """SBD holds one image of each VOC split, one that only the devkit's XML knows, one alone."""
    devkit = make_devkit(tmp_path / "VOC2012", SPLITS | {"other": ["2008_8"]})
    (devkit / "ImageSets/Segmentation/other.txt").unlink()
    (devkit / "SegmentationClass/2008_8.png").unlink()
    names = ("2008_1", "2008_3", "2008_8", "2008_9")
    make_sbd(tmp_path / "sbd", dict.fromkeys(names, MASK), images=names[-1:])
    return devkit


@pytest.fixture
def read(tmp_path, devkit):
    """A function that adds trainaug to the devkit's source."""

    def call(dataset=tmp_path / "sbd"):
        return sbd.add_trainaug(read_devkit(devkit, CLASSES), devkit, dataset, tmp_path / "masks")

    return call


def test_trainaug(tmp_path, devkit, read):
    before, source = read_devkit(devkit, CLASSES), read()
    assert source.splits == before.splits | {"trainaug": TRAINAUG}
    # VOC's own images keep VOC's masks.
    assert source.entries["2008_1"] == before.entries["2008_1"]
    known, alone = source.entries["2008_8"], source.entries["2008_9"]
    assert known.image == devkit / "JPEGImages/2008_8.jpg"
    assert known.labels == ("cat", "person")
    assert alone.image == tmp_path / "sbd/img/2008_9.jpg"
    assert alone.labels == ("bird", "dog")
    for entry in (known, alone):
        assert np.array_equal(read_label_map(entry.mask), MASK)
    assert {path.stem for path in (tmp_path / "masks").iterdir()} == {"2008_8", "2008_9"}
    checked = verify(source)["2008_8"]
    assert len(checked.bare) == len(checked.more) == 2


def test_damaged_and_foreign_masks_are_problems(tmp_path, read):
    folder = tmp_path / "sbd/cls"
    savemat(folder / "other.mat", {"x": MASK})
    write_mat(folder / "float.mat", MASK.astype(float))
    (folder / "cut.mat").write_bytes((folder / "2008_9.mat").read_bytes()[:200])
    (folder / "text.mat").write_text("no MATLAB")
    write_mat(folder / "2008_9.mat", np.full_like(MASK, 21))
    _, *lines = problems_of(read())
    parts = [f"{name}.mat is unreadable" for name in ("cut", "float", "other", "text")]
    parts += ["2008_9.mat names no class", "2008_9.png has values outside 0..20 and 255: 21"]
    for line, part in zip(lines, parts, strict=True):
        assert part in line
    with pytest.raises(UserError, match=r"holds no .mat masks"):
        read(tmp_path)


def test_the_official_list_is_recognised_and_told(read, monkeypatch):
    for official, verb in ((0, "is a part or variant of, not"), (1, "is")):
        source = read()
        assert source.figures == {"trainaug.official": official}
        assert source.notes == (f"trainaug {verb} the official list of 10,582 images",)
        digest = sha256("\n".join(TRAINAUG).replace("_", "").encode())
        monkeypatch.setattr(sbd, "OFFICIAL_TRAINAUG", digest[:16])
