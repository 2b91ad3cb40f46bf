"""Scores of CAMs and label maps that lie on the disk (spec 8); no network is run."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isim import metrics
from isim.data import files
from isim.data.prepared import Item
from isim.labels.crf import refine as crf
from isim.labels.seeds import seeds
from isim.params import Evaluate, chosen
from isim.passes import counts, each
from isim.passes.counts import Confusions, Parts
from isim.runtime.here import Here

# Images, evenly spread, that the best threshold is bounded by.
BOUNDED = 1000


def thresholds(params: Evaluate) -> tuple[NDArray[np.float32], int]:
    """List the thresholds of the sweep, ascending, and the place of the fixed one among them."""
    # Up to sweep_stop, not beyond; the margin is for steps such as 0.05, which are no binary
    # fractions.
    count = int((params.sweep_stop - params.sweep_start) / params.sweep_step + 1e-6) + 1
    grid = params.sweep_start + params.sweep_step * np.arange(count)
    # The fixed threshold is one of the sweep, so that oracle >= fixed holds by construction.
    threshold = chosen(params.threshold)
    values = np.unique(np.round([*grid, threshold], 6)).astype(np.float32)
    return values, int(np.argmin(np.abs(values - threshold)))


def cams(
    here: Here,
    items: Sequence[Item],
    folder: Path,
    params: Evaluate,
    *,
    num_labels: int,
    parts: Parts,
    pictured: Collection[str],
) -> tuple[Confusions, Confusions, dict[str, dict[str, float]]]:
    """Score a split's CAMs in a folder of its name; items without a ground truth are left out.

    Returns for each of `parts` the confusion matrices (T, L, L) of the seeds at `thresholds`, and
    (L, L) of the seed at the fixed one after dCRF, with the bounds of its mIoU
    (`counts.interval`, `cam_crf_`) and of the best threshold (`oracle_threshold_`). Label maps
    after dCRF of images whose ids are `pictured` are kept, in `labels/<split>` of the resume
    folder. Raises UserError when a file is missing, unreadable or of another image.
    """
    values, fixed = thresholds(params)
    kept = here.resume / "labels" / folder.name

    def finish(item: Item) -> dict[str, Any]:
        ids = item.class_ids
        planes, size = files.read_cam_of(folder / f"{item.id}.npz", item.image, ids)
        best, top = seeds.peak(seeds.grow(planes, size), ids)
        seed = seeds.cut(best, top, float(values[fixed]))
        label = crf.refine(files.read_image(item.image), seed, ids, params.crf)
        if item.id in pictured:
            files.write_label_map(kept / f"{item.id}.png", label)
        sweep = best, np.searchsorted(values, top), len(values)
        return counts.scored(item, {"refined": label}, num_labels, sweep)

    scored = [item for item in items if item.mask is not None]
    lines = each.image(here, scored, finish, name=f"cams/{folder.name}").lines
    square = (num_labels, num_labels)
    swept = counts.totals(lines, "sweep", (len(values), *square), parts)
    bounds = {}
    for part, ids in parts.items():
        own = [line for line in lines if line["id"] in ids]
        bounds[part] = counts.interval("cam_crf_", own, "refined", num_labels)
        places = np.linspace(0, len(own) - 1, min(BOUNDED, len(own))).astype(int)
        sweeps = (counts.total([own[p]], "sweep", (len(values), *square)) for p in places)
        if (best := metrics.best_interval(sweeps)) is not None:
            for name, place in zip(("low", "high"), best, strict=True):
                bounds[part][f"oracle_threshold_{name}"] = round(float(values[place]), 6)
    return swept, counts.totals(lines, "refined", square, parts), bounds


def labels(
    here: Here, items: Sequence[Item], folder: Path, *, num_labels: int, parts: Parts
) -> Confusions:
    """Score label maps `<id>.png` of a folder: an (L, L) confusion matrix for each of `parts`.

    Items without a ground truth are left out. Raises UserError when a file is missing, unreadable
    or of another image.
    """

    def finish(item: Item) -> dict[str, Any]:
        path, size = folder / f"{item.id}.png", files.image_size(item.image)
        label = files.read_label_of(path, size, num_labels, ignored=False)
        return counts.scored(item, {"counts": label}, num_labels)

    scored = [item for item in items if item.mask is not None]
    lines = each.image(here, scored, finish, name=f"labels/{folder.name}").lines
    return counts.totals(lines, "counts", (num_labels, num_labels), parts)
