"""Random walk of a split's CAMs: affinities, walk, label maps, dCRF, scores (paper 4.1.6; spec 6).

Along AffinityNet's affinities of near pixels the network computes the next ones while helpers walk
along the last ones; a GPU walks, too. Along dense affinities of patches the network's device does
both, as their matrices are larger than what walks. In either case the helpers do the rest.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from isim.data import files
from isim.data.prepared import Item
from isim.labels.crf import refine as crf
from isim.labels.dense import batched as dense
from isim.labels.seeds import seeds
from isim.labels.walk import walk as walks
from isim.models import affinity, folding, frozen
from isim.models.affinity import AffinityConfig, AffinityNet
from isim.models.cam import CamConfig, CamNetwork
from isim.models.frozen import FrozenNetwork
from isim.params import MOST_SIDE, RandomWalk
from isim.passes import counts, each, stream
from isim.passes.features import Features
from isim.passes.stream import Array, Compute, OnGroup, Tensors
from isim.runtime import devices
from isim.runtime.here import Here


class Stored(NamedTuple):
    """CAMs that walk: those in a folder that is named after their split.

    `probable` ones are p_k / (p_k + p_0), and keep their values: a class is likelier than the
    background above 0.5. Others mean something beside their plane's maximum alone.
    """

    folder: Path
    probable: bool = False


class _Way(NamedTuple):
    """Parts of a walk: what the network's device computes, and what makes (M, h, w) of that."""

    compute: Compute
    on_group: OnGroup | None
    walked: Callable[[Item, Array], Array]


class _Grid(NamedTuple):
    """Patches (N, C) to compare on a grid (h, w), N = h * w, and their scores (N, L) of labels.

    The (N, N) attention is there where the walk follows it.
    """

    size: tuple[int, int]
    patches: Tensor
    scores: Tensor
    attention: Tensor | None


# (M, h, w) planes of an image that walk, at the size (h, w).
_Read = Callable[[Item, tuple[int, int]], NDArray[np.float32]]
# Images of one size and their (B, 3, H, W) uint8 pixels to the grid of each.
_Describe = Callable[[Sequence[Item], Tensor], Iterable[_Grid]]


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
    cams: Stored,
    num_labels: int,
) -> each.Passed:
    """Make the label maps of a split, in `folders` of `labels` in the resume folder.

    Lines have the sparse counts `walk` and, where the dCRF follows, `walk_crf`. Raises UserError
    when a file is missing, unreadable or of another image, or cannot be written.
    """
    walks_here = stream.groups(here.device)
    prepared = folding.for_inference(
        network, lambda net, images: net(images), here.device, devices.DTYPES[here.precision]
    )
    read = _reader(params, cams)

    def affinities(_: Sequence[Item], images: Tensor) -> list[Tensors]:
        with devices.autocast(here.precision, here.device):
            return [(affinity.of_image(prepared, config, image),) for image in images]

    def on_group(group: Sequence[Item], found: Sequence[Tensors]) -> list[Tensors]:
        from isim.labels.walk.batched import walk_batch

        near = [tensor for (tensor,) in found if tensor is not None]
        planes = [
            torch.from_numpy(read(item, (tensor.shape[1], tensor.shape[2]))).to(here.device)
            for item, tensor in zip(group, near, strict=True)
        ]
        moves = {"radius": config.radius, "beta": params.beta, "t": params.steps_log2}
        return [(walked,) for walked in walk_batch(planes, near, **moves)]

    def walked(item: Item, near: Array) -> Array:
        moves = walks.transition(near, config.radius, params.beta)
        return walks.walk(read(item, (near.shape[1], near.shape[2])), moves, params.steps_log2)

    way = _Way(affinities, on_group, _as_it_is if walks_here else walked)
    return _label(here, way, items, params=params, cams=cams, num_labels=num_labels)


def walk_dense(
    here: Here,
    network: CamNetwork | Features,
    config: CamConfig,
    items: Sequence[Item],
    *,
    params: RandomWalk,
    cams: Stored,
    num_labels: int,
) -> each.Passed:
    """Make label maps as `walk` does, along affinities of all pairs of a CAM network's patches.

    Those of a frozen network are its cached features, standardised; those of another one the last
    map of the image at its own size, less the image's mean. Raises UserError as `walk` and, for an
    encoder without attention, `frozen.attention`.
    """
    walking = replace(config, affinity=params.affinity, **params.dense_walk.model_dump())
    describe: _Describe
    if isinstance(network, Features):
        patches, describe = network.network, partial(_cached, network, walking)
    else:
        patches = _as_frozen(network)
        describe = _computed(here, patches, walking)
    read = _reader(params, cams)
    attends = params.affinity == "attention"

    @torch.inference_mode()
    def walked(batch: Sequence[Item], images: Tensor) -> list[Tensors]:
        # Images of one size have grids of one size.
        grids = list(describe(batch, images))
        size = grids[0].size
        compared = torch.stack([grid.patches for grid in grids])
        scores = torch.stack([grid.scores for grid in grids])
        heard = [grid.attention for grid in grids if grid.attention is not None]
        attention = torch.stack(heard) if heard else None
        near = patches.affinity(compared, scores, walking, attention)  # (B, N, N)
        read_planes = [torch.from_numpy(read(item, size)).to(here.device) for item in batch]
        planes = pad_sequence(read_planes, batch_first=True)  # (B, M, h, w)
        inside = _boxes(planes, params).flatten(2) if attends else None
        steps = dense.walk(planes.flatten(2), near, walking.steps, inside).unflatten(2, size)
        return [(own[: len(some)],) for own, some in zip(steps, read_planes, strict=True)]

    way = _Way(walked, None, _as_it_is)
    return _label(here, way, items, params=params, cams=cams, num_labels=num_labels)


