"""Dense affinities and their walk, against the equations written out in numpy."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from support.devices import DEVICES, tensor

from isim.labels.dense import batched

COUNTS = (1, 2, 7, 63)  # patches

pytestmark = pytest.mark.parametrize("device", DEVICES)


def random(*shape, seed=0):
    return np.random.default_rng(seed).random(shape)


def close(found, expected, atol=2e-6):
    assert found.dtype == torch.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=0, atol=atol)


def cosine(features, tau, beta):
    affinity = np.zeros((len(features), len(features)))
    for p, q in np.ndindex(affinity.shape):
        lengths = np.linalg.norm(features[p]) * np.linalg.norm(features[q])
        similarity = features[p] @ features[q] / lengths if lengths else 0
        affinity[p, q] = max(0, (similarity - tau) / (1 - tau)) ** beta
    return affinity


def class_distribution(scores, temperature):
    powers = np.exp(scores / temperature)
    probabilities = powers / powers.sum(1, keepdims=True)
    affinity = np.zeros((len(scores), len(scores)))
    for p, q in np.ndindex(affinity.shape):
        one, other = probabilities[p], probabilities[q]
        mean = (one + other) / 2
        # The mean of both divergences from the mean distribution.
        divergence = (one * np.log(one / mean) + other * np.log(other / mean)).sum() / 2
        affinity[p, q] = 1 - divergence / math.log(2)
    return affinity


def attention(maps):
    maps = maps.copy()
    for _ in range(3):
        maps /= maps.sum(0, keepdims=True)
        maps /= maps.sum(1, keepdims=True)
    maps = (maps + maps.T) / 2
    return maps @ maps


AFFINITIES = {
    "cosine": (
        lambda values: batched.cosine(values, 0.1, 3),
        lambda values: cosine(values, 0.1, 3),
        lambda count: random(count, 5) - 0.5,
    ),
    "class_distribution": (
        lambda values: batched.class_distribution(values, 0.5),
        lambda values: class_distribution(values, 0.5),
        lambda count: 4 * random(count, 4),
    ),
    "attention": (batched.attention, attention, lambda count: random(count, count) ** 3 + 1e-3),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", AFFINITIES)
def test_affinities_equal_their_equations(name, count, device):
    compute, reference, draw = AFFINITIES[name]
    values = draw(count).astype(np.float32)
    found = compute(tensor(values, device))
    close(found, reference(values.astype(np.float64)))
    torch.testing.assert_close(found, found.mT, rtol=0, atol=1e-6)
    assert found.min() >= 0 and found.max() <= 1 + 1e-6
    assert name == "attention" or torch.allclose(found.diagonal(), torch.ones(count, device=device))


@pytest.mark.parametrize("name", AFFINITIES)
def test_images_of_a_batch_are_as_if_alone(name, device):
    compute, _, draw = AFFINITIES[name]
    values = tensor(np.stack([draw(7), 2 * draw(7)]).astype(np.float32), device)
    torch.testing.assert_close(compute(values), torch.stack([compute(each) for each in values]))


def test_a_patch_without_features_is_like_none(device):
    features = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [1.0, -1.0]], device=device)
    expected = torch.zeros(4, 4)
    expected[1:3, 1:3] = expected[3, 3] = 1
    close(batched.cosine(features.half(), 0.5, 2), expected.numpy(), atol=1e-3)


def test_sure_and_opposite_distributions_have_affinity_0_and_no_nan(device):
    scores = torch.tensor([[300.0, 0, 0], [0, 300.0, 0], [300.0, 0, 0]], device=device)
    close(batched.class_distribution(scores, 1), np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]]))
    # Probabilities are handed over as logarithms.
    probabilities = torch.tensor([[0.5, 0.5, 0], [0.25, 0.75, 0]], device=device)
    found = batched.class_distribution(probabilities.log(), 1)
    expected = class_distribution(np.log([[0.5, 0.5], [0.25, 0.75]]), 1)
    close(found, expected)


def test_blocks_of_pairs_change_nothing(monkeypatch, device):
    scores = tensor(random(2, 23, 4).astype(np.float32), device)
    whole = batched.class_distribution(scores, 0.2)
    for block in (1, 4 * scores.numel() * 5):
        monkeypatch.setattr(batched, "BLOCK", block)
        torch.testing.assert_close(batched.class_distribution(scores, 0.2), whole)


def test_attention_keeps_the_sum_of_what_is_walked(device):
    found = batched.attention(tensor(random(40, 40) + 0.1, device).float())
    torch.testing.assert_close(found.sum(1), torch.ones(40, device=device), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.sum(0), torch.ones(40, device=device), rtol=0, atol=1e-3)


def test_attention_that_nobody_pays_stays_finite(device):
    maps = torch.zeros(3, 3, device=device)
    maps[0, 0] = 1
    close(batched.attention(maps), np.diag([1.0, 0, 0]))


def boxes(plane, threshold):
    """Masks of scipy's connected parts."""
    parts, _ = ndimage.label(plane > threshold, structure=np.ones((3, 3)))
    mask = np.zeros(plane.shape, bool)
    for place in ndimage.find_objects(parts):
        mask[place] = True
    return mask


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (6, 1), (13, 17)])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_boxes_lie_round_connected_parts(size, share, device):
    planes = random(5, *size).astype(np.float32)
    found = batched.boxes(tensor(planes, device), 1 - share)
    assert found.dtype == torch.bool
    expected = np.stack([boxes(plane, np.float32(1 - share)) for plane in planes])
    np.testing.assert_array_equal(found.cpu().numpy(), expected)


