"""Pseudo-labels of each round at the threshold that is best for its CAMs on the ground truth.

A round makes its pseudo-labels at the fixed threshold; how much better they were at the oracle
threshold needs a second pass over its checkpoint, as spec 8 asks for both. Parameters are those
of params.yaml, so run it where the training ran:

    python benchmarks/oracle_threshold.py models/train_cam/round_*.safetensors
"""

import argparse
import tempfile
from pathlib import Path

from isim.data import prepared
from isim.models import cam
from isim.params import TrainCam, load
from isim.passes import features, pseudo_labels, seeds
from isim.runtime import devices
from isim.runtime.here import Here


def score(checkpoint: Path, params: TrainCam) -> dict[str, float]:
    """Make the pseudo-labels of the training split from a checkpoint, and score them."""
    network, config = cam.load(checkpoint)
    items = prepared.load(Path.cwd()).split(params.split)
    with tempfile.TemporaryDirectory() as folder:
        here = Here(Path(folder), params.precision)
        devices.place(network, here.device)
        source = features.ready(here, network, config, items)
        if params.threshold == "auto":
            chosen = seeds.choose_threshold(here, source, config, items, params=params)
            params = params.model_copy(update={"threshold": chosen})
        scores = pseudo_labels.regenerate(
            here, source, config, items, params=params, name=checkpoint.stem
        )
    return scores.row()


def main() -> None:
    """Print a row a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    params = load(Path("params.yaml")).train_cam
    print("| checkpoint | threshold | CAM | pseudo-label | oracle | CAM | pseudo-label |")
    print("|---|---|---|---|---|---|---|")
    for checkpoint in parser.parse_args().checkpoints:
        fixed = oracle = score(checkpoint, params)
        threshold = fixed["oracle_threshold"]
        if threshold != fixed["threshold"]:
            oracle = score(checkpoint, params.model_copy(update={"threshold": threshold}))
        cells = [checkpoint.stem]
        for used, row in ((fixed["threshold"], fixed), (threshold, oracle)):
            mious = (100 * row[name] for name in ("cam_miou", "pseudo_label_miou"))
            cells += [f"{value:.2f}" for value in (used, *mious)]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
