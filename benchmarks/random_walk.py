"""The random walk against the field's dense way: eight squarings of an N x N matrix.

An image of about 500 x 375 pixels at stride 8, 2^8 steps, as in PSA: the reference fills a matrix
of its N = 2,961 map pixels, squares it eight times in fp32 and multiplies the CAMs by it; isim
walks the CAMs along the stencil of affinities. Both start from the affinities. Those are generated
from the VOC sample's ground truth where it is there: high within an object, low across its border.
Stride 4 is not compared: there the dense way takes minutes an image.

On a CUDA device both sides run there, too: the reference image by image, isim in one batch.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import harness
import numpy as np
import torch
from numpy.typing import NDArray

from isim.data import files
from isim.data.prepared import Item
from isim.labels.walk import walk as random_walk
from isim.labels.walk.batched import walk_batch
from isim.labels.walk.pairs import half_disc, overlap

RADIUS, BETA, STEPS_LOG2, STRIDE = 5, 8, 8, 8


Planes = NDArray[np.float32]


def inputs(item: Item) -> tuple[Planes, Planes]:
    """Make planes (M, h, w), the background and two classes, and affinities (34, h, w)."""
    assert item.mask is not None
    truth = files.read_label_map(item.mask)
    height, width = (-(-side // STRIDE) for side in truth.shape)
    small = cv2.resize(truth, (width, height), interpolation=cv2.INTER_NEAREST)
    rng = np.random.default_rng(0)
    planes = rng.uniform(0, 1, (3, height, width)).astype(np.float32)
    affinity = np.zeros((len(half_disc(RADIUS)), height, width), np.float32)
    for plane, offset in zip(affinity, half_disc(RADIUS), strict=True):
        here, there = overlap(offset, height, width)
        alike = np.where(small[here] == small[there], 0.9, 0.5)
        plane[here] = alike + rng.uniform(-0.1, 0.1, alike.shape)
    return planes, affinity


def dense(planes: torch.Tensor, affinity: torch.Tensor) -> torch.Tensor:
    """Walk as the field's scripts do: (M, h, w)."""
    height, width = affinity.shape[1:]
    number = torch.arange(height * width, device=planes.device).view(height, width)
    matrix = torch.eye(height * width, device=planes.device)
    for plane, offset in zip(affinity, half_disc(RADIUS), strict=True):
        here, there = overlap(offset, height, width)
        one, two = number[here].flatten(), number[there].flatten()
        matrix[one, two] = matrix[two, one] = plane[here].flatten() ** BETA
    matrix /= matrix.sum(0)
    for _ in range(STEPS_LOG2):
        matrix = matrix @ matrix
    return (planes.flatten(1) @ matrix).view_as(planes)


def row(
    part: str,
    data: str,
    reference: Callable[[], list[Planes]],
    candidate: Callable[[], list[Planes]],
    *,
    repeats: int,
) -> harness.Row:
    """Time both sides, and compare what they find."""
    both = list(zip(reference(), candidate(), strict=True))
    worst = max(float(np.abs(one - two).max()) for one, two in both)
    case = harness.Case(part, data, ">= 50", f"max difference {worst:.1e} (goal 1e-4)")
    return harness.compare(case, reference, candidate, units=len(both), repeats=repeats)


def main() -> None:
    """Print a row a device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1, help="on the CPU")
    parser.add_argument("--gpu-images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(harness.machine())
    cuda = torch.cuda.is_available()
    count = max(arguments.images, arguments.gpu_images if cuda else 0)
    with tempfile.TemporaryDirectory() as folder:
        chosen = harness.items(count, Path(folder))
        arrays = [inputs(item) for item in chosen]
    some = arrays[: arguments.images]

    def walk() -> list[Planes]:
        return [
            random_walk.walk(planes, random_walk.transition(near, RADIUS, BETA), STEPS_LOG2)
            for planes, near in some
        ]

    def dense_walk() -> list[Planes]:
        return [dense(torch.from_numpy(p), torch.from_numpy(a)).numpy() for p, a in some]

    data = f"{harness.data_name(chosen[: arguments.images])}, stride {STRIDE}"
    rows = [row("random walk on the CPU", data, dense_walk, walk, repeats=arguments.repeats)]
    if cuda:
        device = torch.device("cuda")
        tensors = [
            tuple(torch.from_numpy(a).to(device) for a in pair)
            for pair in arrays[: arguments.gpu_images]
        ]

        def walk_there() -> list[Planes]:
            planes, affinities = zip(*tensors, strict=True)
            walked = walk_batch(planes, affinities, radius=RADIUS, beta=BETA, t=STEPS_LOG2)
            return [each.cpu().numpy() for each in walked]

        def dense_walk_there() -> list[Planes]:
            return [dense(*pair).cpu().numpy() for pair in tensors]

        data = f"{harness.data_name(chosen[: len(tensors)])}, stride {STRIDE}"
        part = f"random walk on {torch.cuda.get_device_name()}"
        rows.append(row(part, data, dense_walk_there, walk_there, repeats=arguments.repeats))
    harness.report(rows)


if __name__ == "__main__":
    main()