def test_boxes_of_a_spiral_of_a_ring_and_of_nothing(device):
    spiral = np.zeros((9, 9), np.float32)
    spiral[0, :] = spiral[:, 8] = spiral[8, :] = spiral[2:, 0] = spiral[2, :7] = 1
    ring = np.zeros((9, 9), np.float32)
    ring[2:6, 3:7] = 1
    ring[3:5, 4:6] = 0
    planes = tensor(np.stack([spiral, ring, np.full_like(ring, 0.4)]), device)
    found = batched.boxes(planes)
    assert found[0].all() and not found[2].any()
    assert found[1].sum() == 16 and found[1, 2:6, 3:7].all()
    assert batched.boxes(planes[:0]).shape == (0, 9, 9)
    assert torch.equal(batched.boxes(planes[None]), found[None])


def walk(planes, affinity, steps, inside):
    """One patch after the other."""
    walked = planes.astype(np.float64)
    for _ in range(steps):
        given = walked * inside
        walked = given.copy()
        for plane, p in itertools.product(range(len(planes)), range(len(affinity))):
            total = affinity[p].sum()
            if total > 0:
                walked[plane, p] = (affinity[p] * given[plane]).sum() / total
    return walked


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_the_walk_equals_its_equation(count, steps, masked, device):
    planes, affinity = random(3, count).astype(np.float32), random(count, count, seed=1) ** 4
    affinity = affinity.astype(np.float32)
    affinity[count // 2] = 0  # a patch that is like none
    inside = random(3, count, seed=2) > 0.5 if masked else np.ones((3, count), bool)
    given = (tensor(planes, device), tensor(affinity, device))
    found = batched.walk(*given, steps, tensor(inside, device) if masked else None)
    close(found, walk(planes, affinity, steps, inside))
    assert masked or torch.equal(found[:, count // 2], given[0][:, count // 2])
    twice = [torch.stack([each, each]) for each in given]
    torch.testing.assert_close(batched.walk(*twice, steps)[1], batched.walk(*given, steps))


def test_a_constant_plane_stays_and_no_plane_is_none(device):
    affinity = batched.cosine(tensor(random(31, 6), device), 0.2, 3)
    constant = torch.full((2, 31), 0.7, device=device)
    torch.testing.assert_close(batched.walk(constant, affinity, 9), constant)
    assert batched.walk(constant[:0], affinity, 3).shape == (0, 31)


def test_a_walk_spreads_a_plane_among_what_is_alike(device):
    features = torch.tensor([[1.0, 0], [0.9, 0.1], [1, 0.1], [0, 1], [0.1, 1]], device=device)
    plane = torch.tensor([[1.0, 0, 0, 0, 0]], device=device)
    found = batched.walk(plane.half(), batched.cosine(features, 0.5, 2), 8)
    torch.testing.assert_close(
        found[0, :3], torch.full((3,), 1 / 3, device=device), atol=0.02, rtol=0
    )
    assert not found[0, 3:].any()
