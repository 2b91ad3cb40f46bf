"""Training steps against the bare network's and against the field's straightforward loop.

Bare: the same network, loss and optimizer on one batch of random tensors in memory, in the same
precision and memory format. What an epoch takes longer than that is what the loader, the
augmentation and the bookkeeping cost. The straightforward loop is what most training scripts do:
Pillow and torchvision's transforms one image at a time in loader processes, float32 crops, NCHW,
fp32, the loss read every step.

Real images are taken from `$ISIM_SHARED` (default ../shared) where it exists, generated ones
otherwise. Seconds depend on the machine and its load; the ratios are the result.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.transforms import v2

from isim.data.crops import CropDataset
from isim.data.prepared import Item
from isim.experiments import preset
from isim.metrics import IGNORE
from isim.models import affinity, cam, segmenter
from isim.runtime import devices, helpers, memory
from isim.runtime.here import Here
from isim.training import loop, optimizer
from isim.training.batches import CropBatches
from isim.training.steps import AffinityStep, Batch, CamStep, SegmenterStep, Step

CLASSES = tuple(f"class {number}" for number in range(1, 21))
# Low, so that the random weights of a short run stay finite; they do not change the speed.
RATES = dict.fromkeys(("encoder_rate", "decoder_rate", "classifier_rate", "rate"), 1e-4)
# Past the warm-up: the decoder is trained, too.
EPOCH = 9
# Steps of the straightforward loop, which take several times as long.
PLAIN_STEPS = 2
MATRIX = 8192


@dataclass(frozen=True)
class Part:
    """A training of isim: the network of its configuration, and the step that trains it."""

    title: str
    section: Any
    config: Any
    build: Callable[[Any], Any]
    step: Callable[..., Step]
    scales: tuple[float, float] | None = None

    def crops(self, items: list[Item]) -> CropDataset:
        """Crops of items with their ground truth."""
        masks = {item.id: item.mask for item in items if item.mask is not None}
        dataset = CropDataset(
            items,
            self.section.crop,
            self.config.mean,
            self.config.std,
            seed=0,
            labels=[masks.__getitem__],
            scales=self.scales,
        )
        dataset.use_labels(0)
        return dataset


def parts(crop: int, batch: int, compiled: bool) -> Iterator[Part]:
    """List the trainings of the preset for the VOC sample (MobileNetV2, stride 16)."""
    values = preset.parameters("voc-sample-mobilenetv2")
    size = {"crop": crop, "batch": batch, "epochs": 100, "compile": compiled}

    def cam_step(here: Here, network: cam.CamNetwork, section: Any) -> Step:  # noqa: ANN401
        return CamStep(here, network, section, section.batch)

    for method in ("cam", "deeplabcam"):
        cams = values.train_cam.model_copy(
            update={
                "method": method,
                "warmup_epochs": 1,
                "optimizer": values.train_cam.optimizer.model_copy(update=RATES),
                **size,
            }
        )
        config = cam.configure(cams, CLASSES)
        yield Part(f"train_cam ({method})", cams, config, cam.build, cam_step)
    slow = {"optimizer": values.train_segmenter.optimizer.model_copy(update=RATES)}
    pixels = values.train_segmenter.model_copy(update=size | slow)
    yield Part(
        f"train_segmenter ({pixels.method})",
        pixels,
        segmenter.configure(pixels, CLASSES),
        segmenter.build,
        SegmenterStep,
        (pixels.scale_min, pixels.scale_max),
    )
    pairs = values.train_affinity.model_copy(
        update={"rate": RATES["rate"], "head_factor": 1.0, **size}
    )
    yield Part("train_affinity", pairs, affinity.configure(pairs), affinity.build, AffinityStep)


class PlainCrops(Dataset[Batch]):
    """The augmentation as scripts write it: Pillow images through a chain of transforms."""

    def __init__(self, crops: CropDataset) -> None:
        """Describe crops of the same images and ranges as `crops`, with draws of their own."""
        self.crops = crops
        fill = {Image.Image: tuple(round(255 * v) for v in crops.mean), tv_tensors.Mask: IGNORE}
        self.move = v2.Compose(
            [v2.RandomCrop(crops.crop, pad_if_needed=True, fill=fill), v2.RandomHorizontalFlip()]
        )
        self.values = v2.Compose(
            [
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(crops.mean), list(crops.std)),
            ]
        )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.crops)

    def __getitem__(self, index: int) -> Batch:
        """Image (3, crop, crop) float32, label (crop, crop) int64, image_label (K,) float32."""
        item = self.crops.items[index]
        assert item.mask is not None
        image = Image.open(item.image).convert("RGB")
        side = self.crops.crop
        if self.crops.scales is None:
            scale = int(torch.randint(side, 2 * side + 1, ())) / max(image.size)
        else:
            low, high = self.crops.scales
            scale = low + (high - low) * float(torch.rand(()))
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.BILINEAR)
        mask = Image.open(item.mask).resize(size, Image.Resampling.NEAREST)
        image, label = self.move(image, tv_tensors.Mask(np.array(mask)[None]))
        return {
            "image": self.values(image),
            "label": label[0].long(),
            "image_label": torch.from_numpy(item.known_label.copy()),
        }


class Trainer:
    """A network with its step and optimizer.

    Args:
        part: What is trained.
        network: On the device.
        precision: auto, fp32 or bf16.
        compiled: Use torch.compile where the part's section asks for it.
    """

    def __init__(self, part: Part, network: nn.Module, precision: str, compiled: bool) -> None:
        """Prepare both for the epoch that is measured."""
        section = part.section if compiled else part.section.model_copy(update={"compile": False})
        self.network = network
        self.here = Here(Path(), precision)
        self.step = part.step(self.here, network, section)
        given = self.step.schedule
        self.optimizer = optimizer.sgd(given.groups, given.momentum, given.weight_decay)
        self.step.begin(EPOCH)

    def loss(self, batch: Batch) -> Tensor:
        """Loss of a batch."""
        return self.step.loss(batch).total

    def bare(self, batch: Batch, steps: int) -> None:
        """Take steps on one batch that is there already."""
        self.network.train()
        torch.backends.cudnn.benchmark = True
        self.step.begin(EPOCH)
        for _ in range(steps):
            loss = self.loss(batch)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        torch.backends.cudnn.benchmark = False
        if self.here.device.type == "cuda":
            torch.cuda.synchronize()

    def plain(self, loader: DataLoader[Batch]) -> None:
        """Take an epoch of the straightforward loop."""
        self.network.train()
        self.step.begin(EPOCH)
        total = 0.0
        for batch in loader:
            there = {name: value.to(self.here.device) for name, value in batch.items()}
            loss = self.loss(there)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item()


def random_batch(section: Any, device: torch.device) -> Batch:  # noqa: ANN401 - sections differ
    """Make a batch of noise with labels of the shapes and types of a real one."""
    side, count = section.crop, section.batch
    images = torch.randn(count, 3, side, side, device=device)
    return {
        "image": images.contiguous(memory_format=torch.channels_last),
        "label": torch.randint(0, 21, (count, side, side), device=device),
        "image_label": (torch.rand(count, len(CLASSES), device=device) < 0.1).float(),
    }


def matrix_rate(device: torch.device) -> float:
    """Measure the operations a second of a large bf16 matrix product."""
    left, right = torch.randn(2, MATRIX, MATRIX, device=device, dtype=torch.bfloat16)

    def product() -> None:
        torch.matmul(left, right)
        torch.cuda.synchronize()

    product()
    return 2 * MATRIX**3 / statistics.median(harness.seconds(product) for _ in range(20))


def measure(part: Part, items: list[Item], repeats: int, peak: float | None) -> list[harness.Row]:
    """Alternate bare steps, isim's epoch and the straightforward one; print what isim reports."""
    section, device = part.section, devices.default()
    steps = len(items) // section.batch
    torch.manual_seed(0)
    network, copied = part.build(part.config), part.build(part.config).to(device)
    copied.load_state_dict(network.state_dict())
    devices.place(network, device)
    ours = Trainer(part, network, "auto", compiled=True)
    bare = Trainer(part, network, "auto", compiled=False)
    plain = Trainer(part, copied, "fp32", compiled=False)
    dataset = part.crops(items)
    crops = CropBatches(dataset, section, device)
    loader = DataLoader(
        PlainCrops(dataset),
        batch_size=section.batch,
        sampler=RandomSampler(dataset, num_samples=PLAIN_STEPS * section.batch),
        num_workers=helpers.worker_count(),
        persistent_workers=helpers.worker_count() > 0,
    )
    noise = random_batch(section, device)
    told: list[loop.Row] = []

    def epoch() -> None:
        number = EPOCH + len(told)
        told.append(
            loop.train_epoch(
                ours.here, network, crops, ours.step, optimizer=ours.optimizer, epoch=number
            )
        )

    difference = first_losses(
        bare, plain, next(iter(CropBatches(dataset, section, device).epoch(1)))
    )
    # Ours first: its loaders are forked before the heap is full, as in a real run.
    sides: tuple[Callable[[], object], ...] = (
        epoch,
        partial(bare.bare, noise, steps),
        partial(plain.plain, loader),
    )
    for side in sides:
        side()
    told.clear()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bare.loss(noise)
    images = [number * section.batch for number in (steps, steps, PLAIN_STEPS)]
    runs = [
        [harness.seconds(side) / count for side, count in zip(sides, images, strict=True)]
        for _ in range(repeats)
    ]
    # Backward is twice forward; torch's own count of it takes depthwise convolutions for whole.
    print(f"{part.title}: {speed(told, 3 * counter.get_total_flops() / section.batch, peak)}")
    isim, reference, loops = zip(*runs, strict=True)
    data = f"{harness.data_name(items)}, {section.crop} px"
    same = f"{ours.here.precision}, same network"
    near = f"first loss differs by {difference:.1e}"
    return [
        harness.row(
            harness.Case(f"{part.title}: bare step", data, ">= 0.91", same), reference, isim
        ),
        harness.row(harness.Case(f"{part.title}: plain loop", data, fidelity=near), loops, isim),
    ]


