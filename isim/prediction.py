"""Predictions of a segmenter: probabilities, label map, dCRF, PNG and scores, streamed.

The network goes on to the next images while worker processes refine and write the last ones.
Only a bounded number of images is in flight, so memory does not grow with the data set.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from isim import atomic, distributed, engine, metrics, splits
from isim.data.dataset import Item
from isim.errors import UserError
from isim.journal import Journal
from isim.models.inference import multi_scale_probabilities
from isim.models.segmenter import Segmenter, SegmenterConfig
from isim.params import Crf
from isim.regeneration import images, in_workers
from isim.splits import Parts
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

    def tasks(missing: Sequence[Item]) -> Iterator[PredictionTask]:
        for item, pixels in images(missing, device):
            with engine.autocast(settings.precision, device):
                probabilities = multi_scale_probabilities(
                    network, config, pixels, settings.scales, settings.flip
                )  # (L, H, W)
            if not torch.isfinite(probabilities).all():
                raise UserError(
                    f"the segmenter's probabilities for {item.image} are not finite: the rates "
                    "are likely too high; lower train_segmenter.optimizer.rate"
                )
            sent = None if settings.crf is None else probabilities.half().cpu().numpy()
            yield PredictionTask(
                item.id,
                item.image,
                probabilities.argmax(0).to(torch.uint8).cpu().numpy(),
                sent,
                settings.crf,
                item.mask,
                labels / f"{item.id}.png",
                None if settings.crf is None else refined / f"{item.id}.png",
                num_labels,
            )

    with Journal(journal_path) as journal:
        journal.keep(path.stem for path in last.glob("*.png"))
        missing, computed = journal.share_out(items)
        results = in_workers(finish_prediction, tasks(missing))
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
            computed=computed,
        )
        for part, ids in parts.items()
    }
