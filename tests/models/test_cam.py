"""CAM methods: linear CAMs, decoders at any stride, and what the two losses train."""

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from support.networks import (
    CAM_METHODS,
    ENCODERS,
    UNETS,
    config_of,
    images,
    network_of,
    same,
    touched,
)

from isim.errors import UserError
from isim.models import cam
from isim.models.losses import modified_cross_entropy


@pytest.fixture(scope="module", params=[(m, e) for e in ENCODERS[::2] for m in CAM_METHODS])
def network(request):
    """Not changed by any test: those that train build their own."""
    method, encoder = request.param
    return network_of(method, encoder=encoder).eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(64, 64), (61, 47), (33, 90)])
def test_the_cam_is_linear_and_its_mean_the_logit(network, size):
    """With a decoder, too: its padding is its own, and the encoder sees the same image."""
    logits, segmentation = network(images(*size), True)
    alone, nothing = network(images(*size), False)
    assert nothing is None and (segmentation is None) == (network.decoder is None)
    assert torch.equal(alone, logits)
    maps = network.cam(images(*size), torch.tensor([1, 2, 3]))
    torch.testing.assert_close(maps.mean((2, 3)), logits, rtol=1e-4, atol=1e-5)
    assert maps.shape[2:] == network.encoder(images(*size))[-1].shape[2:]
    some = network.cam(images(*size), torch.tensor([3, 1]))
    torch.testing.assert_close(some, maps[:, [2, 0]], rtol=1e-5, atol=1e-6)


def test_what_is_padded_hardly_changes_the_inside(network):
    """Cropped where it belongs: a shift by a pixel or the wrong corner is far off."""
    if network.decoder is None:
        return
    picture = F.interpolate(images(6, 8), (96, 128), mode="bicubic")
    whole = network(picture, True)[1][..., :80, :112]
    cut = network(picture[..., :87, :119], True)[1][..., :80, :112]
    torch.testing.assert_close(cut.mean(), whole.mean(), rtol=0.5, atol=0.1)
    together = torch.stack([whole.flatten(), cut.flatten()])
    assert torch.corrcoef(together)[0, 1] > 0.5


def test_maps_are_extended_to_whole_strides_by_their_border():
    frame = cam.Frame(16)
    features = [torch.randn(1, 2, -(-45 // r), 77 // r) for r in frame.reductions]
    fitted = frame.fit(features)
    for feature, found, stride in zip(features, fitted, (1, 2, 4, 8, 16, 16), strict=True):
        height, width = feature.shape[-2:]
        assert found.shape == (1, 2, 48 // stride, 80 // stride)
        assert torch.equal(found[..., :height, :width], feature)
        assert (found[..., height:, :width] == feature[..., -1:, :]).all()
        assert (found[..., width:] == found[..., width - 1 : width]).all()


def test_whole_maps_are_handed_on_as_they_are_or_pooled_for_a_doubling_decoder():
    frame = cam.Frame(8)
    features = [torch.randn(1, 2, 64 // r, 32 // r) for r in frame.reductions]
    assert all(a is b for a, b in zip(features, frame.fit(features), strict=True))
    fitted = cam.Frame(8, doubling=True).fit(features)
    assert [tuple(f.shape[-2:]) for f in fitted] == [(64 >> i, 32 >> i) for i in range(6)]
    torch.testing.assert_close(fitted[5][0, 0, 1, 0], features[5][0, 0, 4:8, :4].mean())


@pytest.mark.parametrize("method", ["cam", "deeplabcam"])
def test_the_seed_draws_what_it_always_drew(method):
    """Results of a seed must not change: the library's own order of draws, and no other."""
    network = network_of(method)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    expected = torch.nn.ModuleDict()
    if method == "cam":
        options = {"weights": None, "output_stride": 16}
        expected["encoder"] = smp.encoders.get_encoder("tu-resnet10t", **options)
    else:
        model = smp.DeepLabV3(
            *("tu-resnet10t", 5, None, 16),
            decoder_channels=16,
            decoder_atrous_rates=(1, 2, 3),
            classes=4,
        )
        expected.update({"encoder": model.encoder, "decoder": model.decoder})
        expected["head"] = model.segmentation_head
        both = network.eval()(images(64, 96), True)[1], model.eval()(images(64, 96))
        assert torch.equal(*both)
    expected["classifier"] = torch.nn.Conv2d(512, 3, 1, bias=False)
    assert torch.equal(after, torch.get_rng_state())
    start = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(expected["classifier"].weight, std=0.01, generator=start)
    assert same(network, expected.state_dict())


def test_every_architecture_of_the_library_serves_or_has_a_reason_why_not():
    known = {each.__name__ for each in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    assert known == {*cam.SERVING, *cam.UNFIT}


@pytest.mark.parametrize(
    ("method", "stride", "words"),
    [
        ("smp:DPT", 16, "DPT cannot serve.*tokens"),
        ("smp:Fpn", 16, "no such method; choose one of .*smp:FPN"),
        ("unetcam", 16, "unetcam_learnable"),
        ("smp:PAN", 8, "smp:PAN .*output_stride 8.*support"),
        ("smp:DeepLabV3", 32, "smp:DeepLabV3 .*output_stride 32.*support"),
    ],
)
def test_methods_that_cannot_be_are_refused(method, stride, words):
    with pytest.raises(UserError, match=rf"^train_cam\.method: .*{words}") as caught:
        cam.build(config_of(method, output_stride=stride))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cam", "deeplabcam", *UNETS])
def test_the_cams_of_all_methods_are_as_large_as_the_papers(name):
    """Section 4.1: 20x20 at 320x320; without memory for the weights."""
    with torch.device("meta"):
        network = network_of(name, encoder="resnet50.tv_in1k", decoder_channels=256)
        maps = network.cam(images(320, 320).to("meta"), torch.ones(1, dtype=torch.int64))
    assert maps.shape == (2, 1, 20, 20)


@pytest.mark.parametrize("method", CAM_METHODS)
def test_each_loss_trains_its_branch_and_both_the_encoder(method):
    network = network_of(method)
    first = next(network.encoder.parameters())

    def learn(weight):
        """Gradient of the first layer, the segmentation loss weighted so."""
        network.zero_grad()
        logits, segmentation = network(images(64, 64), weight > 0)
        loss = F.multilabel_soft_margin_loss(logits, torch.ones(2, 3)) * (weight < 2)
        if segmentation is not None:
            pixels = torch.ones(2, 64, 64, dtype=torch.int64)
            loss = loss + weight * modified_cross_entropy(segmentation, pixels)[0]
        loss.backward()
        assert first.grad.any()
        return first.grad.clone()

    classifying = learn(0)
    assert touched(network.classifier)
    if method == "cam":
        return
    assert not touched(network.decoder) and not touched(network.head)
    assert not torch.allclose(learn(1), classifying)
    learn(2)
    assert touched(network.decoder) and touched(network.head) and not touched(network.classifier)


def test_scores_of_another_size_are_refused_when_built(monkeypatch):
    make = cam.METHODS["unetcam_bilinear"]

    def coarser(config):
        *others, head, frame = make(config)
        return *others, torch.nn.Sequential(head, torch.nn.AvgPool2d(2)), frame

    monkeypatch.setitem(cam.METHODS, "unetcam_bilinear", coarser)
    with pytest.raises(UserError, match=r"^train_cam\.method: .* does not go .*\(scores of "):
        network_of("unetcam_bilinear")
