"""Stage prepare: read the data source, check every file, write lists, labels and manifest."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from isim.atomic import atomic_directory, write_csv, write_json
from isim.data import folder, sbd, shapes, voc
from isim.data.files import FORMAT, PREPARED
from isim.data.source import Checked, Source, verify
from isim.errors import UserError
from isim.params import Prepare, resolve_path
from isim.tracking import stage_run

logger = logging.getLogger(__name__)


def run(params: Prepare, root: Path) -> None:
    """Write `data/prepared` and `reports/prepare` (spec 2).

    Raises:
        UserError: The source is missing or inconsistent (all problems are listed), a download
            failed or the disk cannot be written. `data/prepared` is then as it was.
    """
    with stage_run("prepare", params, root, inputs={}) as tracked:
        with atomic_directory(root / "data" / "prepared") as out:
            inside = params.source == "shapes"
            data_root = out if inside else resolve_path(params.root, root)
            try:
                source = _read(params, data_root, out)
            except OSError as error:
                raise UserError(
                    f"cannot read {error.filename}: {error.strerror}; fix its permissions"
                ) from error
            checked = verify(source)
            about = {
                "format": FORMAT,
                "source": params.source,
                "root": PREPARED if inside else params.root,
                "classes": source.classes,
                "splits": {name: len(ids) for name, ids in source.splits.items()},
            }
            write_json(out / "dataset.json", about)
            _write_lists(source, checked, data_root, out)
        figures: dict[str, float] = {
            "classes": len(source.classes),
            "images": len(source.entries),
        }
        for split in source.splits:
            figures |= _figures(split, source, checked)
        counts = _counts(source, checked)
        write_json(root / "reports" / "prepare" / "metrics.json", figures)
        write_csv(root / "reports" / "prepare" / "counts.csv", counts)
        tracked.metrics(figures)
        tracked.table("counts", counts)
        _tell(source, figures)


def _read(params: Prepare, data_root: Path, out: Path) -> Source:
    if params.source == "shapes":
        size = params.shapes
        shapes.generate(out, size.train, size.val, size.size, params.seed)
        return voc.read_devkit(voc.find_devkit(out, download=False), shapes.CLASSES)
    if params.source == "folder":
        return folder.read_folder(data_root, params.val_fraction, params.seed)
    devkit = voc.find_devkit(data_root, params.download)
    source = voc.read_devkit(devkit, voc.CLASSES)
    if params.sbd:
        dataset = sbd.find_sbd(data_root, params.download)
        source = sbd.add_trainaug(source, devkit, dataset, out / "masks")
    return source


def _write_lists(
    source: Source, checked: Mapping[str, Checked], data_root: Path, out: Path
) -> None:
    def stored(path: Path | None) -> str:
        if path is None:
            return ""
        if path.is_relative_to(out):
            return PREPARED + path.relative_to(out).as_posix()
        return path.relative_to(data_root).as_posix()

    for split, ids in source.splits.items():
        entries = [(name, source.entries[name]) for name in ids]
        rows = [{"id": n, "image": stored(e.image), "mask": stored(e.mask)} for n, e in entries]
        write_csv(out / f"{split}.csv", rows)
    names = sorted(source.entries)
    # Every labelled image has a class, so that an empty cell can tell of unknown labels.
    labels = [{"id": n, "labels": ";".join(source.entries[n].labels or ())} for n in names]
    write_csv(out / "labels.csv", labels)
    files = [file for name in names for file in checked[name].files]
    manifest = [{"path": stored(path), "bytes": size, "md5": md5} for path, size, md5 in files]
    write_csv(out / "manifest.csv", manifest)


def _figures(split: str, source: Source, checked: Mapping[str, Checked]) -> dict[str, float]:
    ids = source.splits[split]
    results = [checked[name] for name in ids]
    labels = [known for name in ids if (known := source.entries[name].labels) is not None]
    figures: dict[str, float] = {
        "images": len(ids),
        "masks": sum(result.pixels is not None for result in results),
        "labels_without_pixels": sum(result.labels_without_pixels for result in results),
        "pixels_without_label": sum(result.pixels_without_label for result in results),
    }
    # Of the test set there is none: JSON and MLflow would have nothing to tell.
    if labels:
        figures["labels_per_image"] = round(sum(map(len, labels)) / len(labels), 4)
    if split == "trainaug":
        figures["official"] = int(sbd.is_official(ids))
    return {f"{split}.{name}": value for name, value in figures.items()}


def _counts(source: Source, checked: Mapping[str, Checked]) -> list[dict[str, Any]]:
    """For each split and class: labelled images, masks that show it, and its pixels."""
    rows = []
    for split, ids in source.splits.items():
        labelled = [name for image in ids for name in source.entries[image].labels or ()]
        masks = [pixels for image in ids if (pixels := checked[image].pixels) is not None]
        # A row of zeros, so that a split without masks has sums.
        pixels = np.stack([np.zeros(len(source.classes) + 1, np.int64), *masks])
        for index, name in enumerate(source.classes, start=1):
            rows.append(
                {
                    "split": split,
                    "class": name,
                    "images": labelled.count(name),
                    "masks": int((pixels[:, index] > 0).sum()),
                    "pixels": int(pixels[:, index].sum()),
                }
            )
    return rows


def _tell(source: Source, figures: Mapping[str, float]) -> None:
    for note in source.notes:
        logger.warning("%s", note)
    for split in source.splits:
        labels = figures.get(f"{split}.labels_per_image")
        print(
            f"{split}: {figures[f'{split}.images']} images, {figures[f'{split}.masks']} masks, "
            + ("labels unknown" if labels is None else f"{labels:.2f} labels an image")
        )
        without_pixels = figures[f"{split}.labels_without_pixels"]
        without_label = figures[f"{split}.pixels_without_label"]
        if without_pixels or without_label:
            logger.warning(
                "%s: %d image labels have no pixel in the mask, %d classes in masks have no "
                "image label",
                split,
                without_pixels,
                without_label,
            )
    if "trainaug" in source.splits:
        official = "is" if figures["trainaug.official"] else "is a part or variant of, not"
        print(f"trainaug {official} the official list of 10,582 images")
