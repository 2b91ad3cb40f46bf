"""Page of 10,000 images: minutes to make it, seconds to its first picture: docs/results.md.

    python benchmarks/page.py WORK [--images 10000] [--side 320]

WORK becomes a project of generated images, of 10 classes with masks, CAMs, pseudo-labels and
predictions, unless it is there already. `isim report` is timed in it, and then the page in
Chromium, where that and playwright are installed.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from isim.data import files, prepared
from isim.experiments import preset
from isim.runtime import atomic, helpers

CLASSES = tuple(f"class {number}" for number in range(10))


def main() -> None:
    """Print how long each takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--side", type=int, default=320, help="longer side in pixels")
    given = parser.parse_args()
    root = given.work.resolve()
    if not (root / prepared.FOLDER).exists():
        generate(root, given.images, given.side)
    shutil.rmtree(root / ".isim", ignore_errors=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "isim", "report"], cwd=root, check=True)
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = used.ru_utime + used.ru_stime
    page = root / "reports/index.html"
    size = sum(path.stat().st_size for path in (root / "reports/page").rglob("*.*")) / 1e6
    print(f"{given.images} images: page made in {seconds:.0f} s, {cores:.0f} s of one core")
    print(f"it has {page.stat().st_size / 1e6:.1f} MB, its pictures {size:.0f} MB")
    if (binary := shutil.which("chromium")) is not None:
        print(f"first picture in a browser after {first_picture(page, binary):.1f} s")


def generate(root: Path, count: int, side: int) -> None:
    """Write the project: ellipses on noise, and label maps that are shifted from one another."""
    preset.write("tiny", root / "params.yaml")
    height = 3 * side // 4
    noise = np.random.default_rng(0).normal(0, 20, (height, side, 3))

    def write(number: int) -> int:
        random = np.random.default_rng(number)
        label = int(random.integers(1, 11))
        maps = np.zeros((3, height, side), np.uint8)
        middle, axes = random.uniform(0.3, 0.7, 2), random.uniform(0.1, 0.4, 2)
        for place, one in enumerate(maps):
            at = int(middle[0] * side) + 4 * place, int(middle[1] * height)
            cv2.ellipse(one, at, (int(axes[0] * side), int(axes[1] * height)), 0, 0, 360, label, -1)
        image = random.integers(60, 200, 3) + 30.0 * maps[0][..., None] / 10 + noise
        id_ = f"{number:05d}"
        for name in ("images", "data/masks", "data/predictions/last_round/train"):
            (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"images/{id_}.jpg")
        folders = ("data/masks", "data/pseudo_labels/round_01", "data/predictions/last_round/train")
        for folder, one in zip(folders, maps, strict=True):
            files.write_label_map(root / folder / f"{id_}.png", one)
        plane = cv2.GaussianBlur((maps[0] > 0).astype(np.float32), (0, 0), 8)[None, ::4, ::4]
        size = (height, side)
        files.write_cam(root / f"data/cams/train/{id_}.npz", plane, np.array([label]), size)
        return label

    labels = list(helpers.in_threads(write, range(count), "images"))
    ids = [f"{number:05d}" for number in range(count)]
    folder = root / prepared.FOLDER
    rows = [{"id": id_, "image": f"{id_}.jpg", "mask": ""} for id_ in ids]
    atomic.write_csv(folder / "train.csv", rows)
    tags = [
        {"id": id_, "labels": CLASSES[label - 1], "known": 1}
        for id_, label in zip(ids, labels, strict=True)
    ]
    atomic.write_csv(folder / "labels.csv", tags)
    atomic.write_csv(folder / "manifest.csv", [], ["path", "bytes", "md5"])
    about = {"format": prepared.FORMAT, "root": str(root / "images"), "classes": CLASSES}
    (folder / "dataset.json").write_text(json.dumps(about | {"splits": {"train": count}}))


def first_picture(page: Path, binary: str) -> float:
    """Open a page in Chromium; returns the seconds until its first thumbnail is shown."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        tab = browser.new_page()
        start = time.perf_counter()
        tab.goto(page.as_uri(), wait_until="commit")
        tab.wait_for_function("document.querySelector('#cards img')?.naturalWidth > 0")
        seconds = time.perf_counter() - start
        browser.close()
    return seconds


if __name__ == "__main__":
    main()
