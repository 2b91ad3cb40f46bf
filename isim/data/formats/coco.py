"""COCO JSON: one file of images, categories and annotations."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isim.data.formats.labelled import Labelled, LabelledSet
from isim.data.formats.regions import Instances, Region, edge_polygons, regions
from isim.runtime import atomic

# Stands in each file that is written here, which is known by it.
DESCRIPTION = "label maps of isim"


def write_coco(
    data: LabelledSet, path: Path, *, polygons: bool = False, instances: Instances = "parts"
) -> int:
    """Write label maps as a COCO file; returns the number of annotations.

    Masks are run lengths or `polygons` along the edges of pixels, into which holes are cut by
    bridges; both are exact. Category k is label k. Pixels to ignore belong to no annotation. Raises
    UserError for unreadable files or a failed write.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, entry in enumerate(data.told("coco"), start=1):
        label = entry.label()
        height, width = label.shape
        image = {"id": number, "file_name": file_name(entry), "height": height, "width": width}
        images.append(image | ({"split": entry.split} if entry.split else {}))
        for annotation in _annotations(label, polygons, instances):
            own = {"id": len(annotations) + 1, "image_id": number}
            annotations.append(own | annotation)
    categories = [{"id": k, "name": name} for k, name in enumerate(data.names)][1:]
    info = {"description": DESCRIPTION}
    whole = {"info": info, "images": images, "categories": categories, "annotations": annotations}
    atomic.write_text(path, json.dumps(whole))
    return len(annotations)


def file_name(entry: Labelled) -> str:
    """Name an image's file, relative to the folder of images."""
    return f"{entry.id}{entry.image.suffix}"


def _annotations(
    label: NDArray[np.uint8], polygons: bool, instances: Instances
) -> Iterator[dict[str, Any]]:
    for region in regions(label, instances):
        height, width = region.plane.shape
        segmentation: Any = run_lengths(region, label.shape)
        if polygons:
            segmentation = [ring.ravel().tolist() for ring in edge_polygons(region)]
        yield {
            "category_id": region.class_id,
            "segmentation": segmentation,
            "area": region.area,
            "bbox": [region.left, region.top, width, height],
            "iscrowd": 0,
        }


def run_lengths(region: Region, size: tuple[int, ...]) -> dict[str, Any]:
    """Encode a region of an image of `size` as COCO's uncompressed run lengths.

    Columns follow one another; the first run is of pixels outside.
    """
    flat = region.whole(size).T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return {"size": list(size), "counts": [0, *counts] if flat[0] else counts}
