"""What runs in worker threads or processes: dCRF, scoring, writing of label maps (no torch)."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
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
class Sweep:
    """What seeds at many thresholds are counted from.

    `best` is (H, W) uint8, the label of the highest CAM, `levels` (H, W) uint8 how many of the
    `thresholds` it rises above.
    """

    best: NDArray[np.uint8]
    levels: NDArray[np.uint8]
    thresholds: int


@dataclass(frozen=True)
class RefineTask:
    """One image's seed on its way to a pseudo-label.

    `seed` is (H, W) uint8, `class_ids` (K',) int64 labels 1..K, `mask` the ground truth if
    there is one, `out` the pseudo-label's path (None: score only), `num_labels` L, `sweep` is
    given where other thresholds are to be scored, too, `label` (H, W) uint8 where the dCRF has
    been computed.
    """

    id: str
    image: Path
    seed: NDArray[np.uint8]
    class_ids: NDArray[np.int64]
    settings: Crf
    mask: Path | None
    out: Path | None
    num_labels: int
    sweep: Sweep | None = None
    label: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class RefineResult:
    """Scores of one image; counts are (row, column, pixels) of its confusion matrices.

    `masked` says that the pseudo-label holds no foreground pixel (paper Eq. 3). `sweep` are
    (flat index, pixels) of the (T, L, L) matrices at the thresholds of a sweep.
    """

    id: str
    seed_counts: Counts
    label_counts: Counts
    masked: bool
    sweep: list[tuple[int, int]]


@dataclass(frozen=True)
class ScoreTask:
    """A label map (H, W) uint8 and its ground truth; `num_labels` L."""

    mask: Path
    label: NDArray[np.uint8]
    num_labels: int


@dataclass(frozen=True)
class PredictionTask:
    """One image's prediction on its way to its files.

    `prediction` is (H, W) uint8, `out` its path; `mask` the ground truth if there is one,
    `num_labels` L. For the dCRF (`settings`, `refined` the path of what it makes of the image;
    both None without one) `probabilities` are (L, H, W) float16: they travel to another process
    in half the bytes of float32, and the rounding moves an energy of the dCRF, -log p with p at
    least 1e-5, by less than 0.004. `refined_label` (H, W) uint8 is given instead where the dCRF
    has been computed.
    """

    id: str
    image: Path
    prediction: NDArray[np.uint8]
    probabilities: NDArray[np.float16] | None
    settings: Crf | None
    mask: Path | None
    out: Path
    refined: Path | None
    num_labels: int
    refined_label: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class PredictionResult:
    """Scores of one image; counts as in `RefineResult`, `refined_counts` those after dCRF."""

    id: str
    counts: Counts
    refined_counts: Counts


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
    label = task.label
    if label is None:
        image = files.read_image(task.image)
        label = crf.refine(image, task.seed, task.class_ids, task.settings)
    seed_counts: Counts = []
    label_counts: Counts = []
    swept: list[tuple[int, int]] = []
    if task.mask is not None:
        truth = files.read_truth(task.mask, task.seed.shape, task.num_labels)
        if task.sweep is not None:
            found = metrics.level_confusion(
                truth,
                task.sweep.best,
                task.sweep.levels,
                task.sweep.thresholds,
                task.num_labels,
            ).ravel()
            swept = [(int(place), int(found[place])) for place in np.flatnonzero(found)]
        seed_counts = sparse(metrics.confusion_matrix(truth, task.seed, task.num_labels))
        label_counts = sparse(metrics.confusion_matrix(truth, label, task.num_labels))
    # Written last: a PNG that is there has been scored.
    if task.out is not None:
        files.write_label_map(task.out, label)
    return RefineResult(task.id, seed_counts, label_counts, not label.any(), swept)


def score(task: ScoreTask) -> NDArray[np.int64]:
    """Confusion matrix (L, L) of a label map.

    Raises:
        UserError: The ground truth cannot be read or does not fit.
    """
    truth = files.read_truth(task.mask, task.label.shape, task.num_labels)
    return metrics.confusion_matrix(truth, task.label, task.num_labels)


def finish_prediction(task: PredictionTask) -> PredictionResult:
    """Write a prediction and, if asked for, what the dCRF makes of it; score both.

    Raises:
        UserError: The image cannot be read or a label map cannot be written.
    """
    labels = [(task.out, task.prediction)]
    if task.refined is not None and task.refined_label is not None:
        labels.append((task.refined, task.refined_label))
    elif task.settings is not None and task.refined is not None and task.probabilities is not None:
        image = files.read_image(task.image)
        probabilities = task.probabilities.astype(np.float32)
        labels.append((task.refined, crf.refine_soft(image, probabilities, task.settings)))
    counts = score_and_write(labels, task.mask, task.num_labels)
    return PredictionResult(task.id, counts[0], counts[1] if len(counts) > 1 else [])


def score_and_write(
    labels: Sequence[tuple[Path, NDArray[np.uint8]]], mask: Path | None, num_labels: int
) -> list[Counts]:
    """Score label maps of one size against the ground truth, if there is one, and write them.

    Returns:
        The counts of each, empty without a ground truth.
    """
    counts: list[Counts] = [[] for _ in labels]
    if mask is not None:
        truth = files.read_truth(mask, labels[0][1].shape, num_labels)
        for place, (_, label) in enumerate(labels):
            counts[place] = sparse(metrics.confusion_matrix(truth, label, num_labels))
    # Written last: PNGs that are there have been scored.
    for path, label in labels:
        files.write_label_map(path, label)
    return counts


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
