"""One contract that every method and encoder keeps, and weights that are refused."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file

from isim.engine import save_tensors
from isim.errors import UserError
from isim.models import cam
from isim.models.losses import modified_cross_entropy

METHODS = ("cam", "deeplabcam")
# Bottlenecks, inverted residuals with a dropped head, and no batch normalisation at all.
ENCODERS = ("resnet10t", "mobilenetv2_100", "convnext_atto")
CLASSES = ("bird", "cat", "dog")


def config_of(method="deeplabcam", encoder="resnet10t", stride=16, norm="batch"):
    mean, std = cam.normalization(encoder, "encoder")
    return cam.CamConfig(
        method=method,
        encoder=encoder,
        output_stride=stride,
        encoder_norm=norm,
        atrous_rates=(1, 2, 3),
        decoder_channels=16,
        classes=CLASSES,
        mean=mean,
        std=std,
    )


def network_of(config, seed=0):
    torch.manual_seed(seed)
    return cam.build(config)


def images(*size, count=2):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module", params=[(m, e) for e in ENCODERS for m in METHODS])
def network(request):
    """Not changed by any test: those that train build their own."""
    return network_of(config_of(*request.param)).eval()


@pytest.fixture(scope="module", params=METHODS)
def fresh(request):
    """A function that builds a small network of each method."""
    return lambda **options: network_of(config_of(request.param, **options))


class TestContract:
    def test_outputs_have_their_shapes(self, network):
        logits, segmentation = network(images(64, 96), True)
        assert logits.shape == (2, 3)
        if network.decoder is None:
            assert segmentation is None
        else:
            assert segmentation.shape == (2, 4, 64, 96)
        assert network(images(64, 96), False)[1] is None

    @pytest.mark.parametrize("size", [(64, 64), (61, 47), (33, 90)])
    def test_the_cam_is_linear_its_mean_is_the_logit(self, network, size):
        maps = network.cam(images(*size), torch.tensor([1, 2, 3]))
        assert maps.dtype == torch.float32
        logits, _ = network(images(*size), False)
        torch.testing.assert_close(maps.mean((2, 3)), logits, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("size", [(64, 64), (61, 47)])
    def test_the_cam_has_the_output_stride(self, network, size):
        maps = network.cam(images(*size), torch.tensor([1]))
        # A part of a stride at the border may count (padded convolutions) or not (patches).
        for found, side in zip(maps.shape[2:], size, strict=True):
            assert found in (side // 16, -(-side // 16))

    def test_only_the_wanted_classes_are_computed(self, network):
        every = network.cam(images(64, 64), torch.tensor([1, 2, 3]))
        some = network.cam(images(64, 64), torch.tensor([3, 1]))
        torch.testing.assert_close(some, every[:, [2, 0]], rtol=1e-5, atol=1e-6)

    def test_images_do_not_influence_each_other_in_evaluation(self, network):
        pair, _ = network(images(64, 64), False)
        alone, _ = network(images(64, 64)[:1], False)
        torch.testing.assert_close(pair[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_every_output_stride_is_kept(stride):
    network = network_of(config_of("cam", stride=stride)).eval()
    assert network.cam(images(64, 96), torch.tensor([1])).shape == (
        2,
        1,
        64 // stride,
        96 // stride,
    )


def touched(module):
    return module is not None and any(
        p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters()
    )


def test_the_classification_loss_trains_encoder_and_classifier_only(fresh):
    network = fresh().train()
    logits, _ = network(images(64, 64), False)
    torch.nn.functional.multilabel_soft_margin_loss(logits, torch.ones(2, 3)).backward()
    assert touched(network.encoder) and touched(network.classifier)
    assert not touched(network.decoder) and not touched(network.head)


def test_the_segmentation_loss_trains_encoder_and_decoder():
    network = network_of(config_of("deeplabcam")).train()
    _, segmentation = network(images(64, 64), True)
    modified_cross_entropy(segmentation, torch.ones(2, 64, 64, dtype=torch.int64))[0].backward()
    assert touched(network.encoder) and touched(network.decoder) and touched(network.head)
    assert not touched(network.classifier)


def test_the_first_layer_learns_from_both_losses():
    network = network_of(config_of("deeplabcam")).train()
    first = next(network.encoder.parameters())
    gradients = []
    for weight in (0, 1):
        network.zero_grad()
        logits, segmentation = network(images(64, 64), True)
        loss = torch.nn.functional.multilabel_soft_margin_loss(logits, torch.ones(2, 3))
        pixels, _ = modified_cross_entropy(segmentation, torch.ones(2, 64, 64, dtype=torch.int64))
        (loss + weight * pixels).backward()
        gradients.append(first.grad.clone())
    assert gradients[0].any() and not torch.allclose(*gradients)


def statistics(module):
    return {
        name: value.clone()
        for name, value in module.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_frozen_statistics_stay_and_the_others_follow_the_batch(fresh, norm):
    network = fresh(norm=norm).train()
    before = statistics(network.encoder)
    decoder = statistics(network.decoder) if network.decoder else {}
    network(images(64, 64), True)
    changed = [not torch.equal(before[k], v) for k, v in statistics(network.encoder).items()]
    assert changed and set(changed) == {norm == "batch"}
    for name, value in decoder.items():
        assert not torch.equal(value, network.decoder.get_buffer(name)), "the decoder is new"
    network.eval()
    assert not any(module.training for module in network.modules())
    # Weight and bias of a frozen layer are still learned.
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_checkpoint_holds_all_that_is_needed(fresh, tmp_path):
    network = fresh().train()
    network(images(64, 64), True)
    config = config_of("cam" if network.decoder is None else "deeplabcam")
    save_tensors(tmp_path / "a.safetensors", network.state_dict(), config.to_metadata())
    loaded, read = cam.load(tmp_path / "a.safetensors")
    assert read == config and not loaded.training
    network.eval()
    for ours, theirs in zip(
        network(images(64, 64), True), loaded(images(64, 64), True), strict=True
    ):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="isim train-cam"):
        cam.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="isim train-cam"):
        cam.load(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="isim train-cam"):
        cam.load(path)


@pytest.mark.parametrize("kind", ["encoder", "unit"])
def test_an_unknown_encoder_is_named_with_similar_ones(kind):
    with pytest.raises(UserError, match=r"train_cam\.encoder.*resnet10x"):
        mean, std = cam.normalization("resnet10x", kind)
        cam.build(replace(config_of(), encoder="resnet10x", mean=mean, std=std))
    with pytest.raises(UserError, match=r"similar:.*resnet10t"):
        cam.normalization("resnet10x", "encoder")


def test_an_encoder_without_strided_features_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224.*choose one") as caught:
        cam.build(config_of(encoder="vit_tiny_patch16_224"))
    assert "\n" not in str(caught.value)


def test_normalisation_is_the_encoders_or_none():
    assert cam.normalization("mobilenetv2_100", "encoder")[0] == (0.485, 0.456, 0.406)
    assert cam.normalization("mobilenetv2_100", "unit") == ((0, 0, 0), (1, 1, 1))


def timm_state(encoder):
    torch.manual_seed(3)
    return timm.create_model(encoder).state_dict()


def load_weights(path: Path, encoder="resnet10t", method="cam"):
    network = network_of(config_of(method, encoder))
    cam.load_encoder_weights(network, encoder, str(path), path)
    return network


class TestWeights:
    @pytest.mark.parametrize("encoder", ENCODERS)
    def test_a_file_of_the_whole_network_fills_the_encoder(self, encoder, tmp_path):
        state = timm_state(encoder)
        save_file(state, tmp_path / "w.safetensors")
        network = load_weights(tmp_path / "w.safetensors", encoder, "deeplabcam")
        # Some of timm's feature extractors name `stages.0` `stages_0`.
        given = {name.replace(".", "_"): value for name, value in state.items()}
        own = network.encoder.get_submodule("model").state_dict()
        assert len(own) > 50
        assert all(torch.equal(value, given[name.replace(".", "_")]) for name, value in own.items())

    def test_a_legacy_file_is_read_without_unpickling(self, tmp_path):
        state = timm_state("resnet10t")
        torch.save(state, tmp_path / "w.pth")
        network = load_weights(tmp_path / "w.pth")
        own = network.encoder.get_submodule("model").state_dict()
        assert torch.equal(own["layer4.0.conv1.weight"], state["layer4.0.conv1.weight"])

    def test_a_malicious_file_is_refused_and_not_run(self, tmp_path):
        class Attack:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "owned",))

        for name in ("w.pth", "w.pt"):
            torch.save({"conv1.weight": Attack()}, tmp_path / name)
            with pytest.raises(UserError, match=name):
                load_weights(tmp_path / name)
        (tmp_path / "w.safetensors").write_bytes(pickle.dumps(Attack()))
        with pytest.raises(UserError, match=r"w\.safetensors"):
            load_weights(tmp_path / "w.safetensors")
        assert not (tmp_path / "owned").exists()

    def test_without_network_the_fix_is_named(self, monkeypatch):
        def fail(*_, **__):
            raise OSError("cannot reach the hub\nbecause of this\nand that")

        network = network_of(config_of())
        monkeypatch.setattr(timm, "create_model", fail)
        with pytest.raises(UserError, match=r"resnet10t \(cannot reach.*check the net") as caught:
            cam.load_encoder_weights(network, "resnet10t", "imagenet", Path("imagenet"))
        assert "\n" not in str(caught.value)

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"train_cam\.weights: no file .*w\.safetensors"):
            load_weights(tmp_path / "w.safetensors")

    @pytest.mark.parametrize("other", ["resnet14t", "mobilenetv2_100", "mobilenetv2_110d"])
    def test_weights_of_another_architecture_are_refused(self, other, tmp_path):
        save_file(timm_state(other), tmp_path / "w.safetensors")
        with pytest.raises(UserError, match="another architecture than resnet10t") as caught:
            load_weights(tmp_path / "w.safetensors")
        assert "\n" not in str(caught.value)

    def test_nothing_is_loaded_when_a_shape_differs(self, tmp_path):
        state = timm_state("resnet10t")
        state["layer4.0.conv1.weight"] = torch.zeros(1, 1, 3, 3)
        save_file(state, tmp_path / "w.safetensors")
        network = network_of(config_of())
        before = {name: value.clone() for name, value in network.state_dict().items()}
        with pytest.raises(UserError, match=r"1 of another shape.*layer4\.0\.conv1"):
            cam.load_encoder_weights(network, "resnet10t", "w", tmp_path / "w.safetensors")
        assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())

    def test_decoder_keys_are_pixel_supervision(self, tmp_path):
        model = smp.DeepLabV3("tu-resnet10t", encoder_weights=None)
        save_file(model.state_dict(), tmp_path / "smp.safetensors")
        # torchvision's names of the same parts.
        extra = {"classifier.0.convs.0.0.weight": torch.zeros(1)}
        save_file(timm_state("resnet10t") | extra, tmp_path / "torchvision.safetensors")
        for name in ("smp", "torchvision"):
            with pytest.raises(UserError, match="pixel supervision"):
                load_weights(tmp_path / f"{name}.safetensors")

    @pytest.mark.parametrize(
        "content", [torch.zeros(3), {"state_dict": {}, "epoch": 3}, {"conv1.weight": "text"}, [1]]
    )
    def test_a_legacy_file_of_something_else_is_refused(self, content, tmp_path):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(UserError, match=r"w\.pth"):
            load_weights(tmp_path / "w.pth")
