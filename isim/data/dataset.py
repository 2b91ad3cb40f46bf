"""Prepared data in memory, and random crops of it for training (spec 3.5)."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from isim.data.files import FORMAT, IGNORE, PREPARED, image_size, read_image, read_label_of
from isim.errors import UserError


@dataclass(frozen=True)
class Item:
    """One image of a split.

    Attributes:
        id: Name, unique in the data set; outputs are named after it.
        image: Path of the RGB image.
        mask: Path of the ground truth, None where there is none.
        image_label: (K,) float32 multi-hot over the foreground classes; None where it is
            unknown, as in VOC's test set.
    """

    id: str
    image: Path
    mask: Path | None
    image_label: np.ndarray | None

    @property
    def known_label(self) -> np.ndarray:
        """`image_label` where there must be one.

        Raises:
            UserError: It is unknown.
        """
        if self.image_label is None:
            raise UserError(f"the classes of image {self.id} are unknown; use a labelled split")
        return self.image_label

    @property
    def class_ids(self) -> np.ndarray:
        """(K',) int64 labels 1..K of the image's classes, ascending.

        Raises:
            UserError: They are unknown.
        """
        return np.flatnonzero(self.known_label) + 1


@dataclass(frozen=True)
class Prepared:
    """What `isim prepare` wrote: the K foreground classes in order, and the splits."""

    classes: tuple[str, ...]
    splits: dict[str, tuple[Item, ...]]

    def split(self, name: str, labelled: bool = True) -> tuple[Item, ...]:
        """The items of a split, in the order of its list.

        Args:
            name: The split.
            labelled: Whether the labels of its images are needed.

        Raises:
            UserError: The split is unknown (the message names the known ones), empty, or has
                images of unknown labels where they are needed.
        """
        items = self.splits.get(name)
        if items is None:
            raise UserError(
                f"no split '{name}' in the prepared data; use one of {', '.join(self.splits)} "
                "(train_cam.eval_split may also be none)"
            )
        if not items:
            raise UserError(f"split '{name}' is empty; add images to it and run `isim prepare`")
        unknown = sum(item.image_label is None for item in items)
        if labelled and unknown:
            raise UserError(
                f"the image labels of split '{name}' are unknown ({unknown} of {len(items)} "
                "images), but needed here; name a labelled split. Only train_segmenter.eval_splits "
                "can do without labels"
            )
        return items


def load_prepared(directory: Path, resolve: Callable[[str], Path]) -> Prepared:
    """Load the lists that `isim prepare` wrote; no image is opened.

    Args:
        directory: `data/prepared`.
        resolve: Expands the data root as it stands in the parameters.

    Raises:
        UserError: The folder is missing, incomplete or of another format.
    """
    try:
        about = json.loads((directory / "dataset.json").read_text())
        if about.get("format") != FORMAT:
            raise UserError(
                f"{directory} has format {about.get('format')}, this version reads {FORMAT}; "
                "run `isim prepare` again"
            )
        names = {row["id"]: row["labels"] for row in _rows(directory / "labels.csv")}
        root = directory if about["root"] == PREPARED else resolve(about["root"])
        classes = tuple(about["classes"])
        labels = {id_: _multi_hot(text, classes) for id_, text in names.items()}

        def locate(text: str) -> Path:
            inside = text.startswith(PREPARED)
            return directory / text.removeprefix(PREPARED) if inside else root / text

        splits = {}
        for split in about["splits"]:
            splits[split] = tuple(
                Item(
                    id=row["id"],
                    image=locate(row["image"]),
                    mask=locate(row["mask"]) if row["mask"] else None,
                    image_label=labels[row["id"]],
                )
                for row in _rows(directory / f"{split}.csv")
            )
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing; run `isim prepare` first") from error
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory} is damaged ({error}); run `isim prepare` again") from error
    return Prepared(classes, splits)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _multi_hot(text: str, classes: tuple[str, ...]) -> np.ndarray | None:
    if not text:
        return None
    label = np.zeros(len(classes), np.float32)
    label[[classes.index(name) for name in text.split(";")]] = 1
    label.flags.writeable = False
    return label


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Order in which an epoch visits the items: a permutation that only its arguments decide.

    Returns:
        (count,) int64.
    """
    return np.random.default_rng([seed, epoch]).permutation(count)


class CropDataset(Dataset[dict[str, torch.Tensor]]):
    """Random crops of images, moved together with their label maps (spec 3.5 and 7).

    The longer side is drawn uniformly from [crop, 2 crop] or, where `scales` is given, a factor
    of the image's size from that range; then a random crop (padded with the
    mean colour and IGNORE when smaller) and a random flip. An item depends on (seed, epoch,
    index) alone, never on workers or on what was drawn before, so that a resumed run sees the
    same crops as an unbroken one.

    Crops stay 8-bit: they travel from loader processes in a fifth of the bytes, and whoever
    trains normalises a batch on its device.
    """

    def __init__(
        self,
        items: Sequence[Item],
        crop: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        labels: Sequence[Callable[[str], Path]],
        flip: bool = True,
        scales: tuple[float, float] | None = None,
    ) -> None:
        """Describe the crops; nothing is read yet.

        Args:
            items: Images to crop.
            crop: Side of a crop in pixels.
            mean: (3,) mean of the encoder's input normalisation, for values in [0, 1].
            std: (3,) standard deviation, likewise.
            seed: Seed of all draws.
            labels: Sets of label maps, each from an item's id to a path; `use_labels` chooses one.
            flip: Whether to mirror at random.
            scales: Lowest and highest factor of the image's size (0.5 and 1.5 for segmenters);
                None draws the longer side by the crop, as the ISIM loop does.
        """
        self.items = items
        self.crop = crop
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.seed = seed
        self.labels = labels
        self.flip = flip
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
        """Draw the crop of one item.

        Returns:
            image (crop, crop, 3) uint8 RGB; image_label (K,) float32; label (crop, crop) uint8
            with 255 for padding and ignored pixels.

        Raises:
            UserError: The image or its label map is unreadable, their sizes differ, or the map
                holds a label that is none of the classes.
        """
        item = self.items[index]
        state = np.random.SeedSequence([self.seed, int(self._epoch), index])
        draws = torch.Generator().manual_seed(int(state.generate_state(1, np.uint64)[0]))
        sides = image_size(item.image)
        scale = self._draw_scale(max(sides), draws)
        size = [max(1, round(side * scale)) for side in sides]
        rows, columns = (self._draw_span(side, draws) for side in size)
        flips = self.flip and bool(torch.rand(1, generator=draws) < 0.5)

        image = self._padding.copy()
        label = np.full((self.crop, self.crop), IGNORE, np.uint8)
        # A permuted view is channels-last, for which torchvision resizes uint8 directly.
        pixels = torch.from_numpy(read_image(item.image, size)).permute(2, 0, 1)
        resized = v2.functional.resize_image(pixels, size).permute(1, 2, 0).numpy()
        image[rows.inside, columns.inside] = resized[rows.taken, columns.taken]
        given = self._read_label(item, sides)
        if given is not None:
            # Nearest: the pixel that holds the centre of the resized one, in integers.
            below, beside = (
                (2 * np.arange(span.taken.start, span.taken.stop) + 1) * before // (2 * side)
                for side, before, span in zip(size, sides, (rows, columns), strict=True)
            )
            label[rows.inside, columns.inside] = given[below][:, beside]
        views = torch.from_numpy(image), torch.from_numpy(label)
        crop, mask = (view.flip(1) for view in views) if flips else views
        return {
            "image": crop,
            "image_label": torch.from_numpy(item.known_label.copy()),
            "label": mask,
        }

    def _read_label(self, item: Item, size: tuple[int, int]) -> np.ndarray | None:
        index = int(self._labels_used)
        if index < 0:
            return None
        path = self.labels[index](item.id)
        return read_label_of(path, item.image, size, len(item.known_label) + 1, ignored=True)

    def _draw_scale(self, longer_side: int, draws: torch.Generator) -> float:
        if self.scales is None:
            drawn = torch.randint(self.crop, 2 * self.crop + 1, (), generator=draws)
            return int(drawn) / longer_side
        lowest, highest = self.scales
        return lowest + (highest - lowest) * float(torch.rand((), generator=draws))

    def _draw_span(self, side: int, draws: torch.Generator) -> "_Span":
        """Where a crop lies along one side of an image, or a smaller image in its crop."""
        start, length = 0, min(side, self.crop)
        if side > self.crop:
            start = int(torch.randint(side - self.crop + 1, (), generator=draws))
            return _Span(slice(start, start + length), slice(0, length))
        if side < self.crop:
            free = self.crop - side
            start = free - int(torch.randint(free + 1, (), generator=draws))
        return _Span(slice(0, length), slice(start, start + length))


class _Span(NamedTuple):
    """Pixels `taken` of an image's side, and the equally many `inside` the crop."""

    taken: slice
    inside: slice
