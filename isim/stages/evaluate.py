"""Score CAMs, CAM + dCRF and every round's pseudo-labels (spec 8)."""

import contextlib
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from isim import atomic, distributed, engine, metrics, pictures, splits, tracking, viz
from isim.data import files
from isim.data.dataset import Item, load_prepared
from isim.errors import UserError
from isim.labels import crf, seeds
from isim.params import Evaluate, digest, home, resolve_path
from isim.splits import Confusions, Parts
from isim.stream import in_workers
from isim.workers import RefineTask, dense, refine_image


def run(params: Evaluate, root: Path) -> None:
    """Run the stage: CAMs and pseudo-labels against the ground truth, to reports/evaluate.

    A split that is part of a scored one (train of trainaug) is reported apart, too. Images
    without a ground truth are left out; where none has one, there is nothing to score
    and the reports say so with nan (null in JSON).

    Args:
        params: Section `evaluate`.
        root: Project folder.

    Raises:
        UserError: No CAMs, no prepared data, a missing or unreadable file; hosts that differ.
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
    stored = sorted(path.name for path in cams.glob("*") if path.is_dir())
    if not stored:
        raise UserError(f"{cams} holds no CAMs; run `isim export-cams` first")
    chosen = {split: prepared.split(split) for split in stored}

    members = splits.members(prepared.splits)
    confusions: Confusions = {}
    report: dict[str, dict[str, Any]] = {}
    sweep: list[dict[str, Any]] = []
    inputs = {name: root / name for name in ("data/prepared", "data/cams", "data/pseudo_labels")}
    if distributed.world() > 1:
        # Hosts with other splits or rounds would wait for each other. There is nothing to resume.
        code, cpu = engine.code_files("evaluate"), torch.device("cpu")
        engine.run_digest(digest(params), list(inputs.values()), code, cpu, "fp32")
    with tracking.stage_run("evaluate", params, root, inputs) as tracked:
        if distributed.is_writer():
            shutil.rmtree(reports / "pictures", ignore_errors=True)
        for split, parts in splits.parts(stored, members).items():
            items = [item for item in chosen[split] if item.mask is not None]
            shown = pictures.choose(items, params.pictures)
            # Each is written by the process that scores the image.
            with _common_folder(home(root) / ".isim/evaluate") as refined_labels:
                at_thresholds, refined = _score_cams(
                    items,
                    cams / split,
                    params,
                    thresholds,
                    fixed,
                    len(names),
                    {item.id: refined_labels / f"{item.id}.png" for item in shown},
                    parts,
                )
                distributed.share(refined_labels)
                for item in shown if distributed.is_writer() else ():
                    cam = cams / split / f"{item.id}.npz"
                    label = refined_labels / f"{item.id}.png"
                    viz.write_png(
                        reports / f"pictures/{split}/{item.id}.png",
                        pictures.strip(item, cam, label, columns=4),
                    )
                    square = pictures.strip(item, cam, label, columns=2)
                    tracked.image(f"{split}/{item.id}", square, step=0)
            for name, ids in parts.items():
                mious = [metrics.miou(confusion) for confusion in at_thresholds[name]]
                oracle = int(np.nanargmax(mious)) if np.isfinite(mious).any() else fixed
                confusions[f"{name}_cam"] = at_thresholds[name][fixed]
                confusions[f"{name}_cam_crf"] = refined[name]
                report[name] = {
                    "images": sum(item.id in ids for item in items),
                    **metrics.segmentation_figures("cam_", at_thresholds[name][fixed]),
                    "cam_miou_oracle": mious[oracle],
                    "oracle_threshold": round(float(thresholds[oracle]), 6),
                    **metrics.segmentation_figures("cam_crf_", refined[name]),
                }
                sweep += [
                    {"split": name, "threshold": f"{threshold:.3f}", "cam_miou": value}
                    for threshold, value in zip(thresholds, mious, strict=True)
                ]
                tracked.metrics({f"{name}_{k}": v for k, v in report[name].items()})
        headline = {
            f"{split}_{name}": figures[name]
            for split, figures in report.items()
            for name in ("cam_miou", "cam_crf_miou")
        }
        known = {item.id: item for items in prepared.splits.values() for item in items}
        folders = (root / "data/pseudo_labels").glob("round_*")
        snapshots = sorted(folders, key=lambda folder: (len(folder.name), folder.name))
        for folder in snapshots:
            labelled = frozenset(path.stem for path in folder.glob("*.png")) & known.keys()
            parts = {"": labelled, **splits.inside(labelled, members)}
            labelled_items = [known[id_] for id_ in sorted(labelled)]
            for name, confusion in _score_labels(folder, labelled_items, len(names), parts).items():
                key = _join(folder.name, name)
                confusions[key] = confusion
                report[key] = metrics.segmentation_figures("pseudo_label_", confusion)
                tracked.metrics(
                    {_join(name, k): v for k, v in report[key].items()},
                    step=int(folder.name.removeprefix("round_")),
                )
        # Here too: train_cam may have come from DVC's run-cache, without an MLflow run.
        if snapshots:
            headline["pseudo_label_miou"] = report[snapshots[-1].name]["pseudo_label_miou"]
        if not distributed.is_writer():
            # The rest is written once on every disk.
            return
        tracked.headline(headline)
        per_class = _per_class(confusions, names)
        tracked.table("per_class", per_class)
        atomic.write_csv(reports / "sweep.csv", sweep)
        atomic.write_csv(reports / "per_class.csv", per_class)
        atomic.write_csv(reports / "confusion.csv", _pairs(confusions, names))
        _draw(reports / "pictures", confusions, names)
        atomic.write_json(reports / "metrics.json", report)


@contextlib.contextmanager
def _common_folder(path: Path) -> Iterator[Path]:
    """An empty folder for the processes of a disk, removed after the block."""
    if distributed.is_writer():
        shutil.rmtree(path, ignore_errors=True)
        atomic.make_directory(path)
    distributed.barrier()
    try:
        yield path
        distributed.barrier()
    finally:
        if distributed.is_writer():
            shutil.rmtree(path, ignore_errors=True)


def _join(*words: str) -> str:
    return "_".join(filter(None, words))


def _draw(folder: Path, confusions: Confusions, names: tuple[str, ...]) -> None:
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
    parts: Parts,
) -> tuple[Confusions, Confusions]:
    """Confusion matrices (T, L, L) of the seeds and (L, L) of the fixed seed after dCRF.

    They are counted for each of `parts`. The label maps after dCRF are written
    for the images that `outs` names.
    """
    shape = (len(thresholds), num_labels, num_labels)
    totals = {name: np.zeros(shape, np.int64) for name in parts}
    own = distributed.mine(items)

    def tasks() -> Iterator[RefineTask]:
        for item in own:
            assert item.mask is not None
            ids = item.class_ids
            planes, size = files.read_cam_of(folder / f"{item.id}.npz", item.image, ids)
            truth = files.read_truth(item.mask, size, num_labels)
            best, top = seeds.peak(seeds.grow(planes, size), ids)
            counts = metrics.sweep_confusion(truth, best, top, thresholds, num_labels)
            splits.add(totals, parts, item.id, counts)
            seed = seeds.cut(best, top, float(thresholds[fixed]))
            yield RefineTask(
                item.id,
                item.image,
                seed,
                ids,
                params.crf,
                item.mask,
                outs.get(item.id),
                num_labels,
            )

    refined = {name: np.zeros(shape[1:], np.int64) for name in parts}
    results = in_workers(refine_image, tasks(), crf.in_threads(params.crf))
    for result in tqdm(results, folder.name, len(own), leave=False, disable=None):
        splits.add(refined, parts, result.id, dense(result.label_counts, num_labels))
    return _over_processes(totals), _over_processes(refined)


def _over_processes(totals: Confusions) -> Confusions:
    return {name: distributed.sum_array(counts) for name, counts in totals.items()}


def _score_labels(folder: Path, items: list[Item], num_labels: int, parts: Parts) -> Confusions:
    """Confusion matrix (L, L) of the folder's label maps, for each of `parts`."""
    totals = {name: np.zeros((num_labels, num_labels), np.int64) for name in parts}
    for item in distributed.mine(items):
        if item.mask is not None:
            path, size = folder / f"{item.id}.png", files.image_size(item.image)
            label = files.read_label_of(path, item.image, size, num_labels, ignored=False)
            truth = files.read_truth(item.mask, size, num_labels)
            counts = metrics.confusion_matrix(truth, label, num_labels)
            splits.add(totals, parts, item.id, counts)
    return _over_processes(totals)


def _per_class(confusions: Confusions, names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {"source": source, "class": name, "iou": float(value)}
        for source, confusion in confusions.items()
        for name, value in zip(names, metrics.iou(confusion), strict=True)
    ]


def _pairs(confusions: Confusions, names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {"source": source, "actual": actual, "predicted": predicted, "pixels": int(pixels)}
        for source, confusion in confusions.items()
        for actual, row in zip(names, confusion, strict=True)
        for predicted, pixels in zip(names, row, strict=True)
    ]
