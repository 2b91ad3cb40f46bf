"""Features of a frozen encoder, computed once an image and found again by content.

They lie in `features/<what they depend on>/<md5 of the image file>.npy`: (C, h, w) float16. A
folder, or a file of it, may be deleted at any time: what is missing is computed again.
"""

import io
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from isim.data import files
from isim.data.prepared import Item
from isim.errors import UserError
from isim.models import folding, frozen
from isim.models.cam import CamConfig
from isim.models.frozen import FrozenNetwork
from isim.models.segmenter import SegmenterConfig
from isim.passes import each, stream
from isim.passes.stream import Array, Tensors
from isim.runtime import atomic, devices, identity, processes, progress
from isim.runtime.here import Here

# Another form or way of making them has another number.
_FORMAT = 1
Network = TypeVar("Network", bound=nn.Module)


class Features:
    """A frozen network with the cached features of its encoder, on one kind of device.

    A stage makes it once, as it digests the encoder's weights and every image.

    Attributes:
        network: The network.
        folder: Where they lie; another encoder, other weights, sides or stages have another one.
    """

    def __init__(
        self, here: Here, network: FrozenNetwork, config: CamConfig | SegmenterConfig
    ) -> None:
        """Find the folder; nothing is computed yet."""
        self._here, self.network, self._config = here, network, config
        self._files: dict[str, Path] = {}
        told = {
            # Another version of these may compute other features.
            "made by": [_FORMAT, *(version(name) for name in ("timm", "torch"))],
            "encoder": config.encoder,
            "weights": identity.of_tensors(network.encoder.state_dict()),
            "output_stride": config.output_stride,
            "normalisation": [config.mean, config.std],
            "sides": sorted(config.sides),
            "stages": config.stages,
            "precision": here.precision,
        }
        self.folder = here.cache / "features" / identity.digest(told)

    def prepare(self, items: Sequence[Item]) -> None:
        """Compute the features of images that have none, and tell how many and their size.

        Raises UserError for an unreadable image, a failed write, or features that are not finite.
        """
        here = self._here
        digested = progress.track(items, "digests of the images")
        places = {item.id: self._file(item) for item in digested}
        # The first process's list: all must leave out the same, though some already write.
        known = set(processes.broadcast([path.name for path in self.folder.glob("*.npy")]))
        missing = [item for item in items if places[item.id].name not in known]
        missing = list({places[item.id]: item for item in missing}.values())
        if missing:
            make = extractor(here, self.network, self._config)
            atomic.make_directory(self.folder)

            def compute(_: Sequence[Item], images: Tensor) -> list[Tensors]:
                return [(maps,) for maps in make(images)]

            def finish(item: Item, maps: Array) -> dict[str, Any]:
                if not np.isfinite(maps).all():
                    raise UserError(
                        f"the encoder's features of {item.image} are not finite; set the stage's "
                        "precision to fp32, or choose another encoder"
                    )
                stream = io.BytesIO()
                np.save(stream, maps)
                atomic.write_bytes(places[item.id], stream.getvalue())
                return {}

            with progress.task("features"):
                each.image(here, missing, finish, name=None, compute=compute)
        size = sum(places[item.id].stat().st_size for item in items) / 1e9
        progress.tell(
            f"{here.name}: features of {len(items)} images ({len(missing)} computed now), "
            f"{size:.2f} GB in {self.folder} (may be deleted at any time)"
        )

    def of(self, item: Item) -> np.ndarray:
        """Map the (C, h, w) float16 features of an image that `prepare` was called for.

        Raises UserError when they are gone or no such file.
        """
        path = self._file(item)
        try:
            maps: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
            if maps.dtype != np.float16 or maps.ndim != 3:
                raise ValueError("another array")
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{path} is gone or damaged; delete it if it is there, and run the same command "
                "again"
            ) from error
        return maps

    def tensor(self, item: Item) -> Tensor:
        """Read the (C, h, w) float32 features of an image, on the stage's device."""
        return torch.from_numpy(self.of(item).astype(np.float32)).to(self._here.device)

    def planes(self, config: CamConfig, item: Item, image: Tensor | None = None) -> Tensor:
        """CAMs (K', h, w) of an image on the grid: `FrozenNetwork.planes`, as `config` has them.

        The (3, H, W) uint8 pixels, on the device, are for affinity `attention` alone.
        """
        ids, given = torch.from_numpy(item.class_ids), None
        if config.affinity == "attention" and image is not None and len(ids):
            with devices.autocast(self._here.precision, self._here.device):
                given = frozen.attention(self.network.encoder, config, image[None])[0]
        return self.network.planes(self.tensor(item), ids, config, given)

    def _file(self, item: Item) -> Path:
        """Path of an image's features; its content is digested once."""
        if item.id not in self._files:
            try:
                self._files[item.id] = self.folder / f"{identity.md5(item.image)}.npy"
            except OSError:
                # Its own message tells what is wrong with the image.
                files.image_size(item.image)
                raise
        return self._files[item.id]


def extractor(
    here: Here, network: FrozenNetwork, config: CamConfig | SegmenterConfig
) -> Callable[[Tensor], Tensor]:
    """Prepare a copy of a network's encoder; return a function that makes features by it.

    They are (B, C, h, w) float16 of (B, 3, H, W) uint8 images of one size.
    """

    def seen(encoder: nn.Module, images: Tensor) -> Tensor:
        stages = encoder(images)[-config.stages :]
        return torch.cat([maps.flatten(1) for maps in stages], 1)

    dtype = devices.DTYPES[here.precision]
    prepared = folding.for_inference(network.encoder, seen, here.device, dtype)

    # Batches fill a device by the pixels of the files; two views of each side are computed.
    pixels = 2 * sum(side**2 for side in config.sides)
    count = max(1, stream.batch_pixels(here.device) // pixels) if pixels else None

    def make(images: Tensor) -> Tensor:
        with devices.autocast(here.precision, here.device):
            parts = images.split(count or len(images))
            made = [frozen.features(prepared, config, part).half() for part in parts]
        return torch.cat(made)

    return make


def ready(
    here: Here,
    network: Network | FrozenNetwork,
    config: CamConfig | SegmenterConfig,
    items: Sequence[Item],
) -> Network | Features:
    """Return what passes over `items` take: a frozen network with its features, which are prepared.

    Errors are those of `Features.prepare`.
    """
    if not isinstance(network, FrozenNetwork):
        return network
    cached = Features(here, network, config)
    cached.prepare(items)
    return cached
