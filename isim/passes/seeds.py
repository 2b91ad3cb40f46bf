"""Seeds of CAMs: as label maps of stored ones, or scored while a network trains (spec 5)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isim import metrics
from isim.data import files
from isim.data.prepared import Item
from isim.labels.seeds import batched, seeds
from isim.models.cam import CamConfig, CamNetwork
from isim.params import TrainCam
from isim.passes import cams, counts, each
from isim.passes.features import Features
from isim.passes.stream import Array, Tensors
from isim.runtime import progress
from isim.runtime.here import Here


def write(
    here: Here, items: Sequence[Item], stored: Mapping[str, Path], threshold: float
) -> dict[str, Path]:
    """Make label maps of the CAMs `stored` in files by id, in `seeds` of the resume folder.

    The background plane is at `threshold`. Returns the path of each label map, by id. Raises
    UserError when a file is missing, unreadable or of another image, or cannot be written.
    """
    folder = here.resume / "seeds"

    def finish(item: Item) -> dict[str, Any]:
        planes, size = files.read_cam_of(stored[item.id], item.image, item.class_ids)
        seed = seeds.seed(seeds.grow(planes, size), item.class_ids, threshold)
        files.write_label_map(folder / f"{item.id}.png", seed)
        return {}

    each.image(here, items, finish, name="seeds", outs={folder: ".png"})
    return {item.id: folder / f"{item.id}.png" for item in items}


def score(
    here: Here,
    network: CamNetwork | Features,
    config: CamConfig,
    items: Sequence[Item],
    *,
    params: TrainCam,
) -> float:
    """Score seeds as `pseudo_labels.regenerate` does, without dCRF and without writing anything.

    Returns the mIoU over the items that have a ground truth, `cam_miou` of a round's row; nan
    where none has one. Raises UserError for an unreadable image or mask.
    """
    num_labels = len(config.classes) + 1
    make = cams.maker(here, network, config, params)

    def seeds_of(batch: Sequence[Item], images: Tensor) -> list[Tensors]:
        return [
            (batched.cut(*batched.peak(cam, torch.from_numpy(item.class_ids)), params.threshold),)
            for item, cam in zip(batch, make(batch, images), strict=True)
        ]

    def finish(item: Item, seed: Array) -> dict[str, Any]:
        return counts.scored(item, {"counts": seed}, num_labels)

    scored = [item for item in items if item.mask is not None]
    with progress.task("scores"):
        lines = each.image(here, scored, finish, name=None, compute=seeds_of).lines
    return metrics.miou(counts.total(lines, "counts", (num_labels, num_labels)))
