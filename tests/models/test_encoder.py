"""What encoders expect, the weights that they start from, and weights that are refused."""

import pickle
from functools import cache
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file
from support.networks import CLASSES, ENCODERS, config_of, copied, network_of, same
from support.vits import VITS, shrink

from isim.errors import UserError
from isim.models import affinity, cam, encoder, segmenter

CONFIGURE = {
    "train_cam": lambda section: cam.configure(section, CLASSES),
    "train_affinity": affinity.configure,
    "train_segmenter": lambda section: segmenter.configure(section, CLASSES),
}


@pytest.mark.parametrize("word", CONFIGURE)
def test_a_section_describes_its_network(word, tiny):
    section = getattr(tiny, word).model_copy(update={"encoder": "mobilenetv2_100"})
    config = CONFIGURE[word](section)
    assert config.stage == word and config.mean == (0.485, 0.456, 0.406)
    # The others are of method frozen alone, which these sections do not have.
    shared = [name for name in vars(config) if hasattr(section, name)]
    assert {"encoder", "output_stride"} < set(shared)
    for name in shared:
        assert getattr(config, name) == getattr(section, name), name
    if word == "train_affinity":
        assert config.map_stride == section.stride
    else:
        assert config.classes == CLASSES
    unit = CONFIGURE[word](section.model_copy(update={"input_norm": "unit"}))
    assert (unit.mean, unit.std) == ((0, 0, 0), (1, 1, 1))
    unknown = {
        "resnet10x": "resnet10t",
        "resnet10x.c3_in1k": "resnet10t",
        "resnet50.tv_in1": r"resnet50\.tv_in1k",
        "test_vit_relpos.in1k": "test_vit",
    }
    for name, similar in unknown.items():
        words = rf"^{word}\.encoder: .*'{name}'; similar:.*{similar}"
        with pytest.raises(UserError, match=words) as caught:
            CONFIGURE[word](section.model_copy(update={"encoder": name}))
        assert len(str(caught.value)) < 300


def timm_state(name):
    torch.manual_seed(3)
    return timm.create_model(name).state_dict()


def load(network, name, weights, **changes):
    """Load as the stage of a network does."""
    config, path = config_of(name, **changes), Path(weights)
    if name == "deeplabv2":
        return segmenter.load_weights(network, config, weights, path, allow_decoder_weights=False)
    return encoder.load(network, config, weights, path)


@pytest.fixture(params=["deeplabcam", "deeplabv2", "affinity"])
def name(request):
    return request.param


# Shared by tests that leave it as it is.
fresh = cache(network_of)


@pytest.fixture
def refused(name, tmp_path):
    """A function: a file's content is refused, nothing is loaded; returns what is said."""

    def check(content, file="w.safetensors"):
        path, network = tmp_path / file, fresh(name)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            (torch.save if path.suffix == ".pth" else save_file)(content, path)
        before = copied(network)
        with pytest.raises(UserError) as caught:
            load(network, name, str(path))
        assert same(network, before)
        text, stage = str(caught.value), config_of(name).stage
        assert "\n" not in text and text.startswith(f"{stage}.weights: ")
        # The middle of a long path may be left out.
        assert path.name in text and str(path)[:30] in text
        others = text.replace(str(path), "").replace(stage, "")
        assert not any(word in others for word in CONFIGURE), "names a section of another stage"
        return text

    return check


@pytest.mark.parametrize("timm_name", ENCODERS)
def test_a_file_of_the_whole_network_fills_the_encoder_alone(name, timm_name, tmp_path):
    # Of these heads, mobilenetv2's is a convolution and convnext's is called `head`.
    state = timm_state(timm_name)
    save_file(state, tmp_path / "w.safetensors")
    network = network_of(name, encoder=timm_name)
    head = copied(network.head)
    assert load(network, name, str(tmp_path / "w.safetensors"), encoder=timm_name) is None
    # Some of timm's feature extractors name `stages.0` `stages_0`.
    given = {key.replace(".", "_"): value for key, value in state.items()}
    own = network.encoder.model.state_dict()
    assert len(own) > 50 and same(network.head, head)
    assert all(torch.equal(value, given[key.replace(".", "_")]) for key, value in own.items())


