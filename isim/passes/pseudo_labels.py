"""One round's pseudo-labels: CAM, seed, dCRF, PNG and scores (paper Algorithm 1, line 8)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isim import metrics
from isim.data import files
from isim.data.prepared import Item
from isim.labels.crf import refine as crf
from isim.labels.seeds import batched as seeds
from isim.models.cam import CamConfig, CamNetwork
from isim.params import TrainCam, chosen
from isim.passes import cams, counts, each, stream
from isim.passes.features import Features
from isim.passes.stream import Array, Tensors
from isim.reporting import pictures
from isim.runtime.here import Here

# Thresholds that a round's CAMs are scored at, to find the best one on the ground truth.
SWEEP = np.round(np.arange(0.05, 0.601, 0.05), 2).astype(np.float32)


@dataclass(frozen=True)
class Scores:
    """Result of a pass over a split.

    The counts are of the images that have a ground truth: (L, L) int64 before and after dCRF, and
    (T, L, L) of the seeds at the thresholds `SWEEP`. `masked_share` is the share of images whose
    label holds no foreground (paper Eq. 3), `coverage` the mean share of them that is labelled.
    """

    seed_confusion: NDArray[np.int64]
    label_confusion: NDArray[np.int64]
    sweep_confusion: NDArray[np.int64]
    threshold: float
    masked_share: float
    coverage: float
    speed: Mapping[str, float]

    def row(self) -> dict[str, float]:
        """Headline figures under their names in reports and MLflow; nan without any mask."""
        fixed = metrics.miou(self.seed_confusion)
        sweep = [metrics.miou(confusion) for confusion in self.sweep_confusion]
        best = int(np.argmax(np.nan_to_num(sweep)))
        oracle, threshold = sweep[best], round(float(SWEEP[best]), 2)
        # The fixed threshold need not be one of the sweep.
        if not oracle > fixed:
            oracle, threshold = fixed, self.threshold
        return {
            "cam_miou": fixed,
            "cam_miou_oracle": oracle,
            "oracle_threshold": threshold,
            "pseudo_label_miou": metrics.miou(self.label_confusion),
            "threshold": self.threshold,
            "masked_share": self.masked_share,
            "coverage": self.coverage,
            **self.speed,
        }

    def per_class(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Rows of IoUs before and after dCRF, one for each label; none without any mask."""
        if not self.label_confusion.any():
            return []
        columns = {"cam_iou": self.seed_confusion, "pseudo_label_iou": self.label_confusion}
        return metrics.iou_table(("background", *classes), columns)


def regenerate(
    here: Here,
    network: CamNetwork | Features,
    config: CamConfig,
    items: Sequence[Item],
    *,
    params: TrainCam,
    name: str,
    refined: bool = True,
) -> Scores:
    """Make a round's labels in `pseudo_labels/<name>` of the resume folder, and score them.

    The full-resolution CAMs of the images that are shown are in its folder `<name>`. The
    scores are over all items, also those of an earlier, interrupted pass. Without the dCRF
    (`refined`) the seeds are the labels. Raises UserError for an
    unreadable image or a failed write.
    """
    pictured = {item.id for item in pictures.choose(items, params.pictures)}
    labels, scratch = here.resume / "pseudo_labels" / name, here.resume / name
    num_labels, threshold = len(config.classes) + 1, chosen(params.threshold)
    make = cams.maker(here, network, config, params)
    on_gpu = refined and stream.refines(here.device)

    def seeds_of(batch: Sequence[Item], images: Tensor) -> list[Tensors]:
        """(3, H, W) uint8: seed, label of the highest CAM, thresholds of SWEEP that it passes."""
        found: list[Tensors] = []
        for item, image, cam in zip(batch, images, make(batch, images), strict=True):
            best, height = seeds.peak(cam, torch.from_numpy(item.class_ids))
            seed = seeds.cut(best, height, threshold)
            maps = torch.stack([seed, best, seeds.levels(height, SWEEP.tolist())])
            kept = cam if item.id in pictured else None
            found.append((maps, image if on_gpu else None, kept))
        return found

    def refine(group: Sequence[Item], found: Sequence[Tensors]) -> list[Tensors]:
        from isim.labels.crf import batched

        images = [image for _, image, _ in found if image is not None]
        ids = [item.class_ids for item in group]
        cut = [maps[0] for maps, _, _ in found if maps is not None]
        refined = batched.refine_batch(images, cut, ids, params.crf)
        return [(maps, label, cam) for (maps, _, cam), label in zip(found, refined, strict=True)]

    def finish(item: Item, maps: Array, label: Array | None, cam: Array | None) -> dict[str, Any]:
        seed, best, levels = maps
        if cam is not None:
            files.write_cam(scratch / f"{item.id}.npz", cam, item.class_ids, seed.shape)
        if not refined:
            label = seed
        elif label is None:
            label = crf.refine(files.read_image(item.image), seed, item.class_ids, params.crf)
        sweep = best, levels, len(SWEEP)
        scores = counts.scored(item, {"seed": seed, "label": label}, num_labels, sweep)
        # Written last: a PNG that is there has been scored.
        files.write_label_map(labels / f"{item.id}.png", label)
        return {"masked": not label.any(), **scores}

    outs, on_group = {labels: ".png"}, refine if on_gpu else None
    done = each.image(
        here, items, finish, name=f"{name}/progress", outs=outs, compute=seeds_of, on_group=on_group
    )
    square = (num_labels, num_labels)
    before, after = (counts.total(done.lines, key, square) for key in ("seed", "label"))
    sweep = counts.total(done.lines, "sweep", (len(SWEEP), *square))
    masked = sum(line["masked"] for line in done.lines) / len(items)
    coverage = counts.coverage(done.lines, "label")
    return Scores(before, after, sweep, threshold, masked, coverage, done.speed)
