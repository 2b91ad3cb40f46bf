"""mIoU of the random walk over exponents, lengths and backgrounds, before dCRF.

The stage scores one setting; this scores many on the same affinities, to see what a data set
needs. Every k-th image of the training split; checkpoints default to that of train_affinity.
Run it where data/cams and models/train_affinity are:

    python benchmarks/walk_settings.py --every 8 [CHECKPOINT ...]
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from isim import metrics, params
from isim.data import files, prepared
from isim.data.prepared import Item
from isim.labels.walk import walk as random_walk
from isim.models import affinity
from isim.passes import counts, each, stream
from isim.runtime import devices
from isim.runtime.here import Here

BETAS, STEPS_LOG2 = (4, 8, 16, 32), (4, 6, 8)
ALPHAS, THRESHOLDS = (2, 4, 8, 16), (0.2, 0.3, 0.4, 0.5)

Planes = NDArray[np.float32]


def walked(planes: Planes, near: Planes, radius: int) -> Iterator[tuple[str, Planes, Any]]:
    """Walk CAMs at every setting.

    Yields:
        Words for the table, planes (K', h, w), and the background for `walk.label_map`.
    """
    for threshold in THRESHOLDS:
        yield f"- | none | constant {threshold}", planes, threshold
    powers = np.stack([random_walk.background_plane(planes, alpha) for alpha in ALPHAS])
    for beta, t in product(BETAS, STEPS_LOG2):
        moves = random_walk.transition(near, radius, beta)
        moved = random_walk.walk(np.concatenate([powers, planes]), moves, t)
        backgrounds, found = moved[: len(ALPHAS)], moved[len(ALPHAS) :]
        for alpha, background in zip(ALPHAS, backgrounds, strict=True):
            yield f"{beta} | 2^{t} | power {alpha}", found, background
        for threshold in THRESHOLDS:
            yield f"{beta} | 2^{t} | constant {threshold}", found, threshold


def score(checkpoint: Path, items: Sequence[Item], cams: Path, num_labels: int) -> None:
    """Print a row a setting, the best first."""
    here = Here(Path(), params.load(Path("params.yaml")).random_walk.precision)
    network, config = affinity.load(checkpoint)
    devices.place(network, here.device)

    def affinities(_: Sequence[Item], images: Tensor) -> list[stream.Tensors]:
        with devices.autocast(here.precision, here.device):
            return [(affinity.of_image(network, config, image),) for image in images]

    def finish(item: Item, near: stream.Array) -> dict[str, Any]:
        ids = item.class_ids
        planes, size = files.read_cam_of(cams / f"{item.id}.npz", item.image, ids)
        planes = random_walk.resize(planes, (near.shape[1], near.shape[2]))
        labels = {
            setting: random_walk.label_map(found, ids, size, background)
            for setting, found, background in walked(planes, near, config.radius)
        }
        return counts.scored(item, labels, num_labels)

    lines = each.image(here, items, finish, name=None, compute=affinities).lines
    print(f"{checkpoint}, {len(items)} images of {cams.name}")
    print("| beta | steps | background | mIoU | precision | recall |\n|---|---|---|---|---|---|")
    figures = {
        setting: metrics.segmentation_figures(
            "", counts.total(lines, setting, (num_labels, num_labels))
        )
        for setting in lines[0].keys() - {"id"}
    }
    for setting, row in sorted(figures.items(), key=lambda entry: -entry[1]["miou"]):
        cells = (f"{100 * row[name]:.2f}" for name in ("miou", "precision", "recall"))
        print(f"| {setting} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print a table a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--every", type=int, default=1, help="score every k-th image")
    arguments = parser.parse_args()
    data = prepared.load(Path.cwd())
    split = params.load(Path("params.yaml")).train_affinity.split
    items = [item for item in data.split(split) if item.mask][:: arguments.every]
    for checkpoint in arguments.checkpoints or [Path("models/train_affinity/model.safetensors")]:
        score(checkpoint, items, Path("data/cams") / split, len(data.classes) + 1)


if __name__ == "__main__":
    main()
