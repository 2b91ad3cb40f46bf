"""Scores: one int64 confusion matrix a split (spec 8) and multi-label figures (paper Table 1)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORE = 255


def confusion_matrix(
    truth: NDArray[np.uint8], prediction: NDArray[np.uint8], num_labels: int
) -> NDArray[np.int64]:
    """Count pixels by (true label, predicted label); pixels whose truth is 255 are dropped.

    Args:
        truth: (H, W) labels 0..L-1 or 255.
        prediction: (H, W) labels 0..L-1, same size.
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


def sweep_confusion(
    truth: NDArray[np.uint8],
    best: NDArray[np.uint8],
    height: NDArray[np.float32],
    thresholds: NDArray[np.float32],
    num_labels: int,
) -> NDArray[np.int64]:
    """Confusion matrices of the seeds at many thresholds, from one count.

    A pixel has the label `best` where `height` is above the threshold, else background.

    Args:
        truth: (H, W) labels 0..L-1 or 255 (dropped).
        best: (H, W) label of the highest CAM, 1..L-1; anything where no class is labelled.
        height: (H, W) value of that CAM.
        thresholds: (T,) ascending.
        num_labels: L = K + 1.

    Returns:
        (T, L, L) counts; each equals `confusion_matrix` of the seed at that threshold.
    """
    levels = np.searchsorted(thresholds, height, side="left")
    return level_confusion(truth, best, levels, len(thresholds), num_labels)


def level_confusion(
    truth: NDArray[np.uint8],
    best: NDArray[np.uint8],
    levels: NDArray[np.integer[Any]],
    thresholds: int,
    num_labels: int,
) -> NDArray[np.int64]:
    """`sweep_confusion` from the number of thresholds that each pixel rises above.

    Args:
        truth: As in `sweep_confusion`.
        best: Likewise.
        levels: (H, W) integers 0..T.
        thresholds: T.
        num_labels: L = K + 1.

    Returns:
        (T, L, L) counts.
    """
    counted = truth != IGNORE
    code = (truth[counted].astype(np.int64) * num_labels + best[counted]) * (
        thresholds + 1
    ) + levels[counted]
    size = (num_labels, num_labels, thresholds + 1)
    counts = np.bincount(code, minlength=int(np.prod(size))).reshape(size)
    # At threshold i the pixels of levels above i are foreground: sum from the right.
    foreground = counts[..., ::-1].cumsum(-1)[..., ::-1][..., 1:]  # (L, L, T)
    confusion = foreground.transpose(2, 0, 1).copy()  # (T, L, L)
    confusion[:, :, 0] += counts.sum((1, 2)) - foreground.sum(1).T
    return confusion


def iou(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intersection over union of each label.

    Args:
        confusion: (L, L) counts.

    Returns:
        (L,) fractions; nan where a label occurs neither in truth nor in prediction.
    """
    hits = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)


def miou(confusion: NDArray[np.int64]) -> float:
    """Mean of `iou` over the labels that occur; nan when nothing was counted."""
    values = iou(confusion)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def precision_recall(confusion: NDArray[np.int64]) -> tuple[float, float]:
    """Precision and recall of foreground pixels with their right class (spec 8).

    Args:
        confusion: (L, L) counts, label 0 is the background.

    Returns:
        Fractions; nan where no pixel is predicted, or is, foreground.
    """
    hits = float(np.diag(confusion)[1:].sum())
    predicted, true = float(confusion[:, 1:].sum()), float(confusion[1:].sum())
    return (
        hits / predicted if predicted else float("nan"),
        hits / true if true else float("nan"),
    )


def segmentation_figures(name: str, confusion: NDArray[np.int64]) -> dict[str, float]:
    """Headline figures of an (L, L) confusion matrix (spec 8), their names opened by `name`.

    Returns:
        `miou`, `precision` and `recall`, as of `miou` and `precision_recall`.
    """
    precision, recall = precision_recall(confusion)
    figures = {"miou": miou(confusion), "precision": precision, "recall": recall}
    return {f"{name}{key}": value for key, value in figures.items()}


def classification_figures(
    labels: NDArray[np.float32], scores: NDArray[np.float32]
) -> dict[str, float]:
    """The figures logged each epoch (spec 3.6).

    Args:
        labels: (N, K) multi-hot image labels.
        scores: (N, K) logits; a class is predicted where its logit is above 0.

    Returns:
        `sample_average_precision` (the paper's "accuracy", Table 1; over the images with a
        class), `element_accuracy` and `class_map` (mean average precision over the classes with
        a positive image). The first and the last are nan where no image has a class.
    """
    # Imported here: the CRF workers import this module and need none of scikit-learn.
    from sklearn.metrics import average_precision_score, label_ranking_average_precision_score

    with_class, occurs = labels.any(1), labels.any(0)
    ranking = class_map = float("nan")
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