@pytest.mark.parametrize("timm_name", VITS)
def test_a_file_of_a_vision_transformer_fills_it(name, timm_name, tmp_path, monkeypatch):
    shrink(monkeypatch)
    state = timm_state(timm_name)
    save_file(state, tmp_path / "w.safetensors")
    network = network_of("cam" if name == "deeplabcam" else name, encoder=timm_name)
    load(network, name, str(tmp_path / "w.safetensors"), encoder=timm_name)
    assert all(torch.equal(v, state[k]) for k, v in network.encoder.model.state_dict().items())
    del state["blocks.0.mlp.fc1.weight" if "blocks.0.mlp.fc1.weight" in state else "cls_token"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="1 keys missing"):
        load(network, name, str(tmp_path / "w.safetensors"), encoder=timm_name)


def test_imagenet_is_fetched_and_none_changes_nothing(name, monkeypatch):
    network = network_of(name)
    before = copied(network)
    load(network, name, "none")
    assert same(network, before)
    create, other = timm.create_model, timm.create_model("resnet10t")

    def fetch(*names, pretrained=False):
        return other if pretrained else create(*names)

    monkeypatch.setattr(timm, "create_model", fetch)
    load(network, name, "imagenet")
    weight = "layer4.0.conv1.weight"
    assert torch.equal(network.encoder.model.state_dict()[weight], other.state_dict()[weight])


def test_without_network_the_fix_is_named(name, monkeypatch):
    def fail(*_, **__):
        raise OSError("cannot reach the hub\nbecause of this\nand that")

    network = fresh(name)
    monkeypatch.setattr(timm, "create_model", fail)
    words = rf"^{config_of(name).stage}\.weights: .* resnet10t \(cannot reach.*check the net"
    with pytest.raises(UserError, match=words) as caught:
        load(network, name, "imagenet")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(refused):
    assert "no file" in refused(None, "train_cam.safetensors")


def test_weights_of_another_architecture_are_refused(refused, name):
    one = timm_state("resnet10t") | {"layer4.0.conv1.weight": torch.zeros(1, 1, 3, 3)}
    assert "1 of another shape" in refused(one)
    assert "1 unknown" in refused(timm_state("resnet10t") | {"strange.weight": torch.zeros(1)})
    for other in ("resnet14t", "mobilenetv2_100"):
        text = refused(timm_state(other))
        assert "another architecture than resnet10t" in text
        assert f"set {config_of(name).stage}.encoder" in text


def test_decoder_keys_are_pixel_supervision(refused):
    model = smp.DeepLabV3("tu-resnet10t", encoder_weights=None)
    # torchvision's names of the same parts.
    extra = {"classifier.0.convs.0.0.weight": torch.zeros(1)}
    ours = (fresh(method).state_dict() for method in ("deeplabv2", "deeplabv3"))
    for state in (model.state_dict(), *ours, timm_state("resnet10t") | extra):
        assert "pixel supervision" in refused(state)


@pytest.mark.parametrize("name", ["deeplabcam"], indirect=True)
class TestLegacyFiles:
    def test_one_is_read_without_unpickling(self, name, tmp_path):
        state, network = timm_state("resnet10t"), network_of(name)
        torch.save(state, tmp_path / "w.pth")
        load(network, name, str(tmp_path / "w.pth"))
        own = network.encoder.model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in own.items())

    def test_a_malicious_file_is_refused_and_not_run(self, refused, tmp_path):
        class Attack:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "owned",))

        torch.save({"conv1.weight": Attack()}, tmp_path / "w.pt")
        refused({"conv1.weight": Attack()}, "w.pth")
        refused(None, "w.pt")
        refused(pickle.dumps(Attack()))
        assert not (tmp_path / "owned").exists()

    @pytest.mark.parametrize(
        "content", [torch.zeros(3), {"state_dict": {}, "epoch": 3}, {"conv1.weight": "text"}, [1]]
    )
    def test_something_else_is_refused(self, content, refused):
        refused(content, "w.pth")


