"""Predictions of a segmenter: probabilities, label map, dCRF, PNG and scores (paper 4.1.7)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isim import metrics
from isim.data import files
from isim.data.prepared import Item
from isim.errors import UserError
from isim.labels.crf import refine as crf
from isim.models import folding
from isim.models.inference import multi_scale_probabilities
from isim.models.segmenter import Segmenter, SegmenterConfig
from isim.params import TrainSegmenter
from isim.passes import counts, stream
from isim.passes.features import Features
from isim.passes.kept import Kept
from isim.passes.stream import Array, Tensors
from isim.reporting import words
from isim.runtime import devices
from isim.runtime.here import Here


@dataclass(frozen=True)
class Predicted:
    """Result of a pass over a split, for the split or a part of it.

    `confusion` and `refined_confusion` are (L, L) int64 before and after dCRF (None without
    one), over the `scored` images that have a ground truth; `coverage` is the mean share of all
    images that is labelled, `bounds` are those of the mIoU (`counts.interval`), `speed` is that of
    the whole pass.
    """

    confusion: NDArray[np.int64]
    refined_confusion: NDArray[np.int64] | None
    images: int
    scored: int
    coverage: float
    bounds: Mapping[str, float]
    speed: Mapping[str, float]

    def row(self) -> dict[str, float]:
        """Headline figures under their names in reports and MLflow; nan without any mask."""
        row: dict[str, float] = {"images": self.images, "scored_images": self.scored}
        for prefix, confusion in (("", self.confusion), ("crf_", self.refined_confusion)):
            if confusion is not None:
                row |= metrics.segmentation_figures(prefix, confusion)
        return {**row, **self.bounds, "coverage": self.coverage, **self.speed}

    def __str__(self) -> str:
        """Return the mIoU in words, or what there is without masks."""
        row = self.row()
        if not self.scored:
            return words.miou("prediction", row["miou"], self.coverage)
        after = f", after dCRF {100 * row['crf_miou']:.2f}" if "crf_miou" in row else ""
        return f"mIoU {100 * row['miou']:.2f}{after}"


def confusions(found: Mapping[str, Predicted]) -> counts.Confusions:
    """List the confusion matrices of parts: `<part>` and, after dCRF, `<part>_crf`."""
    listed: counts.Confusions = {}
    for part, result in found.items():
        listed[part] = result.confusion
        if result.refined_confusion is not None:
            listed[f"{part}_crf"] = result.refined_confusion
    return listed


def predict(
    here: Here,
    network: Segmenter | Features,
    config: SegmenterConfig,
    items: Sequence[Item],
    *,
    params: TrainSegmenter,
    parts: counts.Parts,
    kept: Kept,
) -> dict[str, Predicted]:
    """Predict a split to `predictions/<split>` and, after dCRF, `<split>_crf` in the resume folder.

    Returns the scores of each of `parts`, the first of which is the split, over all of its items,
    also those of an earlier, interrupted pass. Raises UserError for an unreadable image, a failed
    write, or probabilities that are not finite.
    """
    num_labels, split = len(config.classes) + 1, next(iter(parts))
    folders = {"plain": here.resume / "predictions" / split}
    if params.crf_after:
        folders["refined"] = here.resume / "predictions" / f"{split}_crf"
    on_gpu = params.crf_after and stream.refines(here.device)
    predicted = _predictor(here, network, config, params, on_gpu=on_gpu)

    def refine(_: Sequence[Item], found: Sequence[Tensors]) -> list[Tensors]:
        from isim.labels.crf import batched

        kept = [probabilities for _, probabilities, _ in found if probabilities is not None]
        images = [image for _, _, image in found if image is not None]
        refined = batched.refine_soft_batch(images, kept, params.crf)
        return [(one[0], None, label) for one, label in zip(found, refined, strict=True)]

    def finish(
        item: Item, label: Array, probabilities: Array | None, refined: Array | None
    ) -> dict[str, Any]:
        if (label == metrics.IGNORE).any():
            raise UserError(
                f"the segmenter's probabilities for {item.image} are not finite: the rates "
                "are likely too high; lower train_segmenter.optimizer.rate"
            )
        if probabilities is not None:
            image = files.read_image(item.image)
            refined = crf.refine_soft(image, probabilities.astype(np.float32), params.crf)
        labels = {"plain": label} if refined is None else {"plain": label, "refined": refined}
        return counts.scored_and_written(item, labels, folders, num_labels)

    outs, on_group = dict.fromkeys(folders.values(), ".png"), refine if on_gpu else None
    done = kept.image(items, finish, name=split, outs=outs, compute=predicted, on_group=on_group)
    square = (num_labels, num_labels)
    plain = counts.totals(done.lines, "plain", square, parts)
    after = counts.totals(done.lines, "refined", square, parts) if params.crf_after else {}
    masked = {item.id for item in items if item.mask is not None}
    found = {}
    for part, ids in parts.items():
        lines = [line for line in done.lines if line["id"] in ids]
        bounds = counts.interval("", lines, "plain", num_labels)
        if params.crf_after:
            bounds |= counts.interval("crf_", lines, "refined", num_labels)
        found[part] = Predicted(
            plain[part],
            after.get(part),
            images=len(ids),
            scored=len(masked & ids),
            coverage=counts.coverage(lines, "plain"),
            bounds=bounds,
            speed=done.speed,
        )
    return found


def _predictor(
    here: Here,
    network: Segmenter | Features,
    config: SegmenterConfig,
    params: TrainSegmenter,
    *,
    on_gpu: bool,
) -> stream.Compute:
    """Prepare a copy of a network; return what predicts images by it.

    Each image gives (H, W) uint8 labels, IGNORE where a probability is not finite; for a dCRF the
    (L, H, W) probabilities; and its pixels, where the dCRF is computed `on_gpu`.
    """
    probable = _probable(here, network, config, params)

    def predicted(items: Sequence[Item], images: Tensor) -> list[Tensors]:
        found: list[Tensors] = []
        for item, image in zip(items, images, strict=True):
            probabilities = probable(item, image)
            finite = torch.isfinite(probabilities).all(0)
            label = torch.where(finite, probabilities.argmax(0), metrics.IGNORE).to(torch.uint8)
            if not params.crf_after:
                found.append((label, None, None))
                continue
            if on_gpu:
                found.append((label, probabilities, image))
            else:
                # To the host in half the bytes: the rounding moves an energy of the dCRF, -log p
                # with p at least 1e-5, by less than 0.004.
                found.append((label, probabilities.half(), None))
        return found

    return predicted


def prepared(here: Here, network: Segmenter) -> Segmenter:
    """Copy a network for inference."""
    dtype = devices.DTYPES[here.precision]
    return folding.for_inference(network, lambda net, images: net(images), here.device, dtype)


def _probable(
    here: Here, network: Segmenter | Features, config: SegmenterConfig, params: TrainSegmenter
) -> Callable[[Item, Tensor], Tensor]:
    """Return what gives an image's (L, H, W) probabilities, given its (3, H, W) uint8 pixels."""
    if isinstance(network, Features):

        def upsampled(item: Item, image: Tensor) -> Tensor:
            height, width = image.shape[-2:]
            return network.probabilities(item, (height, width))

        return upsampled
    made = prepared(here, network)

    def averaged(_: Item, image: Tensor) -> Tensor:
        with devices.autocast(here.precision, here.device):
            return multi_scale_probabilities(
                made, config, image, scales=params.test_scales, flip=params.test_flip
            )

    return averaged
