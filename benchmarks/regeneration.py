"""CAM inference and a whole regeneration against the field's straightforward way.

The reference does one image at a time: one batch of an image and its mirror image a scale in
NCHW fp32 with all classes, then pydensecrf, in a process of its own, which isim's way with malloc
and threads does not reach. Both sides make the same labels from the same network and images, in
turn, in this run.

`overlap` compares a regeneration's wall time with the least that it could be: its slowest part
alone, or its CPU seconds spread over all cores.

    python benchmarks/regeneration.py --images 16
    python benchmarks/regeneration.py --encoder resnet50.tv_in1k --images 500     # on a GPU
"""

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from harness import Case, Row
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as TF

from isim import metrics
from isim.data import files
from isim.data.prepared import Item
from isim.experiments import preset
from isim.labels.crf import refine as crf
from isim.labels.seeds import seeds
from isim.models import cam
from isim.models import encoder as encoders
from isim.params import TrainCam, chosen
from isim.passes import cams, counts, each, pseudo_labels
from isim.runtime import devices, helpers
from isim.runtime.here import Here
from isim.runtime.paths import resolve_path

LABELS = 21
CLASSES = tuple(f"class {number}" for number in range(1, LABELS))

Planes = dict[str, NDArray[np.float32]]
Labels = dict[str, NDArray[np.uint8]]


def section(encoder: str = "mobilenetv2_100") -> TrainCam:
    """Return the paper's parameters (four scales, flips, dCRF) with another encoder."""
    paper = preset.parameters("voc-deeplabcam-resnet50").train_cam
    return paper.model_copy(update={"method": "cam", "encoder": encoder})


def network(params: TrainCam) -> tuple[cam.CamNetwork, cam.CamConfig]:
    """Build a network at output stride 16; its weights do not change the speed."""
    torch.manual_seed(0)
    config = cam.configure(params, CLASSES)
    net = cam.build(config)
    assert isinstance(net, cam.CamNetwork)
    path = resolve_path(f"$ISIM_SHARED/weights/{config.encoder}.imagenet.safetensors", Path.cwd())
    encoders.load(net, config, str(path) if path.is_file() else "none", path)
    return net.eval(), config


@dataclass(frozen=True)
class Bench:
    """Both sides' networks and the images."""

    items: list[Item]
    plain: cam.CamNetwork
    ours: cam.CamNetwork
    config: cam.CamConfig
    params: TrainCam
    folder: Path

    @torch.inference_mode()
    def reference_cam(self, item: Item) -> NDArray[np.float32]:
        """Make (K', H, W) CAMs of one image: all classes at every scale, NCHW fp32."""
        net, config, device = self.plain, self.config, devices.default()
        image = torch.from_numpy(files.read_image(item.image)).permute(2, 0, 1)
        height, width = image.shape[1:]
        total = torch.zeros(len(config.classes), height, width, device=device)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
        for scale in self.params.scales:
            size = [round(height * scale), round(width * scale)]
            pixels = (TF.resize(image, size, antialias=True) / 255 - mean) / std
            scaled = pixels.contiguous()[None].to(device)
            views = torch.cat([scaled, scaled.flip(-1)])
            maps = F.conv2d(net.encoder(views)[-1], net.classifier.weight).relu()
            summed = maps[:1] + maps[1:].flip(-1)
            total += F.interpolate(summed, (height, width), mode="bilinear")[0]
        planes = total[torch.from_numpy(item.class_ids - 1)]
        return (planes / (planes.amax((1, 2), keepdim=True) + 1e-5)).cpu().numpy()

    def reference_planes(self) -> Planes:
        """Make the reference's CAMs of all images."""
        return {item.id: self.reference_cam(item) for item in self.items}

    def planes(self, precision: str) -> Planes:
        """Make our CAMs of all images."""
        here = Here(self.folder, precision)
        made = cams.cams(here, self.ours, self.config, self.items, settings=self.params)
        return {item.id: planes.cpu().numpy() for item, planes in made}

    def seeds(self, planes: Planes) -> Labels:
        """Make the seeds of CAMs."""
        threshold = chosen(self.params.threshold)
        return {i.id: seeds.seed(planes[i.id], i.class_ids, threshold) for i in self.items}

    def miou(self, labels: Labels) -> float:
        """Score label maps against the ground truth, in points."""
        lines = [counts.scored(item, {"": labels[item.id]}, LABELS) for item in self.items]
        return 100 * metrics.miou(counts.total(lines, "", (LABELS, LABELS)))

    def regenerate(self, precision: str) -> float:
        """Make and score the labels of all images with ours, from the beginning: mIoU in points."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            scores = pseudo_labels.regenerate(
                Here(Path(scratch), precision),
                self.ours,
                self.config,
                self.items,
                params=self.params,
                name="round_01",
            )
        return 100 * metrics.miou(scores.label_confusion)

    def regenerate_reference(self) -> float:
        """Make and score them in the straightforward way: mIoU in points."""
        with harness.crf_backend("pydensecrf"):
            made = ({item.id: self.reference_cam(item)} for item in self.items)
            lines = [
                self._finish(item, planes) for item, planes in zip(self.items, made, strict=True)
            ]
        return 100 * metrics.miou(counts.total(lines, "", (LABELS, LABELS)))

    def finish(self, planes: Planes) -> None:
        """Do all of our regeneration but the CAMs: seed, dCRF, scores, PNG."""
        each.image(Here(self.folder), self.items, partial(self._finish, planes=planes), name=None)

    def _finish(self, item: Item, planes: Planes) -> dict[str, Any]:
        ids = item.class_ids
        label = seeds.seed(planes[item.id], ids, chosen(self.params.threshold))
        label = crf.refine(files.read_image(item.image), label, ids, self.params.crf)
        return counts.scored_and_written(item, {"": label}, {"": self.folder}, LABELS)


def agreement(first: Labels, second: Labels) -> float:
    """Percentage of pixels with the same label."""
    return 100 * float(np.mean([np.mean(first[name] == second[name]) for name in first]))


def overlap(bench: Bench, precision: str, data: str, repeats: int) -> Row:
    """Wall time of a regeneration beside the least that it could be."""
    made = bench.planes(precision)
    here, cores = Here(bench.folder, precision), len(os.sched_getaffinity(0))

    def network_alone() -> None:
        for _ in cams.cams(here, bench.ours, bench.config, bench.items, settings=bench.params):
            pass

    least, walls, others = [], [], []
    print("wall, slowest part alone, own CPU seconds / cores, all CPU seconds / cores:")
    for _ in harness.rounds(repeats):
        slowest = max(harness.seconds(network_alone), harness.seconds(lambda: bench.finish(made)))
        own, machine = time.process_time(), _busy_seconds()
        wall = harness.seconds(lambda: bench.regenerate(precision))
        own, machine = time.process_time() - own, _busy_seconds() - machine
        told = (wall, slowest, own / cores, max(own, machine) / cores)
        print("  " + ", ".join(f"{value:.2f} s" for value in told))
        walls.append(wall / len(bench.items))
        least.append(max(slowest, own / cores) / len(bench.items))
        others.append(max(0.0, machine - own) / cores / wall)
    busy = f"others took {100 * statistics.median(others):.0f} % of the machine"
    case = Case("regeneration: least / wall", data, f">= {1 / 1.15:.2f}", busy)
    return harness.row(case, least, walls)


def _busy_seconds() -> float:
    """Seconds that the machine's cores have not been idle."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


