"""Features of a frozen encoder, computed once an image and found again by content.

They lie in `features/<what they depend on>/<md5 of the image file>.npy`: (C, h, w) float16. Where
planes walk along attention, that of the N = h * w patches lies beside them, (N, N) float16, in
`<md5>.attention.npy`. A folder, or a file of it, may be deleted at any time: what is missing is
computed again.
"""

import copy
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from isim import errors
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
        pooling: That of the classifier.
        scales: Features at each of the configuration's scales; at scale 1 these themselves.
    """

    def __init__(
        self, here: Here, network: FrozenNetwork, config: CamConfig | SegmenterConfig
    ) -> None:
        """Find the folders; nothing is computed yet."""
        self._here, self.network, self._config = here, network, config
        self._attends = _attends(config)
        self.pooling = config.pooling if isinstance(config, CamConfig) else "gap"
        self._digests: dict[str, str] = {}
        self._about = {
            # Another version of these may compute other features.
            "made by": [_FORMAT, *(version(name) for name in ("timm", "torch"))],
            "encoder": config.encoder,
            "weights": identity.of_tensors(network.encoder.state_dict()),
            "output_stride": config.output_stride,
            "normalisation": [config.mean, config.std],
            "stages": config.stages,
            "precision": here.precision,
        }
        self.folder = self._folder(config)
        self.scales = [
            self if scale == 1 else self._sized(at)
            for scale, at in zip(config.feature_scales, at_scales(config), strict=True)
        ]

    def _folder(self, config: CamConfig | SegmenterConfig) -> Path:
        about = self._about | {"sides": sorted(config.sides)}
        return self._here.cache / "features" / identity.digest(about)

    def _sized(self, config: CamConfig | SegmenterConfig) -> "Features":
        """Those of other sides; what was digested is not digested again."""
        other = copy.copy(self)
        other._config, other.folder, other.scales = config, self._folder(config), [other]
        return other

    def prepare(self, items: Sequence[Item], others: Sequence[Item] = ()) -> None:
        """Compute the features of images that have none, and tell how many and their size.

        `items` get theirs at every scale, `others` at scale 1 alone. Raises UserError for an
        unreadable image, a failed write, or features that are not finite.
        """
        for features in self.scales:
            if features is not self:
                features._prepare(items)
        every = [*items, *others] if self in self.scales else others
        self._prepare([*{item.id: item for item in every}.values()])

    def _prepare(self, items: Sequence[Item]) -> None:
        if not items:
            return
        here = self._here
        digested = progress.track(items, "digests of the images")
        places = {item.id: self._files(item) for item in digested}
        # The first process's list: all must leave out the same, though some already write.
        known = set(processes.broadcast([path.name for path in self.folder.glob("*.npy")]))
        missing = {
            places[item.id][0]: item
            for item in items
            if not known.issuperset(path.name for path in places[item.id])
        }
        if missing:
            make = extractor(here, self.network, self._config)
            atomic.make_directory(self.folder)

            def compute(_: Sequence[Item], images: Tensor) -> list[Tensors]:
                maps, attention = make(images, self._config)
                if attention is None:
                    return [(own,) for own in maps]
                return list(zip(maps, attention.half(), strict=True))

            def finish(item: Item, *made: Array) -> dict[str, Any]:
                if not all(np.isfinite(array).all() for array in made):
                    raise UserError(
                        f"the encoder's features of {item.image} are not finite; set the stage's "
                        "precision to fp32, or choose another encoder"
                    )
                for path, array in zip(places[item.id], made, strict=True):
                    stream = io.BytesIO()
                    np.save(stream, array)
                    atomic.write_bytes(path, stream.getvalue())
                return {}

            with progress.task("features"):
                computed = list(missing.values())
                each.image(here, computed, finish, name=None, compute=compute)
        size = sum(path.stat().st_size for item in items for path in places[item.id]) / 1e9
        sides = ", ".join(map(str, self._config.sides))
        progress.tell(
            f"{here.name}: features of {len(items)} images ({len(missing)} computed now) at "
            f"{sides} px, {size:.2f} GB in {self.folder} (may be deleted at any time)"
        )

    def of(self, item: Item) -> np.ndarray:
        """Map the (C, h, w) float16 features of an image that `prepare` was called for.

        Raises UserError when they are gone or no such file.
        """
        return _mapped(self._files(item)[0], 3)

    def tensor(self, item: Item) -> Tensor:
        """Read the (C, h, w) float32 features of an image, on the stage's device."""
        return torch.from_numpy(self.of(item).astype(np.float32)).to(self._here.device)

    def attention(self, item: Item) -> Tensor:
        """Read the (N, N) float32 attention of an image's patches, on the stage's device.

        It is there where the configuration walks along it. Errors are those of `of`.
        """
        attention = _mapped(self._files(item)[1], 2)
        return torch.from_numpy(attention.astype(np.float32)).to(self._here.device)

    def planes(self, config: CamConfig, item: Item, size: tuple[int, int] | None = None) -> Tensor:
        """CAMs (K', h, w) of an image: `FrozenNetwork.planes`, as `config` has them.

        They have `size`, or that of the grid, and are the mean of all scales.
        """
        ids = torch.from_numpy(item.class_ids)

        def at(features: Features) -> Tensor:
            given = features.attention(item) if _attends(config) and len(ids) else None
            return self.network.planes(features.tensor(item), ids, config, given)

        return self.network.mean([*map(at, self.scales)], size or self.of(item).shape[1:])

    def probabilities(self, item: Item, size: tuple[int, int]) -> Tensor:
        """Probabilities (L, *size) of an image, its tags unknown: the mean of all scales."""
        grids = [self.network.probabilities(one.tensor(item)) for one in self.scales]
        return frozen.averaged(grids, size)

    def _files(self, item: Item) -> list[Path]:
        """Paths of what is kept of an image, whose content is digested once."""
        if item.id not in self._digests:
            try:
                self._digests[item.id] = identity.md5(item.image)
            except OSError:
                # Its own message tells what is wrong with the image.
                files.image_size(item.image)
                raise
        suffixes = (".npy", ".attention.npy")[: 1 + self._attends]
        return [self.folder / f"{self._digests[item.id]}{suffix}" for suffix in suffixes]


