"""Trials of method frozen on `$ISIM_SHARED/data/voc_sample`, over several seeds: docs/results.md.

    python benchmarks/frozen_trials.py WORK --trial lite2-512 --seeds 0 1 2 [-S train_cam.x=1 ...]

Each run is `isim train-cam` with preset `voc-sample-fast` and the trial's settings, and with
`--segmenter LABEL_SET` also `isim train-segmenter` on the last round or the true masks. Features
are shared by all runs of the folder WORK. The table has mIoU in percent: mean and, behind it, the
largest difference from it over the seeds.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from isim.experiments import overlay
from isim.runtime import figures

WEIGHTS = "$ISIM_SHARED/weights/"
ENCODERS = {
    "lite2": ("tf_efficientnet_lite2", "tf_efficientnet_lite2.in1k.safetensors"),
    "lite0": ("tf_efficientnet_lite0", "tf_efficientnet_lite0.in1k.safetensors"),
    "mobilenetv2": ("mobilenetv2_100", "mobilenetv2_100.imagenet.safetensors"),
}


def main() -> None:
    """Run the trials, and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--trial", action="append", default=[], help="encoder-side[+side ...]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-S", dest="settings", action="append", default=[], help="name=value")
    parser.add_argument("--segmenter", action="append", default=[], help="its label sets")
    given = parser.parse_args()
    for trial in given.trial or ["lite2-512"]:
        rows = [
            one(given.work, trial, seed, given.settings, given.segmenter) for seed in given.seeds
        ]
        print(f"{trial} {' '.join(given.settings)} seeds {given.seeds}: {table(rows)}", flush=True)


def one(
    work: Path, trial: str, seed: int, settings: list[str], label_sets: list[str]
) -> dict[str, float]:
    """Run a trial with a seed; returns its figures by name."""
    encoder, _, sides = trial.partition("-")
    name, file = ENCODERS[encoder]
    tree = overlay.tree("voc-sample-fast")
    features = {"sides": [int(side) for side in sides.split("+")]}
    network = {"encoder": name, "weights": WEIGHTS + file, "seed": seed, "pictures": 0}
    network["features"] = features
    overlay.merge(tree, {"train_cam": network, "train_segmenter": network})
    names = [("last_round", "data/pseudo_labels"), ("ground_truth", "data/prepared")]
    overlay.merge(tree, {"label_sets": [{"name": n, "path": path} for n, path in names]})
    for setting in settings:
        key, value = setting.split("=", 1)
        values: Any = overlay.plain(f"value: {value}")["value"]
        for part in reversed(key.split(".")):
            values = {part: values}
        overlay.merge(tree, values)
    work.mkdir(parents=True, exist_ok=True)
    (work / "params.yaml").write_text(overlay.dump(tree))
    if not (work / "data/prepared").exists():
        stage(work, "prepare")
    found = {"minutes": stage(work, "train-cam")}
    with (work / "reports/train_cam/miou.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        number = row["round"] or "0"
        found[f"cam {number}"] = 100 * float(row["cam_miou"])
        if row["pseudo_label_miou"]:
            found[f"label {number}"] = 100 * float(row["pseudo_label_miou"])
    for label_set in label_sets:
        found["minutes"] += stage(work, "train-segmenter", label_set)
        val = figures.read(work / f"reports/train_segmenter/{label_set}")["val"]
        found[f"{label_set} val"] = 100 * val["miou"]
        if "crf_miou" in val:
            found[f"{label_set} crf"] = 100 * val["crf_miou"]
    return found


def stage(work: Path, *command: str) -> float:
    """Run a stage; returns minutes."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "isim", *command],
        cwd=work,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return (time.perf_counter() - start) / 60


def table(rows: list[dict[str, float]]) -> str:
    """Put the mean and the spread of every figure in words."""
    words = []
    for name in rows[0]:
        values = [row[name] for row in rows]
        mean = statistics.mean(values)
        words.append(f"{name} {mean:.2f} ({max(abs(value - mean) for value in values):.2f})")
    return ", ".join(words)


if __name__ == "__main__":
    main()
