"""Pseudo-labels of each round at the threshold that is best for its CAMs on the ground truth.

A round makes its pseudo-labels at the fixed threshold; how much better they were at the oracle
threshold needs a second pass over its checkpoint, as spec 8 asks for both. Parameters are those
of params.yaml, so run it where the training ran:

    python benchmarks/oracle_threshold.py models/train_cam/round_*.safetensors
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from isim import engine
from isim.data.dataset import load_prepared
from isim.models import cam
from isim.params import load, resolve_path
from isim.regeneration import CamSettings, Scores, regenerate


def score(checkpoint: Path, threshold: float | None) -> Scores:
    """Pseudo-labels of the training split from `checkpoint`; None is the fixed threshold."""
    params = load(Path("params.yaml")).train_cam
    prepared = load_prepared(Path("data/prepared"), partial(resolve_path, root=Path.cwd()))
    network, config = cam.load(checkpoint)
    device = engine.default_device()
    engine.place(network, device)
    precision = engine.resolve_precision(params.precision, device)
    with tempfile.TemporaryDirectory() as folder:
        return regenerate(
            network,
            config,
            prepared.split(params.split),
            Path(folder) / "labels",
            Path(folder) / "scratch",
            CamSettings(params.scales, params.flip, precision),
            params.threshold if threshold is None else threshold,
            params.crf,
            (),
            device,
        )


def main() -> None:
    """Print a row a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    print("| checkpoint | threshold | CAM | pseudo-label | oracle | CAM | pseudo-label |")
    print("|---|---|---|---|---|---|---|")
    for checkpoint in parser.parse_args().checkpoints:
        fixed = score(checkpoint, None)
        row = fixed.row()
        oracle = row
        if row["oracle_threshold"] != fixed.threshold:
            oracle = score(checkpoint, row["oracle_threshold"]).row()
        cells = [
            checkpoint.stem,
            f"{fixed.threshold:.2f}",
            f"{100 * row['cam_miou']:.2f}",
            f"{100 * row['pseudo_label_miou']:.2f}",
            f"{row['oracle_threshold']:.2f}",
            f"{100 * oracle['cam_miou']:.2f}",
            f"{100 * oracle['pseudo_label_miou']:.2f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    # The dCRF workers would import this script, and torch, again: no stage makes them do that.
    del __file__
    main()