SUPERVISION = {
    "ImageNet labels": (
        *("mobilenetv2_100", "resnet50.tv_in1k", "tf_efficientnet_lite2.in1k", "resnest269e"),
        *("vit_base_patch16_224.augreg2_in21k_ft_in1k", "vit_base_patch16_224.sam_in1k"),
        *("convnextv2_atto.fcmae_ft_in1k", "swin_large_patch4_window12_384.ms_in22k_ft_in1k"),
    ),
    "none (self-supervised)": (
        *("vit_base_patch14_dinov2", "vit_small_patch14_reg4_dinov2.lvd142m"),
        *("vit_small_patch16_dinov3.lvd1689m", "vit_large_patch16_dinov3.sat493m"),
        *("vit_small_patch8_224.dino", "vit_base_patch16_224.mae", "convnextv2_atto.fcmae"),
        *("convnext_tiny.dinov3_lvd1689m", "vit_huge_patch14_gap_224.in1k_ijepa"),
    ),
    "text (CLIP, SigLIP)": (
        *("vit_base_patch16_clip_224.openai", "vit_base_patch16_siglip_224.v2_webli"),
        *("vit_base_patch16_clip_224.laion2b", "resnet50_clip.openai", "aimv2_1b_patch14_224"),
        # Its targets are CLIP's features.
        "eva02_base_patch14_224.mim_in22k",
    ),
    "text (CLIP, SigLIP), ImageNet labels": (
        "vit_base_patch16_clip_224.openai_ft_in1k",
        "eva02_base_patch14_448.mim_in22k_ft_in1k",
    ),
    "hashtags, ImageNet labels": ("resnext101_32x8d.fb_wsl_ig1b_ft_in1k",),
    "masks": (
        *("samvit_base_patch16.sa1b", "sam2_hiera_tiny.fb_r896", "davit_base_fl.msft_florence2"),
        *("vit_so400m_patch14_siglip_gap_448.pali_refcoco_seg", "vit_pe_spatial_base_patch16_512"),
        "naflexvit_base_patch16_radio_v3",
    ),
    # Taught by several networks, some of them with labels of another kind.
    "unknown": ("vit_base_patch16_dinov3_qkvb.eupe_lvd1689m", "resnet50.bamboo", "resnet10x"),
}


@pytest.mark.parametrize(("words", "names"), SUPERVISION.items())
def test_what_weights_have_learned_from_is_named(words, names):
    assert {name: encoder.supervision(name) for name in names} == dict.fromkeys(names, words)


def test_all_of_a_name_are_told_apart_and_few_are_unknown():
    found = {name: encoder.supervision(name) for name in timm.list_pretrained()}
    assert set(found.values()) == set(SUPERVISION)
    labels = [name for name, words in found.items() if "labels" in words]
    assert all("_in" in name or ".in" in name for name in labels)
    assert list(found.values()).count("unknown") < 0.05 * len(found)


def test_weights_of_a_file_are_those_that_it_is_called_by():
    def of(file, name="mobilenetv2_100"):
        return encoder.supervision(name, f"../shared/weights/{file}")

    assert encoder.supervision("mobilenetv2_100", "none") == "none (random)"
    assert of("mobilenetv2_100.imagenet.safetensors") == "ImageNet labels"
    assert of("mobilenetv2_100.ra_in1k.pth", "mobilenetv2_100.ra_in1k") == "ImageNet labels"
    vit = "vit_small_patch14_dinov2"
    assert of(f"{vit}.lvd142m.safetensors", f"{vit}.lvd142m") == "none (self-supervised)"
    others = ("best.safetensors", "in1k.pth", "resnet50.tv_in1k.pth", "mobilenetv2_100.mine.pth")
    assert [of(file) for file in others] == ["unknown"] * 4
    assert of("best.pth", "vit_base_patch16_clip_224.openai") == "unknown"
    assert of("sam_vit_b.sa1b.pth") == of("best.pth", "sam2_hiera_tiny") == "masks"


@pytest.mark.parametrize("weights", ["imagenet", "sam2_hiera_tiny.safetensors"])
def test_encoders_that_learned_from_masks_are_refused(name, weights):
    network, changed = fresh(name), "sam2_hiera_tiny.fb_r896"
    before = copied(network)
    with pytest.raises(UserError) as caught:
        load(network, name, weights, encoder=changed)
    text = str(caught.value)
    assert text.startswith(f"{config_of(name).stage}.weights: {weights} of {changed} has learned")
    assert "pixel supervision" in text and "\n" not in text and len(text) < 300
    assert same(network, before)
    load(network, name, "none", encoder=changed)  # random ones have learned nothing