def at_scales(config: CamConfig | SegmenterConfig) -> list[CamConfig | SegmenterConfig]:
    """Configurations of each of a configuration's scales, with its sides times the scale."""
    return [
        replace(
            config, sides=tuple(round(side * scale) for side in config.sides), feature_scales=(1.0,)
        )
        for scale in config.feature_scales
    ]


def _attends(config: CamConfig | SegmenterConfig) -> bool:
    return isinstance(config, CamConfig) and config.affinity == "attention"


def _mapped(path: Path, dimensions: int) -> np.ndarray:
    try:
        errors.regular(path)
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.dtype != np.float16 or array.ndim != dimensions:
            raise ValueError("another array")
    except UserError:
        raise
    # numpy meets damage of a header with whatever its parser stumbles over.
    except Exception as error:
        raise UserError(
            f"{path} is gone or damaged; delete it if it is there, and run the same command again"
        ) from error
    return array


def extractor(
    here: Here, network: FrozenNetwork, config: CamConfig | SegmenterConfig
) -> Callable[[Tensor, CamConfig | SegmenterConfig], tuple[Tensor, Tensor | None]]:
    """Prepare a copy of a network's encoder; return a function that makes features by it.

    They are (B, C, h, w) float16 of (B, 3, H, W) uint8 images of one size, with the attention
    (B, N, N) float32 of their patches where the configuration walks along it. The sides are those
    of the configuration that comes with the images.
    """

    def seen(encoder: nn.Module, images: Tensor) -> Tensor:
        stages = encoder(images)[-config.stages :]
        return torch.cat([maps.flatten(1) for maps in stages], 1)

    dtype = devices.DTYPES[here.precision]
    prepared = folding.for_inference(network.encoder, seen, here.device, dtype)

    def of_some(images: Tensor, at: CamConfig | SegmenterConfig) -> tuple[Tensor, Tensor | None]:
        with devices.autocast(here.precision, here.device):
            if _attends(at):
                return frozen.features_with_attention(prepared, at, images)
            return frozen.features(prepared, at, images), None

    def make(images: Tensor, at: CamConfig | SegmenterConfig) -> tuple[Tensor, Tensor | None]:
        # Batches fill a device by the pixels of the files; two views of each side are computed.
        pixels = 2 * sum(side**2 for side in at.sides)
        count = max(1, stream.batch_pixels(here.device) // pixels) if pixels else len(images)
        parts = [of_some(part, at) for part in images.split(count)]
        maps = torch.cat([maps.half() for maps, _ in parts])
        heard = [attention for _, attention in parts if attention is not None]
        return maps, torch.cat(heard) if heard else None

    return make


def ready(
    here: Here,
    network: Network | FrozenNetwork,
    config: CamConfig | SegmenterConfig,
    items: Sequence[Item],
    *,
    others: Sequence[Item] = (),
) -> Network | Features:
    """Return what passes over `items` take: a frozen network with its features, which are prepared.

    Arguments and errors are those of `Features.prepare`.
    """
    if not isinstance(network, FrozenNetwork):
        return network
    cached = Features(here, network, config)
    cached.prepare(items, others)
    return cached
