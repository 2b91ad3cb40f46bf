"""CAMs of many images by a network that is prepared once (spec 4)."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from isim.data.prepared import Item
from isim.models import folding
from isim.models.cam import CamConfig, CamNetwork
from isim.models.inference import multi_scale_cams
from isim.params import ExportCams, TrainCam
from isim.passes import stream
from isim.passes.features import Features
from isim.runtime import devices, helpers
from isim.runtime.here import Here

# Scales and flip that CAMs are summed over.
Settings = TrainCam | ExportCams
# Images of one size and their (B, 3, H, W) uint8 pixels to (K', H, W) CAMs of each.
Maker = Callable[[Sequence[Item], Tensor], list[Tensor]]


def maker(
    here: Here, network: CamNetwork | Features, config: CamConfig, settings: Settings
) -> Maker:
    """Prepare a copy of a network; return a function that makes CAMs by it, in any thread.

    The features of a frozen one are those of `Features.prepare`.
    """
    if isinstance(network, Features):
        return partial(_grown, network, config)
    made = prepared(here, network, config)

    def make(items: Sequence[Item], images: Tensor) -> list[Tensor]:
        ids = [torch.from_numpy(item.class_ids) for item in items]
        with devices.autocast(here.precision, here.device):
            return multi_scale_cams(
                made, config, images, ids, scales=settings.scales, flip=settings.flip
            )

    return make


def prepared(here: Here, network: CamNetwork, config: CamConfig) -> CamNetwork:
    """Copy a network for inference, checked on what `multi_scale_cams` runs."""
    every = torch.arange(1, len(config.classes) + 1, device=here.device)

    def seen(net: CamNetwork, images: Tensor) -> Tensor:
        labels = net(images, True)[1] if config.decoder_labels else None
        return net.cam(images, every) if labels is None else labels

    return folding.for_inference(network, seen, here.device, devices.DTYPES[here.precision])


def _grown(
    cached: Features, config: CamConfig, items: Sequence[Item], images: Tensor
) -> list[Tensor]:
    """CAMs (K', H, W) of a frozen network, brought from its grids to that size."""
    height, width = images.shape[-2:]
    return [cached.planes(config, item, (height, width)) for item in items]


def grids(
    here: Here, cached: Features, config: CamConfig, items: Sequence[Item]
) -> Iterator[tuple[Item, Tensor]]:
    """Yield each item with its (K', h, w) CAMs on the grid; no image is opened."""

    def of_one(item: Item) -> tuple[Item, Tensor]:
        return item, cached.planes(config, item)

    # A thread an image, as in `stream`.
    with devices.intra_op_threads(1):
        start = partial(torch.set_num_threads, 1)
        yield from helpers.in_threads(of_one, items, "CAMs", start=start)


def cams(
    here: Here,
    network: CamNetwork | Features,
    config: CamConfig,
    items: Sequence[Item],
    *,
    settings: Settings,
) -> Iterator[tuple[Item, Tensor]]:
    """Yield each item with its (K', H, W) CAMs on the device, the largest images first."""
    return stream.computed(maker(here, network, config, settings), items, here.device)
