"""mIoU of the seeds of trained networks in fp32 and in reduced precision, on real images.

Reduced precision may change the mIoU by 0.2 points; where it changes more, `precision: fp32`.
Needs the VOC sample (`$ISIM_SHARED`) and checkpoints of train_cam with VOC's 20 classes:

    python benchmarks/precision.py models/train_cam/model.safetensors --every 2
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import harness
import numpy as np
import torch
from numpy.typing import NDArray

from isim import metrics
from isim.data import files
from isim.data.prepared import Item
from isim.experiments import preset
from isim.labels.seeds import batched as seeds
from isim.models import cam
from isim.passes import cams, features
from isim.passes.pseudo_labels import SWEEP
from isim.runtime import devices
from isim.runtime.here import Here


def sweep(checkpoint: Path, items: Sequence[Item], precision: str) -> NDArray[np.int64]:
    """Confusion matrices (T, L, L) of the seeds at the thresholds of `SWEEP`."""
    here = Here(Path(), precision)
    network, config = cam.load(checkpoint)
    devices.place(network, here.device)
    # Four scales and flips.
    settings = preset.parameters("voc-deeplabcam-resnet50").export_cams
    labels = len(config.classes) + 1
    source = features.ready(here, network, config, items)
    total = np.zeros((len(SWEEP), labels, labels), np.int64)
    for item, planes in cams.cams(here, source, config, items, settings=settings):
        assert item.mask is not None
        best, height = seeds.peak(planes, torch.from_numpy(item.class_ids))
        levels = seeds.levels(height, SWEEP.tolist()).cpu().numpy()
        truth = files.read_truth(item.mask, levels.shape, labels)
        total += metrics.level_confusion(
            truth, best.cpu().numpy(), levels, num_thresholds=len(SWEEP), num_labels=labels
        )
    return total


def main() -> None:
    """Print a row a checkpoint and threshold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--precision", default="bf16", choices=sorted(devices.DTYPES))
    parser.add_argument("--every", type=int, default=1, help="take every n-th image")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        items = harness.items(1_000_000, Path(folder))[:: options.every]
        print(f"{harness.machine()}; {len(items)} images")
        print("| checkpoint | threshold | fp32 mIoU | difference |\n|---|---|---|---|")
        for path in options.checkpoints:
            full, reduced = (sweep(path, items, p) for p in ("fp32", options.precision))
            for threshold, one, other in zip(SWEEP, full, reduced, strict=True):
                before, after = (100 * metrics.miou(confusion) for confusion in (one, other))
                row = f"| {path} | {threshold:.2f} | {before:.2f} | {after - before:+.2f} |"
                print(row, flush=True)


if __name__ == "__main__":
    main()
