"""Labels that AffinityNet learns from: what two dCRF results of a CAM agree on (spec 6)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from isim import metrics
from isim.data import files
from isim.data.prepared import Item
from isim.labels.crf import refine as crf
from isim.labels.seeds import seeds
from isim.labels.walk.affinity_labels import affinity_label
from isim.params import TrainAffinity
from isim.passes import counts, each
from isim.runtime.here import Here


def make(
    here: Here, items: Sequence[Item], cams: Path, params: TrainAffinity, *, num_labels: int
) -> dict[str, float]:
    """Make the affinity labels of the CAMs in a folder, in `labels` of the resume folder.

    Returns the share of the pixels that are sure, not IGNORE; and of the sure ones the share of
    the right ones and the mIoU, nan without any mask. Raises UserError when a file is missing,
    unreadable or of another image, or cannot be written.
    """
    labels = here.resume / "labels"

    def finish(item: Item) -> dict[str, Any]:
        ids = item.class_ids
        planes, size = files.read_cam_of(cams / f"{item.id}.npz", item.image, ids)
        grown, image = seeds.grow(planes, size), files.read_image(item.image)
        foreground, background = (
            crf.refine(image, seeds.seed(grown, ids, threshold), ids, params.crf)
            for threshold in (params.foreground_threshold, params.background_threshold)
        )
        label = affinity_label(foreground, background)
        sure = label != metrics.IGNORE
        line: dict[str, Any] = {"pixels": label.size, "sure": int(sure.sum()), "counts": []}
        if item.mask is not None:
            truth = files.read_truth(item.mask, label.shape, num_labels)
            truth[~sure] = metrics.IGNORE
            # Any label will do for what is not counted, but the matrix has no place for 255.
            confusion = metrics.confusion_matrix(truth, np.where(sure, label, 0), num_labels)
            line["counts"] = counts.sparse(confusion)
        # Written last: a PNG that is there has been scored.
        files.write_label_map(labels / f"{item.id}.png", label)
        return line

    lines = each.image(here, items, finish, name="labels", outs={labels: ".png"}).lines
    confusion = counts.total(lines, "counts", (num_labels, num_labels))
    pixels = int(confusion.sum())
    return {
        "sure_share": sum(line["sure"] for line in lines) / sum(line["pixels"] for line in lines),
        "sure_accuracy": float(np.trace(confusion)) / pixels if pixels else float("nan"),
        "sure_miou": metrics.miou(confusion),
    }
