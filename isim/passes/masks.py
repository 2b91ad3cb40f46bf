"""Final label maps: taken from a label set or made anew, cleaned, scored before and after."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isim.data import files
from isim.data.prepared import Item
from isim.labels.clean.clean import clean, count_parts
from isim.params import Masks
from isim.passes import counts
from isim.passes.journal import Line
from isim.passes.kept import Kept
from isim.passes.photographs import Answer, BySegmenter, ByTags
from isim.passes.stream import Array, Tensors


@dataclass(frozen=True)
class Writer:
    """End of each pass: an image's label map is cleaned, scored and written to `folder`."""

    params: Masks
    num_labels: int
    folder: Path

    def __call__(self, item: Item, label: Array) -> dict[str, Any]:
        """Write an (H, W) uint8 label map; returns its figures.

        Raises UserError when the ground truth cannot be read or does not fit, or the write fails.
        """
        after = clean(label, self.params.least_area, self.params.fill_holes)
        scores = counts.scored(item, {"before": label, "after": after}, self.num_labels)
        parts = {"parts_before": count_parts(label), "parts_after": count_parts(after)}
        changed = {"pixels": label.size, "changed": int((after != label).sum())}
        # Written last: a PNG that is there has been scored.
        files.write_label_map(self.folder / f"{item.id}.png", after)
        return {**parts, **changed, "empty": not after.any(), **scores}


def copied(
    kept: Kept, items: Sequence[Item], stored: Mapping[str, Path], write: Writer
) -> list[Line]:
    """Clean the label maps of a label set, `stored` by id. Errors are those of `read_label_of`."""

    def finish(item: Item) -> dict[str, Any]:
        given = stored[item.id], files.image_size(item.image), write.num_labels
        return write(item, files.read_label_of(*given, ignored=True))

    return kept.image(items, finish, name="copied", outs={write.folder: ".png"}).lines


def by_tags(kept: Kept, items: Sequence[Item], network: ByTags, write: Writer) -> list[Line]:
    """Label images by CAMs of their tags and the dCRF. Raises UserError for unreadable images."""

    def answer(item: Item, image: Array) -> Answer:
        return network(image, item.class_ids)

    def label(planes: Array, labels: Array, image: Array, size: tuple[int, int]) -> Array:
        found = Answer(planes, labels, image, size, are_probable=False)
        return found.refined(write.params.crf).label()

    return _answered(kept, items, answer, label, write=write, name="by_tags")


def by_segmenter(
    kept: Kept, items: Sequence[Item], network: BySegmenter, write: Writer
) -> list[Line]:
    """Label images whose tags are unknown by a segmenter and, if wanted, its dCRF.

    Raises UserError for unreadable images.
    """

    def answer(_: Item, image: Array) -> Answer:
        return network(image)

    def label(planes: Array, labels: Array, image: Array, size: tuple[int, int]) -> Array:
        found = Answer(planes, labels, image, size, are_probable=True)
        wanted = write.params.crf_after
        return (found.refined(write.params.segmenter_crf) if wanted else found).label()

    return _answered(kept, items, answer, label, write=write, name="by_segmenter")


def _answered(
    kept: Kept,
    items: Sequence[Item],
    answer: Callable[[Item, Array], Answer],
    label: Callable[..., Array],
    *,
    write: Writer,
    name: str,
) -> list[Line]:
    def compute(batch: Sequence[Item], images: Tensor) -> list[Tensors]:
        found: list[Tensors] = []
        for item, image in zip(batch, images, strict=True):
            made = answer(item, image.permute(1, 2, 0).cpu().numpy())
            found.append([torch.from_numpy(a) for a in (made.planes, made.labels, made.image)])
        return found

    def finish(item: Item, planes: Array, labels: Array, image: Array) -> dict[str, Any]:
        return write(item, label(planes, labels, image, files.image_size(item.image)))

    outs = {write.folder: ".png"}
    return kept.image(items, finish, name=name, outs=outs, compute=compute).lines
