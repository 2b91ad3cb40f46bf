"""Predictions of a segmenter: probabilities, label map, dCRF, PNG and scores, streamed.

As in `regeneration`, the network goes on to the next images while helpers refine and write the
last ones, and only a bounded number of images is in flight.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from isim import atomic, distributed, engine, metrics, splits
from isim.data.dataset import Item
from isim.errors import UserError
from isim.journal import Journal
from isim.labels import crf
from isim.models import folding
from isim.models.inference import multi_scale_probabilities
from isim.models.segmenter import Segmenter, SegmenterConfig
from isim.params import Crf
from isim.splits import Parts
from isim.stream import Host, computed, delivered, group_size, in_workers, refines_on_gpu, to_host
from isim.workers import PredictionTask, dense, finish_prediction


@dataclass(frozen=True)
class PredictionSettings:
    """How a segmenter is tested (spec 7); `precision` is resolved, `crf` None for no dCRF."""

    scales: tuple[float, ...]
    flip: bool
    precision: str
    crf: Crf | None


@dataclass(frozen=True)
class Predicted:
    """Result of a pass over a split, for the split or a part of it.

    `confusion` and `refined_confusion` are (L, L) int64 before and after dCRF (None without
    one), over the `scored` images that have a ground truth; `seconds` and `computed` tell the
    speed of the whole pass.
    """

    confusion: NDArray[np.int64]
    refined_confusion: NDArray[np.int64] | None
    images: int
    scored: int
    seconds: float
    computed: int

    def row(self) -> dict[str, float]:
        """Headline figures under their names in reports and MLflow; nan without any mask."""
        row: dict[str, float] = {"images": self.images, "scored_images": self.scored}
        for prefix, confusion in (("", self.confusion), ("crf_", self.refined_confusion)):
            if confusion is not None:
                row |= metrics.segmentation_figures(prefix, confusion)
        speed = self.computed / self.seconds if self.seconds else 0.0
        return row | {"seconds": self.seconds, "images_per_second": speed}


class _Prediction(NamedTuple):
    """An image's label map (H, W) uint8 and what its dCRF needs, on the device.

    `finite` is a bool, whether all probabilities are.

    `image` (3, H, W) uint8 and float32 `probabilities` (L, H, W) are kept for a dCRF on a GPU,
    float16 `probabilities` alone for one elsewhere.
    """

    label: Tensor
    finite: Tensor
    image: Tensor | None
    probabilities: Tensor | None


def predict(
    network: Segmenter,
    config: SegmenterConfig,
    items: Sequence[Item],
    labels: Path,
    refined: Path,
    journal_path: Path,
    settings: PredictionSettings,
    device: torch.device,
    parts: Parts,
) -> dict[str, Predicted]:
    """Predict every item and score the label maps before and after dCRF (paper 4.1.7).

    Each process of a run predicts its share of them.

    Runs again after an interruption with the same arguments, it computes only the images
    that are not done.

    Args:
        network: Left in evaluation mode.
        config: Its configuration.
        items: Images of the split.
        labels: Folder of the palette PNGs before dCRF, `<id>.png`.
        refined: Folder of those after dCRF; not made without one.
        journal_path: File of finished images; its folder must exist.
        settings: Scales, flip, precision and dCRF.
        device: Where the network is.
        parts: Image ids of what is reported apart, the split itself included.

    Returns:
        Scores over all items of each part, also those of an earlier, interrupted pass.

    Raises:
        UserError: An unreadable image, a failed write, a worker that died, or probabilities
            that are not finite.
    """
    start = time.perf_counter()
    network.eval()
    num_labels = len(config.classes) + 1
    # The PNG that is written last tells that an image is done.
    last = labels if settings.crf is None else refined
    for folder in {labels, last}:
        atomic.make_directory(folder)
        for leftover in folder.glob(".tmp-*"):
            leftover.unlink(missing_ok=True)

    prepared = folding.for_inference(
        network, lambda net, images: net(images), device, engine.DTYPES[settings.precision]
    )
    on_gpu = settings.crf is not None and refines_on_gpu(settings.crf, device)

    def predicted(_: Sequence[Item], images: Tensor) -> list[_Prediction]:
        found = []
        for image in images:
            with engine.autocast(settings.precision, device):
                probabilities = multi_scale_probabilities(
                    prepared, config, image, settings.scales, settings.flip
                )  # (L, H, W)
            label = probabilities.argmax(0).to(torch.uint8)
            kept = None if settings.crf is None else probabilities
            if kept is not None and not on_gpu:
                kept = kept.half()
            finite = torch.isfinite(probabilities).all()
            found.append(_Prediction(label, finite, image if on_gpu else None, kept))
        return found

    def launch(group: Sequence[tuple[Item, _Prediction]]) -> list[Callable[[], PredictionTask]]:
        refined_maps: list[Tensor | None] = [None] * len(group)
        if on_gpu and settings.crf is not None:
            refined_maps = [*_refine_on_gpu(group, settings.crf)]
        launched: list[Callable[[], PredictionTask]] = []
        for (item, found), after in zip(group, refined_maps, strict=True):
            sent = None if on_gpu or found.probabilities is None else to_host(found.probabilities)
            after_ = None if after is None else to_host(after)
            finite, label = to_host(found.finite), to_host(found.label)
            launched.append(partial(task, item, finite, label, sent, after_))
        return launched

    def task(
        item: Item, finite: Host, label: Host, sent: Host | None, after: Host | None
    ) -> PredictionTask:
        if not finite():
            raise UserError(
                f"the segmenter's probabilities for {item.image} are not finite: the rates "
                "are likely too high; lower train_segmenter.optimizer.rate"
            )
        return PredictionTask(
            item.id,
            item.image,
            label(),
            None if sent is None else sent(),
            settings.crf,
            item.mask,
            labels / f"{item.id}.png",
            None if settings.crf is None else refined / f"{item.id}.png",
            num_labels,
            None if after is None else after(),
        )

    with Journal(journal_path) as journal:
        journal.keep(path.stem for path in last.glob("*.png"))
        missing, made = journal.share_out(items)
        tasks = delivered(computed(predicted, missing, device), launch, group_size(device))
        in_threads = settings.crf is None or on_gpu or crf.in_threads(settings.crf)
        results = in_workers(finish_prediction, tasks, in_threads)
        for result in tqdm(results, labels.name, len(missing), leave=False, disable=None):
            journal.add(asdict(result))
        lines = journal.collect(items)
    # Not a set, whose order is another one in every process.
    for folder in (labels, last):
        distributed.share(folder, "*.png")

    plain = {part: np.zeros((num_labels, num_labels), np.int64) for part in parts}
    after = {part: np.zeros_like(confusion) for part, confusion in plain.items()}
    for line in lines:
        splits.add(plain, parts, line["id"], dense(line["counts"], num_labels))
        splits.add(after, parts, line["id"], dense(line["refined_counts"], num_labels))
    seconds = time.perf_counter() - start
    return {
        part: Predicted(
            plain[part],
            None if settings.crf is None else after[part],
            images=len(ids),
            scored=sum(item.mask is not None and item.id in ids for item in items),
            seconds=seconds,
            computed=made,
        )
        for part, ids in parts.items()
    }


def _refine_on_gpu(group: Sequence[tuple[Item, _Prediction]], settings: Crf) -> list[Tensor]:
    from isim.gpu.crf import refine_soft_batch

    return refine_soft_batch(
        [found.image for _, found in group if found.image is not None],
        [found.probabilities for _, found in group if found.probabilities is not None],
        settings,
    )
