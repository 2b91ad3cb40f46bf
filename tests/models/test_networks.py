"""One contract that all networks keep: CAM methods, segmenters, AffinityNet."""

import math

import pytest
import segmentation_models_pytorch as smp
import torch
from support.networks import (
    ENCODERS,
    NAMES,
    SEGMENTERS,
    UNETS,
    config_of,
    copied,
    images,
    module_of,
    network_of,
    outputs,
    same,
    touched,
)
from support.vits import shrink

from isim.errors import UserError
from isim.models import affinity, cam, common, segmenter

# Every method there is on one encoder, those of a kind of their own on the others and at other
# strides.
EVERY = tuple(dict.fromkeys((*cam.METHODS, *NAMES)))
STRIDING = ("cam", *UNETS, "smp:Linknet", "affinity")
# What one map is enough for, on plain vision transformers: patches of 16 and 14 pixels, rotations.
ONE_STRIDE = ("cam", "deeplabcam", *SEGMENTERS, "affinity")
VITS = ("test_vit", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3")
ON_VITS = [
    *((name, {"encoder": "test_vit"}) for name in ONE_STRIDE),
    *((name, {"encoder": encoder}) for name in ONE_STRIDE[::2] for encoder in VITS[1:]),
]
CASES = [
    *((name, {}) for name in EVERY),
    *ON_VITS,
    *((name, {"encoder": VITS[1], "output_stride": 8}) for name in ONE_STRIDE),
    *((name, {"encoder": VITS[0], "output_stride": 32}) for name in ("cam", "affinity")),
    *((name, {"encoder": encoder}) for name in NAMES for encoder in ENCODERS[1:]),
    *((name, {"output_stride": 8}) for name in (*STRIDING, *SEGMENTERS)),
    *((name, {"output_stride": 32}) for name in STRIDING),
    ("affinity", {"map_stride": 4}),
    # Without dilation.
    ("unetcam_bilinear", {"encoder": "ghostnet_100", "output_stride": 32}),
]
# Device, name, encoder, stride and why it cannot serve: no strided features, or not any size.
UNSUITABLE = [
    ("cpu", "cam", "densenet121", 16, ".*some serve at output_stride: 32 alone"),
    *(("cpu", name, "resnet10x", 16, "") for name in NAMES[:2] + NAMES[-4:]),
    *(("cpu", name, "test_vit_relpos", 16, "") for name in NAMES[:2] + NAMES[-4:]),
    # Its attention takes 8x8 blocks.
    *((device, "deeplabv2", "bat_resnext26ts", 16, "") for device in ("cpu", "meta")),
    ("meta", "deeplabv3", "bat_resnext26ts", 16, ""),
    *(
        ("meta", name, "tresnet_m", 32, "(?!.*some serve)")
        for name in ("cam", UNETS[0], "affinity")
    ),
    *(
        ("meta", name, "hrnet_w18_small", 32, "(?!.*some serve)")
        for name in ("cam", UNETS[0], "affinity")
    ),
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


@pytest.fixture(params=[*((name, {}) for name in NAMES), *ON_VITS[: len(ONE_STRIDE) + 2]], ids=str)
def case(request):
    """Name of a network, and changes of its configuration."""
    return request.param


def shapes(network, height, width):
    """Shapes of `outputs`; that of the CAM is its own matter."""
    if isinstance(network, affinity.AffinityNet):
        rows, columns = (math.ceil(side / network.map_stride) for side in (height, width))
        return {"features": (2, 448, rows, columns), "affinities": (2, 34, rows, columns)}
    if isinstance(network, segmenter.Segmenter):
        stride = network.output_stride
        return {"segmentation": (2, 4, math.ceil(height / stride), math.ceil(width / stride))}
    found = {"logits": (2, 3)}
    return found if network.decoder is None else found | {"segmentation": (2, 4, height, width)}


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_images_of_any_size_have_their_maps_whatever_is_beside_them(name, changes):
    network = network_of(name, **changes).eval().requires_grad_(False)
    stride = changes.get("output_stride", 16)
    for size in ((61, 47), (33, 64)):
        found = outputs(network, images(*size))
        for key, shape in shapes(network, *size).items():
            assert found[key].shape == shape, key
        assert all(t.dtype == torch.float32 and t.isfinite().all() for t in found.values())
        # A part of a stride at the border may count (padded convolutions) or not (patches).
        last = network.encoder(images(*size, count=1))[-1]
        for side, whole in zip(last.shape[2:], size, strict=True):
            assert side in (whole // stride, -(-whole // stride))
    for key, alone in outputs(network, images(33, 64)[:1]).items():
        bound = 1e-4 * float(found[key].abs().max())
        torch.testing.assert_close(alone, found[key][:1], rtol=1e-3, atol=bound)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in EVERY),
        *((name, {"encoder": "mobilenetv2_100"}) for name in (*SEGMENTERS, "affinity")),
        *ON_VITS,
    ],
    ids=str,
)
def test_every_part_learns_at_an_odd_size(name, changes):
    network = network_of(name, **changes)
    assert network.training
    sum(each.square().mean() for each in outputs(network, images(61, 47)).values()).backward()
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learning)
    assert all(touched(part) for part in network.children())
    # The parts are the groups of the optimizers.
    parts = dict(network.named_children())
    assert parts.keys() <= {"encoder", "classifier", "decoder", "head"}
    counts = [len(list(part.parameters())) for part in parts.values()]
    assert sum(counts) == len(list(network.parameters()))


