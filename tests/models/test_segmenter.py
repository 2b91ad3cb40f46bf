"""One contract that both methods keep with every encoder, and weights that are refused."""

import math
from dataclasses import replace

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn

from isim.engine import save_tensors
from isim.errors import UserError
from isim.models import cam, segmenter
from isim.models.inference import upsample
from isim.models.losses import pixel_cross_entropy

METHODS = ("deeplabv2", "deeplabv3")
ENCODERS = ("mobilenetv2_100", "resnet18")
CLASSES = ("bird", "cat", "dog")
SIZES = ((64, 64), (61, 47), (5, 90))


def config_of(method="deeplabv3", encoder="resnet18", stride=16, norm="batch"):
    mean, std = segmenter.normalization(encoder, "encoder")
    return segmenter.SegmenterConfig(
        method=method,
        encoder=encoder,
        output_stride=stride,
        encoder_norm=norm,
        decoder_channels=16,
        classes=CLASSES,
        mean=mean,
        std=std,
    )


def network_of(config, seed=0):
    torch.manual_seed(seed)
    return segmenter.build(config)


def images(*size, count=2):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(7))


@pytest.fixture(
    scope="module", params=[(m, e, s) for m in METHODS for e in ENCODERS for s in (8, 16)]
)
def network(request):
    """Not changed by any test: those that train build their own."""
    return network_of(config_of(*request.param)).eval()


@pytest.fixture(scope="module", params=METHODS)
def fresh(request):
    """A function that builds a small network of each method."""
    return lambda **options: network_of(config_of(request.param, **options))


class TestContract:
    @pytest.mark.parametrize("size", SIZES)
    def test_logits_have_the_output_stride(self, network, size):
        with torch.no_grad():
            logits = network(images(*size))
        stride = network.output_stride
        assert logits.shape == (2, 4, *(math.ceil(side / stride) for side in size))
        assert logits.dtype == torch.float32
        assert upsample(logits, stride, size).shape == (2, 4, *size)

    def test_padding_is_zeros_at_the_right_and_bottom(self, network):
        padded = torch.zeros(2, 3, 64, 48)
        padded[..., :61, :47] = images(61, 47)
        with torch.no_grad():
            assert torch.equal(network(images(61, 47)), network(padded))

    def test_encoder_and_head_hold_all_parameters(self, network):
        split = [*network.encoder.parameters(), *network.head.parameters()]
        assert {id(p) for p in split} == {id(p) for p in network.parameters()}
        assert len(split) == len(list(network.parameters()))

    def test_images_do_not_influence_each_other_in_evaluation(self, network):
        with torch.no_grad():
            pair, alone = network(images(64, 64)), network(images(64, 64)[:1])
        torch.testing.assert_close(pair[:1], alone, rtol=1e-4, atol=1e-5)


def dilations(module):
    return [
        m.dilation[0]
        for m in module.modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size[0] == 3
    ]


@pytest.mark.parametrize(
    ("method", "stride", "rates"),
    [
        ("deeplabv2", 8, [6, 12, 18, 24]),
        ("deeplabv2", 16, [6, 12, 18, 24]),
        ("deeplabv3", 8, [12, 24, 36]),
        ("deeplabv3", 16, [6, 12, 18]),
    ],
)
def test_atrous_rates(method, stride, rates):
    head = network_of(config_of(method, stride=stride)).head
    assert dilations(head.decoder.aspp if method == "deeplabv3" else head) == rates


@pytest.mark.parametrize("method", METHODS)
def test_stride_32_has_no_rates(method):
    with pytest.raises(UserError, match=rf"train_segmenter\.output_stride: {method} .* 8 or 16"):
        segmenter.build(config_of(method, stride=32))


