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
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.transforms import v2

from isim import engine, params, segmenter_training, training
from isim.batches import CropBatches
from isim.data.dataset import CropDataset, Item
from isim.labels.affinity_pairs import reduce_label
from isim.models import affinity, cam, segmenter
from isim.models.affinity import affinity_loss
from isim.models.losses import modified_cross_entropy, pixel_cross_entropy
from isim.stages import train_affinity

ROOT = Path(__file__).parent.parent
CLASSES = tuple(f"class {number}" for number in range(1, 21))
# Low, so that the random weights of a short run stay finite; they do not change the speed.
RATES = {"encoder_rate": 1e-4, "decoder_rate": 1e-4, "classifier_rate": 1e-4, "rate": 1e-4}
# Past the warm-up: the decoder is trained, too.
EPOCH = 9
# Of the straightforward loop, whose steps take several times as long.
PLAIN_STEPS = 2
MATRIX = 8192


@dataclass(frozen=True)
class Part:
    """A training loop of isim and what it is compared by.

    `loss` is that of a batch, `train_epoch` isim's, `dataset` the crops of items.
    """

    title: str
    section: Any
    build: Callable[[], nn.Module]
    make_optimizer: Callable[[Any, Any], torch.optim.Optimizer]
    train_epoch: Callable[..., dict[str, Any]]
    dataset: Callable[[list[Item]], CropDataset]
    loss: Callable[[Any, dict[str, Tensor]], Tensor]
    label_stride: int = 1


def parts(crop: int, batch: int, compiled: bool) -> Iterator[Part]:
    """Parts of the sections of the preset for the VOC sample (MobileNetV2, stride 16)."""
    preset = params.load(ROOT / "isim/presets/voc-sample-mobilenetv2.yaml")
    size = {"crop": crop, "batch": batch, "epochs": 100, "compile": compiled}

    def optimizer(section: Any) -> dict[str, Any]:  # noqa: ANN401 - sections differ
        rates = {k: v for k, v in RATES.items() if hasattr(section.optimizer, k)}
        return {"optimizer": section.optimizer.model_copy(update=rates)}

    for method in ("cam", "deeplabcam"):
        update = size | {"method": method, "warmup_epochs": 1} | optimizer(preset.train_cam)
        cams = preset.train_cam.model_copy(update=update)
        config = cam.configure(cams, CLASSES)
        yield Part(
            f"train_cam ({method})",
            cams,
            partial(cam.build, config),
            training.make_optimizer,
            training.train_epoch,
            partial(_crops, crop=crop, mean=config.mean, std=config.std),
            _cam_loss,
        )
    pixels = preset.train_segmenter
    pixels = pixels.model_copy(update=size | optimizer(pixels))
    mean, std = segmenter.normalization(pixels.encoder, pixels.input_norm)
    scales = (pixels.scale_min, pixels.scale_max)
    yield Part(
        f"train_segmenter ({pixels.method})",
        pixels,
        lambda: segmenter.build(
            segmenter.SegmenterConfig(
                pixels.method,
                pixels.encoder,
                pixels.output_stride,
                pixels.encoder_norm,
                pixels.decoder_channels,
                CLASSES,
                mean,
                std,
            )
        ),
        segmenter_training.make_optimizer,
        segmenter_training.train_epoch,
        partial(_crops, crop=crop, mean=mean, std=std, scales=scales),
        lambda network, batch: pixel_cross_entropy(
            network(batch["image"]), batch["label"], network.output_stride
        ),
    )
    pairs = preset.train_affinity.model_copy(update=size | {"rate": RATES["rate"]})
    net = affinity.AffinityConfig(
        pairs.encoder, pairs.output_stride, pairs.stride, pairs.radius, mean, std
    )
    yield Part(
        "train_affinity",
        pairs,
        lambda: affinity.build(net),
        lambda network, section: engine.sgd(
            [(network.encoder, section.rate), (network.head, section.rate)],
            section.momentum,
            section.weight_decay,
        ),
        train_affinity.train_epoch,
        lambda items: train_affinity.AffinityCrops(items, pairs, net, _mask_of(items)),
        lambda network, batch: (
            affinity_loss(network(batch["image"]), batch["label"], pairs.radius).total
        ),
        label_stride=pairs.stride,
    )


