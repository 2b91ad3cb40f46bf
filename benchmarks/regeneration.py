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
import os
import resource
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import harness
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from harness import Row
from torchvision.transforms.v2 import functional as TF

from isim import engine, metrics
from isim.data import files
from isim.data.dataset import Item
from isim.labels import crf, seeds
from isim.models import cam
from isim.params import Crf, resolve_path
from isim.regeneration import CamSettings, Scores, cams, regenerate
from isim.stream import in_workers
from isim.workers import RefineTask, refine_image

SCALES = (1.0, 0.5, 1.5, 2.0)
THRESHOLD = 0.3
CRF = Crf(
    backend="auto",
    steps=10,
    gt_prob=0.7,
    gaussian_sxy=3,
    gaussian_compat=3,
    bilateral_sxy=50,
    bilateral_srgb=5,
    bilateral_compat=10,
)


def network(encoder: str = "mobilenetv2_100") -> tuple[cam.CamNetwork, cam.CamConfig]:
    """An encoder at output stride 16; its weights do not change the speed."""
    torch.manual_seed(0)
    mean, std = cam.normalization(encoder, "encoder")
    classes = tuple(f"class {number}" for number in range(1, 21))
    config = cam.CamConfig("cam", encoder, 16, "batch", (6,), 1, classes, mean, std)
    net = cam.build(config)
    path = resolve_path(f"$ISIM_SHARED/weights/{encoder}.imagenet.safetensors", Path.cwd())
    weights = str(path) if path.is_file() else "none"
    cam.load_encoder_weights(net, config.encoder, weights, path)
    return net.eval(), config


@torch.inference_mode()
def reference_cam(
    net: cam.CamNetwork, config: cam.CamConfig, item: Item, device: torch.device
) -> np.ndarray:
    """(K', H, W) CAMs of one image: all classes at every scale, NCHW fp32."""
    image = torch.from_numpy(files.read_image(item.image)).permute(2, 0, 1)
    height, width = image.shape[1:]
    total = torch.zeros(len(config.classes), height, width, device=device)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    for scale in SCALES:
        size = [round(height * scale), round(width * scale)]
        pixels = (TF.resize(image, size, antialias=True) / 255 - mean) / std
        scaled = pixels.contiguous()[None].to(device)
        views = torch.cat([scaled, scaled.flip(-1)])
        maps = F.conv2d(net.encoder(views)[-1], net.classifier.weight).relu()
        summed = maps[:1] + maps[1:].flip(-1)
        total += F.interpolate(summed, (height, width), mode="bilinear")[0]
    planes = total[torch.from_numpy(item.class_ids - 1)]
    return (planes / (planes.amax((1, 2), keepdim=True) + 1e-5)).cpu().numpy()


@dataclass(frozen=True)
class Bench:
    """Both sides' networks and the images."""

    chosen: list[Item]
    plain: cam.CamNetwork
    ours: cam.CamNetwork
    config: cam.CamConfig
    device: torch.device
    folder: Path

    def planes(self, precision: str) -> dict[str, np.ndarray]:
        """Our CAMs of all images."""
        settings = CamSettings(SCALES, True, precision)
        stream = cams(self.ours, self.config, self.chosen, settings, self.device)
        return {item.id: planes.cpu().numpy() for item, planes in stream}

    def reference_planes(self) -> dict[str, np.ndarray]:
        """The reference's CAMs of all images."""
        return {i.id: reference_cam(self.plain, self.config, i, self.device) for i in self.chosen}

    def seeds(self, planes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Seeds of CAMs."""
        return {i.id: seeds.seed(planes[i.id], i.class_ids, THRESHOLD) for i in self.chosen}

    def miou(self, labels: dict[str, np.ndarray]) -> float:
        """Score label maps against the ground truth, in points."""
        total = np.zeros((21, 21), np.int64)
        for item in self.chosen:
            assert item.mask is not None
            truth = files.read_truth(item.mask, labels[item.id].shape, 21)
            total += metrics.confusion_matrix(truth, labels[item.id], 21)
        return 100 * metrics.miou(total)

    def regenerate(self, precision: str) -> Scores:
        """Make the labels of all images with ours, below `folder`/ours, from the beginning."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            return regenerate(
                self.ours,
                self.config,
                self.chosen,
                Path(scratch) / "labels",
                Path(scratch) / "scratch",
                CamSettings(SCALES, True, precision),
                THRESHOLD,
                CRF,
                (),
                self.device,
            )

    def regenerate_reference(self) -> np.ndarray:
        """Make and score them in the straightforward way; returns the confusion matrix."""
        total = np.zeros((21, 21), np.int64)
        settings = CRF.model_copy(update={"backend": "pydensecrf"})
        for item in self.chosen:
            assert item.mask is not None
            ids = item.class_ids
            planes = reference_cam(self.plain, self.config, item, self.device)
            label = seeds.seed(planes, ids, THRESHOLD)
            label = crf.refine(files.read_image(item.image), label, ids, settings)
            truth = files.read_truth(item.mask, label.shape, 21)
            total += metrics.confusion_matrix(truth, label, 21)
            files.write_label_map(self.folder / "reference" / f"{item.id}.png", label)
        return total

    def finish(self, made: dict[str, np.ndarray]) -> None:
        """All of our regeneration but the CAMs: dCRF, scores, PNG."""
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            tasks = (
                RefineTask(
                    item.id,
                    item.image,
                    made[item.id],
                    item.class_ids,
                    CRF,
                    item.mask,
                    Path(out) / f"{item.id}.png",
                    21,
                )
                for item in self.chosen
            )
            for _ in in_workers(refine_image, tasks, crf.in_threads(CRF)):
                pass


