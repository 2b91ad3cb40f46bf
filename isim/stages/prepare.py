"""Stage 1: check the data source; write data/prepared."""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from isim import stage
from isim.data import prepared
from isim.data.sources import readers
from isim.data.sources.source import Checked, Source, verify
from isim.params import Prepare
from isim.runtime.atomic import atomic_directory, write_csv, write_json
from isim.runtime.paths import resolve_path
from isim.stage import Stage

logger = logging.getLogger(__name__)


def run(params: Prepare, root: Path) -> None:
    """Run the stage: the data source to data/prepared and reports (spec 2).

    Raises:
        UserError: The source is missing or inconsistent (all problems are listed), a download
            failed or the disk cannot be written. `data/prepared` is then as it was.
    """
    with stage.opened("prepare", params, root, reads={}) as here:
        # All of it is work for one process.
        here.report(partial(_prepare, params))


def _prepare(params: Prepare, here: Stage) -> None:
    generated = params.source in readers.GENERATED
    with atomic_directory(here.root / prepared.FOLDER) as out:
        data = out if generated else resolve_path(params.root, here.root)
        source = readers.read(params, data, out)
        checked = verify(source)
        about = {
            "format": prepared.FORMAT,
            "source": params.source,
            "root": prepared.INSIDE if generated else params.root,
            "classes": source.classes,
            "splits": {name: len(ids) for name, ids in source.splits.items()},
        }
        write_json(out / "dataset.json", about)
        _write_lists(source, checked, data, out)
    figures, counts = _figures(source, checked), _counts(source, checked)
    write_json(here.reports / "metrics.json", figures)
    write_csv(here.reports / "counts.csv", counts)
    here.tracked.metrics(figures)
    here.tracked.table("counts", counts)
    _tell(source, figures)


def _write_lists(source: Source, checked: Mapping[str, Checked], data: Path, out: Path) -> None:
    def stored(path: Path | None) -> str:
        if path is None:
            return ""
        if path.is_relative_to(out):
            return prepared.INSIDE + path.relative_to(out).as_posix()
        return path.relative_to(data).as_posix()

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


def _figures(source: Source, checked: Mapping[str, Checked]) -> dict[str, float]:
    figures: dict[str, float] = {"classes": len(source.classes), "images": len(source.entries)}
    for split, ids in source.splits.items():
        results = [checked[name] for name in ids]
        labels = [known for name in ids if (known := source.entries[name].labels) is not None]
        figures |= {
            f"{split}.images": len(ids),
            f"{split}.masks": sum(result.pixels is not None for result in results),
            f"{split}.labels_without_pixels": sum(r.labels_without_pixels for r in results),
            f"{split}.pixels_without_label": sum(r.pixels_without_label for r in results),
        }
        # A test set has none: JSON and MLflow would have nothing to tell.
        if labels:
            figures[f"{split}.labels_per_image"] = round(sum(map(len, labels)) / len(labels), 4)
    return figures | source.figures


def _counts(source: Source, checked: Mapping[str, Checked]) -> list[dict[str, Any]]:
    """Count for each split and class: labelled images, masks that show it, and its pixels."""
    rows = []
    for split, ids in source.splits.items():
        labelled = [name for image in ids for name in source.entries[image].labels or ()]
        masks = [pixels for image in ids if (pixels := checked[image].pixels) is not None]
        # A row of zeros, so that a split without masks has sums.
        pixels = np.stack([np.zeros(len(source.classes) + 1, np.int64), *masks])
        sums = ((pixels > 0).sum(0)[1:].tolist(), pixels.sum(0)[1:].tolist())
        rows += [
            {"split": split, "class": name, "images": labelled.count(name), "masks": m, "pixels": p}
            for name, m, p in zip(source.classes, *sums, strict=True)
        ]
    return rows


def _tell(source: Source, figures: Mapping[str, float]) -> None:
    for split in source.splits:
        labels = figures.get(f"{split}.labels_per_image")
        print(
            f"{split}: {figures[f'{split}.images']} images, {figures[f'{split}.masks']} masks, "
            + ("labels unknown" if labels is None else f"{labels:.2f} labels an image")
        )
        bare = figures[f"{split}.labels_without_pixels"]
        more = figures[f"{split}.pixels_without_label"]
        if bare or more:
            logger.warning(
                f"{split}: {bare} image labels have no pixel in the mask, {more} classes in masks "
                "have no image label"
            )
    for note in source.notes:
        print(note)
