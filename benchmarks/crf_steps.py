"""mIoU of the dCRF on real CAMs over its number of mean-field steps, 0 (none: the seed) to 10.

Ten steps, the field's number, have not converged, and more are not better: this shows what each
gives. Seeds are those of `evaluate`: the stored CAMs at its threshold. Run it where data/cams is:

    python benchmarks/crf_steps.py [--split train] [--every 1]
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from isim import engine, metrics
from isim.data import files
from isim.data.dataset import Item, load_prepared
from isim.labels import crf, seeds
from isim.params import Evaluate, load, resolve_path

STEPS = tuple(range(11))


def score(item: Item, cams: Path, params: Evaluate, num_labels: int) -> NDArray[np.int64]:
    """(steps, L, L) confusion matrices of an image."""
    assert item.mask is not None
    ids = item.class_ids
    planes, size = files.read_cam_of(cams / f"{item.id}.npz", item.image, ids)
    seed = seeds.seed(seeds.grow(planes, size), ids, params.threshold)
    truth = files.read_truth(item.mask, size, num_labels)
    image = files.read_image(item.image)
    found = []
    for steps in STEPS:
        settings = params.crf.model_copy(update={"steps": steps})
        label = crf.refine(image, seed, ids, settings)
        found.append(metrics.confusion_matrix(truth, label, num_labels))
    return np.stack(found)


def main() -> None:
    """Print a row a number of steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", default="train")
    parser.add_argument("--every", type=int, default=1, help="score every k-th image")
    options = parser.parse_args()
    params = load(Path("params.yaml")).evaluate
    prepared = load_prepared(Path("data/prepared"), partial(resolve_path, root=Path.cwd()))
    items = [item for item in prepared.split(options.split) if item.mask][:: options.every]
    num_labels = len(prepared.classes) + 1
    total = np.zeros((len(STEPS), num_labels, num_labels), np.int64)
    with ThreadPoolExecutor(max(1, engine.worker_count())) as pool:
        work = partial(
            score,
            cams=Path("data/cams") / options.split,
            params=params,
            num_labels=num_labels,
        )
        for confusions in tqdm(pool.map(work, items), total=len(items), disable=None):
            total += confusions
    print(f"{len(items)} images of {options.split}, threshold {params.threshold}")
    print("| steps | mIoU | precision | recall |\n|---|---|---|---|")
    for steps, confusion in zip(STEPS, total, strict=True):
        row = metrics.segmentation_figures("", confusion)
        cells = (f"{100 * row[name]:.2f}" for name in ("miou", "precision", "recall"))
        print(f"| {steps} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
