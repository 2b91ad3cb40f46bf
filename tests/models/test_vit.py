"""Plain vision transformers behind the face of an encoder, and the attention that they pay."""

import math

import pytest
import timm
import torch
from support.networks import copied, images
from support.vits import VITS, shrink

from isim.errors import UserError
from isim.models import encoder, vit
from isim.models.vit import PlainViT

# One of each kind.
KINDS = (
    *("vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224"),
    *("vit_base_patch16_clip_224", "vit_small_patch8_224", "test_vit2"),
)
TWICE = "vit_small_patch16_18x2_224"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


def built(name, stride=16):
    """Encoder in evaluation mode, with weights that spread attention and features."""
    torch.manual_seed(0)
    model = PlainViT(name, stride).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(std=0.3)
            elif "gamma" in key or ".ls" in key:
                value.fill_(1)
    return model


def test_plain_ones_are_told_from_others():
    assert all(vit.is_plain(name) for name in VITS)
    tagged = ("vit_base_patch16_siglip_224.v2_webli", "vit_small_patch14_dinov2.lvd142m")
    assert all(vit.is_plain(name) for name in tagged)
    others = ("resnet50.tv_in1k", "swin_tiny_patch4_window7_224", "samvit_base_patch16", "vit_x")
    assert not any(vit.is_plain(name) for name in others)


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_images_of_any_size_have_maps_of_the_stride(name, stride):
    model = built(name, stride)
    for height, width in ((33, 64), (1, 70)):
        maps = model(images(height, width))
        size = math.ceil(height / stride), math.ceil(width / stride)
        expected = [(2, channels, *size) for channels in model.out_channels[1:]]
        assert [tuple(each.shape) for each in maps[1:]] == expected
        assert all(each.isfinite().all() for each in maps)
    assert len(model.out_channels) == 6 and model.out_channels[:3] == [3, 0, 0]


@pytest.mark.parametrize("name", KINDS)
def test_the_maps_are_what_the_model_makes_of_its_patches(name):
    model = built(name, timm.create_model(name).patch_embed.patch_size[0])
    pixels = images(3 * model.stride, 5 * model.stride)
    *_, first, second, last = model(pixels)
    tokens = model.model.fc_norm(model.model.forward_features(pixels))
    tokens = tokens[:, model.model.num_prefix_tokens :]
    torch.testing.assert_close(last.permute(0, 2, 3, 1).reshape(tokens.shape), tokens)
    # Normalised alike, but of other depths.
    for one, other in ((first, second), (second, last), (first, last)):
        assert not torch.allclose(one, other, atol=0.1)
    bias = model.model.norm.bias if name != "test_vit2" else model.model.fc_norm.bias
    for each in (first, second, last):
        spread = (each - bias[:, None, None]).std(1, correction=0)
        torch.testing.assert_close(spread, torch.ones_like(spread), atol=1e-2, rtol=0)


@pytest.mark.parametrize(("name", "taps"), [("test_vit", (1, 3, 5)), ("test_vit2", (1, 4, 7))])
def test_the_maps_come_after_a_third_two_thirds_and_all_of_the_blocks(name, taps):
    model, made = built(name), []
    for block in model.model.blocks:
        block.register_forward_hook(lambda _, __, tokens: made.append(tokens))
    for tap, found in zip(taps, model(images(32, 48))[-3:], strict=True):
        tokens = model.model.fc_norm(model.model.norm(made[tap]))[:, -6:]
        torch.testing.assert_close(found.flatten(2).mT, tokens)


@pytest.mark.parametrize(("name", "stride"), [("vit_small_patch14_dinov2", 16), ("test_vit", 32)])
def test_a_patch_sees_exactly_its_pixels(name, stride):
    model = built(name, stride)
    values = images(3, 4)
    blocks = values.repeat_interleave(stride, 2).repeat_interleave(stride, 3)
    # At the right and at the bottom the last pixels go on.
    pixels, size = model._patches(blocks[..., :-5, :-3])
    patch = pixels.shape[-1] // 4
    assert size == (3, 4) and patch == model.model.patch_embed.patch_size[0]
    expected = values.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    torch.testing.assert_close(pixels, expected)


@pytest.mark.parametrize("name", KINDS)
def test_a_change_of_the_image_is_seen_where_it_is(name):
    model = built(name)
    for block in model.model.blocks:  # Without attention no patch knows of another one.
        torch.nn.init.zeros_(block.attn.proj.weight)
    pixels = images(61, 47)
    changed = pixels.clone()
    changed[:, :, 20:28, 36:] += 1
    differs = (model(pixels)[-1] != model(changed)[-1]).flatten(0, 1).any(0)
    assert differs.nonzero().tolist() == [[1, 2]]


