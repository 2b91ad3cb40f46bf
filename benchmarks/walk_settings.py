"""mIoU of the random walk over exponents, lengths and backgrounds, before dCRF.

The stage scores one setting; this scores many on the same affinities, to see what a data set
needs. Every k-th image of the training split; checkpoints default to that of train_affinity.
Run it where data/cams and models/train_affinity are:

    python benchmarks/walk_settings.py --every 8 [CHECKPOINT ...]
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from torch import Tensor

from isim import engine, metrics
from isim.data import files
from isim.data.dataset import Item, load_prepared
from isim.labels import random_walk
from isim.models import affinity
from isim.params import load, resolve_path
from isim.stream import computed

BETAS, STEPS_LOG2 = (4, 8, 16, 32), (4, 6, 8)
ALPHAS, THRESHOLDS = (2, 4, 8, 16), (0.2, 0.3, 0.4, 0.5)


def score(checkpoint: Path, items: tuple[Item, ...], split: str, num_labels: int) -> None:
    """Print a row a setting, the best first."""
    network, config = affinity.load(checkpoint)
    device = engine.default_device()
    engine.place(network, device)
    precision = engine.resolve_precision(load(Path("params.yaml")).random_walk.precision, device)
    confusions: dict[tuple[str, ...], np.ndarray] = defaultdict(
        lambda: np.zeros((num_labels, num_labels), np.int64)
    )

    def affinities_of(_: Sequence[Item], images: Tensor) -> list[Tensor]:
        with engine.autocast(precision, device):
            return [affinity.of_image(network, config, image) for image in images]

    for item, found in computed(affinities_of, items, device):
        assert item.mask is not None
        affinities = found.cpu().numpy()
        ids = item.class_ids
        path = Path("data/cams") / split / f"{item.id}.npz"
        planes, size = files.read_cam_of(path, item.image, ids)
        truth = files.read_truth(item.mask, size, num_labels)
        planes = random_walk.resize(planes, affinities.shape[1:])

        def add(walked: np.ndarray, background: float | np.ndarray, *setting: str) -> None:
            label = random_walk.label_map(walked.copy(), ids, size, background)  # noqa: B023
            counts = metrics.confusion_matrix(truth, label, num_labels)  # noqa: B023
            confusions[setting] += counts

        for threshold in THRESHOLDS:
            add(planes, threshold, "-", "none", f"constant {threshold}")
        powers = np.stack([random_walk.background_plane(planes, alpha) for alpha in ALPHAS])
        for beta, t in product(BETAS, STEPS_LOG2):
            matrix = random_walk.transition(affinities, config.radius, beta)
            walked = random_walk.walk(np.concatenate([powers, planes]), matrix, t)
            for plane, alpha in zip(walked, ALPHAS, strict=False):
                add(walked[len(ALPHAS) :], plane, str(beta), f"2^{t}", f"power {alpha}")
            for threshold in THRESHOLDS:
                add(walked[len(ALPHAS) :], threshold, str(beta), f"2^{t}", f"constant {threshold}")
    print(f"{checkpoint}, {len(items)} images of {split}")
    print("| beta | steps | background | mIoU | precision | recall |\n|---|---|---|---|---|---|")
    figures = {k: metrics.segmentation_figures("", v) for k, v in confusions.items()}
    for setting, row in sorted(figures.items(), key=lambda entry: -entry[1]["miou"]):
        cells = (*setting, *(f"{100 * row[name]:.2f}" for name in ("miou", "precision", "recall")))
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print a table a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--every", type=int, default=1, help="score every k-th image")
    arguments = parser.parse_args()
    prepared = load_prepared(Path("data/prepared"), partial(resolve_path, root=Path.cwd()))
    split = load(Path("params.yaml")).train_affinity.split
    items = tuple(item for item in prepared.split(split) if item.mask)[:: arguments.every]
    for checkpoint in arguments.checkpoints or [Path("models/train_affinity/model.safetensors")]:
        score(checkpoint, items, split, len(prepared.classes) + 1)


if __name__ == "__main__":
    main()
