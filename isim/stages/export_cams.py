"""Write the CAMs of the final checkpoint at a stride (spec 4), for `evaluate` and affinity."""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from isim import atomic, distributed, engine, metrics, tracking
from isim.data import files
from isim.data.dataset import load_prepared
from isim.journal import Journal
from isim.labels import seeds
from isim.models import cam
from isim.params import ExportCams, digest, home, resolve_path
from isim.regeneration import CamSettings, cams, class_ids
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
                missing, computed = journal.share_out(items)
                stream = cams(network, config, missing, settings, device)
                for item, full in tqdm(stream, split, len(missing), leave=False, disable=None):
                    ids, size = class_ids(item), (full.shape[1], full.shape[2])
                    small = _shrink(full, params.stride)
                    line = {"id": item.id, "full": [], "stored": []}
                    if item.mask is not None:
                        truth = files.read_truth(item.mask, size, num_labels)
                        for name, planes in (("full", full), ("stored", _grow(small, size))):
                            seed = seeds.seed(planes.cpu().numpy(), ids, params.threshold)
                            line[name] = sparse(metrics.confusion_matrix(truth, seed, num_labels))
                    files.write_cam(folder / f"{item.id}.npz", small.cpu().numpy(), ids, size)
                    journal.add(line)
                lines = journal.collect(items)
            distributed.share(folder, "*.npz")
            seconds = time.perf_counter() - start
            report[split] = {
                "images": len(items),
                "images_per_second": computed / seconds,
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


def _shrink(planes: Tensor, stride: int) -> Tensor:
    """(K', H, W) to (K', ceil(H / stride), ceil(W / stride)), each pixel the mean of its area."""
    size = [-(-side // stride) for side in planes.shape[1:]]
    if 0 in planes.shape:
        return planes.new_zeros(0, *size)
    return F.interpolate(planes[None], size, mode="area")[0]


def _grow(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Undo `_shrink` as `evaluate` does, through the stored float16."""
    if 0 in planes.shape:
        return planes.new_zeros(0, *size)
    return F.interpolate(planes.half().float()[None], size, mode="bilinear")[0]