def agreement(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    """Percentage of pixels with the same label."""
    return 100 * float(np.mean([np.mean(first[name] == second[name]) for name in first]))


def overlap(bench: Bench, precision: str, data: str, repeats: int) -> Row:
    """Wall time of a regeneration beside the least that it could be."""
    made = bench.seeds(bench.planes(precision))
    settings = CamSettings(SCALES, True, precision)
    cores = len(os.sched_getaffinity(0))

    def network_alone() -> None:
        for _ in cams(bench.ours, bench.config, bench.chosen, settings, bench.device):
            pass

    measured = []
    for _ in range(repeats):
        slowest = max(harness.seconds(network_alone), harness.seconds(lambda: bench.finish(made)))
        own, machine = _cpu_seconds(), _busy_seconds()
        wall = harness.seconds(lambda: bench.regenerate(precision))
        own, machine = _cpu_seconds() - own, _busy_seconds() - machine
        measured.append((wall, slowest, own / cores, max(own, machine) / cores))
    print("wall, slowest part alone, own CPU seconds / cores, all CPU seconds / cores:")
    for row in measured:
        print("  " + ", ".join(f"{value:.2f} s" for value in row))
    ratios = sorted(max(slowest, own) / wall for wall, slowest, own, _ in measured)
    wall, slowest, own, busy = (statistics.median(c) for c in zip(*measured, strict=True))
    units = len(bench.chosen)
    return Row(
        "regeneration: least / wall",
        data,
        max(slowest, own) / units,
        wall / units,
        statistics.median(ratios),
        ratios[0],
        ratios[-1],
        f">= {1 / 1.15:.2f}",
        f"others took {100 * (busy - own) / wall:.0f} % of the machine",
    )


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its helpers that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _busy_seconds() -> float:
    """Seconds that the machine's cores have not been idle."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice


def main() -> None:
    """Time both sides in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--encoder", default="mobilenetv2_100")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:

        def make() -> Bench:
            device = engine.default_device()
            plain, config = network(options.encoder)
            ours, _ = network(options.encoder)
            engine.place(ours, device)
            items = harness.items(options.images, Path(name))
            return Bench(items, plain.to(device), ours, config, device, Path(name))

        def actions() -> dict[str, Callable[[], object]]:
            plain = make()
            return {"cams": plain.reference_planes, "all": plain.regenerate_reference}

        reference = harness.Apart(actions)
        bench = make()
        chosen, device = bench.chosen, bench.device
        data = f"{harness.data_name(chosen)}, {options.encoder}, 4 scales x flip"
        precision = engine.resolve_precision("auto", device)
        print(f"{harness.machine()}, {engine.worker_count()} helpers")
        rows = []
        expected = bench.reference_planes()
        expected_seeds = bench.seeds(expected)
        for each in dict.fromkeys(("fp32", precision)):
            found = bench.planes(each)
            error = max(float(np.abs(found[n] - expected[n]).max(initial=0)) for n in found)
            made = bench.seeds(found)
            gained = bench.miou(made) - bench.miou(expected_seeds)
            rows.append(
                harness.compare(
                    f"CAM inference, {each}",
                    data,
                    partial(reference.run, "cams"),
                    partial(bench.planes, each),
                    len(chosen),
                    options.repeats,
                    ">= 4" if each == precision else "",
                    f"max dCAM {error:.1g}, seeds {agreement(made, expected_seeds):.2f} % equal, "
                    f"mIoU {gained:+.2f}",
                )
            )
        gained = 100 * (
            metrics.miou(bench.regenerate(precision).label_confusion)
            - metrics.miou(bench.regenerate_reference())
        )
        rows.append(
            harness.compare(
                f"regeneration, {precision}",
                data,
                partial(reference.run, "all"),
                lambda: bench.regenerate(precision),
                len(chosen),
                options.repeats,
                "",
                f"mIoU {gained:+.2f}",
            )
        )
        rows.append(overlap(bench, precision, data, options.repeats))
        harness.report(rows)


if __name__ == "__main__":
    # Helper processes would import this script, and torch, again: no stage makes them do that.
    del __file__
    main()
