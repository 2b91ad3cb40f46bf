"""A small data set of each source, as `isim prepare` would find it."""

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from isim.data.files import write_label_map
from isim.data.sources.source import verify
from isim.errors import UserError
from isim.params import Prepare, Shapes

# By a name: what sets the section `prepare` apart.
SOURCES = {
    "shapes": {"source": "shapes"},
    "voc": {"source": "voc"},
    "voc with sbd": {"source": "voc", "sbd": True},
    "folder": {"source": "folder"},
}
DEVKIT = "VOCdevkit/VOC2012"
SBD = "benchmark_RELEASE/dataset"
# Images of the devkit by split.
SPLITS = {"train": ["a", "b"], "val": ["c"], "test": ["t"]}


def section(name, **changes):
    """Section `prepare` of one of `SOURCES`."""
    values = {"root": "$ISIM_DATA", "download": False, "sbd": False, "val_fraction": 0.5, "seed": 0}
    values |= {"shapes": Shapes(train=3, val=2, size=64)}
    return Prepare(**(values | SOURCES[name] | changes))


def make(name, root, make_devkit):
    """Write the data set of one of `SOURCES` below `root`."""
    if name.startswith("voc"):
        make_devkit(root / DEVKIT, SPLITS)
    if name == "voc with sbd":
        # One image of train, one of val, one that SBD alone has.
        mask = np.zeros((24, 32), np.uint8)
        mask[3:9, 3:9] = 10
        make_sbd(root / SBD, dict.fromkeys("bcs", mask), images=["s"])
    if name == "folder":
        make_folder(
            root, ["a.jpg,x;y", "b,y", "c.png,x", "d.png, y"], ["a.jpg", "b.png", "c.png", "d.png"]
        )
        write_label_map(root / "masks/b.png", np.full((6, 8), 2, np.uint8))


def make_sbd(dataset, masks, images=()):
    """Write SBD's folder: a .mat file for each of `masks`, black photos for `images`."""
    for folder in ("cls", "img"):
        (dataset / folder).mkdir(parents=True, exist_ok=True)
    for name, mask in masks.items():
        write_mat(dataset / f"cls/{name}.mat", mask)
    for name in images:
        Image.new("RGB", (32, 24)).save(dataset / f"img/{name}.jpg")


def write_mat(path, mask):
    """Write a mask as SBD does."""
    present = np.unique(mask[mask > 0])
    savemat(path, {"GTcls": {"Segmentation": mask, "CategoriesPresent": present}})


def make_folder(root, rows, images, header="image,labels"):
    """Write a user's folder: labels.csv of the `rows`, and photos of 8x6 pixels."""
    (root / "images").mkdir(parents=True)
    for name in images:
        Image.new("RGB", (8, 6)).save(root / "images" / name)
    (root / "labels.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return root


def problems_of(source):
    """Check a source; the lines of the error that this must be, its head first."""
    with pytest.raises(UserError) as caught:
        verify(source)
    return str(caught.value).splitlines()


def contents(folder):
    """Bytes of each file below a folder, by path."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
