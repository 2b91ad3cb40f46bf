"""Fully connected CRF in PyTorch: batches of images of any size (paper 4.1; spec 5).

The same mean field as `labels.crf`, exact: Q <- softmax(-U + sum_m w_m n_m K_m (n_m Q)), with K_m a
Gaussian kernel on the permutohedral lattice (Adams et al. 2010) and n_m = 1 / sqrt(K_m 1 + 1e-20).
A softmax ignores what all its logits share, so that everything here is a difference to the last
label: n labels are n - 1 channels, two labels a single one.

The lattice of a whole batch comes from one sort of its points' keys, which hold the number of the
image. Every sum has a fixed order, none is atomic: a batch gives the same bits each time.
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
from isim.params import Crf

# Probabilities below this count as this, as in pydensecrf's unaries.
LEAST = 1e-5
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
    """Refine seeds along their images' edges by mean-field inference (spec 5, set `labels`).

    Labels are the background and an image's `class_ids` only: other classes cannot appear.

    Args:
        images: (3, H, W) RGB uint8 each, of any sizes, all on one device.
        seeds: (H, W) uint8 labels out of 0 and the image's `class_ids`, on the same device.
        class_ids: (K',) labelled classes of each image, 1..K; may be empty.
        settings: Kernel widths (pixels, 8-bit levels), weights, steps, `gt_prob`.

    Returns:
        (H, W) uint8 labels each, of the same label set, on the same device.
    """
    results = [torch.zeros_like(seed) for seed in seeds]
    for chosen in _batches(images, [1 + len(ids) for ids in class_ids], settings):
        # Labels of each image, ascending, and the place of each label among them.
        labels = torch.stack(
            [torch.from_numpy(np.append(0, np.sort(class_ids[i]))) for i in chosen]
        )
        places = torch.zeros(len(chosen), 256, dtype=torch.int64)
        count = labels.shape[1]
        places.scatter_(1, labels, torch.arange(count).expand_as(labels))
        batch = [images[i] for i in chosen]
        number = _image_numbers(batch)
        seed = torch.cat([seeds[i].flatten() for i in chosen])
        place = places.to(seed.device)[number, seed.long()]
        sure = math.log(settings.gt_prob) - math.log((1 - settings.gt_prob) / (count - 1))
        scores = F.one_hot(place, count).float() * sure
        found = _labels(_infer(batch, number, _differences(scores), settings))
        found = labels.to(seed.device, torch.uint8)[number, found]
        _hand_out(found, chosen, images, results)
    return results


@torch.no_grad()
def refine_soft_batch(
    images: Sequence[Tensor], probabilities: Sequence[Tensor], settings: Crf
) -> list[Tensor]:
    """Refine class probabilities along the images' edges (spec 5, sets `soft` and `segmenter`).

    Args:
        images: (3, H, W) RGB uint8 each, of any sizes, all on one device.
        probabilities: (L, H, W) each, a softmax over L, on the same device; below 1e-5 they count
            as 1e-5. L may differ.
        settings: Kernel widths (pixels, 8-bit levels), weights, steps; `gt_prob` is not used.

    Returns:
        (H, W) uint8 labels 0..L-1 each, indices of the planes, on the same device.
    """
    results = [torch.zeros_like(image[0]) for image in images]
    for chosen in _batches(images, [len(planes) for planes in probabilities], settings):
        batch = [images[i] for i in chosen]
        planes = torch.cat([probabilities[i].float().flatten(1) for i in chosen], 1)
        scores = planes.clamp(LEAST, 1).log_().T
        logits = _infer(batch, _image_numbers(batch), _differences(scores), settings)
        _hand_out(_labels(logits).byte(), chosen, images, results)
    return results


@torch.no_grad()
def marginals(images: Sequence[Tensor], unaries: Sequence[Tensor], settings: Crf) -> list[Tensor]:
    """Probabilities of the labels after `settings.steps` steps; without steps softmax(-U).

    Args:
        images: (3, H, W) RGB uint8 each, of any sizes, all on one device.
        unaries: (n, H * W) float32 energies each, on the same device; n may differ.
        settings: Kernel widths (pixels, 8-bit levels), weights, steps; `gt_prob` is not used.

    Returns:
        (n, H, W) float32 each, on the same device.
    """
    results = [
        torch.ones(len(energies), *image.shape[1:], device=image.device)
        for image, energies in zip(images, unaries, strict=True)
    ]
    for chosen in _batches(images, [len(energies) for energies in unaries], settings):
        batch = [images[i] for i in chosen]
        scores = -torch.cat([unaries[i] for i in chosen], 1).T
        logits = _infer(batch, _image_numbers(batch), _differences(scores), settings)
        _hand_out(F.pad(logits, (0, 1)).softmax(1), chosen, images, results)
    return results


def _batches(images: Sequence[Tensor], counts: Sequence[int], settings: Crf) -> Iterator[list[int]]:
    """Indices of the images that are computed together: of one label count.

    An image of a single label, where nothing is to be decided, is in no batch.

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
            "widen them, or set backend: pydensecrf"
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
                yield chosen
                chosen, pixels = [], images[index][0].numel()
            chosen.append(index)
        yield chosen


def _image_numbers(images: Sequence[Tensor]) -> Tensor:
    """(P,) int64 number of each pixel's image, image after image."""
    device = images[0].device
    pixels = torch.tensor([image[0].numel() for image in images])
    total = int(pixels.sum())
    numbers = torch.arange(len(images), device=device)
    return numbers.repeat_interleave(pixels.to(device), output_size=total)


def _differences(scores: Tensor) -> Tensor:
    """(P, n - 1) differences of (P, n) scores to those of the last label."""
    return (scores[:, :-1] - scores[:, -1:]).contiguous()


def _labels(logits: Tensor) -> Tensor:
    """(P,) int64 most probable of the labels; (P, n - 1) logits; the first of equals."""
    return F.pad(logits, (0, 1)).argmax(1)


def _hand_out(
    values: Tensor, chosen: Sequence[int], images: Sequence[Tensor], results: list[Tensor]
) -> None:
    """Cut (P,) or (P, n) values into the `chosen` images' (H, W) or (n, H, W) results."""
    parts = values.split([images[i][0].numel() for i in chosen])
    for index, part in zip(chosen, parts, strict=True):
        results[index] = part.transpose(0, -1).reshape(*values.shape[1:], *images[index].shape[1:])


def _infer(images: Sequence[Tensor], number: Tensor, unary: Tensor, settings: Crf) -> Tensor:
    """(P, n - 1) logits after the mean field's steps, as differences to the last label's.

    Args:
        images: (3, H, W) uint8 each, n labels all.
        number: (P,) number of each pixel's image.
        unary: (P, n - 1) negative energies, as differences to the last label's.
        settings: Kernels and steps.
    """
    if settings.steps == 0:
        return unary
    kernels = [_spatial(images, settings), _bilateral(images, number, settings)]
    logits = unary
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
    """A Gaussian filter of P pixels' features in d dimensions by V lattice points.

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
        """The filter w n K n, with n = 1 / sqrt(K 1 + 1e-20), all of it in the pairs' weights."""
        ones = torch.ones(self.corners.shape[1], 1, device=self.slices.device)
        norm = torch.rsqrt(self.filter(ones) + 1e-20)[:, 0]
        splats = self.splats * norm.index_select(0, self.pixels)
        return replace(self, slices=self.slices * norm * weight, splats=splats)


def _segment_sums(values: Tensor, starts: Tensor) -> Tensor:
    """(S, C) sums of the values from each of (S + 1,) starts to the next, in order."""
    # Unsafe: not checked, which would wait for the GPU.
    return torch.segment_reduce(values, "sum", offsets=starts, axis=0, unsafe=True)


def _bilateral(images: Sequence[Tensor], number: Tensor, settings: Crf) -> _Lattice:
    """Filter by place and colour, one lattice an image, of all images at once."""
    sxy, srgb = settings.bilateral_sxy, settings.bilateral_srgb
    places = [_places(image.shape[1], image.shape[2], sxy, image.device) for image in images]
    colours = torch.cat([image.flatten(1) for image in images], 1)
    features = torch.cat([torch.cat(places, 1), _divided(colours, srgb)])
    # pydensecrf takes four pixels at a time and fills the last four up with black ones at (0, 0).
    # They have no value, but others' values pass through the points that they add to the lattice.
    partial = [i for i, image in enumerate(images) if image[0].numel() % 4]
    features = F.pad(features, (0, len(partial)))
    number = torch.cat([number, torch.tensor(partial, dtype=torch.int64, device=number.device)])
    lattice = _build(features, _most(images, sxy, srgb), number, len(partial))
    return lattice.normalized(settings.bilateral_compat)


def _spatial(images: Sequence[Tensor], settings: Crf) -> _Lattice:
    """Filter by place: the lattices of the images' sizes, side by side."""
    device = images[0].device
    width, weight = settings.gaussian_sxy, settings.gaussian_compat
    parts = [_spatial_of_size(*image.shape[1:], width, weight, device) for image in images]
    corners, pixels, runs, points, neighbours = [], [], [], [], []
    starts = [0, 0, 0, 0]
    for part in parts:
        point, pixel, pair, run = starts
        corners.append(part.corners + point)
        pixels.append(part.pixels + pixel)
        runs.append(part.runs + pair)
        points.append(part.points + run)
        # A neighbour that is not there stays point 0.
        inside = part.neighbours[..., 1:]
        neighbours.append(torch.where(inside > 0, inside + point, 0))
        lengths = len(part.points), part.corners.shape[1], len(part.pixels), len(part.runs)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    return _Lattice(
        torch.cat(corners, 1),
        torch.cat([part.slices for part in parts], 1),
        torch.cat(pixels),
        torch.cat([part.splats for part in parts]),
        torch.cat(runs),
        torch.cat(points),
        F.pad(torch.cat(neighbours, 2), (1, 0)),
    )


@functools.lru_cache(KEPT)
def _spatial_of_size(
    height: int, width: int, sxy: float, weight: float, device: torch.device
) -> _Lattice:
    number = torch.zeros(height * width, dtype=torch.int64, device=device)
    features = _places(height, width, sxy, device)
    return _build(features, [width / sxy, height / sxy], number).normalized(weight)


def _places(height: int, width: int, sxy: float, device: torch.device) -> Tensor:
    """(2, H * W) features x / sxy, y / sxy."""
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy")).flatten(1)
    return _divided(grid, sxy)


def _divided(values: Tensor, divisor: float) -> Tensor:
    """Quotients in float32, rounded once: by a number CUDA would multiply by its reciprocal."""
    return values.float() / torch.tensor(divisor, dtype=torch.float32, device=values.device)


def _build(features: Tensor, most: Sequence[float], number: Tensor, fillers: int = 0) -> _Lattice:
    """Permutohedral lattice of features; its slices hold the factor 1 / (1 + 2^-d).

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
    """(d + 1, 2, V + 1) points before and after each of V + 1 points along each axis.

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
    """Upper bounds of the features by place and, if asked for, colour."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    colours = [] if srgb is None else 3 * [255 / srgb]
    return [width / sxy, height / sxy, *colours]


def _scales(d: int) -> list[float]:
    """What features are multiplied by, so that the lattice's blur has unit standard deviation."""
    deviation = float(np.float32(math.sqrt(2 / 3) * (d + 1)))
    return [1 / math.sqrt((i + 1) * (i + 2)) * deviation for i in range(d)]


def _lowest(most: Sequence[float], i: int) -> int:
    """Least number of blocks along coordinate i, for features up to `most`."""
    least = -i * most[i - 1] * _scales(len(most))[i - 1] if i else 0.0
    # Rounding, wrapping, corners and neighbours go 3.5 beyond at most.
    return math.floor(least / (len(most) + 1)) - 4


def _digits(most: Sequence[float]) -> list[int]:
    """How many numbers of blocks there are along each of d coordinates."""
    scaled = [bound * factor for bound, factor in zip(most, _scales(len(most)), strict=True)]
    return [
        math.ceil(sum(scaled[i:]) / (len(most) + 1)) + 4 - _lowest(most, i)
        for i in range(len(most))
    ]
