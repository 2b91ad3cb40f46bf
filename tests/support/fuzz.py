"""Damaged files for every reader: each gives a value or a UserError, soon and in bounded memory.

`make fuzz` runs this module: all readers in turn, for some minutes, each with other damage.
"""

import argparse
import gzip
import io
import json
import os
import random
import re
import resource
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from support.checkpoints import save as save_checkpoint

from isim import params
from isim.data import files, prepared
from isim.data.formats import annotation, instances, labelled, labels, listing, masks
from isim.data.sources import download, sbd, splits
from isim.errors import UserError
from isim.experiments import runs
from isim.models import cam, encoder, segmenter
from isim.passes import features
from isim.passes.journal import Journal
from isim.project import lock
from isim.reporting import results
from isim.reporting.page import content
from isim.runtime import checkpoint
from isim.runtime.here import Here

ROOT = Path(__file__).parents[2]
# Seconds that reading a damaged file of a few kilobytes may take on a busy machine, and bytes that
# it may add to a process.
SECONDS, MEMORY = 10, 2 << 30


class Reader(NamedTuple):
    """A reader: a name for its file, what writes a valid one, and the call that reads it."""

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]


def _written(text):
    return lambda path: path.write_text(text, encoding="utf-8")


def _put(path, place):
    """Make a file, whatever it is, one of another name, too."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    os.link(path, place)


def _array(height, width, *more):
    return np.random.default_rng(3).integers(0, 3, (height, width, *more)).astype(np.uint8)


def _image(form, mode="RGB", **options):
    def make(path):
        channels = {"RGB": (3,), "L": (), "P": ()}[mode]
        Image.fromarray(_array(9, 14, *channels)).convert(mode).save(path, format=form, **options)

    return make


def _deep(path):
    Image.fromarray(_array(9, 14).astype(np.uint16) * 999).save(path, format="PNG")


def _look(path):
    """Read an image in every way in which something of it is read."""
    files.image_size(path), files.orientation(path), files.unusual(path), files.is_lossy(path)
    deep = files.is_deep(path)
    return files.read_photograph(path, (0, 65535)), deep or files.read_image(path, least=(4, 4))


def _mask(path):
    files.read_raw_mask(path)
    files.read_label_of(path, (9, 14), 3, ignored=True)
    return masks.read(path, masks.Scheme(2))


COCO = {
    "images": [{"id": 1, "file_name": "a.jpg", "height": 9, "width": 14}],
    "categories": [{"id": 3, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "iscrowd": 0, "area": 9.0,
         "segmentation": [[1.0, 1.0, 6.5, 1.0, 6.5, 7.0]]},
        {"id": 2, "image_id": 1, "category_id": 3, "iscrowd": 1, "area": 4,
         "segmentation": {"counts": [20, 4, 102], "size": [9, 14]}},
    ],
}  # fmt: skip


def _instances(path):
    found = instances.read(path)
    found.tags()
    return [found.mask(number, instances.class_ids(found.classes)) for number in found.images]


XML = "<annotation><filename>a.jpg</filename><object><name>cat</name></object></annotation>"


def _cam(path):
    files.write_cam(path, np.full((2, 3, 4), 0.5), np.array([1, 2]), (9, 14))


def _prepared(damaged):
    """Files of data/prepared: one of them is the damaged one, the others are whole."""
    about = {"format": 2, "root": "prepared:", "classes": ["cat", "dog"], "splits": {"train": 2}}
    whole = {
        "dataset.json": json.dumps(about),
        "train.csv": "id,image,mask\na,images/a.jpg,masks/a.png\nb,images/b.jpg,\n",
        "labels.csv": "id,labels,known\na,cat;dog,1\nb,,1\n",
        "manifest.csv": "path,bytes,md5\nimages/a.jpg,100,d41d8cd98f00b204e9800998ecf8427e\n",
    }

    def read(path):
        folder = path.parent / prepared.FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in whole.items():
            if name != damaged:
                (folder / name).write_text(text)
        _put(path, folder / damaged)
        return prepared.load(path.parent), prepared.digests(path.parent)

    return Reader(f"prepared_{damaged}", _written(whole[damaged]), read)


class _Weights(NamedTuple):
    stage: str = "train_cam"


def _weights(path):
    torch.manual_seed(0)
    tensors = {"conv1.weight": torch.randn(4, 3, 3, 3), "bn1.bias": torch.zeros(4)}
    if path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)


def _state(path):
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    folder = path.parent / "digest"
    folder.mkdir(exist_ok=True)
    checkpoint.save_state(folder, net, optimizer, {"epochs": [{"loss": 1.0}]})
    path.write_bytes((folder / "state.safetensors").read_bytes())


def _restore(path):
    _put(path, path.parent / "digest/state.safetensors")
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    return checkpoint.restore(path.parent / "digest", net, optimizer)


def _once(path):
    _put(path, path.parent / "figures.json")
    return Here(path.parent).once("figures", lambda: {"speed": 1.0})


def _features(path):
    return np.asarray(features._mapped(path, 3)).astype(np.float32)


def _tar(path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        about = tarfile.TarInfo("kit/VOC/a.txt")
        about.size = 500
        tar.addfile(about, io.BytesIO(b"a" * 500))
    path.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))


def _extract(path):
    with TemporaryDirectory(dir=path.parent) as where:
        download.extract(path, "kit/VOC", Path(where))


def _mat(path):
    from scipy.io import savemat

    savemat(path, {"GTcls": {"Segmentation": _array(9, 14)}}, do_compression=True)


def _lists(path):
    _put(path, path.parent / "train.txt")
    names = listing.Names(listing.Listing({"a": Path("a.jpg"), "b/c": Path("b/c.png")}, {}))
    return splits.lists(path.parent, names, [])


def _workspace(path):
    _put(path, path.parent / "dvc.lock")
    found = runs.workspace(path.parent)
    return found and runs.lineage(found.lock, "data/prepared")


def _lock(path):
    _put(path, path.parent / lock.FILE)
    lock.require(path.parent)


def _class_list(path):
    _put(path, path.parent / "classes.json")
    return labelled._names(path.parent, path.parent)


def _table(path):
    _put(path, path.parent / "reports/evaluate/metrics.json")
    return results.table(path.parent)


def _threshold(path):
    _put(path, path.parent / "threshold.json")
    return files.read_threshold(path.parent)


def _journal(path):
    with Journal(path) as journal:
        return journal.read()


LOCK = """schema: '2.0'
stages:
  prepare:
    cmd: python -m isim prepare
    params: {params.yaml: {prepare.seed: 1}}
    outs:
    - {path: data/prepared, md5: 0123.dir, nfiles: 4}
