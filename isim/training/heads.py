"""Training of classifiers and heads on cached features: seconds, where a network takes minutes."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isim.data.files import image_size, read_label_of
from isim.data.prepared import Item
from isim.errors import UserError
from isim.labels.seeds import seeds
from isim.metrics import IGNORE
from isim.models.frozen import FrozenNetwork
from isim.params import Head
from isim.runtime import devices, helpers, processes, progress
from isim.runtime.here import Here

Config = TypeVar("Config")

# Bytes of features that are in memory at once, as float16.
BUDGET = 2 << 30
# Images of a step of pooling mil.
MIL_BATCH = 64
# Steps over which AdamW's rate rises; it falls to 0 afterwards.
RISE = 10


class Patches:
    """Patches of all images of a training, from their cached features.

    Attributes:
        items: The images.
        sizes: (h, w) of each grid.
        device: Where patches are computed on.
    """

    def __init__(
        self, items: Sequence[Item], maps: Callable[[Item], np.ndarray], device: torch.device
    ) -> None:
        """Describe the patches; `maps` gives the (C, h, w) float16 features of an image."""
        self.items, self.device, self._maps = items, device, maps
        shapes = [maps(item).shape for item in items]
        self.sizes = [(shape[1], shape[2]) for shape in shapes]
        bytes_ = 2 * sum(math.prod(shape) for shape in shapes)
        self._share = min(1.0, BUDGET / bytes_) if bytes_ else 1.0

    @cached_property
    def held(self) -> tuple[Tensor, list[np.ndarray]]:
        """Patches (N, C) float16 that are held in memory, and their places in each image's grid.

        They are all patches, or the same share of every image's, drawn once, of what `BUDGET` has
        no room for: neighbours are so alike that a training has no use for all of many.
        """
        draws, held, places = np.random.default_rng(0), [], []
        grids = progress.track(self.sizes, "patches")
        for number, (height, width) in enumerate(grids):
            count = height * width
            chosen = np.arange(count)
            if self._share < 1:
                some = draws.choice(count, math.ceil(self._share * count), replace=False)
                chosen = np.sort(some)
            held.append(self.of_image(number)[chosen])
            places.append(chosen)
        return torch.from_numpy(np.concatenate(held)).to(self.device), places

    def of_image(self, number: int) -> np.ndarray:
        """Read all patches (N, C) float16 of image number `number`."""
        maps = self._maps(self.items[number])
        return np.ascontiguousarray(maps.reshape(len(maps), -1).T)

    def held_of(self, number: int) -> Tensor:
        """Patches (N, C) float16 of image number `number` that are held in memory."""
        return self.held[0][self._starts[number] : self._starts[number + 1]]

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate(map(len, self.held[1]), initial=0))

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and deviation (C,) of the features over all patches, and each image's mean (B, C).

        All are float32.
        """
        images, squares, count = [], 0.0, 0
        for number in progress.track(range(len(self.items)), "means of the features"):
            patches = self.of_image(number).astype(np.float32)
            images.append(patches.mean(0, dtype=np.float64))
            squares = squares + (patches**2).sum(0, dtype=np.float64)
            count += len(patches)
        weights = np.array([h * w for h, w in self.sizes]) / count
        mean = weights @ np.stack(images)
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
        # A channel that never varies is left as it is.
        deviation[deviation < 1e-6] = 1
        found = [mean, deviation, np.stack(images)]
        centre, spread, pooled = (torch.from_numpy(a.astype(np.float32)) for a in found)
        return centre.to(self.device), spread.to(self.device), pooled.to(self.device)


def fit(network: FrozenNetwork, patches: Patches) -> Tensor:
    """Let a network standardise by these patches; returns each image's mean features (B, C)."""
    network.centre[:], network.spread[:], pooled = patches.means()
    return pooled


def train_classifier(
    network: FrozenNetwork,
    patches: Patches,
    *,
    seed: int,
    pooling: str,
    steps: int,
    rate: float,
) -> tuple[float, Tensor]:
    """Standardise the features, and train the classifier on image labels (multi-label soft margin).

    Pooling `gap`: an image's logits are the means of its patches' scores (paper 3.2). Pooling
    `mil`: a tag that is there is scored by the mean of its highest tenth, and one that is not must
    be absent from every patch.

    Returns:
        The last step's loss and the images' logits (B, K), on the patches' device. Raises UserError
        for a loss that is not finite.
    """
    devices.seed_all(seed)
    pooled = fit(network, patches)
    labels = torch.from_numpy(np.stack([item.known_label for item in patches.items]))
    labels = labels.to(patches.device)
    nn.init.normal_(network.classifier.weight, std=0.01)
    standard = network.standardise(pooled)
    optimizer = torch.optim.AdamW(network.classifier.parameters(), lr=rate)
    loss = torch.zeros(())
    for _ in progress.track(range(steps), "classifier", unit="step"):
        if pooling == "gap":
            loss = F.multilabel_soft_margin_loss(network.class_scores(standard), labels)
        else:
            loss = _mil_loss(network, patches, labels)
        _descend(optimizer, loss, "rate of the classifier")
    with torch.no_grad():
        logits = network.class_scores(standard)
        if pooling == "mil":
            numbers = progress.track(range(len(patches.items)), "classification")
            read = (torch.from_numpy(patches.of_image(number)) for number in numbers)
            each = (network.standardise(some.to(patches.device)) for some in read)
            logits = torch.stack([network.logits(some, pooling) for some in each])
    return float(loss.detach()), logits


