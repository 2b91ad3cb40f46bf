"""Scores: one int64 confusion matrix a split (spec 8) and multi-label figures (paper Table 1)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Labels of pixels: 0 is the background, 255 stands for what is not counted.
BACKGROUND, IGNORE = 0, 255


def confusion_matrix(
    truth: NDArray[np.uint8], prediction: NDArray[np.uint8], num_labels: int
) -> NDArray[np.int64]:
    """Count pixels by (true label, predicted label); pixels whose truth is 255 are dropped.

    Args:
        truth: (H, W) labels 0..L-1 or 255.
        prediction: (H, W) labels 0..L-1.
        num_labels: L = K + 1.

    Returns:
        (L, L) counts, rows are the truth. Add the matrices of all images, then take `miou`.

    Raises:
        ValueError: Sizes differ, or a label is outside 0..L-1.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth is {truth.shape}, prediction is {prediction.shape}")
    counted = truth != IGNORE
    # int64 before the product: 21 * 20 + 20 overflows uint8.
    rows = truth[counted].astype(np.int64)
    columns = prediction[counted].astype(np.int64)
    if rows.size and max(rows.max(), columns.max()) >= num_labels:
        raise ValueError(f"a label above {num_labels - 1} in truth or prediction")
    counts = np.bincount(rows * num_labels + columns, minlength=num_labels**2)
    return counts.reshape(num_labels, num_labels)


def level_confusion(
    truth: NDArray[np.uint8],
    best: NDArray[np.uint8],
    levels: NDArray[np.integer[Any]],
    *,
    num_thresholds: int,
    num_labels: int,
) -> NDArray[np.int64]:
    """Confusion matrices (T, L, L) of the seeds at T ascending thresholds, from one count.

    A pixel has the label `best` (H, W) at the lowest thresholds, as many as `levels` (H, W), 0..T,
    says, and is background at the others. Each equals `confusion_matrix` of that seed.
    """
    counted = truth != IGNORE
    size = (num_labels, num_labels, num_thresholds + 1)
    pairs = truth[counted].astype(np.int64) * num_labels + best[counted]
    code = pairs * size[2] + levels[counted]
    counts = np.bincount(code, minlength=int(np.prod(size))).reshape(size)
    # At threshold i the pixels of levels above i are foreground: sum from the right.
    foreground = counts[..., ::-1].cumsum(-1)[..., ::-1][..., 1:]  # (L, L, T)
    confusion = foreground.transpose(2, 0, 1).copy()  # (T, L, L)
    confusion[:, :, 0] += counts.sum((1, 2)) - foreground.sum(1).T
    return confusion


