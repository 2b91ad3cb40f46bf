"""Walk the CAMs along AffinityNet's affinities: the final pseudo-labels (paper 4.1.6; spec 6).

The network computes the next affinities while helpers walk along the last ones; a GPU walks,
too, and leaves the rest to the helpers.
Resume rule: a journal is kept of finished images; the same command goes on with the others.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from isim import atomic, distributed, engine, metrics, pictures, splits, tracking, viz
from isim.data import files
from isim.data.dataset import Item, load_prepared
from isim.journal import Journal
from isim.labels import crf
from isim.models import affinity, folding
from isim.models.affinity import AffinityConfig, AffinityNet
from isim.params import RandomWalk, digest, home, resolve_path
from isim.splits import Confusions, Parts
from isim.stream import Host, computed, delivered, group_size, in_workers, to_host
from isim.walk_workers import WalkTask, planes_to_walk, walk_image
from isim.workers import dense

# Devices that walk themselves, and how many images they walk together.
WALKING = {"cuda"}
TOGETHER = 16


def run(params: RandomWalk, root: Path) -> None:
    """Run the stage: data/cams and models/train_affinity to data/random_walk and reports.

    The label maps of a split are in its folder, those after dCRF in `<split>_crf`. A split that
    is part of it (train of trainaug) is reported apart, too.

    Args:
        params: Section `random_walk`.
        root: Project folder.

    Raises:
        UserError: No checkpoint, no CAMs of a split, an unreadable file, a failed write.
    """
    prepared = load_prepared(root / "data/prepared", partial(resolve_path, root=root))
    chosen = {split: prepared.split(split) for split in params.splits}
    cams = root / "data/cams"
    for split in chosen:
        files.require_cams(cams / split)
    checkpoint = root / "models/train_affinity/model.safetensors"
    network, config = affinity.load(checkpoint)
    device = engine.default_device()
    engine.place(network, device)
    precision = engine.resolve_precision(params.precision, device)
    key = engine.run_digest(
        digest(params),
        [root / "data/prepared", *(cams / split for split in chosen), checkpoint],
        engine.code_files("random_walk"),
        device,
        precision,
    )
    resume = engine.resume_folder(home(root) / ".isim/resume/random_walk", key)
    reports = root / "reports/random_walk"
    # Where processes have several disks, what an earlier run has finished is then on each.
    distributed.share(resume)
    names = ("background", *prepared.classes)
    inputs = {"data/prepared": root / "data/prepared", "data/cams": cams}
    inputs["models/train_affinity"] = checkpoint.parent
    report: dict[str, Any] = {"precision": precision, "map_stride": config.map_stride}
    per_class: list[dict[str, Any]] = []
    headline: dict[str, float] = {}
    with tracking.stage_run("random_walk", params, root, inputs) as tracked:
        for split, parts in splits.parts(chosen, splits.members(prepared.splits)).items():
            items = chosen[split]
            start = time.perf_counter()
            made, confusions = _walk_split(
                items,
                resume,
                split,
                cams,
                params,
                network,
                config,
                precision,
                device,
                len(names),
                parts,
            )
            seconds = time.perf_counter() - start
            # Of the pass, hence not of a part of it.
            speed = {"seconds": seconds, "images_per_second": made / seconds}
            for part, ids in parts.items():
                figures = {"images": len(ids), **(speed if part == split else {})}
                for name, totals in confusions.items():
                    figures |= metrics.segmentation_figures(f"{name}_", totals[part])
                report[part] = figures
                ious = {name: metrics.iou(totals[part]) for name, totals in confusions.items()}
                for index, class_ in enumerate(names):
                    row = {f"{name}_iou": float(values[index]) for name, values in ious.items()}
                    per_class.append({"split": part, "class": class_, **row})
                tracked.metrics({f"{part}_{name}": value for name, value in figures.items()})
                headline |= {f"{part}_{k}": v for k, v in figures.items() if k.endswith("_miou")}
                scores = (f"{name} mIoU {100 * figures[f'{name}_miou']:.2f}" for name in confusions)
                tqdm.write(f"random_walk: {len(ids)} label maps of {part}, {', '.join(scores)}")
        if not distributed.is_writer():
            # The rest is published once on every disk.
            engine.remove_resume_folder(resume)
            return
        atomic.copy_tree(resume / "labels", root / "data/random_walk")
        shutil.rmtree(reports / "pictures", ignore_errors=True)
        for split, items in chosen.items():
            for item in pictures.choose(items, params.pictures):
                rows = _strips(item, split, cams, resume / "labels", params, columns=4)
                viz.write_png(reports / f"pictures/{split}/{item.id}.png", np.concatenate(rows))
                # Two rows of two: MLflow's thumbnails are square.
                square = _strips(item, split, cams, resume / "labels", params, columns=2)[-1]
                tracked.image(f"{split}/{item.id}", square, step=0)
        atomic.write_csv(reports / "per_class.csv", per_class)
        atomic.write_json(reports / "metrics.json", report)
        tracked.headline(headline)
        tracked.table("per_class", per_class)
    engine.remove_resume_folder(resume)


def _walk_split(
    items: Sequence[Item],
    resume: Path,
    split: str,
    cams: Path,
    params: RandomWalk,
    network: AffinityNet,
    config: AffinityConfig,
    precision: str,
    device: torch.device,
    num_labels: int,
    parts: Parts,
) -> tuple[int, dict[str, Confusions]]:
    """Make the label maps that are missing below `resume`/labels.

    Returns:
        How many were made now, and the (L, L) confusion matrices over all images of each of
        `parts`: of `walk` and, where the dCRF follows, `walk_crf`.
    """
    folders = _folders(resume / "labels", split, params)
    for folder in folders.values():
        atomic.make_directory(folder)
        for leftover in folder.glob(".tmp-*"):
            leftover.unlink(missing_ok=True)
    with Journal(resume / f"{split}.jsonl") as journal:
        for folder in folders.values():
            journal.keep(path.stem for path in folder.glob("*.png"))
        missing, made = journal.share_out(items)

        prepared = folding.for_inference(
            network, lambda net, images: net(images), device, engine.DTYPES[precision]
        )

        def affinities(_: Sequence[Item], images: Tensor) -> list[Tensor]:
            with engine.autocast(precision, device):
                return [affinity.of_image(prepared, config, image) for image in images]

        def launch(group: Sequence[tuple[Item, Tensor]]) -> list[Callable[[], WalkTask]]:
            return _launch([(task(item), found) for item, found in group], device)

        def task(item: Item) -> WalkTask:
            paths = [folder / f"{item.id}.png" for folder in folders.values()]
            return WalkTask(
                item.id,
                item.image,
                cams / split / f"{item.id}.npz",
                item.class_ids,
                None,
                None,
                config.radius,
                params,
                item.mask,
                paths[0],
                paths[1] if params.crf_after else None,
                num_labels,
            )

        size = TOGETHER if device.type in WALKING else group_size(device)
        tasks = delivered(computed(affinities, missing, device), launch, size)
        in_threads = not params.crf_after or crf.in_threads(params.crf)
        results = in_workers(walk_image, tasks, in_threads)
        for result in tqdm(results, split, len(missing), leave=False, disable=None):
            journal.add(asdict(result))
        lines = journal.collect(items)
    for folder in folders.values():
        distributed.share(folder, "*.png")
    shape = (num_labels, num_labels)
    confusions = {name: {part: np.zeros(shape, np.int64) for part in parts} for name in folders}
    for line in lines:
        for name, totals in confusions.items():
            counts = line["crf_counts" if name == "walk_crf" else "walk_counts"]
            splits.add(totals, parts, line["id"], dense(counts, num_labels))
    return made, confusions


def _launch(
    group: Sequence[tuple[WalkTask, Tensor]], device: torch.device
) -> list[Callable[[], WalkTask]]:
    """Add what workers walk along, or where a GPU has walked."""
    if device.type not in WALKING:
        return [partial(_with_affinity, task, to_host(found)) for task, found in group]
    from isim.gpu.random_walk import walk_batch

    planes = [planes_to_walk(task, (near.shape[1], near.shape[2])) for task, near in group]
    settings = group[0][0].settings
    walked = walk_batch(
        [torch.from_numpy(cam).to(device) for cam, _ in planes],
        [near for _, near in group],
        group[0][0].radius,
        settings.beta,
        settings.steps_log2,
    )
    return [
        partial(_with_walk, task, to_host(found), size)
        for (task, _), (_, size), found in zip(group, planes, walked, strict=True)
    ]


def _with_affinity(task: WalkTask, found: Host) -> WalkTask:
    return replace(task, affinity=found())


def _with_walk(task: WalkTask, found: Host, size: tuple[int, int]) -> WalkTask:
    return replace(task, walked=(found(), size))


def _folders(labels: Path, split: str, params: RandomWalk) -> dict[str, Path]:
    """Where the label maps of a split are, by what they are called in reports."""
    refined = {"walk_crf": labels / f"{split}_crf"} if params.crf_after else {}
    return {"walk": labels / split, **refined}


def _strips(
    item: Item, split: str, cams: Path, labels: Path, params: RandomWalk, columns: int
) -> list[np.ndarray]:
    captions = {"walk": "random walk", "walk_crf": "walk + dCRF"}
    return [
        pictures.strip(
            item,
            cams / split / f"{item.id}.npz",
            folder / f"{item.id}.png",
            columns,
            captions[name],
        )
        for name, folder in _folders(labels, split, params).items()
    ]
