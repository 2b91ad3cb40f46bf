"""What runs in workers for affinity labels: two dCRFs, scoring, writing (no torch)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isim import metrics
from isim.data import files
from isim.labels import affinity_pairs, crf, seeds
from isim.params import TrainAffinity
from isim.workers import Counts, sparse


@dataclass(frozen=True)
class LabelTask:
    """One image's CAMs on their way to affinity labels.

    `cam` is a file of `files.write_cam`, `class_ids` (K',) int64 labels 1..K, `mask` the ground
    truth if there is one, `out` the label map's path, `num_labels` L.
    """

    id: str
    image: Path
    cam: Path
    class_ids: NDArray[np.int64]
    settings: TrainAffinity
    mask: Path | None
    out: Path
    num_labels: int


@dataclass(frozen=True)
class LabelResult:
    """How many of an image's pixels are `sure`, not IGNORE, and of which label they are.

    `counts` are (row, column, pixels) of the confusion matrix of the sure pixels.
    """

    id: str
    pixels: int
    sure: int
    counts: Counts


def make_label(task: LabelTask) -> LabelResult:
    """Write what two dCRF results of an image's CAMs agree on, and score it.

    Raises:
        UserError: A file is missing, unreadable or of another image, or cannot be written.
    """
    planes, size = files.read_cam_of(task.cam, task.image, task.class_ids)
    grown = seeds.grow(planes, size)
    image = files.read_image(task.image)
    foreground, background = (
        crf.refine(
            image, seeds.seed(grown, task.class_ids, threshold), task.class_ids, task.settings.crf
        )
        for threshold in (task.settings.foreground_threshold, task.settings.background_threshold)
    )
    label = affinity_pairs.affinity_label(foreground, background)
    sure = label != affinity_pairs.IGNORE
    counts: Counts = []
    if task.mask is not None:
        truth = files.read_truth(task.mask, label.shape, task.num_labels)
        truth[~sure] = metrics.IGNORE
        # Of what is not counted any label will do, but the matrix has no place for 255.
        confusion = metrics.confusion_matrix(truth, np.where(sure, label, 0), task.num_labels)
        counts = sparse(confusion)
    # Written last: a PNG that is there has been scored.
    files.write_label_map(task.out, label)
    return LabelResult(task.id, label.size, int(sure.sum()), counts)
