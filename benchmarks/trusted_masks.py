"""Twenty trusted masks against none, on `$ISIM_SHARED/data/voc_sample`: docs/results.md.

    python benchmarks/trusted_masks.py PROJECT WORK --masks 20 --seeds 0 1 2

PROJECT is a folder after `dvc repro` of preset `voc-sample-fast`; WORK becomes one with its
pseudo-labels, in which train has no mask. The first seed's segmenter predicts train, too, `isim
report` and `isim masks-wanted` choose the images, which then get their masks back; with
`--at-random` as many others are drawn for comparison. The table has the segmenter's mIoU on val in
percent.
"""

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from isim.experiments import overlay
from isim.runtime import figures

SPLIT = "data/prepared/train.csv"


def main() -> None:
    """Run all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("project", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--masks", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--at-random", action="store_true")
    given = parser.parse_args()
    work, wanted = given.work, set[str]()
    with (given.project / SPLIT).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not (work / "data").exists():
        shutil.copytree(given.project / "data", work / "data")
        shutil.copytree(given.project / "reports", work / "reports")
        # Features are long to compute and may be shared.
        features = given.project / ".isim/features"
        shutil.copytree(features, work / ".isim/features", copy_function=os.link)
    found: dict[str, list[float]] = {}
    for seed in given.seeds:
        put_masks(work, rows, set())
        found.setdefault("none", []).append(miou(work, seed, trust=False, train=not wanted))
        if not wanted:
            isim(work, "report")
            isim(work, "masks-wanted", str(given.masks), "--split", "train")
            with (work / "reports/masks_wanted.csv").open(newline="") as stream:
                wanted = {row["id"] for row in csv.DictReader(stream)}
        arms = {"masks-wanted": wanted}
        if given.at_random:
            ids = sorted(row["id"] for row in rows)
            drawn = np.random.default_rng(seed).choice(ids, len(wanted), replace=False)
            arms["at random"] = set(drawn.tolist())
        for name, chosen in arms.items():
            put_masks(work, rows, chosen)
            found.setdefault(f"{len(chosen)}, {name}", []).append(miou(work, seed, trust=True))
        told = {name: [round(value, 2) for value in values] for name, values in found.items()}
        print(told, flush=True)
    print("| trusted masks | val mIoU, seeds " + " ".join(map(str, given.seeds)) + " | mean |")
    print("|---|---|---|")
    for name, values in found.items():
        cells = ", ".join(f"{value:.2f}" for value in values)
        print(f"| {name} | {cells} | {statistics.mean(values):.2f} |")


def put_masks(work: Path, rows: list[dict[str, str]], ids: set[str]) -> None:
    """Let the images of train with these ids have a mask, and no other."""
    with (work / SPLIT).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {"mask": row["mask"] * (row["id"] in ids)} for row in rows)


def miou(work: Path, seed: int, *, trust: bool, train: bool = False) -> float:
    """Train a segmenter on the last round's labels; returns its mIoU on val in percent."""
    tree = overlay.tree("voc-sample-fast")
    own: dict[str, Any] = {"seed": seed, "trust_masks": trust, "pictures": 0}
    own["eval_splits"] = ["train", "val"] if train else ["val"]
    overlay.merge(tree, {"train_segmenter": own})
    (work / "params.yaml").write_text(overlay.dump(tree))
    isim(work, "train-segmenter", "last_round")
    report = figures.read(work / "reports/train_segmenter/last_round")
    return 100 * float(report["val"]["miou"])


def isim(work: Path, *command: str) -> None:
    """Run a command in the project."""
    done = subprocess.run(
        [sys.executable, "-m", "isim", *command], cwd=work, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
