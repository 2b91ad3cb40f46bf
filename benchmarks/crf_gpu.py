"""The dCRF on a GPU: images a second, and how equal its labels are to pydensecrf's.

Seeds are the ground truth's foreground in blocks of 32 pixels, as coarse as a CAM, with the labels
of each image alone, as in training. Images are decoded and lie in memory before the clock starts;
copies to the GPU and back are counted. Meant for 500 images or more, taken from `$ISIM_SHARED`
(default ../shared):

    python benchmarks/crf_gpu.py --images 800
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import cv2
import harness
import numpy as np
import torch
from numpy.typing import NDArray

from isim.data import files
from isim.data.prepared import Item
from isim.experiments import preset
from isim.labels.crf import refine as crf
from isim.labels.crf.batched import refine_batch
from isim.metrics import BACKGROUND, IGNORE

SETTINGS = preset.parameters("voc-deeplabcam-resnet50").crf


def seed(item: Item) -> NDArray[np.uint8]:
    """Make (H, W) labels of the ground truth, a block of 32 pixels each."""
    assert item.mask is not None
    truth = files.read_label_map(item.mask)
    height, width = truth.shape
    truth[truth == IGNORE] = BACKGROUND
    small = cv2.resize(truth, (-(-width // 32), -(-height // 32)), interpolation=cv2.INTER_NEAREST)
    grown = cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)
    return np.asarray(grown, np.uint8)


def main() -> None:
    """Print what one GPU does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=256, help="images given at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reference", type=int, default=16, help="images pydensecrf refines, too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("crf_gpu: no CUDA device; benchmarks/crf.py is about the CPU")
        return
    print(harness.machine())
    device = torch.device("cuda")
    with tempfile.TemporaryDirectory() as folder:
        chosen = harness.items(arguments.images, Path(folder))
        pictures = [files.read_image(item.image) for item in chosen]
        seeds = [seed(item) for item in chosen]
    ids = [item.class_ids for item in chosen]

    def refine() -> list[NDArray[np.uint8]]:
        labels: list[NDArray[np.uint8]] = []
        for start in range(0, len(chosen), arguments.batch):
            part = slice(start, start + arguments.batch)
            planes = [torch.from_numpy(p).to(device).permute(2, 0, 1) for p in pictures[part]]
            places = [torch.from_numpy(s).to(device) for s in seeds[part]]
            labels += [x.cpu().numpy() for x in refine_batch(planes, places, ids[part], SETTINGS)]
        return labels

    # Spread over all images.
    some = range(0, len(chosen), -(-len(chosen) // arguments.reference))

    def reference() -> list[NDArray[np.uint8]]:
        with harness.crf_backend("pydensecrf"):
            return [crf.refine(pictures[i], seeds[i], ids[i], SETTINGS) for i in some]

    found = refine()
    agreements = [(a == found[i]).mean() for a, i in zip(reference(), some, strict=True)]
    times = [harness.seconds(refine) / len(chosen) for _ in range(arguments.repeats)]
    slow = harness.seconds(reference) / len(some)
    middle = statistics.median(times)
    print(
        f"{harness.data_name(chosen)}: {1000 * middle:.2f} ms an image, {1 / middle:.1f} images/s, "
        f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    )
    case = harness.Case(
        "dCRF on a GPU against pydensecrf, one core",
        harness.data_name(chosen),
        "2.3 ms an image",
        f"same labels {100 * np.mean(agreements):.4f} %, worst {100 * min(agreements):.4f} %",
    )
    harness.report([harness.row(case, [slow] * len(times), times)])


if __name__ == "__main__":
    main()
