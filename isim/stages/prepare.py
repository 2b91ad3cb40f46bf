"""Stage 1: check the data source; write data/prepared."""

import glob
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from isim import stage
from isim.data import prepared, problems
from isim.data.formats.labels import AUTO
from isim.data.problems import Problem
from isim.data.sources import readers, review
from isim.data.sources.source import Checked, Source, Treatment, examine
from isim.errors import UserError, one_line
from isim.params import Prepare
from isim.runtime import identity
from isim.runtime.atomic import atomic_directory, write_csv, write_json
from isim.runtime.paths import home, resolve_path
from isim.stage import Stage

logger = logging.getLogger(__name__)
# Folder of what is made, in the resume folder.
_MADE = "prepared"


def run(
    params: Prepare, root: Path, *, keep: Callable[[Source], Source] = lambda source: source
) -> None:
    """Run the stage: the data source, or what `keep` keeps of it, to data/prepared and reports.

    Raises:
        UserError: The source is missing or inconsistent (all problems are listed), a download
            failed or the disk cannot be written. `data/prepared` is then as it was.
    """
    places = [] if params.source in readers.GENERATED else _places(params, root)
    state = identity.of_times(places)
    with stage.opened("prepare", params, root, reads={}, state=state) as here:
        # All of it is work for one process.
        here.report(partial(_prepare, params, keep))
        # A download, or somebody else, may have changed the source meanwhile.
        here.keeps = identity.of_times(places) == state


def _places(params: Prepare, root: Path) -> list[Path]:
    """List files and folders that the source is made of: labels may lie beside it, or elsewhere."""
    folder = resolve_path(params.root, root)
    beside = sorted(folder.parent.glob(f"{glob.escape(folder.name)}.*"))
    return [folder, *beside, *([] if params.labels == AUTO else [folder / params.labels])]


def _prepare(params: Prepare, keep: Callable[[Source], Source], here: Stage) -> None:
    generated = params.source in readers.GENERATED
    with atomic_directory(here.resume / _MADE) as out:
        data = out if generated else resolve_path(params.root, here.root)
        source, checked, found = _read(params, keep, data, out, here=here)
        about = {
            "format": prepared.FORMAT,
            "source": params.source,
            "root": prepared.INSIDE if generated else params.root,
            "classes": source.classes,
            "splits": {name: len(ids) for name, ids in source.splits.items()},
        }
        write_json(out / "dataset.json", about)
        _write_lists(source, checked, data, out)
        files = {path: md5 for result in checked.values() for path, _, md5 in result.files}
    here.publish({_MADE: prepared.FOLDER})
    outside = {path: md5 for path, md5 in files.items() if not path.is_relative_to(out)}
    prepared.remember(home(here.root), outside)
    prepared.remember_splits(home(here.root), source.splits)
    figures, counts = _figures(source, checked), _counts(source, checked)
    here.figures(figures, {"images": figures["images"]}, timed=False)
    write_csv(here.reports / "counts.csv", counts)
    here.tracked.metrics(figures)
    here.tracked.table("counts", counts)
    _tell(source, figures, found)


def _read(
    params: Prepare, keep: Callable[[Source], Source], data: Path, out: Path, *, here: Stage
) -> tuple[Source, dict[str, Checked], Sequence[Problem]]:
    """Read and check the source; all problems are in problems.csv when one of them ends the run."""
    shown = None if params.sixteen_bit == "refuse" else params.sixteen_bit
    treatment = Treatment(out, params.unreadable == "skip", shown)
    try:
        examined = examine(keep(readers.read(params, data, out)), treatment)
        source, checked = examined.source, examined.results
        found = [*examined.problems, *review.review(source, checked)]
        found += _moved(source, here)
    except UserError as error:
        _write_problems([Problem("unusable data", str(error))], here.root / problems.FILE)
        raise
    # Also when errors end the run: all is told at once.
    for line in problems.warnings(found):
        logger.warning(line)
    if any(problem.error for problem in found):
        _write_problems(found, here.root / problems.FILE)
    problems.refuse(found)
    _write_problems(found, here.reports / "problems.csv")
    if not source.splits.get(next(iter(source.splits))):
        raise UserError(f"no image of the first split is left; look at {problems.FILE}")
    return source, checked, found