"""
SCORES = {"val": {"cam_miou": 0.4, "cam_miou_oracle": 0.5, "cam_crf_miou": 0.6}}

READERS = [
    Reader("params.yaml", _written((ROOT / "params.yaml").read_text()), params.load),
    Reader("table.csv", _written('image,labels\na.jpg,cat;dog\n"b.jpg",\n'), labels.of_file),
    Reader("hot.csv", _written("image,cat,dog\na.jpg,1,0\nb.jpg,0,1\n"), labels.of_file),
    Reader("tags.json", _written('[{"image": "a.jpg", "labels": ["cat"]}]'), labels.of_file),
    Reader("tags.jsonl", _written('{"image": "a.jpg", "labels": ["cat"]}\n'), labels.of_file),
    Reader("coco.json", _written(json.dumps(COCO)), _instances),
    Reader("a.xml", _written(XML), annotation.names),
    Reader("utf16.xml", lambda path: path.write_bytes(XML.encode("utf-16")), annotation.names),
    *(
        Reader(f"image.{form.lower()}", _image(form), _look)
        for form in ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM", "TGA", "ICO", "PCX")
    ),
    Reader("deep.png", _deep, _look),
    Reader("mask.png", _image("PNG", "P"), _mask),
    Reader("mask.tiff", _image("TIFF", "L", compression="tiff_lzw"), _mask),
    Reader("cam.npz", _cam, files.read_cam),
    Reader("cams.json", _written('{"threshold": 0.3}'), _threshold),
    *map(_prepared, ("dataset.json", "train.csv", "labels.csv", "manifest.csv")),
    Reader("cam.safetensors", lambda p: save_checkpoint("deeplabcam", p), cam.load),
    Reader("frozen.safetensors", lambda p: save_checkpoint("frozen", p), cam.load),
    Reader("seg.safetensors", lambda p: save_checkpoint("deeplabv2", p), segmenter.load),
    Reader("weights.safetensors", _weights, lambda p: encoder.read(p, _Weights())),
    Reader("weights.pth", _weights, lambda p: encoder.read(p, _Weights())),
    Reader("state.safetensors", _state, _restore),
    Reader("journal.jsonl", _written('{"id": "a"}\n{"id": "b", "n": [1]}\n'), _journal),
    Reader("once.json", _written('{"speed": 2.0}'), _once),
    Reader("features.npy", lambda p: np.save(p, np.zeros((2, 3, 4), np.float16)), _features),
    Reader("kit.tar.gz", _tar, _extract),
    Reader("sbd.mat", _mat, lambda p: sbd._convert(p.parent, p)),
    Reader("list.txt", _written("a\nb/c.png\n"), _lists),
    Reader("colors.txt", _written("cat 128 0 0\ndog:1,2,3::\n"), lambda p: masks._table(p, [])),
    Reader("dvc.lock.txt", _written(LOCK), _workspace),
    Reader("isim.lock.txt", lambda p: p.write_text(lock.text()), _lock),
    Reader("classes.list", _written('[{"id": 0, "name": "cat"}]'), _class_list),
    Reader("scores.json", _written(json.dumps(SCORES)), _table),
    Reader("rows.csv", _written("id,labels\na,cat\n"), content.rows),
]


def damaged(data, draw):
    """Damage the content of a file, in a way that `draw`, a random.Random, chooses."""
    at = draw.randrange(len(data) + 1)
    other = min(len(data), at + draw.randrange(1, 40))
    ways = [
        lambda: data[:at],
        lambda: data[at:],
        lambda: data[:at] + data[other:],
        lambda: data[:at] + bytes(draw.randrange(256) for _ in range(9)) + data[at:],
        lambda: data[:at] + data[at:other] * 50 + data[other:],
        lambda: data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :],
        lambda: bytes(b ^ (1 << draw.randrange(8)) if draw.random() < 0.01 else b for b in data),
        lambda: data[:at] + draw.choice(_ODD) + data[at:],
        lambda: data[:at] + draw.choice(_ODD) + data[other:],
        lambda: _renumbered(data, draw),
        lambda: _renumbered(data, draw),
        lambda: _quoted(data, draw),
        # Sizes in headers of binary files.
        lambda: data[:at] + draw.choice((b"\xff", b"\x7f", b"\x00")) * 4 + data[at + 4 :],
        lambda: data[:at] + b"\xff\xff\xff\x7f\x00\x00\x00\x00" + data[at + 8 :],
        lambda: data.decode("latin-1").encode(draw.choice(("utf-16", "utf-32", "utf-8-sig"))),
        lambda: draw.choice(_ODD),
        lambda: bytes(draw.randrange(256) for _ in range(draw.randrange(200))),
        lambda: b"",
    ]
    return draw.choice(ways)()


_ODD = [
    b"[" * 10_000, b"{" * 10_000, b'{"a":' * 10_000, b"<a>" * 10_000, b"- " * 10_000, b"(" * 10_000,
    b"\x00", b"\x1b[31m", "\u202e".encode(), b"\xff\xfe", b"\xed\xa0\x80", b"\r", b'"', b"'", b"\n",
    b"nan", b"1e999", b"-1", b"true", b"null", b"[]", b"{}", b"../../x", b"/etc/passwd",
    b"!!binary ", b"&a [*a]", b"*a", b"!!timestamp 9", b"9" * 5000,
    b"<!DOCTYPE a [<!ENTITY b 'c'>]>",
    "²".encode(), b",", b";", b":", b"x" * 200_000, b",\n" * 10_000, b"{}\n" * 100,
]  # fmt: skip


def _renumbered(data, draw):
    """Put another number into the place of one."""
    places = list(re.finditer(rb"-?\d+(\.\d+)?", data))
    if not places:
        return data[::-1]
    one = draw.choice(places)
    number = draw.choice((b"-1", b"0", b"1e400", b"NaN", b"true", b'"7"', b"4294967296", b"1" * 30))
    return data[: one.start()] + number + data[one.end() :]


def _quoted(data, draw):
    """Put another text into the place of one."""
    places = list(re.finditer(rb"[A-Za-z_]{2,}", data))
    if not places:
        return data + data
    one = draw.choice(places)
    word = draw.choice(
        (b"", b"\\u0000", b"a" * 5000, b"..", b"/a", "\u202eé\x07".encode(), b"null")
    )
    return data[: one.start()] + word + data[one.end() :]


def check(reader, path):
    """Read a file; returns the error's text, empty for a value. AssertionError if it is bad."""
    start = time.monotonic()
    told = ""
    try:
        reader.read(path)
    except UserError as error:
        told = str(error)
    assert len(told) < 300 and told.isprintable(), f"{len(told)}: {told[:500]!r}"
    seconds = time.monotonic() - start
    assert seconds < SECONDS, f"{seconds:.1f} s"
    return told


