"""Figures of masks that need no ground truth: of every image, every class, and all of them."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isim import metrics
from isim.data.prepared import Item

Row = dict[str, Any]
# Lines of `passes.overviews`, and rows of reports/train_cam/tags.csv.
Lines = Sequence[Mapping[str, Any]]
Tags = Iterable[Mapping[str, Any]]


def disputes(rows: Tags) -> dict[str, list[Row]]:
    """Group rows of disputed tags by image id, the clearest first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        values = {name: float(row[name]) for name in ("probability", "usual")}
        entry = {"class": row["class"], "tagged": row["tagged"] == "1", **values}
        found.setdefault(row["id"], []).append(entry)
    return found


def image(
    item: Item,
    splits: Sequence[str],
    line: Mapping[str, Any],
    *,
    classes: Sequence[str],
    disputed: int,
    covering: float,
) -> Row:
    """Judge an image by its line and the number of its tags that the network disputes.

    Its mask covers everything from the share `covering` on. `labels` are the names of its tags.

    What is not known is None; `doubt` is what `ranked` makes it.
    """
    tags = None if item.image_label is None else int(item.image_label.sum())
    names = () if tags is None else [classes[label - 1] for label in item.class_ids]
    row: Row = {"id": item.id, "splits": ";".join(splits), "tags": tags, "labels": ";".join(names)}
    row |= dict.fromkeys(("doubt", "agreement", "stable", "coverage", "parts", "iou"))
    row |= {"empty": 0, "covering": 0, "disputed": disputed}
    if "pixels" not in line:
        return row
    pixels = dict(line["pixels"])
    total = sum(pixels.values())
    foreground = total - pixels.get(metrics.BACKGROUND, 0)
    row |= {"coverage": foreground / total, "parts": line["parts"]}
    row |= {name: line.get(name) for name in ("agreement", "stable")}
    row["empty"] = int(bool(tags) and not foreground)
    row["covering"] = int(foreground >= covering * total)
    row["iou"] = line.get("iou")
    return row


def ranked(rows: Sequence[Row], lines: Lines) -> list[Row]:
    """Give rows their `doubt` in [0, 1], by which images are ordered, the worst first.

    It is 1 where the tags promise an object and the mask has none. Else it is the share of the
    images with the same `pair` that are better, in the mean over what is known of three figures:
    `agreement`, `stable` and `parts`, of which few are good. Each alone orders images less well
    (docs/results.md); shares let images stand in one order of which other pairs are compared.
    """
    kinds = [tuple(line.get("pair", ())) for line in lines]
    shares: list[list[float]] = [[] for _ in rows]
    for name, good in (("agreement", 1), ("stable", 1), ("parts", -1)):
        known: dict[tuple[str, ...], list[int]] = {}
        for place, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
            if row[name] is not None:
                known.setdefault(kind, []).append(place)
        for places in known.values():
            values = np.array([good * rows[place][name] for place in places])
            better = len(values) - np.searchsorted(np.sort(values), values, "right")
            for place, share in zip(places, (better / len(values)).tolist(), strict=True):
                shares[place].append(share)
    found = []
    for row, known_shares in zip(rows, shares, strict=True):
        doubt = statistics.mean(known_shares) if known_shares else None
        found.append(row | {"doubt": 1.0 if row["empty"] else doubt})
    return found


def compared(lines: Lines) -> tuple[str, ...]:
    """Choose the pair of label maps that all images are summed up by: with a segmenter's first."""
    pairs = Counter(tuple(line["pair"]) for line in lines if "pair" in line)
    return max(pairs, key=lambda pair: ("segmenter" in pair, pairs[pair]), default=())


def dense(sparse: Iterable[Sequence[int]], labels: int) -> NDArray[np.int64]:
    """Make an (L, L) confusion matrix of sparse counts."""
    counts = np.zeros(labels**2, np.int64)
    for place, number in sparse:
        counts[place] = number
    return counts.reshape(labels, labels)


def classes(names: Sequence[str], items: Sequence[Item], lines: Lines) -> list[Row]:
    """Judge each foreground class.

    Rows have the numbers of `images` tagged with it, of masks that show it (`masks`) and of tagged
    ones that do not (`missing`), its mean share of the tagged images' masks (`coverage`), and the
    IoU of the two label maps that are compared (`agreement`) and with the truth (`iou`), over all
    pixels; None where nothing is known.
    """
    labels, pair = len(names) + 1, compared(lines)
    between, truth = np.zeros((2, labels, labels), np.int64)
    shares: list[list[float]] = [[] for _ in names]
    shown: Counter[int] = Counter()
    for item, line in zip(items, lines, strict=True):
        if pair and tuple(line.get("pair", ())) == pair:
            between += dense(line["between"], labels)
        truth += dense(line.get("counts", ()), labels)
        pixels = dict(line.get("pixels", ()))
        shown.update(pixels.keys())
        if pixels and item.image_label is not None:
            total = sum(pixels.values())
            for label in item.class_ids:
                shares[label - 1].append(pixels.get(int(label), 0) / total)
    known = [item.image_label for item in items if item.image_label is not None]
    tagged = np.sum([np.zeros(len(names)), *known], 0).astype(int)
    ious = [[None if np.isnan(v) else float(v) for v in metrics.iou(c)] for c in (between, truth)]
    return [
        {
            "class": name,
            "images": int(tagged[place]),
            "masks": shown[place + 1],
            "missing": sum(share == 0 for share in shares[place]),
            "coverage": statistics.mean(shares[place]) if shares[place] else None,
            "agreement": ious[0][place + 1],
            "iou": ious[1][place + 1],
        }
        for place, name in enumerate(names)
    ]


def together(rows: Sequence[Row], lines: Lines, labels: int) -> Row:
    """Sum the images up: means over those of which a figure is known, and numbers of others.

    `miou` with its interval is there if any image has a truth.
    """
    found: Row = {"images": len(rows), "with_mask": sum(r["coverage"] is not None for r in rows)}
    for name in ("stable", "coverage"):
        if known := [row[name] for row in rows if row[name] is not None]:
            found[name] = statistics.mean(known)
    if parts := [row["parts"] for row in rows if row["parts"] is not None]:
        found["parts_median"] = statistics.median(parts)
    if pair := compared(lines):
        agree = [line["agreement"] for line in lines if tuple(line.get("pair", ())) == pair]
        found |= {"compared": " and ".join(pair), "agreement": statistics.mean(agree)}
        found["compared_images"] = len(agree)
    for name in ("empty", "covering", "disputed"):
        found[name] = sum(row[name] > 0 for row in rows)
    scored = [line["counts"] for line in lines if "counts" in line]
    found["scored_images"] = len(scored)
    if scored:
        total = sum((dense(counts, labels) for counts in scored), np.zeros((labels, labels), int))
        low, high = metrics.miou_interval(dense(counts, labels) for counts in scored)
        found |= {"miou": metrics.miou(total), "miou_low": low, "miou_high": high}
    return found