@torch.inference_mode()
def needs(bench: Bench) -> tuple[float, float]:
    """Sum up what all images' CAMs need: operations, and bytes of the convolutions' maps."""
    moved, flops = 0.0, 0

    def count(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        nonlocal moved
        moved += 4 * (inputs[0].numel() + made.numel())

    network = copy.deepcopy(bench.plain)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    for item in bench.items:
        height, width = files.image_size(item.image)
        for scale in bench.params.scales:
            pixels = torch.zeros(2, 3, round(height * scale), round(width * scale))
            with FlopCounterMode(display=False) as counter:
                network.encoder(pixels.to(devices.default()))
            flops += counter.get_total_flops()
    return flops, moved


def compare_cams(
    bench: Bench, reference: harness.Apart, precision: str, *, data: str, repeats: int
) -> Row:
    """Compare our CAMs in a precision with the reference's."""
    expected, found = bench.reference_planes(), bench.planes(precision)
    error = max(float(np.abs(found[n] - expected[n]).max(initial=0)) for n in found)
    before, after = bench.seeds(expected), bench.seeds(found)
    fidelity = (
        f"max dCAM {error:.1g}, seeds {agreement(after, before):.2f} % equal, "
        f"mIoU {bench.miou(after) - bench.miou(before):+.2f}"
    )
    goal = ">= 4" if precision == Here(bench.folder).precision else ""
    row = harness.compare(
        Case(f"CAM inference, {precision}", data, goal, fidelity),
        partial(reference.run, "cams"),
        partial(bench.planes, precision),
        units=len(bench.items),
        repeats=repeats,
    )
    if precision == "fp32" and devices.default().type == "cpu":
        used = harness.shares(partial(bench.planes, precision), *needs(bench))
        print(f"{row.case.part}: {used}", flush=True)
    return row


def main() -> None:
    """Time both sides in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--encoder", default="mobilenetv2_100")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, params = Path(name), section(options.encoder)

        def make() -> Bench:
            device = devices.default()
            (plain, config), (ours, _) = network(params), network(params)
            devices.place(ours, device)
            items = harness.items(options.images, folder)
            return Bench(items, plain.to(device), ours, config, params, folder)

        def actions() -> dict[str, Callable[[], object]]:
            plain = make()
            return {"cams": plain.reference_planes, "all": plain.regenerate_reference}

        reference = harness.Apart(actions)
        bench = make()
        data = f"{harness.data_name(bench.items)}, {options.encoder}, 4 scales x flip"
        precision = Here(folder).precision
        print(f"{harness.machine()}, {helpers.worker_count()} helpers")
        rows = [
            compare_cams(bench, reference, chosen, data=data, repeats=options.repeats)
            for chosen in dict.fromkeys(("fp32", precision))
        ]
        gained = bench.regenerate(precision) - bench.regenerate_reference()
        rows.append(
            harness.compare(
                Case(f"regeneration, {precision}", data, fidelity=f"mIoU {gained:+.2f}"),
                partial(reference.run, "all"),
                partial(bench.regenerate, precision),
                units=len(bench.items),
                repeats=options.repeats,
            )
        )
        rows.append(overlap(bench, precision, data, options.repeats))
        harness.report(rows)


if __name__ == "__main__":
    main()