def fuzz(reader, folder, seeds):
    """Check a reader with as many damaged files as there are seeds; the valid one is read first."""
    path = folder / reader.name
    reader.make(path)
    data = path.read_bytes()
    assert not check(reader, path), "a valid file is refused"
    for seed in seeds:
        path.write_bytes(damaged(data, random.Random(f"{reader.name} {seed}")))
        try:
            check(reader, path)
        except Exception as error:
            raise AssertionError(f"{reader.name}, damage {seed}: {error!r:.300}") from error


def main():
    """Fuzz all readers until the minutes are over; tell what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--first", type=int, default=1000, help="First seed.")
    options = parser.parse_args()
    end, first, found = time.monotonic() + 60 * options.minutes, options.first, {}
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while time.monotonic() < end:
        for reader in READERS:
            for seed in range(first, first + 10):
                with TemporaryDirectory() as name:
                    try:
                        fuzz(reader, Path(name), [seed])
                    except AssertionError as error:
                        found.setdefault(reader.name, str(error))
                        print(error, flush=True)
                now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                if 1024 * (now - size) > MEMORY:
                    found.setdefault(reader.name, f"damage {seed}: {(now - size) / 1e6:.1f} GB")
                    print(found[reader.name], flush=True)
                size = max(size, now)
            if time.monotonic() > end:
                break
        first += 10
    print(f"{len(READERS)} readers, seeds {options.first} to {first}: {len(found)} fare badly")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
