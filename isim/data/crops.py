"""Random crops of prepared images for training (spec 3.5)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from isim.data.files import image_size, read_image, read_label_of
from isim.data.prepared import Item
from isim.metrics import IGNORE


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Draw the order (count,) int64 in which an epoch visits the items, by the arguments alone."""
    return np.random.default_rng([seed, epoch]).permutation(count)


class CropDataset(Dataset[dict[str, torch.Tensor]]):
    """Random crops of images, moved together with their label maps (spec 3.5 and 7).

    The longer side is drawn uniformly from [crop, 2 crop] or, where `scales` is given, a factor
    of the image's size from that range; then a random crop (padded with the mean colour and
    IGNORE when smaller) and, every other time, a mirroring. An item depends on (seed, epoch,
    index) alone, so that a resumed run sees the same crops as an unbroken one, with any workers.
    Crops stay 8-bit: they travel from loader processes in a fifth of the bytes, and whoever trains
    normalises a batch on its device.
    """

    def __init__(
        self,
        items: Sequence[Item],
        crop: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        seed: int,
        labels: Sequence[Callable[[str], Path]],
        scales: tuple[float, float] | None = None,
    ) -> None:
        """Describe the crops, of `crop` pixels a side; nothing is read yet.

        `mean` and `std` are the encoder's, (3,) for values in [0, 1]. Each of `labels` is a set
        of label maps, from an item's id to a path; `use_labels` chooses one. `scales` are 0.5 and
        1.5 for segmenters; None draws the longer side by the crop, as the ISIM loop does.
        """
        self.items = items
        self.crop = crop
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.seed = seed
        self.labels = labels
        self.scales = scales
        # Shared memory, so that workers which outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._labels_used = torch.full((), -1, dtype=torch.int64).share_memory_()
        colour = np.array([round(255 * value) for value in mean], np.uint8)
        self._padding = np.broadcast_to(colour, (crop, crop, 3)).copy()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose crops are drawn; call it before the epoch's iterator is made."""
        self._epoch.fill_(epoch)

    def use_labels(self, index: int) -> None:
        """Read the label maps of `labels[index]` from now on; before, all labels are IGNORE."""
        self._labels_used.fill_(index)

    def __len__(self) -> int:
        """Number of items."""
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Draw a crop: image (crop, crop, 3) uint8 RGB, image_label (K,) float32, label.

        The label is (crop, crop) uint8, 255 for padding and ignored pixels.

        Raises:
            UserError: The image or its label map is unreadable, their sizes differ, or the map
                holds a label that is none of the classes.
        """
        item = self.items[index]
        state = np.random.SeedSequence([self.seed, int(self._epoch), index])
        draws = torch.Generator().manual_seed(int(state.generate_state(1, np.uint64)[0]))
        sides = image_size(item.image)
        if self.scales is None:
            longer = torch.randint(self.crop, 2 * self.crop + 1, (), generator=draws)
            scale = int(longer) / max(sides)
        else:
            lowest, highest = self.scales
            scale = lowest + (highest - lowest) * float(torch.rand((), generator=draws))
        size = [max(1, round(side * scale)) for side in sides]
        taken, inside = zip(*(self._draw_span(side, draws) for side in size), strict=True)
        flips = bool(torch.rand(1, generator=draws) < 0.5)

        image = self._padding.copy()
        label = np.full((self.crop, self.crop), IGNORE, np.uint8)
        # A permuted view is channels-last, for which torchvision resizes uint8 directly.
        pixels = torch.from_numpy(read_image(item.image, size)).permute(2, 0, 1)
        resized = v2.functional.resize_image(pixels, size).permute(1, 2, 0).numpy()
        image[inside] = resized[taken]
        if (used := int(self._labels_used)) >= 0:
            path = self.labels[used](item.id)
            given = read_label_of(path, sides, len(item.known_label) + 1, ignored=True)
            # Nearest: the pixel that holds the centre of the resized one, in integers.
            rows, columns = (
                (2 * np.arange(part.start, part.stop) + 1) * before // (2 * after)
                for part, before, after in zip(taken, sides, size, strict=True)
            )
            label[inside] = given[rows][:, columns]
        views = torch.from_numpy(image), torch.from_numpy(label)
        crop, mask = (view.flip(1) for view in views) if flips else views
        image_label = torch.from_numpy(item.known_label.copy())
        return {"image": crop, "image_label": image_label, "label": mask}

    def _draw_span(self, side: int, draws: torch.Generator) -> tuple[slice, slice]:
        """Draw which pixels of an image's side are taken, and where in the crop they lie."""
        taken = inside = slice(0, min(side, self.crop))
        if side > self.crop:
            start = int(torch.randint(side - self.crop + 1, (), generator=draws))
            taken = slice(start, start + self.crop)
        if side < self.crop:
            free = self.crop - side
            start = free - int(torch.randint(free + 1, (), generator=draws))
            inside = slice(start, start + side)
        return taken, inside
