"""Fully connected CRF in PyTorch: batches of images of any size (paper 4.1; spec 5).

Q <- softmax(-U + sum_m w_m n_m K_m (n_m Q)), exact: K_m is a Gaussian kernel on the permutohedral
lattice (Adams et al. 2010), n_m = 1 / sqrt(K_m 1 + 1e-20). A softmax ignores what its logits share:
all is a difference to the last label. Every sum has a fixed order: the same bits each time.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from isim.errors import UserError
from isim.labels.crf.refine import LEAST_PROBABILITY, working_size
from isim.params import Crf

# A thread adds up to so many values; a lattice point of a plain area has tens of thousands.
RUN = 64
# Spatial lattices kept: of the most frequent image sizes, about 10 MB each.
KEPT = 32
# Bytes that a batch may take, which is more than enough to keep a GPU busy, and what it takes a
# pixel: for building the bilateral lattice, and a channel for filtering.
BUDGET = 4 << 30
BYTES_OF_PIXEL = 768
BYTES_OF_CHANNEL = 80


@torch.no_grad()
def refine_batch(
    images: Sequence[Tensor],
    seeds: Sequence[Tensor],
    class_ids: Sequence[NDArray[np.int64]],
    settings: Crf,
) -> list[Tensor]:
    """Refine seeds along their images' edges (spec 5, set `labels`), as `refine.refine` does.

    Args:
        images: (3, H, W) RGB uint8 each, of any sizes, all on one device.
        seeds: (H, W) uint8 labels out of 0 and the image's `class_ids`, on the same device.
        class_ids: (K',) labelled classes of each image, 1..K; may be empty.
        settings: All of them.

    Returns:
        (H, W) uint8 labels each, out of 0 and the image's `class_ids`, on the same device.
    """
    sizes = [working_size(*image.shape[1:]) for image in images]
    if any(size != tuple(image.shape[1:]) for size, image in zip(sizes, images, strict=True)):
        small = [_resized(image, size, "area") for image, size in zip(images, sizes, strict=True)]
        cut = [_resized(seed[None], size)[0] for seed, size in zip(seeds, sizes, strict=True)]
        return _grown(refine_batch(small, cut, class_ids, settings), images)
    results = [torch.zeros_like(seed) for seed in seeds]
    for batch in _batches(images, [1 + len(ids) for ids in class_ids], settings):
        # Labels of each image, ascending, and the place of each label among them.
        sorted_ids = (np.append(0, np.sort(class_ids[i])) for i in batch.places)
        labels = torch.stack([torch.from_numpy(ids) for ids in sorted_ids])
        places = torch.zeros(len(labels), 256, dtype=torch.int64)
        count = labels.shape[1]
        places.scatter_(1, labels, torch.arange(count).expand_as(labels))
        seed = torch.cat([seeds[i].flatten() for i in batch.places])
        place = places.to(seed.device)[batch.number, seed.long()]
        sure = math.log(settings.gt_prob) - math.log((1 - settings.gt_prob) / (count - 1))
        found = _labels(_infer(batch, F.one_hot(place, count).float() * sure, settings))
        batch.hand_out(labels.to(seed.device, torch.uint8)[batch.number, found], results)
    return results


@torch.no_grad()
def refine_soft_batch(
    images: Sequence[Tensor], probabilities: Sequence[Tensor], settings: Crf
) -> list[Tensor]:
    """Refine class probabilities along the images' edges, as `refine.refine_soft` does.

    Args:
        images: (3, H, W) RGB uint8 each, of any sizes, all on one device.
        probabilities: (L, H, W) each, a softmax over L, on the same device; below 1e-5 they count
            as 1e-5. L may differ.
        settings: All but `gt_prob`.

    Returns:
        (H, W) uint8 labels 0..L-1 each, indices of the planes, on the same device.
    """
    sizes = [working_size(*image.shape[1:]) for image in images]
    if any(size != tuple(image.shape[1:]) for size, image in zip(sizes, images, strict=True)):
        small = [_resized(image, size, "area") for image, size in zip(images, sizes, strict=True)]
        given = zip(probabilities, sizes, strict=True)
        smaller = [_resized(own, size, "area") for own, size in given]
        return _grown(refine_soft_batch(small, smaller, settings), images)
    results = [torch.zeros_like(image[0]) for image in images]
    for batch in _batches(images, [len(planes) for planes in probabilities], settings):
        planes = torch.cat([probabilities[i].float().flatten(1) for i in batch.places], 1)
        logits = _infer(batch, planes.clamp(LEAST_PROBABILITY, 1).log_().T, settings)
        batch.hand_out(_labels(logits).byte(), results)
    return results


def _resized(planes: Tensor, size: tuple[int, ...], mode: str = "nearest-exact") -> Tensor:
    """Resize (C, H, W), keeping the type."""
    resized = F.interpolate(planes[None].float(), size, mode=mode)[0]
    return resized.round_().to(planes.dtype) if planes.dtype == torch.uint8 else resized


def _grown(labels: Sequence[Tensor], images: Sequence[Tensor]) -> list[Tensor]:
    pairs = zip(labels, images, strict=True)
    return [_resized(label[None], tuple(image.shape[1:]))[0] for label, image in pairs]


@dataclass(frozen=True)
class _Batch:
    """Images that are computed together, P pixels in all."""

    places: list[int]  # of the images among all
    images: list[Tensor]

    @functools.cached_property
    def number(self) -> Tensor:
        """(P,) int64 number of each pixel's image, image after image."""
        pixels = torch.tensor([image[0].numel() for image in self.images])
        device, total = self.images[0].device, int(pixels.sum())
        numbers = torch.arange(len(self.images), device=device)
        return numbers.repeat_interleave(pixels.to(device), output_size=total)

    def hand_out(self, values: Tensor, results: list[Tensor]) -> None:
        """Cut (P,) or (P, n) values into the images' (H, W) or (n, H, W) results."""
        parts = values.split([image[0].numel() for image in self.images])
        for place, image, part in zip(self.places, self.images, parts, strict=True):
            results[place] = part.transpose(0, -1).reshape(*values.shape[1:], *image.shape[1:])


def _batches(images: Sequence[Tensor], counts: Sequence[int], settings: Crf) -> Iterator[_Batch]:
    """Choose the images that are computed together: of one label count, and no single label.

    Raises:
        UserError: The kernel is so narrow that an image's lattice points cannot be numbered.
    """
    several = sorted((i for i in range(len(images)) if counts[i] > 1), key=lambda i: counts[i])
    if not several:
        return
    features = (
        _most(images, settings.gaussian_sxy),
        _most(images, settings.bilateral_sxy, settings.bilateral_srgb),
    )
    # The one filter's lattice is of one image, the other's of all images.
    room = [2**63 // ((len(most) + 1) * math.prod(_digits(most))) for most in features]
    if min(room) == 0:
        raise UserError(
            f"the dCRF's kernels are too narrow for a GPU (gaussian_sxy {settings.gaussian_sxy}, "
            f"bilateral_sxy {settings.bilateral_sxy}, bilateral_srgb {settings.bilateral_srgb}); "
            "widen them, or set ISIM_CRF=pydensecrf"
        )
    budget, device = BUDGET, images[0].device
    if device.type == "cuda":
        # What torch holds for the next tensors is free, too.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = min(budget, (torch.cuda.mem_get_info(device)[0] + held) // 2)
    for count, group in itertools.groupby(several, key=lambda i: counts[i]):
        most_pixels = budget // (BYTES_OF_PIXEL + BYTES_OF_CHANNEL * (count - 1))
        chosen: list[int] = []
        pixels = 0
        for index in group:
            pixels += images[index][0].numel()
            if chosen and (pixels > most_pixels or len(chosen) == room[1]):
                yield _Batch(chosen, [images[i] for i in chosen])
                chosen, pixels = [], images[index][0].numel()
            chosen.append(index)
        yield _Batch(chosen, [images[i] for i in chosen])


def _differences(scores: Tensor) -> Tensor:
    """Subtract the last label's scores from the others: (P, n) to (P, n - 1)."""
    return (scores[:, :-1] - scores[:, -1:]).contiguous()


def _labels(logits: Tensor) -> Tensor:
    """Find the most probable labels (P,) int64 of (P, n - 1) logits; the first of equals."""
    return F.pad(logits, (0, 1)).argmax(1)


def _infer(batch: _Batch, scores: Tensor, settings: Crf) -> Tensor:
    """Take the mean field's steps from (P, n) negative energies.

    Returns:
        (P, n - 1) logits, as differences to the last label's.
    """
    logits = unary = _differences(scores)
    if settings.steps == 0:
        return unary
    kernels = [_spatial(batch.images, settings), _bilateral(batch, settings)]
    for _ in range(settings.steps):
        if unary.shape[1] == 1:
            # Q_0 - Q_1 of two labels.
            differences = torch.tanh(logits / 2)
        else:
            differences = _differences(F.pad(logits, (0, 1)).softmax(1))
        logits = unary
        for kernel in kernels:
            logits = logits + kernel.filter(differences)
    return logits


@dataclass(frozen=True)
class _Lattice:
    """Gaussian filter of P pixels' features in d dimensions by V lattice points.

    Point 0 is none: its value is 0, and it stands for neighbours that are not there. All indices
    are int32. E = (d + 1) P is the number of pairs of a pixel and a corner of its simplex; sorted
    by corner they are cut into runs of at most `RUN` pairs.
    """

    corners: Tensor  # (d + 1, P) points 1..V
    slices: Tensor  # (d + 1, P) float32 weights of the corners in the result
    pixels: Tensor  # (E,) pixel of each pair, sorted by corner
    splats: Tensor  # (E,) float32 weight of the pixel in the point
    runs: Tensor  # first pair of each run
    points: Tensor  # (V,) first run of each point
    neighbours: Tensor  # (d + 1, 2, V + 1) before and after each point along each axis

    def filter(self, values: Tensor) -> Tensor:
        """Filter (P, C) values."""
        channels = values.shape[1]
        pairs = values.index_select(0, self.pixels).mul_(self.splats[:, None])
        sums = _segment_sums(pairs, F.pad(self.runs, (0, 1), value=len(pairs)))
        # The first segment is empty: point 0.
        starts = F.pad(F.pad(self.points, (1, 0)), (0, 1), value=len(sums))
        lattice = _segment_sums(sums, starts)
        for axis in self.neighbours:
            both = lattice.index_select(0, axis.flatten()).view(2, -1, channels)
            lattice = torch.add(lattice, both[0].add_(both[1]), alpha=0.5)
        found = lattice.index_select(0, self.corners.flatten())
        return found.view(*self.corners.shape, channels).mul_(self.slices[..., None]).sum(0)

    def normalized(self, weight: float) -> "_Lattice":
        """Make the filter w n K n, n = 1 / sqrt(K 1 + 1e-20), all of it in the pairs' weights."""
        ones = torch.ones(self.corners.shape[1], 1, device=self.slices.device)
        norm = torch.rsqrt(self.filter(ones) + 1e-20)[:, 0]
        splats = self.splats * norm.index_select(0, self.pixels)
        return replace(self, slices=self.slices * norm * weight, splats=splats)


def _segment_sums(values: Tensor, starts: Tensor) -> Tensor:
    """Sum the values from each of (S + 1,) starts to the next, in order: (S, C)."""
    # Unsafe: not checked, which would wait for the GPU.
    return torch.segment_reduce(values, "sum", offsets=starts, axis=0, unsafe=True)


def _bilateral(batch: _Batch, settings: Crf) -> _Lattice:
    """Build the filter by place and colour: one lattice an image, of all images at once."""
    images, sxy, srgb = batch.images, settings.bilateral_sxy, settings.bilateral_srgb
    places = [_places(image.shape[1], image.shape[2], sxy, image.device) for image in images]
    colours = torch.cat([image.flatten(1) for image in images], 1)
    features = torch.cat([torch.cat(places, 1), _divided(colours, srgb)])
    # pydensecrf takes four pixels at a time and fills the last four up with black ones at (0, 0).
    # They have no value, but others' values pass through the points that they add to the lattice.
    partial = [i for i, image in enumerate(images) if image[0].numel() % 4]
    features = F.pad(features, (0, len(partial)))
    number = torch.cat([batch.number, batch.number.new_tensor(partial)])
    lattice = _build(features, _most(images, sxy, srgb), number, len(partial))
    return lattice.normalized(settings.bilateral_compat)


def _spatial(images: Sequence[Tensor], settings: Crf) -> _Lattice:
    """Build the filter by place: the lattices of the images' sizes, side by side."""
    device = images[0].device
    width, weight = settings.gaussian_sxy, settings.gaussian_compat
    parts = [_spatial_of_size(*image.shape[1:], width, weight, device=device) for image in images]
    shifted, starts = [], [0, 0, 0, 0]
    for part in parts:
        point, pixel, pair, run = starts
        # A neighbour that is not there stays point 0.
        inside = part.neighbours[..., 1:]
        inside = torch.where(inside > 0, inside + point, 0)
        shifted.append(
            (
                *(part.corners + point, part.slices, part.pixels + pixel, part.splats),
                *(part.runs + pair, part.points + run, inside),
            )
        )
        lengths = len(part.points), part.corners.shape[1], len(part.pixels), len(part.runs)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    joined = [torch.cat(tensors, -1) for tensors in zip(*shifted, strict=True)]
    joined[-1] = F.pad(joined[-1], (1, 0))
    return _Lattice(*joined)


@functools.lru_cache(KEPT)
def _spatial_of_size(
    height: int, width: int, sxy: float, weight: float, *, device: torch.device
) -> _Lattice:
    number = torch.zeros(height * width, dtype=torch.int64, device=device)
    features = _places(height, width, sxy, device)
    return _build(features, [width / sxy, height / sxy], number).normalized(weight)


def _places(height: int, width: int, sxy: float, device: torch.device) -> Tensor:
    """Make the features x / sxy, y / sxy: (2, H * W)."""
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy")).flatten(1)
    return _divided(grid, sxy)


def _divided(values: Tensor, divisor: float) -> Tensor:
    """Divide in float32, rounding once: by a number CUDA would multiply by its reciprocal."""
    return values.float() / torch.tensor(divisor, dtype=torch.float32, device=values.device)


def _build(features: Tensor, most: Sequence[float], number: Tensor, fillers: int = 0) -> _Lattice:
    """Build the permutohedral lattice of features; slices hold the factor 1 / (1 + 2^-d).

    Args:
        features: (d, P) float32, of unit standard deviation, from 0.
        most: (d,) upper bounds of them.
        number: (P,) int64: features of different numbers share no points.
        fillers: How many pixels at the end add points alone and are not filtered.
    """
    d, count = features.shape
    device = features.device
    # Onto the hyperplane of d + 1 coordinates whose sum is 0.
    scale = _scales(d)
    elevated = torch.empty(d + 1, count, device=device)
    total = torch.zeros(count, device=device)
    for i in range(d, 0, -1):
        scaled = features[i - 1] * scale[i - 1]
        elevated[i] = total - i * scaled
        total = total + scaled
    elevated[0] = total

    # The nearest point of remainder 0, d + 1 times `block`, and the ranks of what is left.
    block = (elevated * (1 / (d + 1))).round_()
    rest = elevated - block * (d + 1)
    ranks = block.sum(0).to(torch.int8).repeat(d + 1, 1)
    for i, j in itertools.combinations(range(d + 1), 2):
        less = rest[i] < rest[j]
        ranks[i] += less
        ranks[j] += ~less
    wrap = (ranks < 0).to(torch.int8) - (ranks > d).to(torch.int8)
    order = (ranks + wrap * (d + 1)).long()
    block += wrap
    ranked = (
        torch.empty_like(rest)
        .scatter_(0, order, (elevated - block * (d + 1)) * (1 / (d + 1)))
        .flip(0)
    )
    weights = ranked - ranked.roll(1, 0)
    weights[0] += 1

    # A point's key: digits of the image, the remainder and, for each of d coordinates (the last
    # follows from them), the number of blocks. The corner of remainder r is r further along all
    # coordinates, but for the r of the highest rank, which go d + 1 - r back: one block less.
    digits = _digits(most)
    place = [math.prod(digits[i + 1 :]) for i in range(d)] + [0]
    one = math.prod(digits)
    key = number * ((d + 1) * one)
    for i in range(d):
        key += (block[i].long() - _lowest(most, i)) * place[i]
    steps = torch.tensor(place, device=device)[:, None].expand(-1, count)
    steps = torch.empty_like(order).scatter_(0, order, steps).flip(0).cumsum_(0)
    keys = F.pad(steps[:-1].neg_(), (0, 0, 1, 0)).add_(key)
    keys += one * torch.arange(d + 1, device=device)[:, None]
    del order, ranks, wrap, less, steps, key, elevated, block, rest, ranked

    keys, order = keys.flatten().sort(stable=True)
    fresh = F.pad(keys[1:] != keys[:-1], (1, 0), value=True)
    starts = fresh.nonzero()[:, 0]
    numbers = fresh.cumsum(0, dtype=torch.int32)
    corners = torch.empty_like(numbers).scatter_(0, order, numbers).view(d + 1, count)
    within = torch.arange(len(keys), device=device) - starts.index_select(0, numbers - 1)
    runs = (within % RUN == 0).nonzero()[:, 0]
    del fresh, numbers, within
    points, pixels = keys[starts], order % count
    splats = weights.flatten()[order]
    real = count - fillers
    return _Lattice(
        corners[:, :real],
        weights[:, :real] / (1 + 2**-d),
        torch.where(pixels < real, pixels, 0).int(),
        torch.where(pixels < real, splats, 0),
        runs.int(),
        torch.searchsorted(runs, starts, out_int32=True),
        _neighbours(points, (points // one) % (d + 1) == 0, one, place),
    )


def _neighbours(points: Tensor, wraps: Tensor, one: int, place: Sequence[int]) -> Tensor:
    """Find the points before and after each along each axis: (d + 1, 2, V + 1) int32, 0 if none.

    Args:
        points: (V,) keys, ascending, of the points from 1 on.
        wraps: (V,) which have remainder 0: the one before is of remainder d.
        one: What a remainder counts in a key.
        place: (d + 1,) what a block counts in it.
    """
    found = torch.zeros(len(place), 2, len(points) + 1, dtype=torch.int32, device=points.device)
    every = torch.arange(len(points) + 1, dtype=torch.int32, device=points.device)
    # Along axis j coordinate j falls by d and the others rise by 1.
    base = points + torch.where(wraps, one * (len(place) - 1) - sum(place), -one)
    for (before, after), step in zip(found, place, strict=True):
        wanted = base + step
        index = torch.searchsorted(points, wanted, out_int32=True).clamp_(max=len(points) - 1)
        before[1:] = (index + 1) * (points.index_select(0, index) == wanted)
        after.scatter_(0, before.long(), every)
        after[0] = 0
    return found


def _most(images: Sequence[Tensor], sxy: float, srgb: float | None = None) -> list[float]:
    """Bound the features by place and, if asked for, colour from above."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    colours = [] if srgb is None else 3 * [255 / srgb]
    return [width / sxy, height / sxy, *colours]


def _scales(d: int) -> list[float]:
    """Scale d features so that the lattice's blur has unit standard deviation: (d,) factors."""
    deviation = float(np.float32(math.sqrt(2 / 3) * (d + 1)))
    return [1 / math.sqrt((i + 1) * (i + 2)) * deviation for i in range(d)]


def _lowest(most: Sequence[float], i: int) -> int:
    """Bound the number of blocks along coordinate i from below, for features up to `most`."""
    least = -i * most[i - 1] * _scales(len(most))[i - 1] if i else 0.0
    # Rounding, wrapping, corners and neighbours go 3.5 beyond at most.
    return math.floor(least / (len(most) + 1)) - 4


def _digits(most: Sequence[float]) -> list[int]:
    """Count the numbers of blocks that there are along each of d coordinates."""
    scaled = [bound * factor for bound, factor in zip(most, _scales(len(most)), strict=True)]
    return [
        math.ceil(sum(scaled[i:]) / (len(most) + 1)) + 4 - _lowest(most, i)
        for i in range(len(most))
    ]
