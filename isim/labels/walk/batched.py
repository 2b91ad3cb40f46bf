"""Random walk in PyTorch: batches of images of any size (paper 4.1.6; spec 6)."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from isim.labels.walk.pairs import half_disc, overlap

# Bytes of a step's products, which decide how many images walk together.
BUDGET = 1 << 30


@torch.no_grad()
def walk_batch(
    planes: Sequence[Tensor], affinities: Sequence[Tensor], *, radius: int, beta: float, t: int
) -> list[Tensor]:
    """Take 2^t steps along affinities, as `walk.transition` and `walk.walk` do.

    Each image has planes (M, h, w) float32, of any number and size, and affinities (P, h, w); all
    are on one device, and so are the (M, h, w) float32 that come back.
    """
    results: list[Tensor] = []
    for part in _parts(planes, radius):
        transitions = _transitions(affinities[part], radius, beta)
        results += _walk(planes[part], *transitions, radius=radius, steps=2**t)
    return results


def _parts(planes: Sequence[Tensor], radius: int) -> Iterator[slice]:
    """Choose neighbours that fit into the budget together, each as large as their largest."""
    start, largest = 0, (0, 0, 0)
    for end, image in enumerate(planes):
        most = tuple(map(max, largest, image.shape))
        bytes_ = 8 * (2 * radius - 1) ** 2 * most[0] * most[1] * (most[2] + radius)
        if end > start and (end + 1 - start) * bytes_ > BUDGET:
            yield slice(start, end)
            start, most = end, tuple(image.shape)
        largest = (most[0], most[1], most[2])
    if planes:
        yield slice(start, len(planes))


def _walk(
    planes: Sequence[Tensor], weights: Tensor, scale: Tensor, *, radius: int, steps: int
) -> list[Tensor]:
    count = len(planes)
    most, height, width = (max(image.shape[axis] for image in planes) for axis in range(3))
    # Flat maps with zeros around and between the rows: neighbours are the same distance away
    # everywhere, and the squares of neighbours are a view.
    stride, side = width + radius, 2 * radius - 1
    rows = height + 2 * radius
    maps = torch.zeros(count, most, rows, stride, dtype=torch.float64, device=planes[0].device)
    for image, map_ in zip(planes, maps, strict=True):
        map_[: len(image), radius : radius + image.shape[1], : image.shape[2]] = image
    size, length = rows * stride, height * stride
    squares = maps.as_strided(
        (count, most, side, side, length),
        (most * size, size, stride, 1, 1),
        stride - radius + 1,  # from the first square's first neighbour
    )
    products = torch.empty(squares.shape, dtype=torch.float64, device=maps.device)
    inside = maps.flatten(2)[..., radius * stride : (radius + height) * stride]
    for _ in range(steps):
        torch.mul(squares, weights, out=products)
        torch.mul(products.sum((2, 3)), scale, out=inside)
    walked = maps[:, :, radius : radius + height, :width].float()
    return [
        map_[: len(image), : image.shape[1], : image.shape[2]]
        for image, map_ in zip(planes, walked, strict=True)
    ]


def _transitions(affinities: Sequence[Tensor], radius: int, beta: float) -> tuple[Tensor, Tensor]:
    """Weigh each pixel's square of neighbours, and find what their sum is scaled by.

    Returns:
        (B, 1, 2r - 1, 2r - 1, height * (width + r)) float32 affinity^beta, 0 for what is not
        nearer than r, outside the image or between rows; (B, 1, height * (width + r)) float64, as
        rounding would add up over the steps.
    """
    count, side, device = len(affinities), 2 * radius - 1, affinities[0].device
    height, width = (max(affinity.shape[axis] for affinity in affinities) for axis in (1, 2))
    weights = torch.zeros(count, side, side, height, width + radius, device=device)
    valid = torch.zeros(count, height, width, dtype=torch.bool, device=device)
    planes = []
    for affinity, pixels in zip(affinities, valid, strict=True):
        pixels[: affinity.shape[1], : affinity.shape[2]] = True
        below, right = height - affinity.shape[1], width - affinity.shape[2]
        planes.append(F.pad(affinity, (0, right, 0, below)))
    powers = torch.stack(planes).double().pow(beta).float()
    middle = radius - 1
    weights[:, middle, middle, :, :width] = valid.float()
    for place, (dy, dx) in enumerate(half_disc(radius)):
        here, there = ((slice(None), *slices) for slices in overlap((dy, dx), height, width))
        both = torch.where(valid[here] & valid[there], powers[:, place][here], 0)
        weights[:, middle + dy, middle + dx, :, :width][here] = both
        weights[:, middle - dy, middle - dx, :, :width][there] = both
    weights = weights.flatten(3)
    sums = weights.sum((1, 2), dtype=torch.float64)
    return weights[:, None], torch.where(sums > 0, 1 / sums, 0)[:, None]
