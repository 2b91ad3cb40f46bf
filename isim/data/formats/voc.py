"""The layout of a VOC devkit: images, class masks, boxes, lists of the splits."""

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isim.data import files
from isim.data.formats.labelled import LabelledSet, put_image
from isim.data.formats.regions import regions
from isim.runtime import atomic


def write_voc(data: LabelledSet, folder: Path, *, copy: bool = False) -> int:
    """Write JPEGImages, SegmentationClass, Annotations and ImageSets/Segmentation below a folder.

    Returns the number of images. `/` in an id becomes `__`, as VOC has no subfolders. An XML has a
    box for each connected part. Images are put there by `put_image`. Raises UserError for
    unreadable files, two images of one name, or a failed write.
    """
    flat = data.flat_ids()
    with atomic.atomic_directory(folder) as building:
        for entry in data.told("voc"):
            name, label = flat[entry.id], entry.label()
            files.write_label_map(building / f"SegmentationClass/{name}.png", label)
            image = put_image(entry, building / "JPEGImages", name, copy=copy)
            text = _annotation(image.name, label, data.names)
            atomic.write_text(building / f"Annotations/{name}.xml", text)
        for split, entries in data.splits().items():
            listing = "".join(f"{flat[entry.id]}\n" for entry in entries)
            atomic.write_text(building / f"ImageSets/Segmentation/{split}.txt", listing)
        atomic.write_text(building / "classes.txt", "\n".join(data.names[1:]) + "\n")
    return len(data.entries)


def _annotation(image: str, label: NDArray[np.uint8], names: tuple[str, ...]) -> str:
    root = ET.Element("annotation")
    ET.SubElement(root, "filename").text = image
    size = ET.SubElement(root, "size")
    for name, value in zip(("width", "height", "depth"), (*label.shape[::-1], 3), strict=True):
        ET.SubElement(size, name).text = str(value)
    ET.SubElement(root, "segmented").text = "1"
    for region in regions(label, "parts"):
        height, width = region.plane.shape
        thing = ET.SubElement(root, "object")
        ET.SubElement(thing, "name").text = names[region.class_id]
        box = ET.SubElement(thing, "bndbox")
        # VOC counts pixels from 1, both ends inside.
        corners = (region.left + 1, region.top + 1, region.left + width, region.top + height)
        for name, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
            ET.SubElement(box, name).text = str(value)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"
