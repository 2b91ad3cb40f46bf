"""What runs in the worker processes of a regeneration: dCRF, scoring, writing (no torch)."""

import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isim import metrics
from isim.data import files
from isim.labels import crf
from isim.params import Crf

Counts = list[tuple[int, int, int]]


@dataclass(frozen=True)
class RefineTask:
    """One image's seed on its way to a pseudo-label.

    `seed` is (H, W) uint8, `class_ids` (K',) int64 labels 1..K, `mask` the ground truth if
    there is one, `out` the pseudo-label's path (None: score only), `num_labels` L.
    """

    id: str
    image: Path
    seed: NDArray[np.uint8]
    class_ids: NDArray[np.int64]
    settings: Crf
    mask: Path | None
    out: Path | None
    num_labels: int


@dataclass(frozen=True)
class RefineResult:
    """Scores of one image; counts are (row, column, pixels) of its confusion matrices.

    `masked` says that the pseudo-label holds no foreground pixel (paper Eq. 3).
    """

    id: str
    seed_counts: Counts
    label_counts: Counts
    masked: bool


def start_worker() -> None:
    """Prepare a worker: Ctrl-C is the parent's to handle, and a lost parent ends the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def follow() -> None:
        # After kill -9 of the parent nothing else would tell the worker to stop.
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def refine_image(task: RefineTask) -> RefineResult:
    """Refine a seed by dCRF, write the pseudo-label and score both against the ground truth.

    Raises:
        UserError: The image cannot be read or the label cannot be written.
    """
    image = files.read_image(task.image)
    label = crf.refine(image, task.seed, task.class_ids, task.settings)
    seed_counts: Counts = []
    label_counts: Counts = []
    if task.mask is not None:
        truth = files.read_truth(task.mask, task.seed.shape, task.num_labels)
        seed_counts = sparse(metrics.confusion_matrix(truth, task.seed, task.num_labels))
        label_counts = sparse(metrics.confusion_matrix(truth, label, task.num_labels))
    # Written last: a PNG that is there has been scored.
    if task.out is not None:
        files.write_label_map(task.out, label)
    return RefineResult(task.id, seed_counts, label_counts, not label.any())


def sparse(confusion: NDArray[np.int64]) -> Counts:
    """Return the non-zero counts of an (L, L) matrix, for a journal's line."""
    rows, columns = np.nonzero(confusion)
    return [(int(r), int(c), int(confusion[r, c])) for r, c in zip(rows, columns, strict=True)]


def dense(counts: Counts, num_labels: int) -> NDArray[np.int64]:
    """Return the (L, L) matrix of sparse counts."""
    confusion = np.zeros((num_labels, num_labels), np.int64)
    for row, column, pixels in counts:
        confusion[row, column] += pixels
    return confusion
