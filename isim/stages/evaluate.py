"""Score CAMs, CAM + dCRF and every round's pseudo-labels (spec 8)."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from isim import atomic, metrics, pictures, tracking, viz
from isim.data import files
from isim.data.dataset import Item, Prepared, load_prepared
from isim.errors import UserError
from isim.labels import seeds
from isim.params import Evaluate, resolve_path
from isim.regeneration import class_ids, grow, refine_all
from isim.workers import RefineTask, dense


def run(params: Evaluate, root: Path) -> None:
    """Run the stage: CAMs and pseudo-labels against the ground truth, to reports/evaluate.

    A split that is part of a scored one (train of trainaug) is reported apart, too. Images
    without a ground truth are left out; where none has one, there is nothing to score
    and the reports say so with nan (null in JSON).

    Args:
        params: Section `evaluate`.
        root: Project folder.

    Raises:
        UserError: No CAMs, no prepared data, a missing or unreadable file.
    """
    prepared = load_prepared(root / "data/prepared", partial(resolve_path, root=root))
    names = ("background", *prepared.classes)
    # Up to sweep_stop, not beyond; the margin is for steps such as 0.05, which are no binary
    # fractions.
    count = int((params.sweep_stop - params.sweep_start) / params.sweep_step + 1e-6) + 1
    grid = params.sweep_start + params.sweep_step * np.arange(count)
    # The fixed threshold is one of the sweep, so that oracle >= fixed holds by construction.
    thresholds = np.unique(np.round([*grid, params.threshold], 6)).astype(np.float32)
    fixed = int(np.argmin(np.abs(thresholds - params.threshold)))
    cams, reports = root / "data/cams", root / "reports/evaluate"
    splits = sorted(path.name for path in cams.glob("*") if path.is_dir())
    if not splits:
        raise UserError(f"{cams} holds no CAMs; run `isim export-cams` first")

    confusions: dict[str, NDArray[np.int64]] = {}
    report: dict[str, dict[str, Any]] = {}
    sweep: list[dict[str, Any]] = []
    inputs = {name: root / name for name in ("data/prepared", "data/cams", "data/pseudo_labels")}
    with tracking.stage_run("evaluate", params, root, inputs) as tracked:
        for split in splits:
            parts = {split: frozenset(item.id for item in prepared.split(split))}
            inner = _inside(prepared, parts[split])
            parts |= {name: ids for name, ids in inner.items() if name not in splits}
            items = [item for item in prepared.split(split) if item.mask is not None]
            shown = pictures.choose(items, params.pictures)
            with tempfile.TemporaryDirectory() as refined_labels:
                at_thresholds, refined = _score_cams(
                    items,
                    cams / split,
                    params,
                    thresholds,
                    fixed,
                    len(names),
                    {item.id: Path(refined_labels) / f"{item.id}.png" for item in shown},
                    parts,
                )
                for item in shown:
                    stored = cams / split / f"{item.id}.npz"
                    label = Path(refined_labels) / f"{item.id}.png"
                    viz.write_png(
                        reports / f"pictures/{split}/{item.id}.png",
                        pictures.strip(item, stored, label, columns=4),
                    )
                    square = pictures.strip(item, stored, label, columns=2)
                    tracked.image(f"{split}/{item.id}", square, step=0)
            for name, ids in parts.items():
                mious = [metrics.miou(confusion) for confusion in at_thresholds[name]]
                oracle = int(np.nanargmax(mious)) if np.isfinite(mious).any() else fixed
                confusions[f"{name}_cam"] = at_thresholds[name][fixed]
                confusions[f"{name}_cam_crf"] = refined[name]
                report[name] = {
                    "images": sum(item.id in ids for item in items),
                    **_figures("cam", at_thresholds[name][fixed]),
                    "cam_miou_oracle": mious[oracle],
                    "oracle_threshold": round(float(thresholds[oracle]), 6),
                    **_figures("cam_crf", refined[name]),
                }
                sweep += [
                    {"split": name, "threshold": f"{threshold:.3f}", "cam_miou": value}
                    for threshold, value in zip(thresholds, mious, strict=True)
                ]
                tracked.metrics({f"{name}_{k}": v for k, v in report[name].items()})
        known = {item.id: item for items in prepared.splits.values() for item in items}
        snapshots = sorted((root / "data/pseudo_labels").glob("round_*"))
        for folder in snapshots:
            labelled = frozenset(path.stem for path in folder.glob("*.png")) & known.keys()
            for name, ids in {"": labelled, **_inside(prepared, labelled)}.items():
                key = f"{folder.name}_{name}" if name else folder.name
                confusion = _score_labels(folder, [known[id_] for id_ in sorted(ids)], len(names))
                confusions[key] = confusion
                report[key] = _figures("pseudo_label", confusion)
                prefix = f"{name}_" if name else ""
                tracked.metrics(
                    {f"{prefix}{k}": v for k, v in report[key].items()},
                    step=int(folder.name.removeprefix("round_")),
                )
        headline = {
            f"{split}_{name}": report[split][name]
            for split in splits
            for name in ("cam_miou", "cam_crf_miou")
        }
        # Here too: train_cam may have come from DVC's run-cache, without an MLflow run.
        rounds = [folder.name for folder in snapshots]
        if rounds:
            headline["pseudo_label_miou"] = report[rounds[-1]]["pseudo_label_miou"]
        tracked.headline(headline)
        per_class = _per_class(confusions, names)
        tracked.table("per_class", per_class)
        atomic.write_csv(reports / "sweep.csv", sweep)
        atomic.write_csv(reports / "per_class.csv", per_class)
        atomic.write_csv(reports / "confusion.csv", _pairs(confusions, names))
        _draw(reports / "pictures", confusions, names)
        atomic.write_json(reports / "metrics.json", report)


def _inside(prepared: Prepared, ids: frozenset[str]) -> dict[str, frozenset[str]]:
    """Splits that are a part of `ids`, as train is of trainaug: spec 8 wants both figures."""
    splits = {name: frozenset(item.id for item in items) for name, items in prepared.splits.items()}
    return {name: part for name, part in splits.items() if part and part < ids}


def _draw(folder: Path, confusions: dict[str, NDArray[np.int64]], names: tuple[str, ...]) -> None:
    for source, confusion in confusions.items():
        viz.confusion_heatmap(confusion, names, folder / f"confusion_{source}.png")
    series = {source: metrics.iou(confusion).tolist() for source, confusion in confusions.items()}
    viz.class_bars(names, series, "IoU", folder / "per_class.png")


def _score_cams(
    items: list[Item],
    folder: Path,
    params: Evaluate,
    thresholds: NDArray[np.float32],
    fixed: int,
    num_labels: int,
    outs: dict[str, Path],
    parts: dict[str, frozenset[str]],
) -> tuple[dict[str, NDArray[np.int64]], dict[str, NDArray[np.int64]]]:
    """Confusion matrices (T, L, L) of the seeds and (L, L) of the fixed seed after dCRF.

    They are counted for each of `parts`, sets of image ids. The label maps after dCRF are written
    for the images that `outs` names.
    """
    shape = (len(thresholds), num_labels, num_labels)
    totals = {name: np.zeros(shape, np.int64) for name in parts}

    def tasks() -> Iterator[RefineTask]:
        for item in items:
            assert item.mask is not None
            planes, ids, size = files.read_cam(folder / f"{item.id}.npz")
            truth = files.read_truth(item.mask, size, num_labels)
            best, top = seeds.peak(grow(planes, size), ids)
            counts = metrics.sweep_confusion(truth, best, top, thresholds, num_labels)
            for name, ids_of_part in parts.items():
                if item.id in ids_of_part:
                    totals[name] += counts
            seed = np.where(top > thresholds[fixed], best, 0).astype(np.uint8)
            yield RefineTask(
                item.id,
                item.image,
                seed,
                class_ids(item),
                params.crf,
                item.mask,
                outs.get(item.id),
                num_labels,
            )

    refined = {name: np.zeros(shape[1:], np.int64) for name in parts}
    progress = tqdm(refine_all(tasks()), folder.name, len(items), leave=False, disable=None)
    for result in progress:
        for name, ids_of_part in parts.items():
            if result.id in ids_of_part:
                refined[name] += dense(result.label_counts, num_labels)
    return totals, refined


def _score_labels(folder: Path, items: list[Item], num_labels: int) -> NDArray[np.int64]:
    confusion = np.zeros((num_labels, num_labels), np.int64)
    for item in items:
        if item.mask is not None:
            label = files.read_label_map(folder / f"{item.id}.png")
            truth = files.read_truth(item.mask, label.shape, num_labels)
            confusion += metrics.confusion_matrix(truth, label, num_labels)
    return confusion


def _figures(name: str, confusion: NDArray[np.int64]) -> dict[str, float]:
    precision, recall = metrics.precision_recall(confusion)
    return {
        f"{name}_miou": metrics.miou(confusion),
        f"{name}_precision": precision,
        f"{name}_recall": recall,
    }


def _per_class(
    confusions: dict[str, NDArray[np.int64]], names: tuple[str, ...]
) -> list[dict[str, Any]]:
    return [
        {"source": source, "class": name, "iou": float(value)}
        for source, confusion in confusions.items()
        for name, value in zip(names, metrics.iou(confusion), strict=True)
    ]


def _pairs(
    confusions: dict[str, NDArray[np.int64]], names: tuple[str, ...]
) -> list[dict[str, Any]]:
    return [
        {"source": source, "actual": actual, "predicted": predicted, "pixels": int(pixels)}
        for source, confusion in confusions.items()
        for actual, row in zip(names, confusion, strict=True)
        for predicted, pixels in zip(names, row, strict=True)
    ]
