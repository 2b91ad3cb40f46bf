"""AffinityNet: one contract for encoders and strides, and loops that say what it computes."""

import math
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from isim.engine import save_tensors
from isim.errors import UserError
from isim.models import affinity, cam
from isim.pairs import half_disc

IGNORE = 255
# Bottlenecks, inverted residuals with a dropped head, and no batch normalisation at all.
ENCODERS = ("resnet10t", "mobilenetv2_100", "convnext_atto")


def config_of(encoder="resnet10t", stride=8, output_stride=16, radius=5):
    mean, std = cam.normalization(encoder, "encoder")
    return affinity.AffinityConfig(encoder, output_stride, stride, radius, mean, std)


def network_of(config, seed=0):
    torch.manual_seed(seed)
    return affinity.build(config)


def images(*size, count=2):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(7))


def features_of(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


def labels_of(*shape, values=(0, 1, 2, IGNORE)):
    chosen = torch.randint(len(values), shape, generator=torch.Generator().manual_seed(5))
    return torch.tensor(values)[chosen]


@pytest.fixture(scope="module", params=[(e, s) for e in ENCODERS for s in (8, 4)])
def network(request):
    """Not changed by any test: those that train build their own."""
    return network_of(config_of(*request.param)).eval()


class TestContract:
    @pytest.mark.parametrize("size", [(64, 96), (61, 47), (33, 90)])
    def test_affinities_are_those_of_the_map(self, network, size):
        height, width = (-(-side // network.map_stride) for side in size)
        features = network.features(images(*size))
        assert features.shape == (2, 448, height, width) and features.dtype == torch.float32
        found = network(images(*size))
        assert found.shape == (2, 34, height, width) and found.dtype == torch.float32
        assert torch.equal(found, affinity.pair_affinity(features, 5))
        for plane, (dy, dx) in zip(found.unbind(1), half_disc(5), strict=True):
            y, x = torch.arange(height)[:, None] + dy, torch.arange(width) + dx
            inside = (y < height) & (x >= 0) & (x < width)
            assert (plane[:, ~inside] == 0).all()
            assert (plane[:, inside] > 0).all() and (plane[:, inside] <= 1).all()

    def test_features_differ_from_pixel_to_pixel(self, network):
        to_the_right = network(images(64, 64))[:, half_disc(5).index((0, 1)), :, :-1]
        assert to_the_right.max() < 0.9999 and to_the_right.std() > 1e-4

    def test_images_do_not_influence_each_other(self, network):
        pair = network(images(64, 64))
        torch.testing.assert_close(network(images(64, 64)[:1]), pair[:1], rtol=1e-3, atol=1e-4)

    def test_bf16_ends_before_the_pairs(self, network):
        with torch.autocast("cpu", torch.bfloat16):
            found = network(images(64, 64))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, network(images(64, 64)), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_every_output_stride_serves(output_stride):
    network = network_of(config_of(output_stride=output_stride)).eval()
    stages = network.encoder(images(64, 96))
    assert stages[-1].shape[-2:] == (64 // output_stride, 96 // output_stride)
    assert network(images(64, 96)).shape == (2, 34, 8, 12)


def test_the_head_mixes_the_three_stages_as_the_paper_says():
    head = affinity.AffinityHead((5, 6, 7))
    stages = [features_of(1, 5, 8, 6), features_of(1, 6, 4, 3), features_of(1, 7, 4, 3)]
    assert not [name for name, _ in head.named_parameters() if "bias" in name]
    weights = [tap.weight[:, :, 0, 0] for tap in head.taps]
    assert [len(weight) for weight in weights] == [64, 128, 256]
    elu, resize = torch.nn.functional.elu, torch.nn.functional.interpolate
    maps = []
    for weight, stage in zip(weights, stages, strict=True):
        reduced = elu(torch.einsum("oc,bchw->bohw", weight, stage))
        maps.append(resize(reduced, (8, 6), mode="bilinear"))
    mixed = elu(torch.einsum("oc,bchw->bohw", head.mix.weight[:, :, 0, 0], torch.cat(maps, 1)))
    torch.testing.assert_close(head(stages, (8, 6)), mixed, rtol=1e-4, atol=1e-4)


class TestPairs:
    @pytest.mark.parametrize("size", [(7, 9), (1, 1), (2, 6), (6, 2)])
    @pytest.mark.parametrize("radius", [2, 5])
    def test_equals_a_loop_over_pixels(self, size, radius):
        features = features_of(2, 3, *size)
        found = affinity.pair_affinity(features, radius)
        expected = torch.zeros(2, len(half_disc(radius)), *size)
        for p, (dy, dx) in enumerate(half_disc(radius)):
            for y in range(size[0]):
                for x in range(size[1]):
                    if y + dy < size[0] and 0 <= x + dx < size[1]:
                        apart = features[:, :, y, x] - features[:, :, y + dy, x + dx]
                        expected[:, p, y, x] = torch.exp(-apart.abs().mean(1))
        torch.testing.assert_close(found, expected)

    def test_equal_features_are_wholly_alike_and_far_ones_not_at_all(self):
        features = torch.zeros(1, 4, 1, 3)
        features[..., 2] = 1e4
        found = affinity.pair_affinity(features, 3)
        to_the_right = half_disc(3).index((0, 1))
        assert found[0, to_the_right].tolist() == [[1, 0, 0]]

    def test_the_gradient_is_that_of_the_function(self):
        features = features_of(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda f: affinity.pair_affinity(f, 3), features)

    def test_no_difference_is_kept_for_the_gradient(self):
        """Autograd alone would keep one as large as the features for each of the 34 offsets."""
        features = features_of(1, 448, 8, 8).requires_grad_()
        kept = []

        def note(tensor):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            affinity.affinity_loss(affinity.pair_affinity(features, 5), labels_of(1, 8, 8), 5)
        # Besides: a few planes an offset of exp, log and the masks.
        assert sum(kept) <= features.numel() + 20 * 34 * 8 * 8


def loop_loss(found, labels, radius):
    """Spec 6 for one pair after the other: the three means."""
    terms = {"background": [], "foreground": [], "negative": []}
    batch, height, width = labels.shape
    for b in range(batch):
        for p, (dy, dx) in enumerate(half_disc(radius)):
            for y in range(height):
                for x in range(width):
                    if not (y + dy < height and 0 <= x + dx < width):
                        continue
                    one, two = int(labels[b, y, x]), int(labels[b, y + dy, x + dx])
                    value = float(found[b, p, y, x])
                    if IGNORE in (one, two):
                        continue
                    if one != two:
                        terms["negative"].append(-math.log(1 - value + 1e-5))
                    else:
                        kind = "foreground" if one else "background"
                        terms[kind].append(-math.log(value + 1e-5))
    return {name: sum(values) / max(1, len(values)) for name, values in terms.items()}


class TestLoss:
    @pytest.mark.parametrize(
        "values", [(0, 1, 2, IGNORE), (0, 1), (0,), (3,), (1, 2), (0, IGNORE), (IGNORE,)]
    )
    @pytest.mark.parametrize("size", [(6, 7), (1, 1)])
    def test_equals_a_loop_over_pairs(self, values, size):
        labels = labels_of(2, *size, values=values)
        found = affinity.pair_affinity(features_of(2, 3, *size), 5)
        loss = affinity.affinity_loss(found, labels, 5)
        terms = loop_loss(found, labels, 5)
        for name, expected in terms.items():
            assert float(getattr(loss, name)) == pytest.approx(expected, rel=1e-4), name
        total = terms["background"] / 4 + terms["foreground"] / 4 + terms["negative"] / 2
        assert float(loss.total) == pytest.approx(total, rel=1e-4)

    @given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
    @settings(deadline=None, max_examples=20)
    def test_equals_a_loop_for_any_map(self, height, width, start):
        generator = torch.Generator().manual_seed(start)
        features = torch.randn(1, 2, height, width, generator=generator)
        labels = torch.tensor([0, 1, 2, IGNORE])[
            torch.randint(4, (1, height, width), generator=generator)
        ]
        found = affinity.pair_affinity(features, 3)
        loss = affinity.affinity_loss(found, labels, 3)
        for name, expected in loop_loss(found, labels, 3).items():
            assert float(getattr(loss, name)) == pytest.approx(expected, rel=1e-4), name

    def test_without_pairs_loss_and_gradient_are_zero(self):
        features = features_of(1, 3, 4, 4).requires_grad_()
        labels = torch.full((1, 4, 4), IGNORE)
        loss = affinity.affinity_loss(affinity.pair_affinity(features, 5), labels, 5)
        loss.total.backward()
        assert loss.total == 0 and (features.grad == 0).all()

    def test_ignored_pixels_have_no_gradient(self):
        features = features_of(1, 3, 5, 6).requires_grad_()
        labels = labels_of(1, 5, 6)
        loss = affinity.affinity_loss(affinity.pair_affinity(features, 5), labels, 5)
        loss.total.backward()
        ignored = labels[0] == IGNORE
        assert ignored.any() and (features.grad[0, :, ignored] == 0).all()
        assert (features.grad[0, :, ~ignored] != 0).any()

    @pytest.mark.parametrize("scale", [0.0, 1e4])
    def test_extreme_affinities_give_finite_gradients(self, scale):
        features = (features_of(1, 3, 5, 6) * scale).requires_grad_()
        loss = affinity.affinity_loss(affinity.pair_affinity(features, 5), labels_of(1, 5, 6), 5)
        loss.total.backward()
        assert torch.isfinite(loss.total) and torch.isfinite(features.grad).all()

    def test_labels_may_be_bytes(self):
        found = affinity.pair_affinity(features_of(1, 3, 5, 6), 5)
        whole = affinity.affinity_loss(found, labels_of(1, 5, 6), 5)
        assert whole == affinity.affinity_loss(found, labels_of(1, 5, 6).to(torch.uint8), 5)


def step(network):
    optimizer = torch.optim.SGD(network.parameters(), 0.01, weight_decay=0.1)
    side = 64 // network.map_stride
    labels = labels_of(2, side, side, values=(0, 1))
    loss = affinity.affinity_loss(network(images(64, 64)), labels, network.radius)
    optimizer.zero_grad()
    loss.total.backward()
    optimizer.step()


@pytest.mark.parametrize(
    "encoder, stem, stages",
    [
        ("resnet10t", {"conv1", "bn1"}, {"layer1", "layer2", "layer3", "layer4"}),
        ("mobilenetv2_100", {"conv_stem", "bn1", "blocks.0"}, {f"blocks.{i}" for i in range(1, 7)}),
        ("convnext_atto", {"stem_0", "stem_1", "stages_0"}, {"stages_1", "stages_2", "stages_3"}),
    ],
)
def test_the_stem_stays_and_all_else_learns(encoder, stem, stages):
    network = network_of(config_of(encoder)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    # Residual branches of zero weight have no gradient inside before the second step.
    step(network)
    step(network)
    changed, kept = set(), set()
    for name, value in network.encoder.model.named_parameters():
        part = ".".join(name.split(".")[: 2 if name.startswith("blocks") else 1])
        same = torch.equal(value, before[f"encoder.model.{name}"])
        (kept if same else changed).add(part)
        assert same is (part in stem), name
    assert kept == stem and changed == stages
    for name, value in network.head.named_parameters():
        assert not torch.equal(value, before[f"head.{name}"]), name
    # Running statistics and counters.
    for name, value in network.named_buffers():
        assert torch.equal(value, before[name]), name


def test_training_switches_all_but_the_normalisation():
    network = network_of(config_of()).train()
    norms = (torch.nn.modules.batchnorm._BatchNorm,)
    modes = {isinstance(m, norms): m.training for m in network.modules()}
    assert modes == {True: False, False: True}
    assert not any(module.training for module in network.eval().modules())


def test_encoder_and_head_are_all_the_parameters():
    """They are the groups of the optimizer."""
    network = network_of(config_of())
    groups = [*network.encoder.parameters(), *network.head.parameters()]
    assert [id(p) for p in groups] == [id(p) for p in network.parameters()]


def test_two_regions_are_learned_apart():
    network = network_of(config_of()).train()
    batch = images(64, 64)
    batch[..., 32:] += 2
    labels = torch.zeros(2, 8, 8, dtype=torch.int64)
    labels[..., 4:] = 1
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(8):
        loss = affinity.affinity_loss(network(batch), labels, 5)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    assert losses[-1] < 0.8 * losses[0]


def test_it_is_built_on_the_meta_device_too():
    with torch.device("meta"):
        network = affinity.build(config_of())
    assert {p.device.type for p in network.parameters()} == {"meta"}
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    real = network_of(config_of()).named_parameters()
    assert frozen == [name for name, p in real if not p.requires_grad]


@pytest.mark.parametrize("encoder", ["tresnet_m", "hrnet_w18_small"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_encoder_that_needs_a_certain_size_is_refused_when_built(encoder, device):
    """Not only when the walk sees whole images, after all the training."""
    config = affinity.AffinityConfig(encoder, 32, 8, 5, (0.5,) * 3, (0.5,) * 3)
    words = rf"train_affinity\.encoder: .*'{encoder}' at output_stride 32 .*any size \(.*choose one"
    with torch.device(device), pytest.raises(UserError, match=words) as caught:
        affinity.build(config)
    assert "\n" not in str(caught.value)


def test_building_draws_what_the_layers_draw(monkeypatch):
    network_of(config_of("convnext_atto"))
    after = torch.get_rng_state()
    monkeypatch.setattr(affinity.common, "try_out", lambda network, run: None)
    network = network_of(config_of("convnext_atto"))
    assert network.training and torch.equal(torch.get_rng_state(), after)


def test_building_leaves_the_statistics_alone():
    for name, buffer in network_of(config_of()).named_buffers():
        assert buffer.eq(1 if name.endswith("running_var") else 0).all(), name


@pytest.mark.parametrize("stride", [8, 4])
def test_a_checkpoint_holds_all_that_is_needed(stride, tmp_path):
    config = config_of(stride=stride, radius=4)
    network = network_of(config).train()
    step(network)
    save_tensors(tmp_path / "a.safetensors", network.state_dict(), config.to_metadata())
    loaded, read = affinity.load(tmp_path / "a.safetensors")
    assert read == config and not loaded.training
    assert torch.equal(network.eval()(images(61, 47)), loaded(images(61, 47)))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="isim train-affinity"):
        affinity.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="isim train-affinity"):
        affinity.load(path)
    # The checkpoint of another stage.
    save_file({"weight": torch.zeros(1)}, path, {"cam_config": "{}"})
    with pytest.raises(UserError, match="isim train-affinity"):
        affinity.load(path)


@pytest.mark.parametrize("encoder", ["resnet10x", "vit_tiny_patch16_224"])
def test_an_encoder_that_cannot_serve_is_refused_in_one_line(encoder):
    config = affinity.AffinityConfig(encoder, 16, 8, 5, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(UserError, match=rf"train_affinity\.encoder.*{encoder}.*such as") as caught:
        affinity.build(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoder_weights_load_as_into_a_cam_network(encoder, tmp_path):
    torch.manual_seed(3)
    state = timm.create_model(encoder).state_dict()
    path = Path(tmp_path / "w.safetensors")
    save_file(state, path)
    network = network_of(config_of(encoder))
    head = {name: value.clone() for name, value in network.head.state_dict().items()}
    cam.load_encoder_weights(network, encoder, str(path), path)
    # Some of timm's feature extractors name `stages.0` `stages_0`.
    given = {name.replace(".", "_"): value for name, value in state.items()}
    own = network.encoder.model.state_dict()
    assert len(own) > 50
    assert all(torch.equal(value, given[name.replace(".", "_")]) for name, value in own.items())
    assert all(torch.equal(head[name], value) for name, value in network.head.state_dict().items())
    assert any(not p.requires_grad for p in network.encoder.parameters())