def test_a_step_in_bf16_has_maps_in_fp32(case):
    name, changes = case
    network = network_of(name, **changes)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(network, images(64, 64))
    maps = [each for each in found.values() if each.ndim == 4]
    assert {each.dtype for each in maps} == {torch.float32}
    sum(each.square().mean() for each in maps).backward()
    assert touched(network.encoder)


@pytest.mark.parametrize(
    ("name", "norm"),
    [("affinity", None), *((n, k) for n in NAMES[:-1] for k in ("batch", "frozen"))],
)
def test_frozen_statistics_stay_and_the_others_follow_the_batch(name, norm):
    network = network_of(name, **({} if norm is None else {"encoder_norm": norm}))
    before = {key: value.clone() for key, value in network.named_buffers()}
    outputs(network, images(64, 64))
    for key, value in network.named_buffers():
        stays = norm != "batch" and key.startswith("encoder.")
        assert torch.equal(value, before[key]) == stays, key
    normal = torch.nn.modules.batchnorm._BatchNorm
    kept = [m for m in network.encoder.modules() if isinstance(m, normal) and norm != "batch"]
    assert [m for m in network.modules() if not m.training] == kept
    # Weight and bias of a frozen layer are still learned, but for AffinityNet's stem.
    assert norm is None or all(p.requires_grad for p in network.parameters())
    assert not any(module.training for module in network.eval().modules())


def test_a_checkpoint_holds_all_that_is_needed(case, tmp_path):
    name, changes = case
    config, path = config_of(name, **changes), tmp_path / "model.safetensors"
    network = network_of(name, **changes)
    outputs(network, images(64, 64))  # Moves the statistics.
    common.save(path, network, config)
    loaded, read = module_of(config).load(path)
    assert read == config and not loaded.training and same(loaded, network.state_dict())
    expected, found = (outputs(net.eval(), images(61, 47)) for net in (network, loaded))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_it_is_built_and_computes_on_the_meta_device_too(case):
    name, changes = case
    with torch.device("meta"):
        network = network_of(name, **changes)
    assert network.training and all(parameter.is_meta for parameter in network.parameters())
    # AffinityNet's stem does not learn.
    kept = {key.split(".")[2] for key, p in network.named_parameters() if not p.requires_grad}
    stem = {"cls_token", "pos_embed", "patch_embed"} if changes else {"conv1", "bn1"}
    assert kept == (stem if name == "affinity" else set())
    found = outputs(network, images(61, 47).to("meta"))
    assert all(found[key].shape == shape for key, shape in shapes(network, 61, 47).items())


def test_trying_it_out_leaves_no_trace(case, monkeypatch):
    """Neither in the statistics nor in what is drawn: results of a seed must not change."""
    name, changes = case
    network = network_of(name, **changes)
    after = torch.get_rng_state()
    for key, buffer in network.named_buffers():
        if key.endswith(".periods"):
            continue  # of rotations
        assert buffer.eq(1 if key.endswith("running_var") else 0).all(), key
    monkeypatch.setattr(common, "try_out", lambda *_: torch.empty(3, 5))
    assert same(network_of(name, **changes), copied(network))
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize(("device", "name", "encoder", "stride", "end"), UNSUITABLE)
def test_an_encoder_that_cannot_serve_is_refused_when_built(device, name, encoder, stride, end):
    """Not only when whole images are seen, after all the training."""
    config = config_of(name, encoder=encoder, output_stride=stride)
    words = rf"^{config.stage}\.encoder: .*'{encoder}' at output_stride {stride} .*\(.+\); choose "
    with torch.device(device), pytest.raises(UserError, match=f"{words}{end}.*_100") as caught:
        module_of(config).build(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", [name for name in cam.METHODS if name not in ONE_STRIDE])
def test_decoders_of_several_strides_are_refused_on_plain_vision_transformers(method):
    config = config_of(method, encoder="vit_small_patch14_dinov2")
    words = rf"^train_cam\.method: {method} .*'{config.encoder}'.*one stride.*; choose .*deeplabcam"
    with pytest.raises(UserError, match=words) as caught:
        cam.build(config)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["cam", "unetcam_bilinear", "deeplabv2"])
def test_maps_of_another_stride_are_refused_when_built(name, monkeypatch):
    """What the library makes of an output stride is seen, not believed."""
    get_encoder = smp.encoders.get_encoder

    def coarser(name, **options):
        return get_encoder(name, **options | {"output_stride": 32})

    monkeypatch.setattr(smp.encoders, "get_encoder", coarser)
    with pytest.raises(UserError, match=r"\.encoder: .*\((maps|scores) of .*\(45, 77\)\); choose"):
        network_of(name)
