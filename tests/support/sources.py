"""A small data set of each source, as `isim prepare` would find it."""

import json

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
    "coco": {"source": "coco"},
}
DEVKIT = "VOCdevkit/VOC2012"
SBD = "benchmark_RELEASE/dataset"
# Images of the devkit by split.
SPLITS = {"train": ["a", "b"], "val": ["c"], "test": ["t"]}


def section(name, **changes):
    """Section `prepare` of one of `SOURCES`."""
    values = {"root": "$ISIM_DATA", "labels": "auto", "download": False, "sbd": False, "seed": 0}
    values |= {"val_fraction": 0.5, "unreadable": "error", "mask_values": {}}
    values |= {"sixteen_bit": "refuse", "shapes": Shapes(train=3, val=2, size=64)}
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
    if name == "coco":
        make_coco(root)


def make_coco(root):
    """Write COCO 2014 in small: 3 classes, images with and without objects, a crowd."""
    categories = [{"id": 1, "name": "person"}, {"id": 7, "name": "kite"}, {"id": 90, "name": "cat"}]
    square = {"segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]], "area": 16, "iscrowd": 0}
    dot = {"segmentation": [[2, 2, 4, 2, 4, 4, 2, 4]], "area": 4, "iscrowd": 0}
    # Columns of 6 pixels: the last two are the crowd's.
    crowd = {"segmentation": {"counts": [36, 12], "size": [6, 8]}, "area": 12, "iscrowd": 1}
    objects = {
        "train": {11: [(1, dot), (90, square)], 12: [(7, square), (1, crowd)], 13: []},
        "val": {21: [(90, dot)], 22: []},
    }
    for split, images in objects.items():
        (root / f"{split}2014").mkdir(parents=True)
        entries, annotations = [], []
        for number, found in images.items():
            file = f"COCO_{split}2014_{number:012d}.jpg"
            Image.new("RGB", (8, 6)).save(root / f"{split}2014" / file)
            entries.append({"id": number, "file_name": file, "height": 6, "width": 8})
            annotations += [
                {"id": len(annotations), "image_id": number, "category_id": category, **shape}
                for category, shape in found
            ]
        write_instances(
            root / f"annotations/instances_{split}2014.json", categories, entries, annotations
        )


def write_instances(path, categories, images, annotations):
    """Write a file of COCO's instances."""
    path.parent.mkdir(parents=True, exist_ok=True)
    given = {"categories": categories, "images": images, "annotations": annotations}
    path.write_text(json.dumps(given), encoding="utf-8")


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
    put_photos(root / "images", images)
    (root / "labels.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return root


def put_photos(folder, names, size=(8, 6)):
    """Write photos that are all different, of `size` (width, height)."""
    for name in names:
        shade = tuple(name.encode().ljust(3, b"0")[-3:])
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", size, shade)
        image.putpixel((0, 0), (len(name), sum(name.encode()) % 256, 0))
        image.save(folder / name)


def problems_of(source):
    """Check a source; the lines of the error that this must be, its head first."""
    with pytest.raises(UserError) as caught:
        verify(source)
    return str(caught.value).splitlines()


def contents(folder):
    """Bytes of each file below a folder, by path."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