def test_deeplabv2_sums_its_four_biased_branches():
    network = network_of(config_of("deeplabv2", stride=8)).eval()
    head = network.head
    assert len(head.branches) == 4
    for branch in head.branches:
        assert branch.weight.shape == (4, 512, 3, 3) and not branch.bias.any()
        assert 0.009 < branch.weight.std() < 0.011 and branch.weight.mean().abs() < 1e-3
        nn.init.normal_(branch.bias)
    with torch.no_grad():
        features = network.encoder(images(64, 64))[-1]
        assert features.shape == (2, 512, 8, 8)
        parts = [
            F.conv2d(F.pad(features, [rate] * 4), b.weight, b.bias, dilation=rate)
            for rate, b in zip((6, 12, 18, 24), head.branches, strict=True)
        ]
        found = network(images(64, 64))
    torch.testing.assert_close(found, parts[0] + parts[1] + parts[2] + parts[3])


def test_the_loss_trains_encoder_and_head(fresh):
    for encoder in ENCODERS:
        network = fresh(encoder=encoder).train()
        logits = network(images(64, 64))
        pixel_cross_entropy(logits, torch.ones(2, 64, 64, dtype=torch.int64), 16).backward()
        for module in (next(network.encoder.children()), network.head):
            assert all(p.grad is not None for p in module.parameters())
            assert next(module.parameters()).grad.any()


def test_a_step_in_bf16_has_fp32_logits(fresh):
    network = fresh().train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(images(64, 64))
    assert logits.dtype == torch.float32
    pixel_cross_entropy(logits, torch.ones(2, 64, 64, dtype=torch.int64), 16).backward()
    assert next(network.encoder.parameters()).grad.any()


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_frozen_statistics_stay_and_the_others_follow_the_batch(fresh, norm):
    network = fresh(norm=norm).train()
    before = {k: v.clone() for k, v in network.named_buffers() if k.endswith("running_mean")}
    network(images(64, 64))
    changed = {k for k, v in network.named_buffers() if k in before and not v.equal(before[k])}
    assert any(k.startswith("encoder.") for k in changed) == (norm == "batch")
    assert any(k.startswith("head.") for k in changed) == any("head." in k for k in before)


def test_a_checkpoint_holds_all_that_is_needed(fresh, tmp_path):
    network = fresh().train()
    network(images(64, 64))
    kind = "deeplabv2" if hasattr(network.head, "branches") else "deeplabv3"
    path = tmp_path / "a.safetensors"
    save_tensors(path, network.state_dict(), config_of(kind).to_metadata())
    loaded, read = segmenter.load(path)
    assert read == config_of(kind) and not loaded.training
    assert torch.equal(network.eval()(images(61, 47)), loaded(images(61, 47)))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="isim train-segmenter"):
        segmenter.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="isim train-segmenter"):
        segmenter.load(path)
    save_file({"weight": torch.zeros(1)}, path, {"cam_config": "{}"})
    with pytest.raises(UserError, match="isim train-segmenter"):
        segmenter.load(path)


@pytest.mark.parametrize("method", METHODS)
def test_unsuitable_encoders_are_refused_in_one_line(method):
    for encoder in ("resnet18x", "vit_tiny_patch16_224"):
        config = replace(config_of(method), encoder=encoder)
        with pytest.raises(UserError, match=rf"train_segmenter\.encoder: .*{encoder}") as caught:
            segmenter.build(config)
        assert "\n" not in str(caught.value) and "choose one" in str(caught.value)
    with pytest.raises(UserError, match=r"train_segmenter\.encoder.*similar:.*resnet18"):
        segmenter.normalization("resnet18x", "encoder")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_encoder_that_needs_a_certain_size_is_refused_when_built(method, device):
    # Its attention takes blocks of 8x8.
    words = r"train_segmenter\.encoder: .*'bat_resnext26ts' .*any size \(.*choose one"
    with torch.device(device), pytest.raises(UserError, match=words) as caught:
        segmenter.build(replace(config_of(method), encoder="bat_resnext26ts"))
    assert "\n" not in str(caught.value)