def test_pixels_are_not_touched_where_patches_fit():
    pixels = images(32, 48)
    assert built("test_vit")._patches(pixels)[0] is pixels


@pytest.mark.parametrize("name", VITS)
def test_what_is_not_of_the_features_is_left_out(name):
    whole = timm.create_model(name).state_dict()
    own = PlainViT(name, 16).model.state_dict()
    left = {key.split(".")[0] for key in whole.keys() - own.keys()}
    assert own.keys() <= whole.keys() and left <= {"head", "head_dist", "attn_pool"}
    assert all(own[key].shape == whole[key].shape for key in own)


def test_the_stem_is_what_precedes_the_blocks():
    model = built("vit_base_patch16_clip_224")
    found = {key.removeprefix("model.").split(".")[0] for key in model.stem}
    assert found == {"cls_token", "pos_embed", "patch_embed", "norm_pre"}


def attention_of_timm(model, pixels, last):
    """Weights that timm's own, unfused attention hands to its dropout."""
    heard = []
    for block in model.model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, made: heard.append(made))
    model(pixels)
    assert len(heard) == len(model.model.blocks)
    prefix = model.model.num_prefix_tokens
    weights = torch.stack(heard[-last:]).mean((0, 2))  # over blocks and heads
    return weights[:, prefix:, prefix:]


@pytest.mark.parametrize("name", [name for name in VITS if name != TWICE])
@pytest.mark.parametrize("last", [1, 3, 8])
def test_attention_is_that_of_the_last_blocks(name, last):
    model, pixels = built(name), images(61, 47)
    found = model.attention(pixels, last)
    assert found.shape == (2, 12, 12) and found.dtype == torch.float32
    expected = attention_of_timm(model, pixels, last)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    # Patches differ in what they attend to, or nothing would be compared.
    assert found.std(1).max() > 1e-3
    # Class and register tokens have the rest.
    sums = found.sum(2)
    assert (sums < 1).all() if model.model.num_prefix_tokens else torch.allclose(sums, sums * 0 + 1)


def test_attention_is_seen_from_8_blocks_and_beside_the_maps():
    model, pixels = built("test_vit2"), images(40, 40)
    maps, found = model.with_attention(pixels)
    assert all(torch.equal(one, other) for one, other in zip(maps, model(pixels), strict=True))
    assert len(model.model.blocks) == 8 and torch.equal(found, model.attention(pixels, 8))


def test_attention_in_bf16_is_summed_in_fp32():
    model, pixels = built("vit_small_patch16_dinov3"), images(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.attention(pixels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model.attention(pixels), rtol=0, atol=0.05)


def test_attention_is_computed_where_timm_would_not_fuse_it(monkeypatch):
    expected = built("vit_small_patch16_dinov3").attention(images(32, 32))
    monkeypatch.setattr(timm.layers.config, "_USE_FUSED_ATTN", 0)
    assert torch.equal(built("vit_small_patch16_dinov3").attention(images(32, 32)), expected)


def test_another_kind_of_attention_is_refused():
    words = rf"^encoder '{TWICE}' has 4 blocks and computes attention 8 times.*; choose another"
    with pytest.raises(UserError, match=words):
        built(TWICE).attention(images(32, 32))


NAMES = (
    *(
        f"vit_{size}_patch14_{kind}.lvd142m"
        for size in ("small", "base", "large")
        for kind in ("dinov2", "reg4_dinov2")
    ),
    *(f"vit_{size}_patch16_dinov3.lvd1689m" for size in ("small", "base", "large")),
    "vit_base_patch16_clip_224.openai",
    "vit_base_patch16_siglip_224.v2_webli",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_big_ones_are_built_on_the_meta_device(name, monkeypatch):
    monkeypatch.undo()  # their real size
    assert timm.get_pretrained_cfg(name) is not None
    assert encoder.supervision(name).startswith("text" if "lip" in name else "none (self")
    with torch.device("meta"):
        model = PlainViT(name, 16).eval()
    pixels = images(375, 500).to("meta")
    maps, found = model.with_attention(pixels)
    assert {tuple(each.shape[2:]) for each in maps[1:]} == {(24, 32)}
    assert model.out_channels[-1] == {"s": 384, "b": 768, "l": 1024}[name[4]]
    assert found.shape == (2, 768, 768)


def test_nothing_is_drawn_or_moved_by_looking():
    model = built("test_vit2").train()
    before, state = copied(model), torch.get_rng_state()
    model.attention(images(32, 32))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
