"""mIoU of the dCRF on real CAMs over its number of mean-field steps, 0 (none: the seed) to 10.

Ten steps, the field's number, have not converged, and more are not better: this shows what each
gives. Seeds are those of `evaluate`: the stored CAMs at its threshold. Run it where data/cams is:

    python benchmarks/crf_steps.py [--split train] [--every 1]
"""

import argparse
from pathlib import Path
from typing import Any

from isim import metrics, params
from isim.data import files, prepared
from isim.data.prepared import Item
from isim.labels.crf import refine as crf
from isim.labels.seeds import seeds
from isim.passes import counts, each
from isim.runtime.here import Here

STEPS = range(11)


def main() -> None:
    """Print a row a number of steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", default="train")
    parser.add_argument("--every", type=int, default=1, help="score every k-th image")
    options = parser.parse_args()
    section = params.load(Path("params.yaml")).evaluate
    told = section.threshold
    threshold = files.read_threshold(Path("data/cams")) if told == "auto" else params.chosen(told)
    data = prepared.load(Path.cwd())
    items = [item for item in data.split(options.split) if item.mask][:: options.every]
    num_labels = len(data.classes) + 1

    def finish(item: Item) -> dict[str, Any]:
        ids, path = item.class_ids, Path("data/cams") / options.split / f"{item.id}.npz"
        planes, size = files.read_cam_of(path, item.image, ids)
        seed = seeds.seed(seeds.grow(planes, size), ids, threshold)
        image, labels = files.read_image(item.image), {}
        for steps in STEPS:
            settings = section.crf.model_copy(update={"steps": steps})
            labels[str(steps)] = crf.refine(image, seed, ids, settings)
        return counts.scored(item, labels, num_labels)

    lines = each.image(Here(Path()), items, finish, name=None).lines
    print(f"{len(items)} images of {options.split}, threshold {threshold}")
    print("| steps | mIoU | precision | recall |\n|---|---|---|---|")
    for steps in STEPS:
        confusion = counts.total(lines, str(steps), (num_labels, num_labels))
        row = metrics.segmentation_figures("", confusion)
        cells = (f"{100 * row[name]:.2f}" for name in ("miou", "precision", "recall"))
        print(f"| {steps} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