def speed(told: list[loop.Row], flops: float, peak: float | None) -> str:
    """Put what isim's epochs report into words; `flops` are operations an image."""
    images = statistics.median(row["images_per_second"] for row in told)
    waiting = statistics.median(row["waiting_share"] for row in told)
    words = f"{images:.1f} images/s, {100 * waiting:.1f} % waiting for data, "
    words += f"{flops / 1e9:.1f} GFLOP an image"
    if peak is not None:
        words += f", {100 * images * flops / peak:.1f} % of the matrix rate"
    return words


@torch.no_grad()
def first_losses(ours: Trainer, plain: Trainer, batch: Batch) -> float:
    """Relative difference of both sides' losses on one batch; dropout aside, hence eval mode."""
    ours.network.eval(), plain.network.eval()
    fast = float(ours.loss(batch))
    exact = float(plain.loss(batch | {"image": batch["image"].contiguous()}))
    return abs(fast - exact) / exact


def main() -> None:
    """Print what isim's epochs report, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="isim's side by torch.compile")
    parser.add_argument("--part", default="", help="only parts whose title has this in it")
    options = parser.parse_args()
    device = devices.default()
    peak = matrix_rate(device) if device.type == "cuda" else None
    print(harness.machine())
    if peak is not None:
        print(f"bf16 matrix product: {peak / 1e12:.0f} TFLOP/s")
    rows = []
    with tempfile.TemporaryDirectory() as name, memory.keep_freed_memory():
        items = harness.items(options.images, Path(name))
        for part in parts(options.crop, options.batch, options.compile):
            if options.part in part.title:
                rows += measure(part, items, options.repeats, peak)
    harness.report(rows)


if __name__ == "__main__":
    main()
