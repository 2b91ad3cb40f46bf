"""CAMs of many images by a network that is prepared once (spec 4)."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from isim.data.prepared import Item
from isim.models import folding
from isim.models.cam import CamConfig, CamNetwork
from isim.models.inference import multi_scale_cams
from isim.params import ExportCams, TrainCam
from isim.passes import stream
from isim.runtime import devices
from isim.runtime.here import Here

# Scales and flip that CAMs are summed over.
Settings = TrainCam | ExportCams
# Images of one size and their (B, 3, H, W) uint8 pixels to (K', H, W) CAMs of each.
Maker = Callable[[Sequence[Item], Tensor], list[Tensor]]


def maker(here: Here, network: CamNetwork, config: CamConfig, settings: Settings) -> Maker:
    """Prepare a copy of a network; return a function that makes CAMs by it, in any thread."""
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


def cams(
    here: Here, network: CamNetwork, config: CamConfig, items: Sequence[Item], *, settings: Settings
) -> Iterator[tuple[Item, Tensor]]:
    """Yield each item with its (K', H, W) CAMs on the device, the largest images first."""
    return stream.computed(maker(here, network, config, settings), items, here.device)
