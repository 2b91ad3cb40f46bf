"""The modified cross-entropy of paper Eq. 2-3 and the segmenters' plain one."""

import math

import pytest
import torch
import torch.nn.functional as F

from isim.models.losses import modified_cross_entropy, pixel_cross_entropy

BACKGROUND_ONLY = torch.zeros(4, 4, dtype=torch.int64)
IGNORED = torch.full((4, 4), 255)


def foreground(ignored_rows=0):
    label = torch.zeros(4, 4, dtype=torch.int64)
    label[2:, 2:] = 2
    label[:ignored_rows] = 255
    return label


def loss_of(*labels, seed=0):
    logits = torch.randn(
        len(labels), 3, 4, 4, generator=torch.Generator().manual_seed(seed), requires_grad=True
    )
    loss, left_out = modified_cross_entropy(logits, torch.stack(labels))
    loss.backward()
    return logits, loss, left_out


def test_crops_without_foreground_give_neither_loss_nor_gradient():
    both, loss, left_out = loss_of(foreground(), BACKGROUND_ONLY)
    assert int(left_out) == 1
    assert not both.grad[1].any() and both.grad[0].any()
    alone, _ = modified_cross_entropy(both[:1], foreground()[None])
    assert torch.equal(loss, alone), "the mean is over the pixels that count"


def test_ignored_pixels_are_no_foreground():
    half_ignored = torch.where(torch.arange(4)[:, None] < 2, 255, 0).expand(4, 4)
    for label in (IGNORED, half_ignored):
        logits, loss, left_out = loss_of(label)
        assert int(left_out) == 1 and loss.item() == 0 and not logits.grad.any()


def test_ignored_pixels_of_a_counted_crop_have_no_gradient():
    logits, _, left_out = loss_of(foreground(ignored_rows=1))
    assert int(left_out) == 0
    assert not logits.grad[0, :, 0].any() and logits.grad[0, :, 1:].all()


def brute_force(logits, labels):
    """Sum of the cross-entropies pixel by pixel, and the number of pixels that count."""
    total, count = 0.0, 0
    for image, row, column in (labels != 255).nonzero().tolist():
        scores = logits[image, :, row, column].tolist()
        total += math.log(sum(map(math.exp, scores))) - scores[labels[image, row, column]]
        count += 1
    return total, count


def test_the_mean_is_over_the_counted_pixels_of_the_whole_batch():
    labels = torch.stack([foreground(ignored_rows=2), foreground(), BACKGROUND_ONLY])
    logits = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    total, count = brute_force(logits, labels[:2])
    assert count == 8 + 16
    loss, _ = modified_cross_entropy(logits, labels)
    assert math.isclose(loss.item(), total / count, rel_tol=1e-5)


def test_no_counted_pixel_at_all_is_zero_without_nan():
    logits, loss, left_out = loss_of(IGNORED, BACKGROUND_ONLY)
    assert loss.item() == 0 and int(left_out) == 2
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def strided(size, stride, seed=2):
    """Logits (2, 3, h, w) of a size, and labels that are partly ignored."""
    generator = torch.Generator().manual_seed(seed)
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
    total, count = brute_force(pixels, labels)
    loss = pixel_cross_entropy(logits, labels, stride)
    assert math.isclose(loss.item(), total / count, rel_tol=1e-5)


def test_the_plain_loss_counts_crops_without_foreground():
    logits = torch.zeros(2, 3, 4, 4)
    labels = torch.stack([IGNORED, BACKGROUND_ONLY])
    assert math.isclose(pixel_cross_entropy(logits, labels, 1).item(), math.log(3), rel_tol=1e-6)


def test_the_plain_loss_without_counted_pixels_is_zero_and_so_are_its_gradients():
    logits, labels = strided((16, 16), 8)
    loss = pixel_cross_entropy(logits, torch.full_like(labels, 255), 8)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_the_plain_loss_of_bf16_logits_is_computed_in_fp32():
    logits, labels = strided((16, 16), 8)
    half = logits.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = pixel_cross_entropy(half, labels, 8)
    assert loss.dtype == torch.float32
    assert math.isclose(loss.item(), pixel_cross_entropy(half.float(), labels, 8).item())
