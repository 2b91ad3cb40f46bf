"""Stage 7: write data/masks, the final label map of every image, cleaned.

An image has the label map of a label set, where there is one; else that of its CAMs and the dCRF,
where its tags are known; else the segmenter's prediction.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from isim import metrics, stage
from isim.data import label_sets, prepared
from isim.data.prepared import Item, Prepared
from isim.errors import UserError
from isim.models import cam, segmenter
from isim.params import Masks, label_set_path
from isim.passes import counts, masks
from isim.passes.journal import Line
from isim.passes.kept import Kept
from isim.passes.masks import Writer
from isim.passes.photographs import BySegmenter, ByTags
from isim.runtime import identity, progress
from isim.stage import Stage

Kinds = dict[str, list[Item]]
# Parameters that tell where label maps and networks are found, or what is shown: no label map
# depends on the names.
_ASIDE = {"labels", "segmenter", "pictures"}


def run(params: Masks, root: Path) -> None:
    """Run the stage: a label set, the CAM network and a segmenter to data/masks and reports.

    Raises UserError for a label set or a network that is wanted and not there, an unreadable image
    or label map, or a failed write.
    """
    data = prepared.load(root)
    stored = label_sets.available(params.labels, data.splits, root)
    kinds = _kinds(data, stored)
    names = ("background", *data.classes)
    trained = root / "models/train_segmenter" / params.segmenter / "model.safetensors"
    if kinds["segmenter"] and not trained.exists():
        raise UserError(
            f"masks.segmenter: {len(kinds['segmenter'])} images have no tags, such as "
            f"{kinds['segmenter'][0].id}, and {trained} is missing; run `isim train-segmenter "
            f"{params.segmenter}`, or give them tags"
        )
    known = {item.id: item for items in kinds.values() for item in items}
    reads = {"data/prepared": root / "data/prepared"}
    reads["labels"] = root / str(label_set_path(params.labels))
    reads |= {"models/train_cam": root / "models/train_cam/model.safetensors", "segmenter": trained}
    reads |= prepared.mask_folders(known.values())
    with stage.opened("masks", params, root, reads=reads) as here:
        write = Writer(params, len(names), here.resume / "masks")
        keep = partial(Kept.on, here, params, _ASIDE, digests=prepared.digests(root))
        copies = keep(labels=len(names), own=lambda item: identity.md5(stored[item.id]))
        lines = masks.copied(copies, kinds["label_set"], stored, write)
        if kinds["cam"]:
            by_tags = _by_tags(here, params, data)
            kept = keep(network=here.hashes["models/train_cam"])
            lines += masks.by_tags(kept, kinds["cam"], by_tags, write)
        if kinds["segmenter"]:
            kept = keep(network=here.hashes["segmenter"])
            network = _by_segmenter(here, trained, params, data)
            lines += masks.by_segmenter(kept, kinds["segmenter"], network, write)
        origins = {kind: len(items) for kind, items in kinds.items()}
        figures, ious = _figures(lines, data, names)
        here.card("masks", params, names, origins | figures)
        here.publish({"masks": "data/masks"})
        here.log("", {k: v for k, v in figures.items() if isinstance(v, int | float)})
        about = {"labels": params.labels, **origins, **figures}
        here.report(partial(_report, about, ious), partial(_show, kinds, params))


def _kinds(data: Prepared, stored: Mapping[str, Path]) -> Kinds:
    """Part the images of all splits, each once, by what their masks are made of."""
    kinds: Kinds = {"label_set": [], "cam": [], "segmenter": []}
    every = {item.id: item for items in data.splits.values() for item in items}
    for item in every.values():
        has_tags = "segmenter" if item.image_label is None else "cam"
        kinds["label_set" if item.id in stored else has_tags].append(item)
    return kinds


def _by_tags(here: Stage, params: Masks, data: Prepared) -> ByTags:
    network, config = cam.load(here.root / "models/train_cam/model.safetensors")
    _require(config.classes, data, "models/train_cam")
    scales, flip = params.scales, params.flip
    return ByTags(here, network, config, side=params.side, scales=scales, flip=flip)


def _by_segmenter(here: Stage, path: Path, params: Masks, data: Prepared) -> BySegmenter:
    network, config = segmenter.load(path)
    _require(config.classes, data, f"models/train_segmenter/{params.segmenter}")
    scales, flip = params.test_scales, params.test_flip
    return BySegmenter(here, network, config, side=params.side, scales=scales, flip=flip)


def _require(classes: Sequence[str], data: Prepared, model: str) -> None:
    if tuple(classes) != data.classes:
        raise UserError(
            f"{model} knows other classes than the prepared data ({len(classes)} and "
            f"{len(data.classes)}); run `dvc repro`"
        )


def _figures(
    lines: Sequence[Line], data: Prepared, names: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Sum up lines: figures of all images and of each split; IoUs where there are masks."""
    square = (len(names), len(names))
    members = counts.members(data.splits)
    before, after = (counts.totals(lines, k, square, members) for k in ("before", "after"))
    splits: dict[str, dict[str, Any]] = {}
    ious: list[dict[str, Any]] = []
    for split, ids in members.items():
        own = [line for line in lines if line["id"] in ids]
        splits[split] = _summed(own)
        # Without a pixel of ground truth there is nothing to score.
        if after[split].any():
            splits[split] |= {
                "scored_images": sum(bool(line["after"]) for line in own),
                "miou_before": metrics.miou(before[split]),
                "miou": metrics.miou(after[split]),
            }
            rows = metrics.iou_table(names, {"iou": after[split]})
            ious += [{"split": split, **row} for row in rows]
    return {**_summed(lines), **splits}, ious


def _summed(lines: Sequence[Line]) -> dict[str, Any]:
    changed, pixels = (sum(line[key] for line in lines) for key in ("changed", "pixels"))
    return {
        "images": len(lines),
        "parts_before": sum(line["parts_before"] for line in lines),
        "parts_after": sum(line["parts_after"] for line in lines),
        "changed_share": changed / pixels if pixels else 0.0,
        "empty_images": sum(line["empty"] for line in lines),
    }


def _report(about: Mapping[str, Any], ious: Sequence[Mapping[str, Any]], here: Stage) -> None:
    splits = {name: row for name, row in about.items() if isinstance(row, Mapping)}
    found = {name: row["miou"] for name, row in splits.items() if "miou" in row}
    here.figures(about, {"masks": found})
    here.table("per_class", ious, ("split", "class", "iou"))
    here.tracked.headline({f"{name}_miou": value for name, value in found.items()})
    mious = "".join(f", mIoU on {name} {100 * value:.2f}" for name, value in found.items())
    progress.tell(
        f"masks: {about['images']} label maps ({about['label_set']} of {about['labels']}, "
        f"{about['cam']} by their tags, {about['segmenter']} by the segmenter), "
        f"{about['parts_before']} parts, {about['parts_after']} after cleaning{mious}"
    )


def _show(kinds: Mapping[str, Sequence[Item]], params: Masks, here: Stage) -> None:
    def results(_: str, item: Item) -> dict[str, Path]:
        return {"mask": here.resume / "masks" / f"{item.id}.png"}

    shown = {kind: items for kind, items in kinds.items() if items}
    here.show(shown, params.pictures, results)
