"""Seeds of CAMs: as label maps of stored ones, or scored while a network trains (spec 5)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isim import metrics
from isim.data import files
from isim.data.prepared import Item
from isim.errors import UserError
from isim.labels.seeds import batched, seeds
from isim.models.cam import CamConfig, CamNetwork
from isim.params import TrainCam, chosen
from isim.passes import cams, counts, each
from isim.passes.features import Features
from isim.passes.stream import Array, Tensors
from isim.runtime import progress
from isim.runtime.here import Here

# Images that a threshold is chosen by.
SOME = 200


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
    num_labels, threshold = len(config.classes) + 1, chosen(params.threshold)
    make = cams.maker(here, network, config, params)

    def seeds_of(batch: Sequence[Item], images: Tensor) -> list[Tensors]:
        return [
            (batched.cut(*batched.peak(cam, torch.from_numpy(item.class_ids)), threshold),)
            for item, cam in zip(batch, make(batch, images), strict=True)
        ]

    def finish(item: Item, seed: Array) -> dict[str, Any]:
        return counts.scored(item, {"counts": seed}, num_labels)

    scored = [item for item in items if item.mask is not None]
    with progress.task("scores"):
        lines = each.image(here, scored, finish, name=None, compute=seeds_of).lines
    return metrics.miou(counts.total(lines, "counts", (num_labels, num_labels)))


def choose_threshold(
    here: Here,
    network: CamNetwork | Features,
    config: CamConfig,
    items: Sequence[Item],
    *,
    params: cams.Settings,
) -> float:
    """Choose the threshold of a network's CAMs without masks.

    A head or a decoder gives probabilities: half means that a class is as likely as the background.
    Otherwise it is Otsu's of the highest CAMs of all pixels, of `SOME` images that have a class,
    evenly spread (docs/results.md). Raises UserError for an unreadable image, and when no image has
    a class.
    """
    if config.head_kind != "none" or config.decoder_labels:
        return 0.5
    make = cams.maker(here, network, config, params)

    def peaks_of(batch: Sequence[Item], images: Tensor) -> list[Tensors]:
        return [(planes.amax(0),) for planes in make(batch, images)]

    def finish(_: Item, peaks: Array) -> dict[str, Any]:
        return {"counts": seeds.histogram(peaks).tolist()}

    known = [item for item in items if item.known_label.any()]
    places = np.linspace(0, len(known) - 1, min(SOME, len(known))).astype(int)
    some = [known[place] for place in places]
    lines = each.image(here, some, finish, name=None, compute=peaks_of).lines
    if not lines:
        raise UserError(
            "threshold: auto: no image has a class, so that none can be chosen; look at the labels"
        )
    return seeds.otsu_of(np.sum([line["counts"] for line in lines], 0))