def _mil_loss(network: FrozenNetwork, patches: Patches, labels: Tensor) -> Tensor:
    chosen = torch.randperm(len(patches.items))[:MIL_BATCH].tolist()
    total = torch.zeros((), device=patches.device)
    for number in chosen:
        rows = network.standardise(patches.held_of(number))
        highest, scores = network.logits(rows, "mil"), network.class_scores(rows)
        terms = torch.where(labels[number] > 0, F.softplus(-highest), F.softplus(scores).mean(0))
        total = total + terms.mean()
    return total / len(chosen)


def train_head(
    here: Here,
    network: FrozenNetwork,
    patches: Patches,
    labels: Sequence[np.ndarray],
    *,
    params: Head,
    seed: Sequence[int],
) -> float:
    """Train the network's head by cross-entropy on labelled patches (AdamW, rate to 0 linearly).

    `labels` are (h * w,) uint8 of each image, 255 ignored; `seed` numbers that all random choices
    follow from. Returns the mean loss of the last tenth of the steps. Raises UserError without any
    labelled patch, and for a loss that is not finite.
    """
    features, places = patches.held
    target = np.concatenate([label[some] for label, some in zip(labels, places, strict=True)])
    known = torch.from_numpy(np.flatnonzero(target != IGNORE)).to(patches.device)
    if not len(known):
        raise UserError(
            f"{here.name}: no patch of any image is labelled, so that no head can learn; lower "
            "the margin or `sure` of train_cam.frozen, or look at the label set"
        )
    head = network.head
    if head is None:
        raise ValueError("the network has no head")
    devices.seed_all(*seed)
    truth = torch.from_numpy(target).to(patches.device).long()
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=params.rate, weight_decay=params.weight_decay
    )
    losses: list[Tensor] = []
    for step in progress.track(range(params.steps), "head", unit="step"):
        rows = known[torch.randint(len(known), (params.batch,), device=known.device)]
        rate = min(1, (step + 1) / RISE) * (1 - step / params.steps)
        optimizer.param_groups[0]["lr"] = params.rate * rate
        given = network.standardise(features[rows])
        with devices.autocast(here.precision, here.device):
            scores = head(given, params.dropout)
        loss = F.cross_entropy(scores.float(), truth[rows])
        _descend(optimizer, loss, "rate of the head")
        losses.append(loss.detach())
    return float(torch.stack(losses[-max(1, params.steps // 10) :]).mean())


def label_grids(
    items: Sequence[Item],
    path: Callable[[str], Path],
    sizes: Sequence[tuple[int, int]],
    *,
    share: float,
) -> list[np.ndarray]:
    """Read label maps and reduce them to grids (`seeds.reduced`): (h * w,) uint8 of each item.

    `path` finds the file by an item's id. Raises UserError when one is missing, unreadable or of
    another image.
    """

    def read(task: tuple[Item, tuple[int, int]]) -> np.ndarray:
        item, size = task
        given = path(item.id), image_size(item.image), len(item.known_label) + 1
        return seeds.reduced(read_label_of(*given, ignored=True), size, share)

    labels = helpers.in_threads(read, zip(items, sizes, strict=True))
    return list(progress.track(labels, "labels of the patches", len(items)))


def load(
    here: Here,
    network: FrozenNetwork,
    path: Path,
    read: Callable[[Path], tuple[nn.Module, Config]],
) -> Config:
    """Give a network the weights that the first process saved at `path`; returns their config.

    All processes then go on with the same, though each trained. Errors are those of `read`, which
    is `load` of the module that knows the checkpoint.
    """
    processes.barrier()
    trained, config = read(path)
    if not isinstance(trained, FrozenNetwork):
        raise TypeError(f"{path} is of another method")
    network.head = trained.head
    network.load_state_dict(trained.state_dict())
    network.to(here.device).eval()
    return config


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor, rate: str) -> None:
    if not torch.isfinite(loss):
        raise UserError(f"the loss is {loss.item()}: lower the {rate} (or try precision: fp32)")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
