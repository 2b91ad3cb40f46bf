"""VOC 2012, with SBD's images where they are asked for (spec 2)."""

from pathlib import Path

from isim.data.sources import sbd
from isim.data.sources.devkit import read_devkit
from isim.data.sources.download import Archive, obtain
from isim.data.sources.source import Source
from isim.params import Prepare

CLASSES: tuple[str, ...] = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip
ARCHIVE = Archive(
    # The long-term address; host.robots.ox.ac.uk, which papers name, redirects there.
    url="https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    md5="6cd6e144f989b92b3379bac3b3de84fd",
    folder="VOCdevkit/VOC2012",
)


def read(params: Prepare, root: Path, out: Path) -> Source:
    """Read the devkit, and trainaug if `params.sbd`; masks of SBD go to `out`/masks.

    The devkit lies below `root`, or is `root`, or comes out of the official archive.

    Raises:
        UserError: Data is missing and cannot be fetched, or is not what it should be.
    """
    places = (root / "VOCdevkit" / "VOC2012", root / "VOC2012", root)
    found = [place for place in places if (place / "JPEGImages").is_dir()]
    devkit = found[0] if found else obtain(ARCHIVE, root, params.download)
    source = read_devkit(devkit, CLASSES)
    if not params.sbd:
        return source
    dataset = obtain(sbd.ARCHIVE, root, params.download)
    return sbd.add_trainaug(source, devkit, dataset, out / "masks")
