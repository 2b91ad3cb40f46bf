"""YOLO's segment files: a line of text for each object, with `data.yaml`."""

from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

from isim.data.formats.labelled import LabelledSet, put_image
from isim.data.formats.regions import Instances, centre_polygons, regions
from isim.runtime import atomic


def write_yolo(
    data: LabelledSet, folder: Path, *, copy: bool = False, instances: Instances = "parts"
) -> int:
    """Write images/<split>, labels/<split> and data.yaml; returns the number of objects.

    A line is a class, 0..K-1, and a polygon through the centres of border pixels, as shares of
    width and height; holes are cut in by bridges. `/` in an id becomes `__`, as few readers look
    into subfolders. Images are put there by `put_image`. Raises UserError for unreadable files, two
    images of one name, or a failed write.
    """
    count = 0
    splits, flat = data.splits(), data.flat_ids()
    with atomic.atomic_directory(folder) as building:
        for split, entries in splits.items():
            for entry in data.told("yolo", entries):
                label = entry.label()
                height, width = label.shape
                lines = [
                    f"{region.class_id - 1} "
                    + " ".join(f"{x / width:.7f} {y / height:.7f}" for x, y in ring)
                    for region in regions(label, instances)
                    for ring in centre_polygons(region)
                ]
                count += len(lines)
                text = "".join(f"{line}\n" for line in lines)
                atomic.write_text(building / f"labels/{split}/{flat[entry.id]}.txt", text)
                put_image(entry, building / "images" / split, flat[entry.id], copy=copy)
        # Whoever trains wants both; where there is no val it is told in the documentation.
        val = "val" if "val" in splits else next(iter(splits))
        about = {
            "path": str(folder.resolve()),
            "train": "images/train" if "train" in splits else f"images/{next(iter(splits))}",
            "val": f"images/{val}",
            "names": dict(enumerate(data.names[1:])),
        }
        stream = StringIO()
        YAML().dump(about, stream)
        atomic.write_text(building / "data.yaml", stream.getvalue())
    return count
