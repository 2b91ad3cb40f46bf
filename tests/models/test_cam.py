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

UNETS = ("unetcam_learnable", "unetcam_bilinear")
# Of the library's, one that pools a dilated encoder's maps and one that does not.
METHODS = ("cam", "deeplabcam", *UNETS, "smp:Linknet", "smp:DeepLabV3Plus")
DECODING = METHODS[1:]
# Bottlenecks, inverted residuals with a dropped head, and no batch normalisation at all.
ENCODERS = ("resnet10t", "mobilenetv2_100", "convnext_atto")
CLASSES = ("bird", "cat", "dog")


def config_of(method="deeplabcam", encoder="resnet10t", stride=16, norm="batch", channels=16):
    mean, std = cam.normalization(encoder, "encoder")
    return cam.CamConfig(
        method=method,
        encoder=encoder,
        output_stride=stride,
        encoder_norm=norm,
        atrous_rates=(1, 2, 3),
        decoder_channels=channels,
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


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def fresh(method):
    """A function that builds a small network of each method."""
    return lambda **options: network_of(config_of(method, **options))


class TestContract:
    def test_outputs_have_their_shapes(self, network):
        for size in ((64, 96), (61, 47), (33, 90)):
            logits, segmentation = network(images(*size), True)
            assert logits.shape == (2, 3)
            if network.decoder is None:
                assert segmentation is None
            else:
                assert segmentation.shape == (2, 4, *size)
            alone, nothing = network(images(*size), False)
            assert nothing is None
            # The decoder's padding is its own: the encoder saw the same image.
            assert torch.equal(alone, logits)

    def test_what_is_padded_hardly_changes_the_inside(self, network):
        """Cropped where it belongs: a shift by a pixel or the wrong corner is far off."""
        if network.decoder is None:
            return
        picture = torch.nn.functional.interpolate(images(6, 8), (96, 128), mode="bicubic")
        whole = network(picture, True)[1][..., :80, :112]
        cut = network(picture[..., :87, :119], True)[1][..., :80, :112]
        torch.testing.assert_close(cut.mean(), whole.mean(), rtol=0.5, atol=0.1)
        together = torch.stack([whole.flatten(), cut.flatten()])
        assert torch.corrcoef(together)[0, 1] > 0.5

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
@pytest.mark.parametrize("method", ["cam", *UNETS, "smp:Linknet"])
def test_every_output_stride_is_kept(method, stride):
    network = network_of(config_of(method, stride=stride)).eval()
    maps = network.cam(images(64, 96), torch.tensor([1]))
    assert maps.shape == (2, 1, 64 // stride, 96 // stride)
    if network.decoder is not None:
        assert network(images(61, 47), True)[1].shape == (2, 4, 61, 47)


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


def test_whole_maps_are_handed_on_as_they_are():
    frame = cam.Frame(8)
    features = [torch.randn(1, 2, 64 // r, 32 // r) for r in frame.reductions]
    assert all(a is b for a, b in zip(features, frame.fit(features), strict=True))


def test_a_doubling_decoder_gets_the_strides_it_counts_on():
    frame = cam.Frame(8, doubling=True)
    features = [torch.randn(1, 2, 64 // r, 32 // r) for r in frame.reductions]
    fitted = frame.fit(features)
    assert [tuple(f.shape[-2:]) for f in fitted] == [(64 >> i, 32 >> i) for i in range(6)]
    torch.testing.assert_close(fitted[5][0, 0, 1, 0], features[5][0, 0, 4:8, :4].mean())


@pytest.mark.parametrize("method", ["cam", "deeplabcam"])
def test_the_seed_draws_what_it_always_drew(method):
    """Results of a seed must not change: the library's own order of draws, and no other."""
    network = network_of(config_of(method))
    after = torch.get_rng_state()
    torch.manual_seed(0)
    if method == "cam":
        parts = {
            "encoder": smp.encoders.get_encoder("tu-resnet10t", weights=None, output_stride=16)
        }
    else:
        model = smp.DeepLabV3(
            *("tu-resnet10t", 5, None, 16),
            decoder_channels=16,
            decoder_atrous_rates=(1, 2, 3),
            classes=4,
        )
        parts = {"encoder": model.encoder, "decoder": model.decoder}
        parts["head"] = model.segmentation_head
        both = network.eval()(images(64, 96), True)[1], model.eval()(images(64, 96))
        assert torch.equal(*both)
    classifier = torch.nn.Conv2d(512, 3, 1, bias=False).weight.data
    assert torch.equal(after, torch.get_rng_state())
    torch.nn.init.normal_(classifier, std=0.01, generator=torch.Generator().manual_seed(0))
    expected = {
        f"{name}.{key}": value
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    } | {"classifier.weight": classifier}
    state = network.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


class TestUnet:
    def test_the_two_differ_in_the_upsampling_only(self):
        learnable, plain = (network_of(config_of(method)).state_dict() for method in UNETS)
        more = learnable.keys() - plain.keys()
        assert plain.keys() <= learnable.keys()
        assert more and all(".upsampling." in key for key in more)
        # At stride 16 the first of the five steps does not upsample.
        assert {key.split(".")[2] for key in more} == {"1", "2", "3", "4"}
        assert all(torch.equal(value, learnable[key]) for key, value in plain.items())

    def test_the_learnable_one_starts_as_repetition_and_learns(self):
        network = network_of(config_of("unetcam_learnable")).train()
        upsampling = network.decoder.blocks[2].upsampling
        feature = torch.randn(1, 8, 3, 5)
        repeated = torch.nn.functional.interpolate(feature, scale_factor=2, mode="nearest")
        torch.testing.assert_close(upsampling(feature), repeated)
        modified_cross_entropy(
            network(images(64, 64), True)[1], torch.ones(2, 64, 64, dtype=torch.int64)
        )[0].backward()
        assert all(b.upsampling.weight.grad.abs().sum() > 0 for b in network.decoder.blocks[1:])

    @pytest.mark.parametrize(
        ("encoder", "stride"),
        [("resnet10t", 8), ("resnet10t", 32), *((encoder, 16) for encoder in ENCODERS)],
    )
    def test_the_bilinear_one_is_the_librarys(self, encoder, stride):
        network = network_of(config_of("unetcam_bilinear", encoder, stride)).eval()
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


class TestLibrary:
    def test_every_architecture_serves_or_has_a_reason_why_not(self):
        known = {each.__name__ for each in smp.MODEL_ARCHITECTURES_MAPPING.values()}
        assert known == {*cam.SERVING, *cam.UNFIT}

    @pytest.mark.parametrize("name", cam.SERVING)
    def test_it_trains_at_the_papers_stride_and_an_odd_size(self, name):
        network = network_of(config_of(f"smp:{name}", channels=64)).train()
        logits, segmentation = network(images(61, 47), True)
        assert logits.shape == (2, 3) and segmentation.shape == (2, 4, 61, 47)
        segmentation.square().mean().backward()
        assert touched(network.encoder) and touched(network.decoder) and touched(network.head)

    @pytest.mark.parametrize(
        ("method", "words"),
        [
            ("smp:DPT", "DPT cannot serve.*tokens"),
            ("smp:Fpn", "no such method; choose one of .*smp:FPN"),
            ("unetcam", "unetcam_learnable"),
        ],
    )
    def test_another_is_refused_with_those_that_serve(self, method, words):
        with pytest.raises(UserError, match=rf"train_cam\.method.*{words}") as caught:
            cam.build(config_of(method))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(("name", "stride"), [("PAN", 8), ("DeepLabV3", 32)])
    def test_a_stride_that_it_cannot_have_is_named(self, name, stride):
        words = rf"train_cam\.method: smp:{name} .*output_stride {stride}.*support"
        with pytest.raises(UserError, match=words) as caught:
            cam.build(config_of(f"smp:{name}", stride=stride))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cam", "deeplabcam", *UNETS])
def test_the_cams_of_all_methods_are_as_large_as_the_papers(name):
    """Section 4.1: 20x20 at 320x320; without memory for the weights."""
    with torch.device("meta"):
        network = cam.build(config_of(name, "resnet50.tv_in1k", channels=256))
        maps = network.cam(images(320, 320).to("meta"), torch.ones(1, dtype=torch.int64))
    assert maps.shape == (2, 1, 20, 20)


@pytest.mark.parametrize(
    "encoder",
    ["resnet101.tv_in1k", "resnet152.tv_in1k"]
    + ["resnest50d", "resnest101e", "resnest200e", "resnest269e"],
)
def test_the_encoders_of_the_paper_build(encoder):
    """Decoders see nothing but the channels, which are those of ResNet-50 above."""
    with torch.device("meta"):
        network = cam.build(config_of("unetcam_learnable", encoder, channels=256))
    assert network.encoder.out_channels[2:] == [256, 512, 1024, 2048]
    assert all(parameter.is_meta for parameter in network.parameters())


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


@pytest.mark.parametrize("method", DECODING)
def test_the_segmentation_loss_trains_encoder_and_decoder(method):
    network = network_of(config_of(method)).train()
    _, segmentation = network(images(64, 64), True)
    modified_cross_entropy(segmentation, torch.ones(2, 64, 64, dtype=torch.int64))[0].backward()
    assert touched(network.encoder) and touched(network.decoder) and touched(network.head)
    assert not touched(network.classifier)


@pytest.mark.parametrize("method", DECODING)
def test_the_first_layer_learns_from_both_losses(method):
    network = network_of(config_of(method)).train()
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


def test_a_checkpoint_holds_all_that_is_needed(method, tmp_path):
    config = config_of(method)
    network = network_of(config).train()
    network(images(64, 64), True)
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


@pytest.mark.parametrize(
    ("encoder", "stride", "words"),
    [
        ("densenet121", 16, "cannot be built.*choose one.*output_stride: 32"),
        ("tresnet_m", 32, r"images of a certain size \("),
        ("hrnet_w18_small", 32, r"images of a certain size \("),
    ],
)
def test_an_encoder_that_cannot_make_the_maps_is_refused_when_built(encoder, stride, words):
    with torch.device("meta"), pytest.raises(UserError, match=f"{encoder}.*{words}") as caught:
        cam.build(config_of("cam", encoder, stride))
    assert "\n" not in str(caught.value) and "train_cam.encoder" in str(caught.value)


def test_an_encoder_without_dilation_serves_at_stride_32():
    network = network_of(config_of("unetcam_bilinear", "ghostnet_100", 32)).eval()
    assert network(images(61, 47), True)[1].shape == (2, 4, 61, 47)


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