def require_attention(
    network: CamNetwork | FrozenNetwork, config: CamConfig, params: RandomWalk
) -> None:
    """Check that an encoder has the attention that the walk wants. Raises UserError if not."""
    if params.affinity == "attention":
        side = 4 * config.output_stride
        pixels = torch.zeros(
            1, 3, side, side, dtype=torch.uint8, device=network.classifier.weight.device
        )
        frozen.attention(network.encoder, replace(config, sides=(side,)), pixels)


def _as_it_is(_: Item, walked: Array) -> Array:
    return walked


def _reader(params: RandomWalk, cams: Stored) -> _Read:
    def read(item: Item, size: tuple[int, int]) -> NDArray[np.float32]:
        """Read CAMs at a size, after the background plane if it walks."""
        planes, _ = files.read_cam_of(cams.folder / f"{item.id}.npz", item.image, item.class_ids)
        planes = walks.resize(planes, size)
        if params.background == "constant":
            return planes
        return np.concatenate([walks.background_plane(planes, params.alpha)[None], planes])

    return read


def _label(
    here: Here,
    way: _Way,
    items: Sequence[Item],
    *,
    params: RandomWalk,
    cams: Stored,
    num_labels: int,
) -> each.Passed:
    """Cut what walks a way, refine, score and write it."""
    name = cams.folder.name
    out = folders(here.resume / "labels", name, params)

    def finish(item: Item, given: Array) -> dict[str, Any]:
        size, ids = files.image_size(item.image), item.class_ids
        walked = way.walked(item, given)
        if params.background == "power":
            label = walks.label_map(walked[1:], ids, size, walked[0])
        elif cams.probable:
            label = seeds.seed(walks.resize(walked, size), ids, params.threshold)
        else:
            label = walks.label_map(walked, ids, size, params.threshold)
        labels = {"walk": label}
        if params.crf_after:
            image = files.read_image(item.image)
            labels["walk_crf"] = crf.refine(image, label, ids, params.crf)
        return counts.scored_and_written(item, labels, out, num_labels)

    outs = dict.fromkeys(out.values(), ".png")
    compute, on_group = way.compute, way.on_group
    return each.image(here, items, finish, name=name, outs=outs, compute=compute, on_group=on_group)


def _boxes(planes: Tensor, params: RandomWalk) -> Tensor:
    """Boxes (B, M, h, w) bool of planes that walk; the background plane has the whole image."""
    inside = dense.boxes(planes)
    if params.background == "power":
        inside[:, 0] = True
    return inside


def _sized(config: CamConfig, images: Tensor) -> CamConfig:
    """Configuration of features; those of a network that is not frozen are at the images' size.

    But for images of more than `MOST_SIDE` squared patches, whose affinities would fill the memory:
    these are made smaller.
    """
    if config.sides:
        return config
    longer, shorter = max(images.shape[-2:]), min(images.shape[-2:])
    most = config.output_stride * MOST_SIDE * math.sqrt(longer / shorter)
    return replace(config, sides=(min(longer, int(most)),), stages=1)


def _cached(
    cached: Features, config: CamConfig, batch: Sequence[Item], _: Tensor
) -> Iterator[_Grid]:
    for item in batch:
        maps = cached.tensor(item)
        patches = cached.network.standardise(maps.flatten(1).T)
        scores = cached.network.label_scores(patches)
        attention = cached.attention(item) if config.affinity == "attention" else None
        yield _Grid((maps.shape[1], maps.shape[2]), patches, scores, attention)


def _computed(here: Here, network: FrozenNetwork, config: CamConfig) -> _Describe:
    prepared = folding.for_inference(
        network.encoder,
        lambda encoder, images: encoder(images)[-1],
        here.device,
        devices.DTYPES[here.precision],
    )

    def describe(_: Sequence[Item], images: Tensor) -> Iterator[_Grid]:
        sized, attention = _sized(config, images), None
        with devices.autocast(here.precision, here.device):
            if config.affinity == "attention":
                found, attention = frozen.features_with_attention(prepared, sized, images)
            else:
                found = frozen.features(prepared, sized, images)
        for number, maps in enumerate(found):
            patches = maps.flatten(1).T
            # Features behind a ReLU all point the same way: what they have in common tells nothing.
            apart = patches - patches.mean(0)
            size, scores = (maps.shape[1], maps.shape[2]), network.label_scores(patches)
            yield _Grid(size, apart, scores, None if attention is None else attention[number])

    return describe


def _as_frozen(network: CamNetwork) -> FrozenNetwork:
    """View encoder and classifier as a frozen network without a head, nothing standardised."""
    classes, channels = network.classifier.weight.shape[:2]
    viewed = FrozenNetwork(network.encoder, (channels, channels), classes=classes, head=None)
    viewed.classifier = network.classifier
    return viewed.to(network.classifier.weight.device).eval()
