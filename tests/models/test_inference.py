"""CAMs and probabilities over scales and flips against plain versions (spec 4 and 7)."""

import copy
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.networks import config_of, network_of
from torchvision.transforms.v2 import functional as TF

from isim.models.inference import multi_scale_cams, multi_scale_probabilities, upsample
from isim.runtime import devices

CONFIG = config_of("cam")
SEGMENTER = config_of("deeplabv2")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network():
    built = network_of("cam")
    # Both signs, else ReLU has nothing to cut off.
    torch.nn.init.normal_(built.classifier.weight)
    devices.place(built, CPU)
    return built.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def segmenting():
    built = network_of("deeplabv2")
    # Far from a uniform softmax, where all views would agree.
    for branch in built.head.branches:
        torch.nn.init.normal_(branch.weight, std=0.1)
    return built.eval().requires_grad_(False)


def picture(height=80, width=113):
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(1, 3, 6, 8, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (255 * smooth[0]).to(torch.uint8)


def cams_of(network, image, class_ids, scales=(1.0, 0.5), flip=True):
    """`multi_scale_cams` of one image: (3, H, W) and (K',) to (K', H, W)."""
    ids = [torch.tensor(class_ids, dtype=torch.int64)]
    return multi_scale_cams(network, CONFIG, image[None], ids, scales=scales, flip=flip)[0]


def probabilities_of(network, image, scales=(0.5, 1.0), flip=True):
    return multi_scale_probabilities(network, SEGMENTER, image, scales=scales, flip=flip)


def plain(of_view, image, scales, flip):
    """Maps of one view at a time, contiguous, in fp32, no batch of flips."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (CONFIG.mean, CONFIG.std))
    maps = []
    for scale, mirrored in itertools.product(scales, (False, True) if flip else (False,)):
        size = [round(side * scale) for side in image.shape[1:]]
        view = TF.resize(image, size, antialias=True)
        view = ((view.flip(-1) if mirrored else view) / 255 - mean) / std
        made = of_view(view[None], image.shape[1:])[0]
        maps.append(made.flip(-1) if mirrored else made)
    return torch.stack(maps)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5, 1.5, 2.0)])
def test_cams_equal_one_view_at_a_time(network, scales, flip):
    def of_view(view, size):
        scores = F.conv2d(network.encoder(view)[-1], network.classifier.weight)[:, [2, 0]].relu()
        return F.interpolate(scores, size, mode="bilinear")

    expected = plain(of_view, picture(), scales, flip).sum(0)
    expected /= expected.amax((1, 2), keepdim=True) + 1e-5
    found = cams_of(network, picture(), [3, 1], scales, flip)
    assert found.dtype == torch.float32 and found.shape == (2, 80, 113)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert found.min() >= 0 and 0.99 < found.max() <= 1


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("scales", [(1.0,), (0.5, 0.75, 1.75)])
def test_probabilities_equal_one_view_at_a_time(segmenting, scales, flip):
    def of_view(view, size):
        """Padded, upsampled and cut as the definition says, then resized."""
        padded = F.pad(view, (0, -view.shape[3] % 16, 0, -view.shape[2] % 16))
        logits = segmenting.head(segmenting.encoder(padded)[-1])
        # Bilinear at the pixel centres of the image, in the coordinates of the padded one.
        places = [
            (torch.arange(side) + 0.5) / side * scaled / whole * 2 - 1
            for side, scaled, whole in zip(size, view.shape[2:], padded.shape[2:], strict=True)
        ]
        grid = torch.stack(torch.meshgrid(*places, indexing="ij")[::-1], -1)[None]
        return F.grid_sample(logits, grid, padding_mode="border", align_corners=False).softmax(1)

    expected = plain(of_view, picture(), scales, flip).mean(0)
    found = probabilities_of(segmenting, picture(), scales, flip)
    assert found.dtype == torch.float32 and found.shape == (4, 80, 113)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.sum(0), torch.ones(80, 113))


def test_what_is_made_of_the_mirror_image_is_mirrored(network, segmenting):
    def apart(make, flip):
        there, back = (make(image, flip=flip) for image in (picture(), picture().flip(-1)))
        return (back.flip(-1) - there).abs().max()

    every = partial(cams_of, network, class_ids=[1, 2, 3])
    for make in (every, partial(probabilities_of, segmenting)):
        assert apart(make, True) < 2e-3
        assert apart(make, False) > 0.02, "without flips it is not"


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (33, 2)])
def test_tiny_and_narrow_images_have_them_too(network, segmenting, size):
    found = cams_of(network, picture(*size), [1])
    assert found.shape == (1, *size) and torch.isfinite(found).all()
    found = probabilities_of(segmenting, picture(*size))
    torch.testing.assert_close(found.sum(0), torch.ones(size))


def test_bf16_is_close(network):
    full = cams_of(network, picture(), [1, 2, 3], (1.0,))
    with devices.autocast("bf16", CPU):
        half = cams_of(network, picture(), [1, 2, 3], (1.0,))
    assert half.dtype == torch.float32 and half.max() <= 1
    assert 0 < (half - full).abs().mean() < 0.02


def test_each_class_is_scaled_by_its_own_maximum(network):
    three, alone = (cams_of(network, picture(), ids) for ids in ([1, 2, 3], [2]))
    torch.testing.assert_close(three[1:2], alone, rtol=0, atol=1e-5)
    silent = copy.deepcopy(network)
    silent.classifier.weight.data.zero_()
    assert not cams_of(silent, picture(), [1]).any(), "seen nowhere"


def test_images_of_one_size_share_a_batch(network):
    """Each with its own classes, some without any."""
    pictures = torch.stack([picture(), picture().flip(-1), picture().flip(-2)])
    ids = [torch.tensor([3, 1]), torch.zeros(0, dtype=torch.int64), torch.tensor([2])]
    together = multi_scale_cams(network, CONFIG, pictures, ids, scales=(1.0, 0.5), flip=True)
    assert [len(planes) for planes in together] == [2, 0, 1]
    for image, own, found in zip(pictures, ids, together, strict=True):
        alone = cams_of(network, image, own.tolist())
        assert alone.shape[1:] == (80, 113)
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5)])
def test_labels_of_the_decoder_equal_one_view_at_a_time(scales, flip):
    """A plane is p_k / (p_k + p_0) of the decoder's softmax, the mean over the views."""
    network = network_of("deeplabcam").eval().requires_grad_(False)
    torch.nn.init.normal_(network.head[0].weight, std=0.3)
    config = config_of("deeplabcam", decoder_labels=True)

    def of_view(view, size):
        odds = network(view, True)[1].softmax(1)
        own = odds[:, [3, 1]]
        return F.interpolate(own / (own + odds[:, :1]), size, mode="bilinear")

    images = torch.stack([picture(), picture().flip(-2)])
    ids = [torch.tensor([3, 1]), torch.zeros(0, dtype=torch.int64)]
    found, none = multi_scale_cams(network, config, images, ids, scales=scales, flip=flip)
    expected = plain(of_view, picture(), scales, flip).mean(0)
    assert none.shape == (0, 80, 113) and expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    alone = partial(multi_scale_cams, scales=scales, flip=flip)
    with pytest.raises(ValueError, match="decoder"):
        alone(network_of("cam").eval(), config, images, ids)


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


def test_each_scale_is_one_channels_last_batch():
    """Logits that are the image itself at stride 1: only the resizing is left to see."""
    seen = []

    class Same(torch.nn.Module):
        def forward(self, images):
            seen.append(images)
            return images

    values = {"output_stride": 1, "classes": ("a", "b"), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    config = replace(SEGMENTER, **values)
    found = multi_scale_probabilities(Same(), config, picture(), scales=(1.0, 0.5), flip=True)
    assert [view.shape for view in seen] == [(2, 3, 80, 113), (2, 3, 40, 56)]
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in seen)
    assert all(torch.equal(view[1], view[0].flip(-1)) for view in seen)
    torch.testing.assert_close(found, (picture() / 255).softmax(0), rtol=0, atol=0.05)
