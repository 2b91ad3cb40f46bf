"""The U-Net decoder and its two upsamplings."""

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from support.networks import ENCODERS, UNETS, images, network_of


def test_the_two_differ_in_the_upsampling_only():
    learnable, plain = (network_of(method).state_dict() for method in UNETS)
    more = learnable.keys() - plain.keys()
    assert plain.keys() <= learnable.keys()
    assert more and all(".upsampling." in key for key in more)
    # At stride 16 the first of the five steps does not upsample.
    assert {key.split(".")[2] for key in more} == {"1", "2", "3", "4"}
    assert all(torch.equal(value, learnable[key]) for key, value in plain.items())


def test_the_learnable_one_starts_as_repetition_and_learns():
    network = network_of("unetcam_learnable")
    upsampling = network.decoder.blocks[2].upsampling
    feature = torch.randn(1, 8, 3, 5)
    repeated = F.interpolate(feature, scale_factor=2, mode="nearest")
    torch.testing.assert_close(upsampling(feature), repeated)
    network(images(64, 64), True)[1].square().mean().backward()
    assert all(b.upsampling.weight.grad.abs().sum() > 0 for b in network.decoder.blocks[1:])


@pytest.mark.parametrize(
    ("encoder", "stride"),
    [("resnet10t", 8), ("resnet10t", 32), *((encoder, 16) for encoder in ENCODERS)],
)
def test_the_bilinear_one_is_the_librarys(encoder, stride):
    network = network_of("unetcam_bilinear", encoder=encoder, output_stride=stride).eval()
    model = smp.Unet(
        f"tu-{encoder}",
        encoder_weights=None,
        output_stride=stride,
        decoder_channels=(16, 8, 4, 2, 1),
        decoder_interpolation="bilinear",
        classes=4,
    ).eval()
    for ours, theirs in (
        (network.encoder, model.encoder),
        (network.decoder, model.decoder),
        (network.head, model.segmentation_head),
    ):
        theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(network(images(64, 96), True)[1], model(images(64, 96)))
