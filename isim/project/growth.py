"""Data that came after `isim init`: what the parameters do not use of them, and what to set."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from isim.data import prepared
from isim.data.formats import labels
from isim.data.sources import folder
from isim.data.sources.source import Source
from isim.experiments import preset
from isim.params import Params
from isim.runtime.paths import resolve_path

# With fewer images each is worth more to learn from than to look at.
FEW_IMAGES = 10

# By the name of a split: which of its images have a mask.
Splits = Mapping[str, Sequence[bool]]


def of_source(source: Source) -> Splits:
    """Describe the splits of data as they are now."""
    entries = source.entries
    return {
        split: [entries[id_].mask is not None for id_ in ids]
        for split, ids in source.splits.items()
    }


def of_project(root: Path) -> Splits:
    """Describe the splits that `isim prepare` wrote. Raises UserError where it has not run."""
    splits = prepared.load(root).splits
    return {split: [item.mask is not None for item in items] for split, items in splits.items()}


def lines(params: Params, splits: Splits) -> list[str]:
    """Tell, a line each, what of one's own images is not used, and what is asked for in vain.

    `isim init` chose splits and label sets by the data of that day; what is set stays as it is.
    """
    if params.prepare.source != "folder":
        return []
    return [*_held_out(params, splits), *_lists(params, splits), *_masks(params, splits)]


def _held_out(params: Params, splits: Splits) -> list[str]:
    count, chosen = len(splits.get("val", ())), params.train_cam.eval_split
    if chosen == "none" and count:
        return [f"val has {count} images, but train_cam.eval_split is none; set it to val"]
    if chosen != "none" and not splits.get(chosen):
        return [f"train_cam.eval_split is {chosen}, which has no image; set it to none"]
    known = sum(len(masks) for split, masks in splits.items() if split != "unlabelled")
    if not count and not params.prepare.val_fraction and known >= FEW_IMAGES:
        usual = preset.parameters("own-images").prepare.val_fraction
        return [
            f"none of {known} images is held out; set prepare.val_fraction, such as {usual}, and "
            "train_cam.eval_split to val"
        ]
    return []


def _lists(params: Params, splits: Splits) -> list[str]:
    """Hold the lists of splits against those that there are."""
    found = []
    for name, listed, wanted, why in (
        ("export_cams.splits", params.export_cams.splits, ("val",), "scored by stage evaluate"),
        (
            "train_segmenter.eval_splits",
            params.train_segmenter.eval_splits,
            ("val", "unlabelled"),
            "predicted by the segmenter",
        ),
    ):
        found += [
            f"{split} has {len(splits[split])} images, which are not {why}; add it to {name}"
            for split in wanted
            if splits.get(split) and split not in listed
        ]
        # A test set may be missing.
        found += [
            f"{name} names {split}, which has no image; take it out"
            for split in listed
            if not splits.get(split) and split != "test"
        ]
    return found


def _masks(params: Params, splits: Splits) -> list[str]:
    count = sum(splits.get("train", ()))
    compared = "ground_truth" in [entry.name for entry in params.label_sets]
    if compared and not count:
        return ["label_sets names ground_truth, but no image of train has a mask; take it out"]
    if count and not compared and not params.train_segmenter.trust_masks:
        return [
            f"{count} images of train have a mask that is scored, not learnt from; for a segmenter "
            "of them add {name: ground_truth, path: data/prepared} to label_sets, or set "
            "train_segmenter.trust_masks: true"
        ]
    return []


def unseen_labels(params: Params, root: Path) -> list[str]:
    """Tell, in a line, of a label file beside the images, whose changes DVC does not notice."""
    if params.prepare.source != "folder" or params.prepare.labels != labels.AUTO:
        return []
    path = folder.labels_beside(resolve_path(params.prepare.root, root))
    if path is None:
        return []
    return [
        f"labels are read from {path}, which DVC does not see there; set prepare.labels: {path}, "
        "then run `isim upgrade` and `dvc repro`"
    ]
