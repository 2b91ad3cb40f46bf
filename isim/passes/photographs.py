"""Answers for photographs of any size: networks work at a bounded size, masks have the full one.

An image whose longer side is above `side` is resized to it; CAMs, probabilities and dCRF are
computed there, as a data set's smaller images are computed at their own size. What they rise to is
brought to all pixels in bands of rows, so that no array of labels times pixels is ever held.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from isim.errors import UserError
from isim.labels.crf import refine as crf
from isim.metrics import IGNORE
from isim.models import frozen
from isim.models.cam import CamConfig, CamNetwork
from isim.models.frozen import FrozenNetwork
from isim.models.inference import multi_scale_cams, multi_scale_probabilities
from isim.models.segmenter import Segmenter, SegmenterConfig
from isim.params import Crf
from isim.passes import cams, features, predictions
from isim.runtime import devices
from isim.runtime.here import Here

# Values of a band of rows, 64 MB of float32; a few such arrays are alive at once.
BAND = 1 << 24


def working_size(size: Sequence[int], side: int) -> tuple[int, int]:
    """Size (h, w) at which an image of `size` (H, W) is worked on: its longer side at most `side`.

    A smaller image keeps its size.
    """
    factor = min(1.0, side / max(size))
    height, width = (max(1, round(length * factor)) for length in size)
    return height, width


def resized(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (3, H, W) uint8 to `size`, with antialiasing; one of that size stays as it is."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    found: Tensor = TF.resize(image, list(size), antialias=True)
    return found


def grown(planes: Tensor, size: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """Bring planes (L, h, w) to `size` (H, W) in bands of rows (bilinear, half-pixel centres).

    Yields the rows, and what of (L, H, W) float32 lies in them.
    """
    count, before, _ = planes.shape
    height, width = size
    step = max(1, BAND // (count * width))
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        place = (torch.arange(rows.start, rows.stop, dtype=torch.float64) + 0.5) * before / height
        place = (place - 0.5).clamp(0, before - 1)
        first = place.long()
        part = (place - first).float()[:, None].to(planes.device)
        second = (first + 1).clamp_max(before - 1)
        band = planes[:, first] * (1 - part) + planes[:, second] * part
        if band.shape[2] != width:
            shape = (rows.stop - rows.start, width)
            band = F.interpolate(band[None], shape, mode="bilinear", align_corners=False)[0]
        yield rows, band


@dataclass(frozen=True)
class Answer:
    """Planes that tell how high each label rises at the pixels of an image, at its working size.

    Attributes:
        planes: (L', h, w) float32; the highest is the label, the first of equals.
        labels: (L',) uint8, what the planes are of, ascending; the background, 0, comes first.
        image: (h, w, 3) uint8 RGB.
        size: (H, W) of the photograph.
        are_probable: The planes are probabilities, whose sum is 1.
    """

    planes: NDArray[np.float32]
    labels: NDArray[np.uint8]
    image: NDArray[np.uint8]
    size: tuple[int, int]
    are_probable: bool

    def refined(self, settings: Crf) -> "Answer":
        """Refine by a dCRF: probabilities as such, CAMs as the labels that they make."""
        count = len(self.labels)
        if count == 1:
            return replace(self, are_probable=True, planes=np.ones_like(self.planes))
        if self.are_probable:
            unary = -np.log(np.maximum(self.planes, crf.LEAST_PROBABILITY))
        else:
            unary = crf.label_energies(self.planes.argmax(0), count, settings.gt_prob)
        found = crf.marginals(self.image, unary.reshape(count, -1), settings)
        return replace(self, are_probable=True, planes=found.reshape(self.planes.shape))

    def label(self, least: float = 0.0) -> NDArray[np.uint8]:
        """Label map (H, W) uint8 of the photograph; 255 where a probability is below `least`."""
        found = np.empty(self.size, np.uint8)
        for rows, band in grown(torch.from_numpy(self.planes), self.size):
            height, best = band.max(0)
            label = self.labels[best.numpy()]
            found[rows] = np.where((height < least).numpy(), np.uint8(IGNORE), label)
        return found


def _features(
    here: Here, network: FrozenNetwork, config: CamConfig | SegmenterConfig
) -> Callable[[Tensor], Iterator[tuple[Tensor, Tensor | None]]]:
    """Return what makes (C, h, w) float32 of (3, H, W) uint8 at each scale, rounded as cached ones.

    The attention (N, N) of its patches comes with them where planes walk along it. It raises
    UserError for features that are not finite.
    """
    make, scales = features.extractor(here, network, config), features.at_scales(config)

    def of_image(image: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        for at in scales:
            maps, attention = make(image[None], at)
            found = maps[0].float()
            if not torch.isfinite(found).all():
                raise UserError("the encoder's features are not finite; set precision to fp32")
            yield found, None if attention is None else attention[0].half().float()

    return of_image


class BySegmenter:
    """A segmenter that answers for photographs."""

    def __init__(
        self,
        here: Here,
        network: Segmenter | FrozenNetwork,
        config: SegmenterConfig,
        *,
        side: int,
        scales: Sequence[float] = (1.0,),
        flip: bool = True,
    ) -> None:
        """Prepare a copy of the network; a frozen one has scales of its own, and flips."""
        self.config, self.side = config, side
        self._here, self._scales, self._flip = here, scales, flip
        devices.place(network, here.device)
        self._network: Segmenter | FrozenNetwork = network
        if isinstance(network, FrozenNetwork):
            self._features = _features(here, network, config)
        else:
            self._network = predictions.prepared(here, network)

    def __call__(
        self, image: NDArray[np.uint8], class_ids: NDArray[np.int64] | None = None
    ) -> Answer:
        """Answer for an image (H, W, 3) uint8 RGB.

        With `class_ids`, (K',) labels 1..K, ascending, its classes are known: no other is found.
        Raises UserError for probabilities that are not finite.
        """
        pixels = torch.from_numpy(image).permute(2, 0, 1).to(self._here.device)
        size = working_size(image.shape[:2], self.side)
        small = resized(pixels, size)
        planes = self._probabilities(pixels, small, size)
        labels = np.arange(len(planes), dtype=np.uint8)
        if class_ids is not None:
            labels = np.concatenate([[0], class_ids]).astype(np.uint8)
            planes = planes[torch.from_numpy(labels).long().to(planes.device)]
            planes = planes / planes.sum(0).clamp_min(1e-12)
        if not torch.isfinite(planes).all():
            raise UserError("the segmenter's probabilities are not finite; train it at lower rates")
        given = planes.cpu().numpy(), labels, small.permute(1, 2, 0).cpu().numpy()
        return Answer(*given, image.shape[:2], are_probable=True)

    @torch.inference_mode()
    def _probabilities(self, pixels: Tensor, small: Tensor, size: tuple[int, int]) -> Tensor:
        """(L, h, w) float32 at the working size."""
        if isinstance(self._network, FrozenNetwork):
            # The image itself is taken: it is then resized once, as in the training.
            grids = [self._network.probabilities(maps) for maps, _ in self._features(pixels)]
            return frozen.averaged(grids, size)
        with devices.autocast(self._here.precision, self._here.device):
            return multi_scale_probabilities(
                self._network, self.config, small, scales=self._scales, flip=self._flip
            )


class ByTags:
    """A CAM network that answers for photographs whose tags are known."""

    def __init__(
        self,
        here: Here,
        network: CamNetwork | FrozenNetwork,
        config: CamConfig,
        *,
        side: int,
        scales: Sequence[float],
        flip: bool,
    ) -> None:
        """Prepare a copy of the network; a frozen one has scales of its own, and flips."""
        self.config, self.side = config, side
        self._here, self._scales, self._flip = here, scales, flip
        devices.place(network, here.device)
        self._network: CamNetwork | FrozenNetwork = network
        if isinstance(network, FrozenNetwork):
            self._features = _features(here, network, config)
        else:
            self._network = cams.prepared(here, network, config)

    def cams(self, image: NDArray[np.uint8], class_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """CAMs (K', h, w) in [0, 1] of (H, W, 3) uint8 RGB at the working size."""
        return self._planes(image, class_ids)[0]

    def __call__(
        self,
        image: NDArray[np.uint8],
        class_ids: NDArray[np.int64],
        threshold: float | None = None,
    ) -> Answer:
        """Answer for (H, W, 3) uint8 RGB of (K',) classes: what rises above `threshold`.

        It is that of the training if not given.
        """
        threshold = self.config.threshold if threshold is None else threshold
        planes, small = self._planes(image, class_ids)
        background = np.full((1, *small.shape[:2]), threshold, np.float32)
        labels = np.concatenate([[0], class_ids]).astype(np.uint8)
        planes = np.concatenate([background, planes])
        return Answer(planes, labels, small, image.shape[:2], are_probable=False)

    @torch.inference_mode()
    def _planes(
        self, image: NDArray[np.uint8], class_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """CAMs, and the image at the working size."""
        pixels = torch.from_numpy(image).permute(2, 0, 1).to(self._here.device)
        small = resized(pixels, working_size(image.shape[:2], self.side))
        size, ids = tuple(small.shape[-2:]), torch.from_numpy(class_ids)
        planes = self._of(pixels, small, ids) if len(ids) else torch.zeros(0, *size)
        return planes.float().cpu().numpy(), small.permute(1, 2, 0).cpu().numpy()

    def _of(self, pixels: Tensor, small: Tensor, ids: Tensor) -> Tensor:
        if isinstance(self._network, CamNetwork):
            given = self._network, self.config, small[None], [ids]
            with devices.autocast(self._here.precision, self._here.device):
                return multi_scale_cams(*given, scales=self._scales, flip=self._flip)[0]
        network = self._network
        grids = [network.planes(maps, ids, self.config, a) for maps, a in self._features(pixels)]
        return network.mean(grids, small.shape[-2:])
