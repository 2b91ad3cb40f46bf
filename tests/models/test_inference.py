"""CAMs and probabilities over scales and flips against plain versions (spec 4 and 7)."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

from isim import engine
from isim.models import cam, segmenter
from isim.models.inference import (
    multi_scale_cam,
    multi_scale_cams,
    multi_scale_probabilities,
    normalize,
    upsample,
)

SCALES = (1.0, 0.5, 1.5, 2.0)
CONFIG = cam.CamConfig(
    method="cam",
    encoder="resnet10t",
    output_stride=16,
    encoder_norm="batch",
    atrous_rates=(),
    decoder_channels=16,
    classes=("a", "b", "c"),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    built = cam.build(CONFIG)
    # Both signs, else ReLU has nothing to cut off.
    torch.nn.init.normal_(built.classifier.weight)
    return built.eval()


def picture(height=80, width=113):
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(1, 3, 6, 8, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (255 * smooth[0]).to(torch.uint8)


def plain_cam(network, image, class_ids, scales, flip):
    """One image at a time, contiguous, fp32, no batch of flips."""
    height, width = image.shape[1:]
    total = torch.zeros(len(class_ids), height, width)
    mean, std = torch.tensor(CONFIG.mean)[:, None, None], torch.tensor(CONFIG.std)[:, None, None]
    for scale in scales:
        scaled = TF.resize(image, [round(height * scale), round(width * scale)], antialias=True)
        maps = []
        for mirrored in (False, True) if flip else (False,):
            view = scaled.flip(-1) if mirrored else scaled
            features = network.encoder(((view / 255 - mean) / std)[None])[-1]
            scores = F.conv2d(features, network.classifier.weight)[0, class_ids - 1].relu()
            maps.append(scores.flip(-1) if mirrored else scores)
        summed = torch.stack(maps).sum(0)
        total += F.interpolate(summed[None], (height, width), mode="bilinear")[0]
    return total / (total.flatten(1).max(1).values[:, None, None] + 1e-5)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("scales", [(1.0,), SCALES])
def test_equals_one_image_at_a_time(network, scales, flip):
    ids = torch.tensor([3, 1])
    with torch.no_grad():
        expected = plain_cam(network, picture(), ids, scales, flip)
    found = multi_scale_cam(network, CONFIG, picture(), ids, scales, flip)
    assert found.dtype == torch.float32 and found.shape == (2, 80, 113)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert found.min() >= 0 and 0.99 < found.max() <= 1


def test_channels_last_changes_nothing(network):
    other = cam.build(CONFIG)
    other.load_state_dict(network.state_dict())
    engine.place(other.eval(), torch.device("cpu"))
    ids = torch.tensor([1, 2, 3])
    plain, placed = (
        multi_scale_cam(n, CONFIG, picture(), ids, SCALES, True) for n in (network, other)
    )
    torch.testing.assert_close(placed, plain, rtol=0, atol=1e-4)


def test_bf16_is_close(network):
    ids = torch.tensor([1, 2, 3])
    full = multi_scale_cam(network, CONFIG, picture(), ids, (1.0,), True)
    with engine.autocast("bf16", torch.device("cpu")):
        half = multi_scale_cam(network, CONFIG, picture(), ids, (1.0,), True)
    assert half.dtype == torch.float32 and half.max() <= 1
    assert 0 < (half - full).abs().mean() < 0.02


def test_the_cam_of_the_mirror_image_is_the_mirrored_cam(network):
    ids = torch.tensor([1, 2, 3])
    there = multi_scale_cam(network, CONFIG, picture(), ids, SCALES, True)
    back = multi_scale_cam(network, CONFIG, picture().flip(-1), ids, SCALES, True).flip(-1)
    torch.testing.assert_close(back, there, rtol=0, atol=2e-3)
    one_sided = multi_scale_cam(network, CONFIG, picture(), ids, SCALES, False)
    mirrored = multi_scale_cam(network, CONFIG, picture().flip(-1), ids, SCALES, False).flip(-1)
    assert (one_sided - mirrored).abs().max() > 0.05, "without flips it is not"


def test_each_class_is_scaled_by_its_own_maximum(network):
    alone = multi_scale_cam(network, CONFIG, picture(), torch.tensor([2]), SCALES, True)
    three = multi_scale_cam(network, CONFIG, picture(), torch.tensor([1, 2, 3]), SCALES, True)
    torch.testing.assert_close(three[1:2], alone, rtol=0, atol=1e-5)


def test_an_image_without_classes_has_no_planes(network):
    ids = torch.zeros(0, dtype=torch.int64)
    found = multi_scale_cam(network, CONFIG, picture(), ids, SCALES, True)
    assert found.shape == (0, 80, 113)


def test_a_class_that_is_seen_nowhere_stays_zero(network):
    silent = cam.build(CONFIG).eval()
    silent.load_state_dict(network.state_dict())
    silent.classifier.weight.data.zero_()
    found = multi_scale_cam(silent, CONFIG, picture(), torch.tensor([1]), SCALES, True)
    assert not found.any()


def test_images_of_one_size_share_a_batch(network):
    """Each with its own classes, some without any."""
    pictures = torch.stack([picture(), picture().flip(-1), picture().flip(-2)])
    ids = [torch.tensor([3, 1]), torch.zeros(0, dtype=torch.int64), torch.tensor([2])]
    together = multi_scale_cams(network, CONFIG, pictures, ids, SCALES, True)
    assert [len(planes) for planes in together] == [2, 0, 1]
    for image, own, found in zip(pictures, ids, together, strict=True):
        alone = multi_scale_cam(network, CONFIG, image, own, SCALES, True)
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (33, 2)])
def test_tiny_and_narrow_images_have_cams_too(network, size):
    found = multi_scale_cam(network, CONFIG, picture(*size), torch.tensor([1]), SCALES, True)
    assert found.shape == (1, *size) and torch.isfinite(found).all()


def test_normalize():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    found = normalize(images, (0.0, 0.5, 0.1), (1.0, 0.25, 0.5))
    assert found.flatten().tolist() == pytest.approx([0, 2, 0.2])


@pytest.mark.parametrize("size", [(48, 64), (47, 33), (1, 5)])
@pytest.mark.parametrize("stride", [8, 16])
def test_upsampling_covers_the_padded_image(size, stride):
    """Against the definition: the whole padded image, of which the padding is cut off."""
    rows, columns = (-(-side // stride) for side in size)
    logits = torch.randn(2, 3, rows, columns, generator=torch.Generator().manual_seed(1))
    padded = F.interpolate(logits, (rows * stride, columns * stride), mode="bilinear")
    found = upsample(logits, stride, size)
    torch.testing.assert_close(found, padded[..., : size[0], : size[1]])
    assert upsample(logits.bfloat16(), stride, size).dtype == torch.float32


def test_upsampling_to_another_size_keeps_the_places():
    """A ramp over the padded image, sampled at the centres of the target's pixels."""
    ramp = (torch.arange(20.0) * 8 + 3.5).expand(1, 1, 2, 20)  # x of the map's pixels
    for width, target in ((157, 300), (153, 80), (160, 91)):
        found = upsample(ramp, 8, (16, width), (9, target))
        x = (torch.arange(target) + 0.5) * width / target - 0.5
        expected = x.clamp(3.5, 155.5).expand(1, 1, 9, target)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_upsampling_never_loses_the_last_row():
    for side in range(1, 700, 13):
        for stride in (8, 16):
            logits = torch.zeros(1, 1, -(-side // stride), 1)
            for target in (side, round(side / 1.75) or 1, round(side / 0.75)):
                found = upsample(logits, stride, (side, 3), (target, 3))
                assert found.shape == (1, 1, target, 3)


SEGMENTER = segmenter.SegmenterConfig(
    method="deeplabv2",
    encoder="resnet18",
    output_stride=16,
    encoder_norm="batch",
    decoder_channels=16,
    classes=("a", "b", "c"),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


@pytest.fixture(scope="module")
def segmenting():
    torch.manual_seed(0)
    built = segmenter.build(SEGMENTER)
    # Far from a uniform softmax, where all views would agree.
    for branch in built.head.branches:
        torch.nn.init.normal_(branch.weight, std=0.1)
    return built.eval()


def plain_probabilities(network, image, scales, flip):
    """One view at a time; padded, upsampled and cut as the definition says, then resized."""
    height, width = image.shape[1:]
    mean, std = (torch.tensor(v)[:, None, None] for v in (SEGMENTER.mean, SEGMENTER.std))
    maps = []
    for scale in scales:
        size = [round(height * scale), round(width * scale)]
        scaled = TF.resize(image, size, antialias=True)
        for mirrored in (False, True) if flip else (False,):
            view = ((scaled.flip(-1) if mirrored else scaled) / 255 - mean) / std
            padded = torch.zeros(1, 3, *(-(-side // 16) * 16 for side in size))
            padded[0, :, : size[0], : size[1]] = view
            logits = network.head(network.encoder(padded)[-1])
            # Bilinear at the pixel centres of the image, in the coordinates of the padded one.
            y = (torch.arange(height) + 0.5) / height * size[0] / padded.shape[2] * 2 - 1
            x = (torch.arange(width) + 0.5) / width * size[1] / padded.shape[3] * 2 - 1
            grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)[None]
            pixels = F.grid_sample(logits, grid, padding_mode="border", align_corners=False)
            probabilities = pixels[0].softmax(0)
            maps.append(probabilities.flip(-1) if mirrored else probabilities)
    return torch.stack(maps).mean(0)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 0.75, 1.75)])
def test_probabilities_equal_one_view_at_a_time(segmenting, scales, flip):
    with torch.no_grad():
        expected = plain_probabilities(segmenting, picture(), scales, flip)
    found = multi_scale_probabilities(segmenting, SEGMENTER, picture(), scales, flip)
    assert found.dtype == torch.float32 and found.shape == (4, 80, 113)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.sum(0), torch.ones(80, 113))


def test_probabilities_of_the_mirror_image_are_mirrored(segmenting):
    def of(image, flip):
        return multi_scale_probabilities(segmenting, SEGMENTER, image, (0.5, 1.0), flip)

    there, back = of(picture(), True), of(picture().flip(-1), True).flip(-1)
    torch.testing.assert_close(back, there, rtol=0, atol=2e-3)
    one_sided = of(picture(), False) - of(picture().flip(-1), False).flip(-1)
    assert one_sided.abs().max() > 0.02, "without flips they are not"


@pytest.mark.parametrize("size", [(1, 1), (7, 300)])
def test_tiny_and_narrow_images_have_probabilities_too(segmenting, size):
    found = multi_scale_probabilities(segmenting, SEGMENTER, picture(*size), (0.5, 1.0), True)
    torch.testing.assert_close(found.sum(0), torch.ones(size))


def test_each_scale_is_one_channels_last_batch():
    """Logits that are the image itself at stride 1: only the resizing is left to see."""
    seen = []

    @dataclass
    class Config:
        output_stride = 1
        classes = ("a", "b")
        mean = (0.0, 0.0, 0.0)
        std = (1.0, 1.0, 1.0)

    class Same(torch.nn.Module):
        def forward(self, images):
            seen.append(images)
            return images

    found = multi_scale_probabilities(Same(), Config(), picture(), (1.0, 0.5), True)
    assert [view.shape for view in seen] == [(2, 3, 80, 113), (2, 3, 40, 56)]
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in seen)
    assert all(torch.equal(view[1], view[0].flip(-1)) for view in seen)
    torch.testing.assert_close(found, (picture() / 255).softmax(0), rtol=0, atol=0.05)
