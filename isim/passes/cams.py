"""CAMs of many images by a network that is prepared once (spec 4)."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from isim.data.prepared import Item
from isim.models import folding, frozen
from isim.models.cam import CamConfig, CamNetwork
from isim.models.frozen import FrozenNetwork
from isim.models.inference import multi_scale_cams
from isim.params import ExportCams, TrainCam
from isim.passes import stream
from isim.passes.features import Features
from isim.runtime import devices
from isim.runtime.here import Here

# Scales and flip that CAMs are summed over.
Settings = TrainCam | ExportCams
# Images of one size and their (B, 3, H, W) uint8 pixels to (K', H, W) CAMs of each.
Maker = Callable[[Sequence[Item], Tensor], list[Tensor]]


def maker(
    here: Here, network: CamNetwork | FrozenNetwork, config: CamConfig, settings: Settings
) -> Maker:
    """Prepare a copy of a network; return a function that makes CAMs by it, in any thread.

    A frozen one needs the features of the images first: `features.Features.prepare`.
    """
    if isinstance(network, FrozenNetwork):
        return _grown(grid_maker(here, network, config))
    device, precision = here.device, here.precision
    every = torch.arange(1, len(config.classes) + 1, device=device)
    prepared = folding.for_inference(
        network, lambda net, images: net.cam(images, every), device, devices.DTYPES[precision]
    )

    def make(items: Sequence[Item], images: Tensor) -> list[Tensor]:
        ids = [torch.from_numpy(item.class_ids) for item in items]
        with devices.autocast(precision, device):
            return multi_scale_cams(
                prepared, config, images, ids, scales=settings.scales, flip=settings.flip
            )

    return make


def grid_maker(here: Here, network: FrozenNetwork, config: CamConfig) -> Maker:
    """Return a function that makes the CAMs (K', h, w) of a frozen network's grid (`planes`).

    Images whose features are on the disk are not looked at, but for the affinity `attention`.
    """
    cached = Features(here, network, config)

    def make(items: Sequence[Item], images: Tensor) -> list[Tensor]:
        found = []
        for item, image in zip(items, images, strict=True):
            ids, given = torch.from_numpy(item.class_ids), None
            if config.affinity == "attention" and len(ids):
                with devices.autocast(here.precision, here.device):
                    given = frozen.attention(network.encoder, config, image[None])[0]
            maps = cached.tensor(item)
            found.append(network.planes(maps, ids, config, given))
        return found

    return make


def _grown(make: Maker) -> Maker:
    def grow(items: Sequence[Item], images: Tensor) -> list[Tensor]:
        size = tuple(images.shape[-2:])
        return [
            F.interpolate(planes[None], size, mode="bilinear", align_corners=False)[0]
            if len(planes)
            else planes.new_zeros(0, *size)
            for planes in make(items, images)
        ]

    return grow


def grids(
    here: Here, network: FrozenNetwork, config: CamConfig, items: Sequence[Item]
) -> Iterator[tuple[Item, Tensor]]:
    """Yield each item with its (K', h, w) CAMs on the grid, the largest images first."""
    return stream.computed(grid_maker(here, network, config), items, here.device)


def cams(
    here: Here,
    network: CamNetwork | FrozenNetwork,
    config: CamConfig,
    items: Sequence[Item],
    *,
    settings: Settings,
) -> Iterator[tuple[Item, Tensor]]:
    """Yield each item with its (K', H, W) CAMs on the device, the largest images first."""
    return stream.computed(maker(here, network, config, settings), items, here.device)
