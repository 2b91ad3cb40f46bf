"""The modified cross-entropy of paper Eq. 2-3."""

import math

import torch

from isim.models.losses import modified_cross_entropy

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


def test_the_mean_is_over_the_counted_pixels_of_the_whole_batch():
    labels = torch.stack([foreground(ignored_rows=2), foreground(), BACKGROUND_ONLY])
    logits = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    total, count = 0.0, 0
    for image in (0, 1):
        for row in range(4):
            for column in range(4):
                label = int(labels[image, row, column])
                if label != 255:
                    scores = logits[image, :, row, column].tolist()
                    total += math.log(sum(map(math.exp, scores))) - scores[label]
                    count += 1
    assert count == 8 + 16
    loss, _ = modified_cross_entropy(logits, labels)
    assert math.isclose(loss.item(), total / count, rel_tol=1e-5)


def test_no_counted_pixel_at_all_is_zero_without_nan():
    logits, loss, left_out = loss_of(IGNORED, BACKGROUND_ONLY)
    assert loss.item() == 0 and int(left_out) == 2
    assert torch.equal(logits.grad, torch.zeros_like(logits))