def test_a_map_of_another_stride_is_refused_when_built(monkeypatch):
    """What the library makes of an output stride is seen, not believed."""
    get_encoder = smp.encoders.get_encoder

    def coarser(name, **options):
        return get_encoder(name, **options | {"output_stride": 32})

    monkeypatch.setattr(smp.encoders, "get_encoder", coarser)
    with pytest.raises(UserError, match=r"train_segmenter\.encoder.*scores of \(2, 3\).*choose"):
        segmenter.build(config_of("deeplabv2"))


@pytest.mark.parametrize("method", METHODS)
def test_it_is_built_and_computes_on_the_meta_device_too(method):
    with torch.device("meta"):
        network = segmenter.build(config_of(method))
    assert all(parameter.is_meta for parameter in network.parameters()) and network.training
    assert network(images(64, 64).to("meta")).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("method", METHODS)
def test_building_leaves_statistics_and_generators_alone(method, monkeypatch):
    network = network_of(config_of(method))
    after = torch.get_rng_state()
    for name, buffer in network.named_buffers():
        assert buffer.eq(1 if name.endswith("running_var") else 0).all(), name
    monkeypatch.setattr(segmenter.common, "try_out", lambda network, run: torch.empty(3, 5))
    network_of(config_of(method))
    assert torch.equal(torch.get_rng_state(), after)


def load(network, path, allow=False, encoder="resnet18"):
    return segmenter.load_weights(network, encoder, str(path), path, allow)


