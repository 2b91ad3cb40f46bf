"""Label Studio: tasks with brush masks as predictions, and the labelling configuration."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from isim.data import files
from isim.data.formats.coco import file_name
from isim.data.formats.labelled import LabelledSet
from isim.data.formats.regions import Instances, Region, regions
from isim.runtime import atomic

# Numbers of bits that a run's length may be told in, and those of a value.
_SIZES, _WORD = (3, 4, 8, 16), 8
LOCAL = "/data/local-files/?d="


def write_labelstudio(
    data: LabelledSet, folder: Path, *, url: str = LOCAL, instances: Instances = "parts"
) -> int:
    """Write tasks.json, to import, and config.xml, the labelling interface; returns the tasks.

    An image's address is `url` and its path below the folder of images; the default is that of
    Label Studio's local storage. Raises UserError for unreadable files or a failed write.
    """
    tasks: list[dict[str, Any]] = []
    for entry in data.told("labelstudio"):
        label = entry.label()
        height, width = label.shape
        about = {"original_width": width, "original_height": height, "image_rotation": 0}
        results = [
            {
                "id": f"{len(tasks)}-{number}",
                "type": "brushlabels",
                "from_name": "mask",
                "to_name": "image",
                **about,
                "value": {
                    "format": "rle",
                    "rle": brush(region, label.shape),
                    "brushlabels": [data.names[region.class_id]],
                },
            }
            for number, region in enumerate(regions(label, instances))
        ]
        address = url + quote(file_name(entry))
        predictions = [{"model_version": "isim", "result": results}]
        tasks.append({"data": {"image": address}, "predictions": predictions})
    atomic.write_text(folder / "tasks.json", json.dumps(tasks))
    atomic.write_text(folder / "config.xml", _configuration(data.names))
    return len(tasks)


def brush(region: Region, size: tuple[int, ...]) -> list[int]:
    """Encode a region of an image of `size` as bytes of a Label Studio brush.

    They are the run lengths of Umbrella's rle-pack, of the four channels of an RGBA picture in
    which the region is 255: 32 bits for the number of values, 5 for the bits of a value less 1, 4
    each for those of a length less 1; then a bit 1 for a run, 2 bits for which of these lengths,
    the run's length less 1, and its value.
    """
    flat: NDArray[np.uint8] = region.whole(size).ravel()
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])
    bits = [f"{4 * flat.size:032b}{_WORD - 1:05b}", *(f"{wide - 1:04b}" for wide in _SIZES)]
    longest = 1 << _SIZES[-1]
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        value, left = 255 * int(flat[start]), 4 * (stop - start)
        while left:
            run = min(left, longest)
            which = next(k for k, wide in enumerate(_SIZES) if run <= 1 << wide)
            bits.append(f"1{which:02b}{run - 1:0{_SIZES[which]}b}{value:0{_WORD}b}")
            left -= run
    text = "".join(bits)
    packed: list[int] = np.packbits(np.frombuffer(text.encode(), np.uint8) - ord("0")).tolist()
    return packed


def _configuration(names: tuple[str, ...]) -> str:
    view = ET.Element("View")
    ET.SubElement(view, "Image", name="image", value="$image", zoom="true")
    labels = ET.SubElement(view, "BrushLabels", name="mask", toName="image")
    for entry in files.class_list(names)[1:]:
        red, green, blue = files.voc_palette()[entry["id"]].tolist()
        colour = f"#{red:02x}{green:02x}{blue:02x}"
        ET.SubElement(labels, "Label", value=str(entry["name"]), background=colour)
    ET.indent(view)
    return ET.tostring(view, encoding="unicode") + "\n"
