"""Dense affinities of patches that a frozen encoder's features give, and the walk along them.

An image has a grid of h rows and w columns, N = h * w patches in the order of its rows; "..." are
the dimensions of a batch of images of one size, or none. An affinity A is (..., N, N) float32, its
entries not negative, A_pq how much patch p takes from patch q. With N = 1,000 it has 4 MB, so that
no stencil is needed, as there is for AffinityNet's (`labels/walk`).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of a block of pairs times classes: as much as stays in a core's cache.
BLOCK = 1 << 20
# Rounds of columns, then rows divided by their sums (Sinkhorn and Knopp), as in CLIP-ES.
SINKHORN_STEPS = 3


@torch.no_grad()
def cosine(features: Tensor, tau: float, beta: float) -> Tensor:
    """Affinity max(0, (cos(f_p, f_q) - tau) / (1 - tau))^beta, symmetric, in [0, 1].

    Args:
        features: (..., N, C), of any float type. A patch of zeros is like none, not even itself.
        tau: Cosine, below 1, that has affinity 0.
        beta: Exponent above 0; higher makes weak links weaker.
    """
    units = F.normalize(features.float(), dim=-1)
    similarity = units @ units.mT
    return similarity.sub_(tau).div_(1 - tau).clamp_(0, 1).pow_(beta)


@torch.no_grad()
def class_distribution(scores: Tensor, temperature: float) -> Tensor:
    """Affinity 1 - JS(P_p, P_q) / ln 2 of P = softmax(scores / T), symmetric, in [0, 1].

    The idea is CD-CLIP's, without text. JS(P, Q) = H((P + Q) / 2) - (H(P) + H(Q)) / 2, with the
    entropy H in nats, lies in [0, ln 2]. Pairs are taken in blocks, as N x N x L numbers would be
    0.8 GB for 3,000 patches and 21 labels.

    Args:
        scores: (..., N, L) of L labels, the background among them; logarithms of probabilities
            are scores, too.
        temperature: T above 0; higher makes patches more alike.
    """
    probabilities = (scores.float() / temperature).softmax(-1)
    entropy = _entropy(probabilities)  # (..., N)
    count = probabilities.shape[-2]
    affinity = scores.new_empty((*entropy.shape, count), dtype=torch.float32)
    rows = max(1, BLOCK // (4 * max(1, probabilities.numel())))
    for start in range(0, count, rows):
        here = slice(start, start + rows)
        # What is left of the block's columns is known from the blocks before.
        pairs = probabilities[..., here, None, :] + probabilities[..., None, start:, :]
        mixed = _entropy(pairs.div_(2))  # (..., rows, N - start)
        apart = mixed - (entropy[..., here, None] + entropy[..., None, start:]) / 2
        alike = (1 - apart / math.log(2)).clamp_(0, 1)
        affinity[..., here, start:] = alike
        affinity[..., start:, here] = alike.mT
    return affinity


def _entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last dimension."""
    # A third faster than torch.special.entr.
    logarithms = probabilities.clamp_min(torch.finfo(torch.float32).tiny).log_()
    return -logarithms.mul_(probabilities).sum(-1)


@torch.no_grad()
def attention(maps: Tensor) -> Tensor:
    """Affinity of attention: CLIP-ES's class-aware one (arXiv 2212.09506, 3.3), without its boxes.

    Columns, then rows are divided by their sums, three times; the matrix is averaged with its
    transpose and multiplied by itself: symmetric, rows that sum to about 1. A class's boxes
    (`boxes`) are for the walk.

    Args:
        maps: (..., N, N) attention that each patch (row) pays the others, of any float type, not
            negative, such as the mean over heads and blocks.
    """
    balanced = maps.float()
    for _ in range(SINKHORN_STEPS):
        for axis in (-2, -1):
            sums = balanced.sum(axis, keepdim=True)
            balanced = balanced * torch.where(sums > 0, 1 / sums, 0)
    balanced = (balanced + balanced.mT) / 2
    return balanced @ balanced


@torch.no_grad()
def boxes(planes: Tensor, threshold: float = 0.4) -> Tensor:
    """Boxes round the connected parts of {CAM > threshold}: (..., h, w) bool, one mask a plane.

    Parts touch at sides or corners; a mask is the union of its parts' upright boxes, which may
    overlap. Planes are (..., h, w) CAMs in [0, 1].
    """
    height, width = planes.shape[-2:]
    high = planes.reshape(-1, 1, height, width) > threshold  # (M, 1, h, w)
    if not len(high):
        return planes > threshold
    y, x = torch.meshgrid(
        torch.arange(height, device=planes.device, dtype=torch.float32),
        torch.arange(width, device=planes.device, dtype=torch.float32),
        indexing="ij",
    )
    # Each patch of a part learns the part's last row and column, and the first, negated.
    ends = torch.stack([y, x, -y, -x]).where(high, -torch.inf)  # (M, 4, h, w)
    while True:
        wider = F.max_pool2d(ends, 3, stride=1, padding=1).where(high, -torch.inf)
        if torch.equal(wider, ends):
            break
        ends = wider
    masks = torch.zeros_like(high[:, 0])
    for mask, part in zip(masks, ends, strict=True):
        corners = part.flatten(1)[:, part[0].flatten() >= 0].unique(dim=1).long()
        for bottom, right, top, left in corners.T.tolist():
            mask[-top : bottom + 1, -left : right + 1] = True
    return masks.reshape(planes.shape)


@torch.no_grad()
def walk(planes: Tensor, affinity: Tensor, steps: int, inside: Tensor | None = None) -> Tensor:
    """Take steps p <- A p along an affinity whose rows are divided by their sums.

    A patch whose row is all zeros keeps its value. With `inside`, columns outside the masks are
    set to 0 after that division (CLIP-ES): what lies outside gives nothing, and takes as much as
    what lies inside is like it.

    Args:
        planes: (..., M, N), of any float type, such as the CAMs of the labelled classes; M may be
            0.
        affinity: (..., N, N), not negative.
        steps: At least 0.
        inside: (..., M, N) bool, a mask for each plane, such as of `boxes`.

    Returns:
        (..., M, N) float32.
    """
    sums = affinity.sum(-1)[..., None, :]  # (..., 1, N)
    walked = planes.float()
    for _ in range(steps):
        given = walked if inside is None else walked * inside
        # Dividing what comes out spares a copy of the matrix.
        walked = torch.where(sums > 0, given @ affinity.mT / sums, given)
    return walked
