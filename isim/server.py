"""The archive that VOC 2012's evaluation server takes (spec 8)."""

import gzip
import io
import tarfile
from functools import partial
from pathlib import Path

from PIL import Image

from isim import atomic
from isim.data.dataset import Item, load_prepared
from isim.data.files import image_size, read_label_map, voc_palette
from isim.data.threads import in_threads
from isim.data.voc import CLASSES
from isim.errors import UserError
from isim.params import resolve_path

# Competition 6, segmentation with any training data; the server looks for the files there.
FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
# The bytes of a PNG that hold its bit depth and colour type: 8 bits, palette.
DEPTH_AND_TYPE, PALETTE_8_BIT = slice(24, 26), b"\x08\x03"


def write(root: Path, labels: str, split: str, crf: bool, out: Path | None) -> tuple[Path, int]:
    """Pack a segmenter's predictions of a split into a gzipped tar, after checking all of them.

    The same predictions give the same bytes.

    Args:
        root: Project folder with data/prepared and data/predictions.
        labels: Label set that the segmenter was trained on.
        split: Split that it predicted.
        crf: Whether to take the predictions after the dCRF.
        out: File to write, or None: `reports/server/<label set>_<split>[_crf].tgz`.

    Returns:
        The file, and the number of predictions in it.

    Raises:
        UserError: The data set has other classes than VOC's; the predictions are not those of
            the split, or not what the server takes; the file cannot be written.
    """
    prepared = load_prepared(root / "data/prepared", partial(resolve_path, root=root))
    if prepared.classes != CLASSES:
        raise UserError(
            f"the VOC server scores VOC's {len(CLASSES)} classes in VOC's order only; the prepared "
            f"data has {len(prepared.classes)}, from '{prepared.classes[0]}' on: prepare VOC 2012"
        )
    items = sorted(prepared.split(split, labelled=False), key=lambda item: item.id)
    name = f"{split}_crf" if crf else split
    folder = _find(root / "data/predictions", labels, split, crf)
    _require_same_ids(folder, {item.id for item in items}, labels)
    found = list(in_threads(partial(_read, folder), items, "check"))
    path = out or root / f"reports/server/{labels}_{name}.tgz"
    atomic.write_bytes(path, _pack({f"{i.id}.png": d for i, d in zip(items, found, strict=True)}))
    return path, len(items)


def _find(predictions: Path, labels: str, split: str, crf: bool) -> Path:
    """Folder of the predictions; only names that are there, so that none leads elsewhere."""
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


def _require_same_ids(folder: Path, ids: set[str], labels: str) -> None:
    found = {path.name for path in folder.iterdir()}
    expected = {f"{name}.png" for name in ids}
    for names, what in ((expected - found, "lacks"), (found - expected, "has beyond the split")):
        if names:
            raise UserError(
                f"{folder} {what} {len(names)} of {len(expected)} predictions, such as "
                f"{min(names)}; run `isim train-segmenter {labels}` again"
            )


def _read(folder: Path, item: Item) -> bytes:
    """The bytes of an image's prediction, if the server can take them."""
    path = folder / f"{item.id}.png"
    label = read_label_map(path)
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        palette = image.getpalette() if image.format == "PNG" else None
    size = image_size(item.image)
    problem = None
    if data[DEPTH_AND_TYPE] != PALETTE_8_BIT or palette != voc_palette().ravel().tolist():
        problem = "is no 8-bit PNG with VOC's palette"
    elif label.shape != size:
        problem = f"is {label.shape[1]}x{label.shape[0]} pixels, its image {size[1]}x{size[0]}"
    elif label.max() > len(CLASSES):
        # 255 too: the server would count it as a wrong class.
        problem = f"holds label {label.max()} of 0..{len(CLASSES)}"
    if problem:
        raise UserError(f"prediction {path} {problem}; make the predictions again")
    return data


def _pack(files: dict[str, bytes]) -> bytes:
    """Bytes of a gzipped tar of `files` in FOLDER, with nothing of this machine or moment."""
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