def unchanged(network, action):
    """Whether `action` raises UserError and leaves the network alone; returns the message."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError) as caught:
        action()
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert "\n" not in str(caught.value) and "train_cam" not in str(caught.value)
    return str(caught.value)


class TestWeights:
    @pytest.mark.parametrize("encoder", [*ENCODERS, "convnext_atto"])
    def test_imagenet_weights_fill_the_encoder_alone(self, encoder, tmp_path):
        state = timm.create_model(encoder).state_dict()
        save_file(state, tmp_path / "w.safetensors")
        # Of these heads, mobilenetv2's is a convolution and convnext's is called `head`.
        network = network_of(config_of("deeplabv2", encoder))
        head = network.head.branches[0].weight.clone()
        assert load(network, tmp_path / "w.safetensors", encoder=encoder) is None
        given = {name.replace(".", "_"): value for name, value in state.items()}
        own = network.encoder.get_submodule("model").state_dict()
        assert all(torch.equal(value, given[name.replace(".", "_")]) for name, value in own.items())
        assert torch.equal(network.head.branches[0].weight, head)

    def test_none_changes_nothing_and_imagenet_is_fetched(self, tmp_path, monkeypatch):
        network = network_of(config_of())
        before = network.encoder.get_submodule("model.conv1").weight.clone()
        assert segmenter.load_weights(network, "resnet18", "none", tmp_path, True) is None
        assert torch.equal(network.encoder.get_submodule("model.conv1").weight, before)
        other, create = timm.create_model("resnet18"), timm.create_model
        monkeypatch.setattr(
            timm, "create_model", lambda *a, **k: other if k.get("pretrained") else create(*a)
        )
        assert segmenter.load_weights(network, "resnet18", "imagenet", tmp_path, False) is None
        assert torch.equal(network.encoder.get_submodule("model.conv1").weight, other.conv1.weight)

    def test_errors_name_this_stage(self, tmp_path):
        network = network_of(config_of())
        missing = unchanged(network, lambda: load(network, tmp_path / "w.safetensors"))
        assert missing.startswith("train_segmenter.weights: no file")
        gone = tmp_path / "train_cam.safetensors"
        with pytest.raises(UserError, match=f"^train_segmenter.weights: no file {gone};"):
            load(network, gone)
        save_file(timm.create_model("mobilenetv2_100").state_dict(), tmp_path / "w.safetensors")
        for allow in (False, True):
            message = unchanged(
                network, lambda a=allow: load(network, tmp_path / "w.safetensors", a)
            )
            assert "another architecture than resnet18" in message
            assert "set train_segmenter.encoder" in message

    @pytest.mark.parametrize("method", METHODS)
    def test_decoder_keys_are_pixel_supervision_unless_allowed(self, method, tmp_path):
        network, source = (network_of(config_of(method), seed) for seed in (0, 1))
        path = tmp_path / "w.safetensors"
        save_file(source.state_dict(), path)
        message = unchanged(network, lambda: load(network, path))
        assert "pixel supervision" in message and "allow_decoder_weights" in message
        assert load(network, path, True) == segmenter.DecoderWeights((), ())
        ours, theirs = network.state_dict(), source.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    @pytest.mark.parametrize("method", METHODS)
    def test_other_classes_keep_a_random_start_and_are_reported(self, method, tmp_path):
        source = network_of(replace(config_of(method), classes=("a",) * 80), 1)
        path = tmp_path / "w.safetensors"
        save_file(source.state_dict() | {"extra.weight": torch.zeros(1)}, path)
        network = network_of(config_of(method))
        found = load(network, path, True)
        layers = [f"branches.{i}" for i in range(4)] if method == "deeplabv2" else ["classifier"]
        expected = {f"head.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
        assert set(found.missing) == expected and found.unexpected == ("extra.weight",)
        assert torch.equal(
            network.state_dict()["encoder.model.conv1.weight"],
            source.state_dict()["encoder.model.conv1.weight"],
        )

    def test_files_of_smp_are_understood(self, tmp_path):
        model = smp.DeepLabV3(
            "tu-resnet18",
            encoder_weights=None,
            encoder_output_stride=16,
            decoder_atrous_rates=(6, 12, 18),
            decoder_channels=16,
            classes=4,
            upsampling=1,
        ).eval()
        save_file(model.state_dict(), tmp_path / "w.safetensors")
        network = network_of(config_of()).eval()
        assert "pixel supervision" in unchanged(
            network, lambda: load(network, tmp_path / "w.safetensors")
        )
        assert load(network, tmp_path / "w.safetensors", True) == segmenter.DecoderWeights((), ())
        with torch.no_grad():
            assert torch.equal(network(images(64, 64)), model(images(64, 64)))

    def test_files_of_torchvision_are_understood(self, tmp_path):
        """All but the names is alike at stride 8: layers, rates, upsampling."""
        torch.manual_seed(0)
        model = torchvision.models.segmentation.deeplabv3_resnet50(
            weights=None, weights_backbone=None, num_classes=4, aux_loss=True
        ).eval()
        path = tmp_path / "w.pth"
        torch.save(model.state_dict(), path)
        config = replace(config_of(encoder="resnet50", stride=8), decoder_channels=256)
        network = network_of(config).eval()
        assert "pixel supervision" in unchanged(
            network, lambda: load(network, path, encoder="resnet50")
        )
        found = load(network, path, True, encoder="resnet50")
        assert found.missing == ()
        assert found.unexpected and all(k.startswith("aux_classifier.") for k in found.unexpected)
        with torch.no_grad():
            ours = upsample(network(images(40, 48, count=1)), 8, (40, 48))
            theirs = model(images(40, 48, count=1))["out"]
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("method", METHODS)
    def test_decoders_of_another_architecture_are_refused(self, method, tmp_path):
        path = tmp_path / "w.safetensors"
        others = [
            config_of("deeplabv2" if method == "deeplabv3" else "deeplabv3"),
            config_of(method, "mobilenetv2_100"),
        ]
        if method == "deeplabv3":
            others.append(replace(config_of(method), decoder_channels=8))
        network = network_of(config_of(method))
        for other in others:
            save_file(network_of(other).state_dict(), path)
            assert "pixel supervision" in unchanged(network, lambda: load(network, path))
            message = unchanged(network, lambda: load(network, path, True))
            assert "another architecture" in message and "keys missing" in message

    def test_networks_of_train_cam_do_not_take_segmenters(self, tmp_path):
        path = tmp_path / "w.safetensors"
        save_file(network_of(config_of("deeplabv3")).state_dict(), path)
        network = network_of(config_of())
        with pytest.raises(UserError, match="pixel supervision"):
            cam.load_encoder_weights(network, "resnet18", str(path), path)
