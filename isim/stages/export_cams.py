"""Write the CAMs of the final checkpoint at a stride (spec 4), for `evaluate` and affinity."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from isim import atomic, distributed, engine, metrics, tracking
from isim.data import files
from isim.data.dataset import Item, load_prepared
from isim.gpu import seeds
from isim.journal import Journal
from isim.models import cam
from isim.params import ExportCams, digest, home, resolve_path
from isim.regeneration import CamSettings, cam_maker
from isim.stream import Host, computed, delivered, group_size, in_workers, to_host
from isim.workers import dense, sparse


def run(params: ExportCams, root: Path) -> None:
    """Run the stage: data/prepared and models/train_cam to data/cams and reports.

    An interrupted run goes on with the images that are missing.

    Args:
        params: Section `export_cams`.
        root: Project folder.

    Raises:
        UserError: No checkpoint, no prepared data, an unknown split, an unreadable image.
    """
    prepared = load_prepared(root / "data/prepared", partial(resolve_path, root=root))
    chosen = {split: prepared.split(split) for split in params.splits}
    checkpoint = root / "models/train_cam/model.safetensors"
    network, config = cam.load(checkpoint)
    device = engine.default_device()
    engine.place(network, device)
    precision = engine.resolve_precision(params.precision, device)
    settings = CamSettings(params.scales, params.flip, precision)
    key = engine.run_digest(
        digest(params),
        [root / "data/prepared", checkpoint],
        engine.code_files("export_cams"),
        device,
        precision,
    )
    resume = engine.resume_folder(home(root) / ".isim/resume/export_cams", key)
    inputs = {"data/prepared": root / "data/prepared", "models/train_cam": checkpoint.parent}
    num_labels = len(config.classes) + 1
    # Where processes have several disks, what an earlier run has finished is then on each.
    distributed.share(resume)
    report: dict[str, dict[str, float]] = {}
    with tracking.stage_run("export_cams", params, root, inputs) as tracked:
        for split, items in chosen.items():
            folder = resume / "cams" / split
            atomic.make_directory(folder)
            for leftover in folder.glob(".tmp-*"):
                leftover.unlink(missing_ok=True)
            start = time.perf_counter()
            with Journal(resume / f"{split}.jsonl") as journal:
                journal.keep(path.stem for path in folder.glob("*.npz"))
                missing, made = journal.share_out(items)
                make = partial(_exported, cam_maker(network, config, settings, device), params)
                write = partial(_write, folder, num_labels)
                tasks = delivered(computed(make, missing, device), _launch, group_size(device))
                results = in_workers(write, tasks, in_threads=True)
                for line in tqdm(results, split, len(missing), leave=False, disable=None):
                    journal.add(line)
                lines = journal.collect(items)
            distributed.share(folder, "*.npz")
            seconds = time.perf_counter() - start
            report[split] = {
                "images": len(items),
                "images_per_second": made / seconds,
                "megabytes": sum(p.stat().st_size for p in folder.glob("*.npz")) / 1e6,
            }
            if any(item.mask for item in items):
                confusions = np.zeros((2, num_labels, num_labels), np.int64)
                for line in lines:
                    confusions[0] += dense(line["full"], num_labels)
                    confusions[1] += dense(line["stored"], num_labels)
                full_miou, stored_miou = map(metrics.miou, confusions)
                report[split] |= {
                    "cam_miou_full_size": full_miou,
                    "cam_miou_stored": stored_miou,
                    "stride_difference": stored_miou - full_miou,
                }
            tracked.metrics({f"{split}_{name}": value for name, value in report[split].items()})
            tqdm.write(f"export_cams: {len(items)} CAMs of {split}")
        if not distributed.is_writer():
            # The rest is published once on every disk.
            engine.remove_resume_folder(resume)
            return
        atomic.copy_tree(resume / "cams", root / "data/cams")
        atomic.write_json(
            root / "reports/export_cams/metrics.json", {"precision": precision, **report}
        )
    engine.remove_resume_folder(resume)


class _Exported(NamedTuple):
    """An image's CAMs (K', h, w) at the stride, and (2, H, W) uint8 seeds: of full size, stored."""

    planes: Tensor
    seeds: Tensor


class _Task(NamedTuple):
    """`_Exported` on the host."""

    item: Item
    planes: NDArray[np.float32]
    seeds: NDArray[np.uint8]


def _exported(
    make: Callable[[Sequence[Item], Tensor], list[Tensor]],
    params: ExportCams,
    batch: Sequence[Item],
    images: Tensor,
) -> list[_Exported]:
    found = []
    for item, full in zip(batch, make(batch, images), strict=True):
        ids = torch.from_numpy(item.class_ids)
        small = _shrink(full, params.stride)
        both = [
            seeds.cut(*seeds.peak(planes, ids), params.threshold)
            for planes in (full, _grow(small, full.shape[1:]))
        ]
        found.append(_Exported(small, torch.stack(both)))
    return found


def _launch(group: Sequence[tuple[Item, _Exported]]) -> list[Callable[[], _Task]]:
    def task(item: Item, planes: Host, both: Host) -> _Task:
        return _Task(item, planes(), both())

    return [
        partial(task, item, to_host(found.planes), to_host(found.seeds)) for item, found in group
    ]


def _write(folder: Path, num_labels: int, task: _Task) -> dict[str, Any]:
    """Score both seeds, then write the CAMs; returns the journal's line."""
    item = task.item
    line: dict[str, Any] = {"id": item.id, "full": [], "stored": []}
    size = (task.seeds.shape[1], task.seeds.shape[2])
    if item.mask is not None:
        truth = files.read_truth(item.mask, size, num_labels)
        for name, seed in zip(("full", "stored"), task.seeds, strict=True):
            line[name] = sparse(metrics.confusion_matrix(truth, seed, num_labels))
    files.write_cam(folder / f"{item.id}.npz", task.planes, item.class_ids, size)
    return line


def _shrink(planes: Tensor, stride: int) -> Tensor:
    """(K', H, W) to (K', ceil(H / stride), ceil(W / stride)), each pixel the mean of its area."""
    size = [-(-side // stride) for side in planes.shape[1:]]
    if 0 in planes.shape:
        return planes.new_zeros(0, *size)
    return F.interpolate(planes[None], size, mode="area")[0]


def _grow(planes: Tensor, size: Sequence[int]) -> Tensor:
    """Undo `_shrink` as `evaluate` does, through the stored float16."""
    if 0 in planes.shape:
        return planes.new_zeros(0, *size)
    return F.interpolate(planes.half().float()[None], size, mode="bilinear")[0]
