"""Archive that VOC 2012's evaluation server takes."""

import gzip
import io
import tarfile
from functools import partial
from pathlib import Path

from PIL import Image

from isim.data import prepared
from isim.data.files import image_size, read_label_of, voc_palette
from isim.data.prepared import Item
from isim.data.sources.voc import CLASSES
from isim.errors import UserError
from isim.runtime import atomic
from isim.runtime.helpers import in_threads

# Competition 6, segmentation with any training data; the server looks for the files there.
FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
# The bytes of a PNG that hold its bit depth and colour type: 8 bits, palette.
DEPTH_AND_TYPE, PALETTE_8_BIT = slice(24, 26), b"\x08\x03"


def write(root: Path, labels: str, split: str, *, crf: bool, out: Path | None) -> tuple[Path, int]:
    """Pack a segmenter's predictions of a split into a gzipped tar, after checking all of them.

    The same predictions give the same bytes. `labels` is the label set that the segmenter was
    trained on; with `crf` the predictions after the dCRF are packed.

    Returns:
        The file (`out` or `reports/server/<label set>_<split>[_crf].tgz`), and their number.

    Raises:
        UserError: The data set has other classes than VOC's; the predictions are not those of
            the split, or not what the server takes; the file cannot be written.
    """
    data = prepared.load(root)
    if data.classes != CLASSES:
        raise UserError(
            f"the VOC server scores VOC's {len(CLASSES)} classes in VOC's order only; the prepared "
            f"data has {len(data.classes)}, from '{data.classes[0]}' on: prepare VOC 2012"
        )
    items = sorted(data.split(split, labelled=False), key=lambda item: item.id)
    folder = _find(root / "data/predictions", labels, split, crf)
    expected, found = [f"{item.id}.png" for item in items], {path.name for path in folder.iterdir()}
    lost, strange = set(expected) - found, found - set(expected)
    for names, what in ((lost, "lacks"), (strange, "has beyond the split")):
        if names:
            raise UserError(
                f"{folder} {what} {len(names)} of {len(expected)} predictions, such as "
                f"{min(names)}; run `isim train-segmenter {labels}` again"
            )
    contents = in_threads(partial(_read, folder), items, "check")
    path = out or root / f"reports/server/{labels}_{folder.name}.tgz"
    atomic.write_bytes(path, _pack(dict(zip(expected, contents, strict=True))))
    return path, len(items)


def _find(predictions: Path, labels: str, split: str, crf: bool) -> Path:
    """Find the predictions' folder, by names that are there: none leads elsewhere."""
    trained = sorted(path.name for path in predictions.glob("[!.]*") if path.is_dir())
    if labels not in trained:
        raise UserError(
            f"{predictions} holds no predictions of label set '{labels}', but of "
            f"{', '.join(trained) or 'none'}; run `isim train-segmenter {labels}` first"
        )
    folder = predictions / labels / (f"{split}_crf" if crf else split)
    if not folder.is_dir():
        crf_too = " and set train_segmenter.crf_after: true" if crf else ""
        raise UserError(
            f"{folder} does not exist; add {split} to train_segmenter.eval_splits{crf_too}, then "
            f"run `isim train-segmenter {labels}`"
        )
    return folder


def _read(folder: Path, item: Item) -> bytes:
    """Read the bytes of an image's prediction, if the server can take them."""
    path = folder / f"{item.id}.png"
    # 255 is refused, too: the server would count it as a wrong class.
    read_label_of(path, image_size(item.image), len(CLASSES) + 1, ignored=False)
    with Image.open(path) as image:
        palette = image.getpalette() if image.format == "PNG" else None
    data = path.read_bytes()
    if data[DEPTH_AND_TYPE] != PALETTE_8_BIT or palette != voc_palette().ravel().tolist():
        raise UserError(
            f"prediction {path} is no 8-bit PNG with VOC's palette; make the predictions again"
        )
    return data


def _pack(files: dict[str, bytes]) -> bytes:
    """Make a gzipped tar of `files` in FOLDER, with nothing of this machine or moment."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w") as tar,
    ):
        for name, data in files.items():
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
