"""Random walk of a split's CAMs: affinities, walk, label maps, dCRF, scores (paper 4.1.6; spec 6).

The network computes the next affinities while helpers walk along the last ones; a GPU walks, too,
and leaves the rest to the helpers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isim.data import files
from isim.data.prepared import Item
from isim.labels.crf import refine as crf
from isim.labels.walk import walk as walks
from isim.models import affinity, folding
from isim.models.affinity import AffinityConfig, AffinityNet
from isim.params import RandomWalk
from isim.passes import counts, each, stream
from isim.passes.stream import Array, Tensors
from isim.runtime import devices
from isim.runtime.here import Here


def folders(labels: Path, split: str, params: RandomWalk) -> dict[str, Path]:
    """Name the folders of a split's label maps, by what they are called in reports."""
    refined = {"walk_crf": labels / f"{split}_crf"} if params.crf_after else {}
    return {"walk": labels / split, **refined}


def walk(
    here: Here,
    network: AffinityNet,
    config: AffinityConfig,
    items: Sequence[Item],
    *,
    params: RandomWalk,
    cams: Path,
    num_labels: int,
) -> each.Passed:
    """Make the label maps of a split, in `folders` of `labels` in the resume folder.

    Its CAMs are in the folder `cams`, named after the split. Lines have the sparse counts `walk`
    and, where the dCRF follows, `walk_crf`. Raises UserError when a file is missing, unreadable or
    of another image, or cannot be written.
    """
    out = folders(here.resume / "labels", cams.name, params)
    walks_here = stream.groups(here.device)
    prepared = folding.for_inference(
        network, lambda net, images: net(images), here.device, devices.DTYPES[here.precision]
    )

    def read(item: Item, near: Tensor | Array) -> NDArray[np.float32]:
        """(M, h, w) CAMs at the affinities' size, after the background plane if it walks."""
        planes, _ = files.read_cam_of(cams / f"{item.id}.npz", item.image, item.class_ids)
        planes = walks.resize(planes, (near.shape[1], near.shape[2]))
        if params.background == "constant":
            return planes
        return np.concatenate([walks.background_plane(planes, params.alpha)[None], planes])

    def affinities(_: Sequence[Item], images: Tensor) -> list[Tensors]:
        with devices.autocast(here.precision, here.device):
            return [(affinity.of_image(prepared, config, image),) for image in images]

    def on_group(group: Sequence[Item], found: Sequence[Tensors]) -> list[Tensors]:
        from isim.labels.walk.batched import walk_batch

        near = [tensor for (tensor,) in found if tensor is not None]
        planes = [
            torch.from_numpy(read(item, tensor)).to(here.device)
            for item, tensor in zip(group, near, strict=True)
        ]
        moves = {"radius": config.radius, "beta": params.beta, "t": params.steps_log2}
        return [(walked,) for walked in walk_batch(planes, near, **moves)]

    def finish(item: Item, given: Array) -> dict[str, Any]:
        walked = given
        if not walks_here:
            moves = walks.transition(given, config.radius, params.beta)
            walked = walks.walk(read(item, given), moves, params.steps_log2)
        size = files.image_size(item.image)
        if params.background == "constant":
            label = walks.label_map(walked, item.class_ids, size, params.threshold)
        else:
            label = walks.label_map(walked[1:], item.class_ids, size, walked[0])
        labels = {"walk": label}
        if params.crf_after:
            image = files.read_image(item.image)
            labels["walk_crf"] = crf.refine(image, label, item.class_ids, params.crf)
        return counts.scored_and_written(item, labels, out, num_labels)

    outs = dict.fromkeys(out.values(), ".png")
    return each.image(
        here, items, finish, name=cams.name, outs=outs, compute=affinities, on_group=on_group
    )
