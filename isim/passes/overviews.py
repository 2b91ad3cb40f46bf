"""Overview of images for the page: a thumbnail, its label maps, and how far they agree.

Nothing needs a mask. What there is of an image is compared: its label made from tags (the
pseudo-label, else the seed of its CAM) with what a segmenter, which saw no tag of it, predicts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from isim import metrics
from isim.data import files
from isim.data.prepared import Item
from isim.labels.seeds import seeds
from isim.params import Report
from isim.passes import counts, each
from isim.passes.journal import Line
from isim.reporting.page.sources import LAYERS
from isim.runtime.atomic import atomic_path
from isim.runtime.here import Here

Label = NDArray[np.uint8]
# Names of the label maps, in the order of their layers in a file.
MASK, PSEUDO, SEGMENTER, TRUTH = LAYERS
# A seed is stable as far as it stays the same at thresholds this far below and above.
AROUND = 0.1
# Connected parts smaller than this share of the image are not counted.
SPECK = 0.001


@dataclass(frozen=True)
class Made:
    """Files that were made of an image.

    Attributes:
        number: Place of the image on the page, which names its thumbnail.
        maps: Label maps by a name of `LAYERS`, in that order.
        cam: Its CAMs, None where there are none.
        steps: Label maps of every step, by what the contact sheet calls them.
    """

    number: int
    maps: Mapping[str, Path]
    cam: Path | None = None
    steps: Mapping[str, Path] = field(default_factory=dict)


class Frame(NamedTuple):
    """Folder of the pictures, and what all images have in common."""

    folder: Path
    params: Report
    threshold: float
    num_labels: int


def place(number: int) -> str:
    """Name the thumbnail of an image: its number, in a folder of a thousand."""
    return f"{number // 1000:03d}/{number:06d}"


def make(here: Here, items: Sequence[Item], made: Mapping[str, Made], frame: Frame) -> list[Line]:
    """Write each image's thumbnail `<place>.jpg` and label maps `<place>.png` into the folder.

    The maps lie one below the other, as large as the thumbnail, in colours of the VOC palette with
    a transparent background. A line has the image's `size`, the `layers` of its file, and of the
    first of them, the mask: `pixels` (sparse, by label) and `parts`; where that can be told
    `stable`, the `agreement` of a `pair` (two names) and its sparse (L, L) counts `between`, and
    `iou` and `counts` of the mask with the truth. Raises UserError when a file is unreadable or of
    another image, or cannot be written.
    """

    def finish(item: Item) -> dict[str, Any]:
        found = made[item.id]
        size = files.image_size(item.image)
        read = {path: _read(name, path, size, frame) for name, path in found.maps.items()}
        maps = {name: read[path] for name, path in found.maps.items()}
        line: dict[str, Any] = {"size": size, "layers": list(maps)}
        seed = None
        if found.cam is not None and item.image_label is not None:
            seed, line["stable"] = _seed(item, found.cam, frame.threshold)
        line |= _compared(item, maps, seed, frame.num_labels)
        path = frame.folder / place(found.number)
        small = _thumbnail(item, size, frame.params.thumbnail, path)
        _write_layers(list(maps.values()), small, path.with_suffix(".png"))
        return line

    return each.image(here, items, finish, name="overviews").lines


def sheet(here: Here, items: Sequence[Item], made: Mapping[str, Made], frame: Frame) -> list[Line]:
    """Write the contact sheet's pictures, as `make` does, into the folder `sheet` of the folder.

    The layers are the seeds at the thresholds, then every step's label map, then the truth. A line
    has `shares`, that part of the image which each layer labels, and the names of `steps`. Images
    without CAMs or tags have no place there. Raises UserError as `make`.
    """

    def finish(item: Item) -> dict[str, Any]:
        found = made[item.id]
        size = files.image_size(item.image)
        best, height = _peak(item, Path(str(found.cam)))
        layers = [seeds.cut(best, height, threshold) for threshold in frame.params.thresholds]
        named = dict(found.steps)
        if item.mask is not None:
            named[TRUTH] = item.mask
        layers += [_read(name, path, size, frame) for name, path in named.items()]
        path = frame.folder / "sheet" / f"{found.number:06d}"
        small = _thumbnail(item, size, 2 * frame.params.thumbnail // 3, path)
        _write_layers(layers, small, path.with_suffix(".png"))
        shares = [float((label % 255 > 0).mean()) for label in layers]
        return {"size": size, "steps": list(named), "shares": shares}

    shown = [item for item in items if made[item.id].cam and item.image_label is not None]
    return each.image(here, shown, finish, name="sheet").lines


def _read(name: str, path: Path, size: tuple[int, int], frame: Frame) -> Label:
    if name == TRUTH:
        return files.read_truth(path, size, frame.num_labels)
    return files.read_label_of(path, size, frame.num_labels, ignored=False)


def _peak(item: Item, cam: Path) -> tuple[Label, NDArray[np.float32]]:
    planes, size = files.read_cam_of(cam, item.image, item.class_ids)
    return seeds.peak(seeds.grow(planes, size), item.class_ids)


def _seed(item: Item, cam: Path, threshold: float) -> tuple[Label, float | None]:
    """Cut a seed (H, W), and tell how stable it is: the IoU of a wider and a narrower one."""
    best, height = _peak(item, cam)
    narrow, wide = ((height > threshold + shift).sum() for shift in (AROUND, -AROUND))
    stable = float(narrow / wide) if wide else None
    return seeds.cut(best, height, threshold), stable


def _compared(
    item: Item, maps: Mapping[str, Label], seed: Label | None, num_labels: int
) -> dict[str, Any]:
    """Compare the label maps of an image with one another."""
    if MASK not in maps:
        return {}
    mask, line = maps[MASK], dict[str, Any]()
    line["pixels"] = counts.sparse(np.bincount(mask.ravel(), minlength=num_labels))
    line["parts"] = _parts(mask)
    # The first two of these, the segmenter's in any case.
    known = {"pseudo-label": maps.get(PSEUDO), "CAM": seed}
    if known["pseudo-label"] is None and item.image_label is not None:
        known = {"mask": mask, "CAM": seed}
    pairs = [(name, label) for name, label in known.items() if label is not None]
    if (predicted := maps.get(SEGMENTER)) is not None:
        others = [pair for pair in pairs if pair[1] is not predicted]
        pairs = [*others[:1], (SEGMENTER, predicted)]
    if len(pairs) == 2:
        (one, first), (other, second) = pairs
        confusion = metrics.confusion_matrix(first, second, num_labels)
        line |= {"pair": [one, other], "agreement": metrics.agreement(confusion)}
        line["between"] = counts.sparse(confusion)
    if (truth := maps.get(TRUTH)) is not None:
        confusion = metrics.confusion_matrix(truth, mask, num_labels)
        line |= {"counts": counts.sparse(confusion), "iou": metrics.agreement(confusion)}
    return line


def _parts(mask: Label) -> int:
    """Count the connected parts of each class, specks aside."""
    found = 0
    for value in np.unique(mask[mask > 0]):
        plane = (mask == value).astype(np.uint8)
        _, _, stats, _ = cv2.connectedComponentsWithStats(plane, connectivity=8)
        found += int((stats[1:, cv2.CC_STAT_AREA] >= SPECK * mask.size).sum())
    return found


def _thumbnail(item: Item, size: tuple[int, int], side: int, path: Path) -> tuple[int, int]:
    """Write an image's thumbnail; returns its (h, w), of which the longer is at most `side`."""
    factor = min(1.0, side / max(size))
    height, width = (max(1, round(factor * length)) for length in size)
    image = files.read_image(item.image, (height, width))
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    with atomic_path(path.with_suffix(".jpg")) as temporary:
        Image.fromarray(resized).save(temporary, format="JPEG", quality=80)
    return height, width


def _write_layers(layers: Sequence[Label], size: tuple[int, int], path: Path) -> None:
    if not layers:
        return
    small = [cv2.resize(one, size[::-1], interpolation=cv2.INTER_NEAREST) for one in layers]
    image = Image.fromarray(np.concatenate(small))
    image.putpalette(files.voc_palette().tobytes())
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", transparency=bytes([0]) + bytes([255]) * 255)
