"""Thresholds of CAMs chosen without masks, against 0.3 and the best one: docs/results.md.

    python benchmarks/thresholds.py PROJECT [PROJECT ...] [--split train] [--images 281]

Each PROJECT is a folder after `isim export-cams` whose images have masks. For each threshold of a
grid the seeds of the stored CAMs are scored before and after the dCRF of params.yaml's `crf`, and
what needs no mask is computed: how far seeds and dCRF agree. A row is a rule: what it chooses, and
the mIoUs in percent there, between two thresholds of the grid by interpolation.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isim import metrics
from isim.data import files, prepared
from isim.data.prepared import Item
from isim.labels.crf import refine as crf
from isim.labels.seeds import seeds
from isim.params import Crf, load
from isim.runtime import helpers

GRID = np.round(np.arange(0.05, 0.951, 0.05), 2)
# Places in the grid at which the dCRF is computed, too: it takes long.
REFINED = np.arange(1, 16, 2)


class Found(NamedTuple):
    """Counts of an image at the thresholds: (T, L, L) before and (R, L, L) after dCRF.

    `agree` (R,) is how far these agree, `peaks` are the highest CAMs of every 16th pixel.
    """

    before: NDArray[np.int64]
    after: NDArray[np.int64]
    agree: NDArray[np.float64]
    peaks: NDArray[np.float32]


def main() -> None:
    """Print a table for each project."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("projects", type=Path, nargs="+")
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=10**9, help="evenly spread over the split")
    given = parser.parse_args()
    for project in given.projects:
        data = prepared.load(project)
        items = [item for item in data.split(given.split) if item.mask is not None]
        places = np.linspace(0, len(items) - 1, min(given.images, len(items))).astype(int)
        chosen = [items[place] for place in places]
        params, cams = load(project / "params.yaml").crf, project / "data/cams" / given.split
        labels = len(data.classes) + 1

        def of_one(
            item: Item, cams: Path = cams, params: Crf = params, labels: int = labels
        ) -> Found:
            return measured(item, cams / f"{item.id}.npz", params, labels)

        found = list(helpers.in_threads(of_one, chosen, "thresholds"))
        print(f"\n{project.name}, {given.split}, {len(chosen)} images\n")
        print(table(found), flush=True)


def measured(item: Item, cam: Path, params: Crf, labels: int) -> Found:
    """Score an image at every threshold."""
    image = files.read_image(item.image)
    planes, size = files.read_cam_of(cam, item.image, item.class_ids)
    best, height = seeds.peak(seeds.grow(planes, size), item.class_ids)
    truth = files.read_truth(Path(str(item.mask)), size, labels)
    before, after, agree = [], [], []
    for threshold in GRID:
        seed = seeds.cut(best, height, float(threshold))
        before.append(metrics.confusion_matrix(truth, seed, labels))
        if threshold not in GRID[REFINED]:
            continue
        label = crf.refine(image, seed, item.class_ids, params)
        after.append(metrics.confusion_matrix(truth, label, labels))
        agree.append(metrics.agreement(metrics.confusion_matrix(seed, label, labels)))
    kept = height[::4, ::4].ravel() if len(planes) else height[:0, 0]
    return Found(np.stack(before), np.stack(after), np.array(agree), kept)


def table(found: list[Found]) -> str:
    """Put the choices of all rules and their mIoUs in a table."""
    before, after = (np.sum([one[place] for one in found], 0) for place in (0, 1))
    plain, refined = ([metrics.miou(c) for c in confusions] for confusions in (before, after))
    agree = np.mean([one.agree for one in found], 0)
    peaks = [one.peaks for one in found if one.peaks.size]
    rules = {
        "0.3": 0.3,
        "0.5": 0.5,
        "Otsu of all peaks": seeds.otsu(np.concatenate(peaks)),
        "mean of Otsu of each image": float(np.mean([seeds.otsu(some) for some in peaks])),
        "seeds and dCRF agree best": float(GRID[REFINED][agree.argmax()]),
        "oracle before dCRF": float(GRID[np.argmax(plain)]),
        "oracle after dCRF": float(GRID[REFINED][np.argmax(refined)]),
    }
    lines = ["| rule | threshold | before dCRF | after dCRF |", "|---|---|---|---|"]
    for name, value in rules.items():
        scores = np.interp(value, GRID, plain), np.interp(value, GRID[REFINED], refined)
        cells = (f"{100 * score:.2f}" for score in scores)
        lines.append(f"| {name} | {value:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
