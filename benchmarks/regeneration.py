"""CAM inference, dCRF and a whole regeneration against the field's straightforward way.

The reference is what IRN's scripts do: one process, one image at a time, one batch of an image
and its mirror image a scale in NCHW fp32, dCRF after the network, in the same process. Both
sides make the same labels from the same network and images, in turn, in this run.

Real images are taken from `$ISIM_SHARED` (default ../shared) where it exists, generated ones
otherwise. Seconds depend on the machine and its load; the ratios are the result.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from isim import engine
from isim.data import files, shapes
from isim.data.dataset import Item
from isim.labels import crf, seeds
from isim.models import cam
from isim.params import Crf, resolve_path
from isim.regeneration import CamSettings, cams, class_ids, refine_all, regenerate
from isim.workers import RefineTask

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


def items(count: int, folder: Path) -> list[Item]:
    """The first `count` images of the VOC sample, else generated ones of 256 pixels."""
    devkit = resolve_path("$ISIM_SHARED/data/voc_sample", Path.cwd()) / "VOCdevkit/VOC2012"
    if not devkit.is_dir():
        shapes.generate(folder, count, 1, 256, 0)
        devkit = folder / "VOCdevkit/VOC2012"
    names = (devkit / "ImageSets/Segmentation/train.txt").read_text().split()[:count]
    chosen = []
    for name in names:
        mask = devkit / f"SegmentationClass/{name}.png"
        label = np.zeros(20, np.float32)
        present = np.setdiff1d(np.unique(files.read_label_map(mask)), [0, 255])
        label[present - 1] = 1
        chosen.append(Item(name, devkit / f"JPEGImages/{name}.jpg", mask, label))
    return chosen


def network() -> tuple[cam.CamNetwork, cam.CamConfig]:
    """MobileNetV2 at output stride 16; its weights do not change the speed."""
    torch.manual_seed(0)
    mean, std = cam.normalization("mobilenetv2_100", "encoder")
    classes = tuple(f"class {number}" for number in range(1, 21))
    config = cam.CamConfig("cam", "mobilenetv2_100", 16, "batch", (6,), 1, classes, mean, std)
    net = cam.build(config)
    path = resolve_path("$ISIM_SHARED/weights/mobilenetv2_100.imagenet.safetensors", Path.cwd())
    weights = str(path) if path.is_file() else "none"
    cam.load_encoder_weights(net, config.encoder, weights, path)
    return net.eval(), config


@torch.inference_mode()
def reference_cam(net: cam.CamNetwork, config: cam.CamConfig, item: Item) -> np.ndarray:
    """(K', H, W) CAMs of one image: all classes at every scale, NCHW fp32."""
    image = files.read_image(item.image)
    height, width = image.shape[:2]
    pixels = (image / np.float32(255) - np.asarray(config.mean, np.float32)) / np.asarray(
        config.std, np.float32
    )
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
    total = torch.zeros(len(config.classes), height, width)
    for scale in SCALES:
        size = (round(height * scale), round(width * scale))
        scaled = F.interpolate(tensor, size, mode="bilinear", antialias=True)
        views = torch.cat([scaled, scaled.flip(-1)])
        maps = F.conv2d(net.encoder(views)[-1], net.classifier.weight).relu()
        summed = maps[:1] + maps[1:].flip(-1)
        total += F.interpolate(summed, (height, width), mode="bilinear")[0]
    planes = total[torch.from_numpy(class_ids(item) - 1)]
    return (planes / (planes.amax((1, 2), keepdim=True) + 1e-5)).numpy()


def main() -> None:
    """Time both sides in turn and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = items(options.images, folder)
        device = engine.default_device()
        plain, config = network()
        ours, _ = network()
        engine.place(ours, device)
        precision = engine.resolve_precision("auto", device)
        settings = CamSettings(SCALES, True, precision)
        made = {item.id: reference_cam(plain, config, item) for item in chosen}
        seed = {n: seeds.seed(p, _ids(chosen, n), THRESHOLD) for n, p in made.items()}

        def reference_crf() -> None:
            for item in chosen:
                image = files.read_image(item.image)
                label = crf.refine(image, seed[item.id], class_ids(item), CRF)
                files.write_label_map(folder / "reference" / f"{item.id}.png", label)

        def our_crf() -> None:
            outs = {item.id: folder / "crf" / f"{item.id}.png" for item in chosen}
            tasks = (
                RefineTask(i.id, i.image, seed[i.id], class_ids(i), CRF, None, outs[i.id], 21)
                for i in chosen
            )
            for _ in refine_all(tasks):
                pass

        def reference_whole() -> None:
            for item in chosen:
                ids = class_ids(item)
                label = seeds.seed(reference_cam(plain, config, item), ids, THRESHOLD)
                label = crf.refine(files.read_image(item.image), label, ids, CRF)
                files.write_label_map(folder / "reference" / f"{item.id}.png", label)

        def our_whole() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                regenerate(
                    ours,
                    config,
                    chosen,
                    Path(out) / "labels",
                    Path(out) / "scratch",
                    settings,
                    THRESHOLD,
                    CRF,
                    (),
                    device,
                )

        parts: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "CAM inference": (
                lambda: [reference_cam(plain, config, item) for item in chosen],
                lambda: [planes for _, planes in cams(ours, config, chosen, settings, device)],
            ),
            "dCRF": (reference_crf, our_crf),
            "regeneration": (reference_whole, our_whole),
        }
        print(
            f"{len(chosen)} images, {precision}, {torch.get_num_threads()} threads, "
            f"{engine.worker_count()} dCRF workers, {options.repeats} runs in turn"
        )
        print("part            reference s/image  isim s/image  ratio  spread of the ratio")
        for title, (reference, candidate) in parts.items():
            candidate()  # warm: kernels, buffers, page cache
            pairs = [(_seconds(reference), _seconds(candidate)) for _ in range(options.repeats)]
            ratios = sorted(slow / fast for slow, fast in pairs)
            slow, fast = (
                statistics.median(side) / len(chosen) for side in zip(*pairs, strict=True)
            )
            print(
                f"{title:<15} {slow:>17.3f}  {fast:>12.3f}  {statistics.median(ratios):>5.2f}"
                f"  {ratios[0]:.2f}..{ratios[-1]:.2f}"
            )
        agreement = np.mean(
            [
                np.mean(
                    seeds.seed(planes.cpu().numpy(), class_ids(item), THRESHOLD) == seed[item.id]
                )
                for item, planes in cams(ours, config, chosen, settings, device)
            ]
        )
        print(f"seeds agree with the reference on {100 * agreement:.2f} % of the pixels")


def _ids(chosen: list[Item], name: str) -> np.ndarray:
    return class_ids(next(item for item in chosen if item.id == name))


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    # The dCRF workers would import this script, and torch, again: no stage makes them do that.
    del __file__
    main()
