"""Segmenters: their heads, padding and rates, and whole-network weights files."""

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from support.networks import SEGMENTERS, config_of, copied, images, network_of, same
from torch import nn

from isim.errors import UserError
from isim.models import segmenter
from isim.models.inference import upsample

NOTHING_OPEN = {"missing": [], "unexpected": []}


@pytest.fixture(params=SEGMENTERS)
def method(request):
    return request.param


@torch.no_grad()
@pytest.mark.parametrize(("encoder", "stride"), [("resnet10t", 8), ("mobilenetv2_100", 16)])
def test_padding_is_zeros_at_the_right_and_bottom(method, encoder, stride):
    network = network_of(method, encoder=encoder, output_stride=stride).eval()
    for size in ((61, 47), (5, 90)):
        height, width = (-(-side // stride) * stride for side in size)
        padded = torch.zeros(2, 3, height, width)
        padded[..., : size[0], : size[1]] = images(*size)
        logits = network(images(*size))
        assert torch.equal(logits, network(padded))
        assert logits.shape == (2, 4, height // stride, width // stride)
        assert upsample(logits, stride, size).shape == (2, 4, *size)


def test_stride_32_has_no_rates(method):
    with pytest.raises(UserError, match=rf"train_segmenter\.output_stride: {method} .* 8 or 16"):
        segmenter.build(config_of(method, output_stride=32))


# The rates of DeepLabv3 at either stride are those of the library's and torchvision's below.
@torch.no_grad()
@pytest.mark.parametrize("stride", [8, 16])
def test_deeplabv2_sums_its_four_biased_branches(stride):
    network = network_of("deeplabv2", output_stride=stride).eval()
    for branch in network.head.branches:
        assert branch.weight.shape == (4, 512, 3, 3) and not branch.bias.any()
        assert 0.009 < branch.weight.std() < 0.011 and branch.weight.mean().abs() < 1e-3
        nn.init.normal_(branch.bias)
    features = network.encoder(images(64, 64))[-1]
    assert features.shape == (2, 512, 64 // stride, 64 // stride)
    parts = [
        F.conv2d(F.pad(features, [rate] * 4), b.weight, b.bias, dilation=rate)
        for rate, b in zip((6, 12, 18, 24), network.head.branches, strict=True)
    ]
    torch.testing.assert_close(network(images(64, 64)), sum(parts))


class TestWholeNetworkFiles:
    @pytest.fixture(autouse=True)
    def _path(self, tmp_path):
        self.path = tmp_path / "w.safetensors"

    def load(self, network, method, allow=True, **changes):
        config, weights = config_of(method, **changes), str(self.path)
        return segmenter.load_weights(
            network, config, weights, self.path, allow_decoder_weights=allow
        )

    def refused(self, network, *arguments, **changes):
        """Tell why a file is refused, and that this leaves the network alone."""
        before = copied(network)
        with pytest.raises(UserError, match=r"^train_segmenter\.weights: ") as caught:
            self.load(network, *arguments, **changes)
        assert same(network, before) and "\n" not in str(caught.value)
        return str(caught.value)

    def test_decoder_keys_are_pixel_supervision_unless_allowed(self, method):
        network, source = network_of(method), network_of(method, 1)
        save_file(source.state_dict(), self.path)
        message = self.refused(network, method, False)
        assert "pixel supervision" in message and "allow_decoder_weights" in message
        assert self.load(network, method) == NOTHING_OPEN
        assert same(network, source.state_dict())

    def test_other_classes_keep_a_random_start_and_are_reported(self, method):
        source = network_of(method, 1, classes=("a",) * 80).state_dict()
        save_file(source | {"extra.weight": torch.zeros(1)}, self.path)
        network = network_of(method)
        before = copied(network)
        found = self.load(network, method)
        layers = [f"branches.{i}" for i in range(4)] if method == "deeplabv2" else ["classifier"]
        expected = {f"head.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
        assert set(found["missing"]) == expected and found["unexpected"] == ["extra.weight"]
        assert same(network, source | {name: before[name] for name in expected})

    def test_files_of_smp_are_understood(self):
        model = smp.DeepLabV3(
            "tu-resnet10t",
            encoder_weights=None,
            encoder_output_stride=16,
            decoder_atrous_rates=(6, 12, 18),
            decoder_channels=16,
            classes=4,
            upsampling=1,
        ).eval()
        save_file(model.state_dict(), self.path)
        network = network_of("deeplabv3").eval()
        assert "pixel supervision" in self.refused(network, "deeplabv3", False)
        assert self.load(network, "deeplabv3") == NOTHING_OPEN
        # Large enough for the widest rate.
        with torch.no_grad():
            assert torch.equal(network(images(320, 320)), model(images(320, 320)))

    def test_files_of_torchvision_are_understood(self):
        """All but the names is alike at stride 8: layers, rates, upsampling."""
        torch.manual_seed(0)
        model = torchvision.models.segmentation.deeplabv3_resnet50(
            weights=None, weights_backbone=None, num_classes=4, aux_loss=True
        ).eval()
        self.path = self.path.with_suffix(".pth")
        torch.save(model.state_dict(), self.path)
        changes = {"encoder": "resnet50", "output_stride": 8, "decoder_channels": 256}
        network = network_of("deeplabv3", **changes).eval()
        assert "pixel supervision" in self.refused(network, "deeplabv3", False, **changes)
        found = self.load(network, "deeplabv3", **changes)
        assert found["missing"] == [] and found["unexpected"]
        assert all(key.startswith("aux_classifier.") for key in found["unexpected"])
        with torch.no_grad():
            ours = upsample(network(images(40, 48, count=1)), 8, (40, 48))
            theirs = model(images(40, 48, count=1))["out"]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

    def test_decoders_of_another_architecture_are_refused(self, method):
        other = "deeplabv2" if method == "deeplabv3" else "deeplabv3"
        others = [(other, {}), (method, {"encoder": "mobilenetv2_100"})]
        if method == "deeplabv3":
            others.append((method, {"decoder_channels": 8}))
        network = network_of(method)
        for name, changes in others:
            save_file(network_of(name, **changes).state_dict(), self.path)
            assert "pixel supervision" in self.refused(network, method, False)
            message = self.refused(network, method)
            assert "another architecture" in message and "keys missing" in message

    def test_permission_is_for_decoders_alone(self, method):
        save_file(timm.create_model("mobilenetv2_100").state_dict(), self.path)
        message = self.refused(network_of(method), method)
        assert "another architecture than resnet10t" in message
        save_file(timm.create_model("resnet10t").state_dict(), self.path)
        assert self.load(network_of(method), method) is None