def _mask_of(items: list[Item]) -> Callable[[str], Any]:
    return {item.id: item.mask for item in items}.__getitem__


def _crops(
    items: list[Item],
    crop: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    scales: tuple[float, float] | None = None,
) -> CropDataset:
    return CropDataset(items, crop, mean, std, 0, [_mask_of(items)], scales=scales)


def _cam_loss(network: cam.CamNetwork, batch: dict[str, Tensor]) -> Tensor:
    logits, segmentation = network(batch["image"], True)
    loss = F.multilabel_soft_margin_loss(logits.float(), batch["image_label"])
    if segmentation is not None:
        loss = loss + modified_cross_entropy(segmentation.float(), batch["label"])[0]
    return loss


class PlainCrops(Dataset[dict[str, Tensor]]):
    """The augmentation as scripts write it: Pillow images through a chain of transforms."""

    def __init__(self, crops: CropDataset, label_stride: int) -> None:
        """Crops of the same images and ranges as `crops`, with draws of their own."""
        self.crops = crops
        self.label_stride = label_stride
        fill = {Image.Image: tuple(round(255 * v) for v in crops.mean), tv_tensors.Mask: 255}
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

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Image (3, crop, crop) float32, label (h, w) int64, image_label (K,) float32."""
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
        labels = np.asarray(label[0])
        if self.label_stride > 1:
            labels = reduce_label(labels, self.label_stride)
        return {
            "image": self.values(image),
            "label": torch.from_numpy(labels).long(),
            "image_label": torch.from_numpy(item.known_label.copy()),
        }


def plain_epoch(
    part: Part,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    device: torch.device,
) -> None:
    """One epoch of the straightforward loop."""
    network.train()
    total = 0.0
    for batch in loader:
        there = {name: value.to(device) for name, value in batch.items()}
        loss = part.loss(network, there)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()


def bare_steps(
    part: Part,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    precision: str,
    steps: int,
) -> None:
    """Forward, backward and step on one batch that is there already."""
    device = batch["image"].device
    network.train()
    torch.backends.cudnn.benchmark = True
    for _ in range(steps):
        with engine.autocast(precision, device):
            loss = part.loss(network, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        torch.cuda.synchronize()


def random_batch(section: Any, label_stride: int, device: torch.device) -> dict[str, Tensor]:  # noqa: ANN401
    """A batch of noise with labels of the shapes and types of a real one."""
    side, count = section.crop, section.batch
    images = torch.randn(count, 3, side, side, device=device)
    low = -(-side // label_stride)
    return {
        "image": images.contiguous(memory_format=torch.channels_last),
        "label": torch.randint(0, 21, (count, low, low), device=device),
        "image_label": (torch.rand(count, len(CLASSES), device=device) < 0.1).float(),
    }


def matrix_rate(device: torch.device) -> float:
    """Measured operations a second of a large bf16 matrix product."""
    left, right = torch.randn(2, MATRIX, MATRIX, device=device, dtype=torch.bfloat16)

    def product() -> None:
        torch.matmul(left, right)
        torch.cuda.synchronize()

    product()
    return 2 * MATRIX**3 / statistics.median(harness.seconds(product) for _ in range(20))


def measure(
    part: Part, items: list[Item], device: torch.device, peak: float | None, repeats: int
) -> list[harness.Row]:
    """Alternate bare steps, isim's epoch and the straightforward one; print what isim reports."""
    section = part.section
    precision = engine.resolve_precision("auto", device)
    steps = len(items) // section.batch
    torch.manual_seed(0)
    ours, plain = part.build(), part.build().to(device)
    plain.load_state_dict(ours.state_dict())
    engine.place(ours, device)
    optimizer, plain_optimizer = (part.make_optimizer(n, section) for n in (ours, plain))
    dataset = part.dataset(items)
    dataset.use_labels(0)
    crops = CropBatches(dataset, section, device)
    loader = DataLoader(
        PlainCrops(dataset, part.label_stride),
        batch_size=section.batch,
        sampler=RandomSampler(dataset, num_samples=PLAIN_STEPS * section.batch),
        num_workers=engine.worker_count(),
        persistent_workers=engine.worker_count() > 0,
    )
    noise = random_batch(section, part.label_stride, device)
    rows: list[dict[str, Any]] = []

    def epoch() -> None:
        rows.append(
            part.train_epoch(
                *(ours, optimizer, crops, section, EPOCH + len(rows), precision, device)
            )
        )

    def bare() -> None:
        bare_steps(part, ours, optimizer, noise, precision, steps)

    def straightforward() -> None:
        plain_epoch(part, plain, plain_optimizer, loader, device)

    real = next(iter(CropBatches(dataset, section, device).epoch(1)))
    difference = first_losses(part, ours, plain, real, precision)
    # Ours first: its loaders are forked before the heap is full, as in a real run.
    for side in (epoch, bare, straightforward):
        side()
    rows.clear()
    # Backward is twice forward; torch's own count of it takes depthwise convolutions for whole.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        part.loss(ours, noise)
    flops = 3 * counter.get_total_flops() / section.batch
    times = [
        [harness.seconds(side) for side in (bare, epoch, straightforward)] for _ in range(repeats)
    ]
    speed = statistics.median(row["images_per_second"] for row in rows)
    waiting = statistics.median(row["waiting_share"] for row in rows)
    told = (
        f"{speed:.1f} images/s, {100 * waiting:.1f} % waiting for data, "
        f"{flops / 1e9:.1f} GFLOP an image"
    )
    if peak is not None:
        told += f", {100 * speed * flops / peak:.1f} % of the matrix rate"
    print(f"{part.title}: {told}", flush=True)
    data = f"{harness.data_name(items)}, {section.crop} px"
    sides = (
        (f"{part.title}: bare step", 0, ">= 0.91", f"{precision}, same network"),
        (f"{part.title}: plain loop", 2, "", f"first loss differs by {difference:.1e}"),
    )
    found = []
    counts = [number * section.batch for number in (steps, steps, PLAIN_STEPS)]
    runs = [[taken / count for taken, count in zip(run, counts, strict=True)] for run in times]
    for title, which, goal, fidelity in sides:
        ratios = sorted(run[which] / run[1] for run in runs)
        reference, isim = (statistics.median(run[side] for run in runs) for side in (which, 1))
        middle = statistics.median(ratios)
        found.append(
            harness.Row(
                *(title, data, reference, isim, middle, ratios[0], ratios[-1], goal, fidelity)
            )
        )
    return found


@torch.no_grad()
def first_losses(
    part: Part, ours: nn.Module, plain: nn.Module, batch: dict[str, Tensor], precision: str
) -> float:
    """Relative difference of both sides' losses on one batch; dropout aside, hence eval mode."""
    ours.eval(), plain.eval()
    with engine.autocast(precision, batch["image"].device):
        fast = float(part.loss(ours, batch))
    exact = float(part.loss(plain, batch | {"image": batch["image"].contiguous()}))
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
    device = engine.default_device()
    peak = matrix_rate(device) if device.type == "cuda" else None
    print(harness.machine())
    if peak is not None:
        print(f"bf16 matrix product: {peak / 1e12:.0f} TFLOP/s")
    rows = []
    with tempfile.TemporaryDirectory() as name, engine.keep_freed_memory():
        items = harness.items(options.images, Path(name))
        for part in parts(options.crop, options.batch, options.compile):
            if options.part in part.title:
                rows += measure(part, items, device, peak, options.repeats)
    harness.report(rows)


if __name__ == "__main__":
    main()