def _moved(source: Source, here: Stage) -> list[Problem]:
    """Tell of images that were in another one of train and val when the stage last ran."""
    to_train, to_val = prepared.moved(home(here.root), source.splits)
    if not to_train and not to_val:
        return []
    what = (
        f"val is not that of the last run: {len(to_train)} images went to train, {len(to_val)} "
        f"came from there, such as {[*to_train, *to_val][0]}; do not compare figures on val"
    )
    return [Problem("val has changed", what, error=False)]


def _write_problems(found: Sequence[Problem], path: Path) -> None:
    # A file of the header alone tells that there is no problem.
    header = ["kind", "severity", "file", "what"]
    write_csv(path, problems.rows(found), header)


def _write_lists(source: Source, checked: Mapping[str, Checked], data: Path, out: Path) -> None:
    def stored(path: Path | None) -> str:
        if path is None:
            return ""
        if path.is_relative_to(out):
            return prepared.INSIDE + path.relative_to(out).as_posix()
        return path.relative_to(data).as_posix()

    for split, ids in source.splits.items():
        results = [(name, checked[name]) for name in ids]
        rows = [{"id": n, "image": stored(r.image), "mask": stored(r.mask)} for n, r in results]
        write_csv(out / f"{split}.csv", rows, ["id", "image", "mask"])
    names = sorted(source.entries)
    labels = [(name, source.entries[name].labels) for name in names]
    # An empty cell of a known image says that it shows none of the classes.
    known = [
        {"id": name, "labels": ";".join(found or ()), "known": int(found is not None)}
        for name, found in labels
    ]
    write_csv(out / "labels.csv", known)
    files = [file for name in names for file in checked[name].files]
    manifest = [{"path": stored(path), "bytes": size, "md5": md5} for path, size, md5 in files]
    write_csv(out / "manifest.csv", manifest)
    splits = {}
    for split, ids in source.splits.items():
        found = [(name, source.entries[name].labels, checked[name]) for name in ids]
        known_ones = [
            [name, labels, [(stored(path), md5) for path, md5 in _read_later(result)]]
            for name, labels, result in found
            if labels is not None
        ]
        if known_ones:
            digest = identity.digest({"images": known_ones})
            splits[split] = {"images": len(known_ones), "digest": digest}
    write_json(out / prepared.LABELLED, {"classes": source.classes, "splits": splits})


def _read_later(result: Checked) -> list[tuple[Path, str]]:
    """Files that the stages read for an image, and their md5: those that were made, if any."""
    known = {path: md5 for path, _, md5 in result.files}
    paths = filter(None, (result.image, result.mask))
    return [(path, known.get(path) or identity.md5(path)) for path in paths]


def _figures(source: Source, checked: Mapping[str, Checked]) -> dict[str, float]:
    figures: dict[str, float] = {"classes": len(source.classes), "images": len(source.entries)}
    for split, ids in source.splits.items():
        results = [checked[name] for name in ids]
        labels = [known for name in ids if (known := source.entries[name].labels) is not None]
        figures |= {
            f"{split}.images": len(ids),
            f"{split}.masks": sum(result.pixels is not None for result in results),
            f"{split}.labels_without_pixels": sum(len(r.bare) for r in results),
            f"{split}.pixels_without_label": sum(len(r.more) for r in results),
        }
        # A test set has none: JSON and MLflow would have nothing to tell.
        if labels:
            figures[f"{split}.negatives"] = sum(not known for known in labels)
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


def _tell(source: Source, figures: Mapping[str, float], found: Sequence[Problem]) -> None:
    for split in source.splits:
        labels = figures.get(f"{split}.labels_per_image")
        told = "labels unknown" if labels is None else f"{labels:.2f} labels an image"
        if negatives := figures.get(f"{split}.negatives"):
            told += f", {negatives} with none of the classes"
        images, masks = figures[f"{split}.images"], figures[f"{split}.masks"]
        print(f"{split}: {images} images, {masks} masks, {told}")
    for note in source.notes:
        print(one_line(note))
    if count := sum(not problem.error for problem in found):
        print(f"{count} warnings: {problems.FILE}")