def iou(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intersection over union of each label: (L,) fractions of (L, L) counts.

    It is nan where a label occurs neither in truth nor in prediction.
    """
    hits = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    ratios = np.full(len(hits), np.nan)
    np.divide(hits, union, out=ratios, where=union > 0)
    return ratios


def iou_table(
    names: Sequence[str], columns: Mapping[str, NDArray[np.int64]]
) -> list[dict[str, Any]]:
    """List the `iou` of L named labels in named (L, L) counts: a row a label, with its `class`."""
    ious = {column: iou(confusion).tolist() for column, confusion in columns.items()}
    return [
        {"class": name} | {column: values[place] for column, values in ious.items()}
        for place, name in enumerate(names)
    ]


def miou(confusion: NDArray[np.int64]) -> float:
    """Mean of `iou` over the labels that occur; nan when nothing was counted."""
    values = iou(confusion)
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def agreement(confusion: NDArray[np.int64]) -> float:
    """Mean of `iou` of two label maps over the foreground that either has; 1 where neither does."""
    values = iou(confusion)[1:]
    return float(np.nanmean(values)) if np.isfinite(values).any() else 1.0


def miou_interval(
    confusions: Iterable[NDArray[np.int64]], draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Bound the `miou` of N images' (L, L) counts: a bootstrap interval over images, 95 %.

    Images are drawn anew `draws` times, as many as there are; what lies between the 2.5th and the
    97.5th percentile of the mIoUs is the interval. A label that no image of a draw has is left out
    of that draw. It is (nan, nan) for fewer than two images. Memory grows by 24 L bytes an image.
    """
    mious = _drawn((c[None] for c in confusions), draws, seed)
    if not len(mious):
        return math.nan, math.nan
    low, high = np.percentile(mious[:, 0], (2.5, 97.5))
    return float(low), float(high)


def best_interval(
    sweeps: Iterable[NDArray[np.int64]], draws: int = 200, seed: int = 0
) -> tuple[int, int] | None:
    """Bound the threshold of the best mIoU as `miou_interval` does: the places of two thresholds.

    `sweeps` are the (T, L, L) counts of N images at T thresholds; None for fewer than two images.
    """
    mious = _drawn(sweeps, draws, seed)
    if not len(mious):
        return None
    low, high = np.percentile(mious.argmax(1), (2.5, 97.5), method="nearest")
    return int(low), int(high)


def _drawn(sweeps: Iterable[NDArray[np.int64]], draws: int, seed: int) -> NDArray[np.float64]:
    """Compute the mIoUs (draws, T) of images drawn anew; none for fewer than two images."""
    found = [(np.diagonal(c, axis1=1, axis2=2), c.sum(1), c.sum(2)) for c in sweeps if c[0].any()]
    if len(found) < 2:
        return np.empty((0, 0))
    images = np.array(found, np.float64)  # (N, 3, T, L): hits, predicted, true
    random, mious = np.random.default_rng(seed), []
    for _ in range(draws):
        chosen = np.bincount(random.integers(0, len(images), len(images)), minlength=len(images))
        hits, predicted, true = np.tensordot(chosen.astype(np.float64), images, 1)
        union = predicted + true - hits  # (T, L)
        ious = np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)
        mious.append(np.nanmean(ious, 1))
    return np.array(mious)


def precision_recall(confusion: NDArray[np.int64]) -> tuple[float, float]:
    """Precision and recall of foreground pixels with their right class (spec 8).

    They are nan where no pixel is predicted, or is, foreground.
    """
    hits, predicted, true = (
        float(counts.sum()) for counts in (np.diag(confusion)[1:], confusion[:, 1:], confusion[1:])
    )
    return hits / predicted if predicted else math.nan, hits / true if true else math.nan


def segmentation_figures(name: str, confusion: NDArray[np.int64]) -> dict[str, float]:
    """Headline figures (spec 8): `miou`, `precision` and `recall`, each with `name` before it."""
    precision, recall = precision_recall(confusion)
    figures = {"miou": miou(confusion), "precision": precision, "recall": recall}
    return {f"{name}{key}": value for key, value in figures.items()}


def classification_figures(
    labels: NDArray[np.float32], scores: NDArray[np.float32]
) -> dict[str, float]:
    """Score image-level predictions, (N, K) logits, against (N, K) multi-hot labels (spec 3.6).

    Returns:
        `sample_average_precision` (the paper's "accuracy", Table 1; over the images with a
        class), `element_accuracy` (a class is predicted where its logit is above 0) and
        `class_map` (mean average precision over the classes with a positive image). The first
        and the last are nan where no image has a class.
    """
    # Imported here: scoring label maps needs none of scikit-learn, which is slow to import.
    from sklearn.metrics import average_precision_score, label_ranking_average_precision_score

    with_class, occurs = labels.any(1), labels.any(0)
    ranking = class_map = math.nan
    if with_class.any():
        # The same figure as average_precision_score(average="samples"), which takes a single
        # class for something else.
        ranking = float(
            label_ranking_average_precision_score(labels[with_class], scores[with_class])
        )
        class_map = float(
            average_precision_score(labels[:, occurs], scores[:, occurs], average="macro")
        )
    return {
        "sample_average_precision": ranking,
        "element_accuracy": float(((scores > 0) == (labels > 0)).mean()),
        "class_map": class_map,
    }
