"""Cleaning of label maps: what least area and largest hole do to mIoU and to the number of parts.

Label maps are those of a folder, which is only read, of images of a project's split:

    python benchmarks/specks.py PROJECT/data/pseudo_labels/round_03 --project PROJECT
"""

import argparse
import time
from pathlib import Path

import numpy as np

from isim import metrics
from isim.data import files, prepared
from isim.labels.clean.clean import clean, count_parts

SETTINGS = (
    *((0.0, 0.0), (0.0, 0.001), (0.0, 0.01)),
    *((area, 0.0) for area in (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02)),
    *((area, area) for area in (0.001, 0.002, 0.005, 0.01)),
)


def main() -> None:
    """Print a row a setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--split", default="train")
    given = parser.parse_args()
    data = prepared.load(given.project)
    count = len(data.classes) + 1
    pairs = []
    for item in data.split(given.split):
        path = given.folder / f"{item.id}.png"
        if item.mask is not None and path.exists():
            pairs.append((files.read_label_map(path), files.read_label_map(item.mask)))
    true = sum(count_parts(truth) for _, truth in pairs)
    print(f"{len(pairs)} images; the true masks have {true} parts\n")
    print("| least area | largest hole | parts | mIoU | pixels changed | ms an image |")
    print("|---|---|---|---|---|---|")
    for least, hole in SETTINGS:
        confusion, parts, changed, taken = np.zeros((count, count), np.int64), 0, 0, 0.0
        for label, truth in pairs:
            start = time.perf_counter()
            cleaned = clean(label, least, hole)
            taken += time.perf_counter() - start
            parts += count_parts(cleaned)
            changed += int((cleaned != label).sum())
            confusion += metrics.confusion_matrix(truth, cleaned, count)
        share = changed / sum(label.size for label, _ in pairs)
        cells = (f"{100 * least:g} %", f"{100 * hole:g} %", f"{parts:,}")
        figures = (f"{100 * metrics.miou(confusion):.2f}", f"{100 * share:.2f} %")
        print("| " + " | ".join((*cells, *figures, f"{1000 * taken / len(pairs):.1f}")) + " |")


if __name__ == "__main__":
    main()
