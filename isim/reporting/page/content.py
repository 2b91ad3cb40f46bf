"""Content of the page: what its template shows, read from reports that may be missing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from isim import errors
from isim.data import files
from isim.data.prepared import Item, Prepared
from isim.reporting import words
from isim.reporting.page import charts
from isim.reporting.page.charts import Chart
from isim.reporting.page.judge import Row
from isim.runtime import atomic

# A table of pairs of more classes than these is too wide: the most frequent pairs are listed.
WIDE, PAIRS = 20, 20
PROBLEMS = 200
_REMEDY = "run `dvc repro` again"


class Problems(NamedTuple):
    """Problems of the data: head and first rows of the table, and `total` of them."""

    head: list[str]
    rows: list[list[str]]
    total: int


def rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV table; no rows where there is none."""
    if not path.exists():
        return []
    with errors.reading(path, _REMEDY, "is damaged"):
        return atomic.read_csv(path)


def colors(count: int) -> list[str]:
    """Name the VOC palette's colours of labels 1..count, as pages do."""
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in files.voc_palette()[1 : count + 1].tolist()]


def splits(data: Prepared) -> list[Row]:
    """Count images, negatives, unknown tags and masks of each split."""
    found = []
    for split, items in data.splits.items():
        labels = [item.image_label for item in items if item.image_label is not None]
        found.append(
            {
                "split": split,
                "images": len(items),
                "masks": sum(item.mask is not None for item in items),
                "negatives": sum(not label.any() for label in labels),
                "unknown": len(items) - len(labels),
                "tags": f"{np.sum(labels) / len(labels):.2f}" if labels else "unknown",
            }
        )
    return found


def together(names: Sequence[str], items: Sequence[Item]) -> dict[str, Any]:
    """Count which classes occur together: a table of all pairs, or the most frequent of many."""
    pairs: Counter[tuple[int, int]] = Counter()
    for item in items:
        if item.image_label is not None:
            ids = item.class_ids - 1
            pairs.update((int(a), int(b)) for a, b in combinations(ids, 2))
            pairs.update((int(a), int(a)) for a in ids)
    between = {pair: count for pair, count in pairs.items() if pair[0] != pair[1]}
    most = sorted(between.items(), key=lambda entry: (-entry[1], entry[0]))[:PAIRS]
    table = []
    if len(names) <= WIDE:
        places = range(len(names))
        table = [[pairs[min(a, b), max(a, b)] for b in places] for a in places]
    return {
        "table": table,
        "most": [(names[a], names[b], count, pairs[a, a], pairs[b, b]) for (a, b), count in most],
        "highest": max(between.values(), default=1),
    }


def problems(reports: Path) -> Problems:
    """Read the problems that `isim prepare` found."""
    found = rows(reports / "prepare/problems.csv")
    cells = [[str(cell or "") for cell in row.values()] for row in found[:PROBLEMS]]
    return Problems(list(found[0]) if found else [], cells, len(found))


def curves(reports: Path) -> list[Chart]:
    """Draw what there is of losses and rounds."""
    cam = reports / "train_cam"
    losses = {"classification_loss": "classification", "segmentation_loss": "segmentation"}
    mious = {"cam_miou": "CAM", "pseudo_label_miou": "pseudo-label"}
    known = {"val_class_map": "val", "train_class_map": "train"}
    epochs, rounds = rows(cam / "epochs.csv"), rows(cam / "rounds.csv")
    drawn = [
        charts.chart("CAM network: losses", epochs, "epoch", losses, y_label="loss"),
        charts.chart("Tags: mean average precision", epochs, "epoch", known, y_label="mAP"),
        charts.chart(
            "Rounds: mIoU on the training images", rounds, "round", mious, y_label="%", scale=100
        ),
        charts.chart(
            "Rounds: pixels that the pseudo-labels cover",
            rounds,
            "round",
            {"coverage": "labelled pixels"},
            y_label="%",
            scale=100,
        ),
    ]
    for path in sorted((reports / "train_segmenter").glob("*/epochs.csv")):
        title = f"Segmenter on {path.parent.name}: loss"
        loss = {"loss": "cross-entropy"}
        drawn.append(charts.chart(title, rows(path), "epoch", loss, y_label="loss"))
    sweep = rows(reports / "evaluate/sweep.csv")
    by_split: dict[str, Row] = {}
    for row in sweep:
        by_split.setdefault(row["threshold"], {"threshold": row["threshold"]})
        by_split[row["threshold"]][row["split"]] = row["cam_miou"]
    names = {row["split"]: row["split"] for row in sweep}
    title = "CAM: mIoU over the threshold"
    by_threshold = list(by_split.values())
    drawn.append(charts.chart(title, by_threshold, "threshold", names, y_label="%", scale=100))
    # A curve of one point tells nothing.
    return [
        one for one in drawn if one is not None and max(len(line.dots) for line in one.lines) > 1
    ]


def summary(found: Mapping[str, Any], cam: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Put the page's figures in words: a figure, what it is, and what it says."""
    said = []
    learnt = charts.number(cam.get("val_class_map"))
    where = "on images that the network did not learn from"
    if learnt is None:
        learnt, where = charts.number(cam.get("train_class_map")), "on its own training images"
    if learnt is not None:
        text = f"{words.tags_learnt(learnt).partition(',')[0]} ({where})"
        said.append((f"{learnt:.2f}", "mAP of the tags", text))
    if "miou" in found:
        bounds = words.interval(found)
        text = f"on {found['scored_images']} masks"
        text += f"; 95 % interval over images {bounds}" if bounds else ""
        said.append((f"{100 * found['miou']:.1f} %", "mIoU of the masks", text))
    if "agreement" in found:
        first, _, second = str(found["compared"]).partition(" and ")
        text = words.agree(first, second, found["agreement"]).partition(",")[0]
        said.append((f"{found['agreement']:.2f}", "agreement", text))
    if "stable" in found:
        text = "IoU of the CAM's seeds at 0.1 below and above the threshold"
        said.append((f"{found['stable']:.2f}", "confidence", text))
    if "coverage" in found:
        share = f"{100 * found['coverage']:.0f} %"
        said.append((share, "coverage", "of the pixels are labelled as an object"))
    if "parts_median" in found:
        said.append((f"{found['parts_median']:g}", "parts", "connected parts an image (median)"))
    return said
