"""Evidence that the paper's effect is real on the embedded data set, by `make demo-evidence`.

Trains the preset `demo` with the stage `train_cam` itself: 3 seeds x methods `cam` and
`deeplabcam`, equal epochs, the generated data prepared once; then a segmenter of the same
network, budget and crops on the ground truth instead of pseudo-labels. All figures are mIoU
over the train split (the segmenter's: val) in percent, before dCRF (CAM) and after it.

Exit code 1 if a claim fails: for `deeplabcam` the last round exceeds the first, for every seed
and by at least 5 points in the mean, before and after dCRF; it exceeds `cam` by at least 3
points in the last round; the first CAM is below 60 %, the segmenter below 97 %.
"""

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from isim import metrics
from isim.data import prepared
from isim.data.crops import CropDataset
from isim.data.prepared import Item
from isim.experiments import preset
from isim.models import cam
from isim.models.cam import CamNetwork
from isim.models.common import normalize
from isim.params import TrainCam
from isim.passes import counts, each, stream
from isim.runtime import devices
from isim.runtime.here import Here
from isim.stages import prepare, train_cam
from isim.training import loop
from isim.training.batches import CropBatches
from isim.training.steps import CamStep

SEEDS = (0, 1, 2)
METHODS = ("cam", "deeplabcam")
FIGURES = {"cam_miou": "before dCRF", "pseudo_label_miou": "after dCRF"}

Rounds = list[dict[str, float]]


def rounds(params: TrainCam, root: Path) -> Rounds:
    """Train with the stage and read back its rounds."""
    train_cam.run(params, root)
    with (root / "reports/train_cam/rounds.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def supervised(params: TrainCam, root: Path) -> float:
    """Return the mIoU on val of the same network, trained on the ground truth instead."""
    data = prepared.load(root)
    items = data.split(params.split)
    # Not validated: a warm-up of no epochs is no ISIM loop.
    params = params.model_copy(update={"warmup_epochs": 0})
    here = Here(root / "supervised", params.precision)
    devices.seed_all(params.seed)
    config = cam.configure(params, data.classes)
    network = cam.build(config)
    devices.place(network, here.device)
    masks = {item.id: item.mask for item in items if item.mask is not None}
    dataset = CropDataset(
        items,
        params.crop,
        config.mean,
        config.std,
        seed=params.seed,
        labels=[masks.__getitem__],
    )
    dataset.use_labels(0)
    crops = CropBatches(dataset, params, here.device)
    assert isinstance(network, CamNetwork)
    for _ in loop.epochs(here, network, crops, CamStep(here, network, params, crops.size)):
        pass

    network.eval()
    num_labels = len(data.classes) + 1

    @torch.inference_mode()
    def predicted(_: Sequence[Item], images: Tensor) -> list[stream.Tensors]:
        with devices.autocast(here.precision, here.device):
            logits = network(normalize(images, config.mean, config.std), True)[1]
        return [(label,) for label in logits.argmax(1).to(torch.uint8)]

    def finish(item: Item, label: stream.Array) -> dict[str, Any]:
        return counts.scored(item, {"counts": label}, num_labels)

    scored = data.split(params.eval_split)
    lines = each.image(here, scored, finish, name=None, compute=predicted).lines
    return metrics.miou(counts.total(lines, "counts", (num_labels, num_labels)))


def check(claim: str, figure: float, holds: bool) -> bool:
    """Print a claim, its figure and whether it holds."""
    print(f"  {'ok  ' if holds else 'FAIL'} {claim}: {figure:.1f}")
    return holds


def judge(results: dict[tuple[str, int], Rounds], segmenter: float) -> bool:
    """Print every claim with its figure; True if all hold."""
    held = []
    seeds = sorted({seed for _, seed in results})
    for name, when in FIGURES.items():
        last = {key: 100 * rows[-1][name] for key, rows in results.items()}
        first = {key: 100 * rows[0][name] for key, rows in results.items()}
        gains = [last["deeplabcam", seed] - first["deeplabcam", seed] for seed in seeds]
        gap = mean(last["deeplabcam", seed] - last["cam", seed] for seed in seeds)
        worst, gain = min(gains), mean(gains)
        held += [
            check(f"{when}: deeplabcam, last - first, worst seed > 0", worst, worst > 0),
            check(f"{when}: deeplabcam, last - first, mean >= 5", gain, gain >= 5),
            check(f"{when}: deeplabcam - cam, last round, mean >= 3", gap, gap >= 3),
        ]
    worst = max(100 * rows[0]["cam_miou"] for rows in results.values())
    held.append(check("first CAM, best seed < 60", worst, worst < 60))
    held.append(check("supervised segmenter on val < 97", 100 * segmenter, segmenter < 0.97))
    return all(held)


def table(results: dict[tuple[str, int], Rounds]) -> None:
    """Print first and last round of every run."""
    print(f"{'method':<12}{'seed':>4}  {'CAM first':>9} {'last':>6} {'gain':>6}", end="")
    print(f"  {'label first':>11} {'last':>6} {'gain':>6}")
    for (method, seed), rows in sorted(results.items()):
        print(f"{method:<12}{seed:>4}", end="")
        for name, width in (("cam_miou", 11), ("pseudo_label_miou", 13)):
            first, last = 100 * rows[0][name], 100 * rows[-1][name]
            print(f"{first:>{width}.1f} {last:>6.1f} {last - first:>+6.1f}", end="")
        print()


def main() -> int:
    """Run all trainings in a temporary folder; 1 if a claim fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--preset", default="demo")
    options = parser.parse_args()
    demo = preset.parameters(options.preset)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        # The evidence leaves the user's own runs, and where they resume, alone.
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{root / 'mlflow.db'}"
        os.environ.pop("DVC_ROOT", None)
        prepare.run(demo.prepare, root)
        results = {}
        for seed in options.seeds:
            for method in METHODS:
                print(f"== {method}, seed {seed}", flush=True)
                change = {"method": method, "seed": seed}
                results[method, seed] = rounds(demo.train_cam.model_copy(update=change), root)
        print("== supervised", flush=True)
        segmenter = supervised(demo.train_cam.model_copy(update={"method": "deeplabcam"}), root)
    print(f"\nmIoU in percent on train ({time.perf_counter() - start:.0f} s in all)")
    table(results)
    print(f"supervised segmenter on val: {100 * segmenter:.1f}\n")
    return 0 if judge(results, segmenter) else 1


if __name__ == "__main__":
    sys.exit(main())
