"""The modified cross-entropy of paper Eq. 2-3 and the segmenters' plain one."""

import math

import pytest
import torch
import torch.nn.functional as F

from isim.models.losses import modified_cross_entropy, pixel_cross_entropy

BACKGROUND_ONLY = torch.zeros(4, 4, dtype=torch.int64)
IGNORED = torch.full((4, 4), 255)
HALF_IGNORED = torch.where(torch.arange(4)[:, None] < 2, 255, 0).expand(4, 4)


def foreground(ignored_rows=0):
    label = torch.zeros(4, 4, dtype=torch.int64)
    label[2:, 2:] = 2
    label[:ignored_rows] = 255
    return label


def loss_of(*labels):
    start = torch.Generator().manual_seed(0)
    logits = torch.randn(len(labels), 3, 4, 4, generator=start, requires_grad=True)
    loss, left_out = modified_cross_entropy(logits, torch.stack(labels))
    loss.backward()
    return logits, loss.item(), int(left_out)


def brute_force(logits, labels):
    """Mean of the cross-entropies, pixel by pixel, of what is not ignored."""
    losses = []
    for image, row, column in (labels != 255).nonzero().tolist():
        scores = logits[image, :, row, column].tolist()
        label = int(labels[image, row, column])
        losses.append(math.log(sum(map(math.exp, scores))) - scores[label])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("other", [BACKGROUND_ONLY, IGNORED, HALF_IGNORED])
def test_pixels_count_that_are_not_ignored_in_crops_with_foreground(other):
    """In one mean of the whole batch, and in the gradient; ignored pixels are no foreground."""
    labels = (foreground(), other, foreground(ignored_rows=1))
    logits, loss, left_out = loss_of(*labels)
    counted = torch.stack([labels[0], IGNORED, labels[2]])
    assert math.isclose(loss, brute_force(logits, counted), rel_tol=1e-5)
    assert left_out == 1
    assert ((logits.grad != 0).all(1) == (counted != 255)).all()
    assert not logits.grad[1].any() and not logits.grad[2, :, 0].any()


@pytest.mark.parametrize("labels", [(IGNORED,), (HALF_IGNORED,), (IGNORED, BACKGROUND_ONLY)])
def test_no_counted_pixel_at_all_is_zero_without_nan(labels):
    logits, loss, left_out = loss_of(*labels)
    assert loss == 0 and left_out == len(labels)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def strided(size, stride):
    """Logits (2, 3, h, w) of a size, and labels that are partly ignored."""
    generator = torch.Generator().manual_seed(2)
    maps = [-(-side // stride) for side in size]
    logits = torch.randn(2, 3, *maps, generator=generator, requires_grad=True)
    labels = torch.randint(0, 3, (2, *size), generator=generator)
    return logits, labels.masked_fill(torch.rand(2, *size, generator=generator) < 0.3, 255)


@pytest.mark.parametrize(("size", "stride"), [((8, 8), 1), ((16, 24), 8), ((13, 21), 8)])
def test_the_plain_loss_is_the_mean_over_counted_pixels(size, stride):
    logits, labels = strided(size, stride)
    rows, columns = (side * stride for side in logits.shape[2:])
    # The map covers the image with its padding, which is cut off.
    pixels = F.interpolate(logits.detach(), (rows, columns), mode="bilinear")
    loss = pixel_cross_entropy(logits, labels, stride)
    assert math.isclose(loss.item(), brute_force(pixels, labels), rel_tol=1e-5)


def test_the_plain_loss_counts_crops_without_foreground_and_is_zero_without_counted_pixels():
    logits = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = pixel_cross_entropy(logits, torch.stack([IGNORED, BACKGROUND_ONLY]), 1)
    assert math.isclose(loss.item(), math.log(3), rel_tol=1e-6)
    loss = pixel_cross_entropy(logits, torch.stack([IGNORED, IGNORED]), 1)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_the_plain_loss_of_bf16_logits_is_computed_in_fp32():
    logits, labels = strided((16, 16), 8)
    half = logits.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = pixel_cross_entropy(half, labels, 8)
    assert loss.dtype == torch.float32
    assert math.isclose(loss.item(), pixel_cross_entropy(half.float(), labels, 8).item())
