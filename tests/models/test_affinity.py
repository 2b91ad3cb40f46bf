"""AffinityNet: what learns of it, and loops that say what it computes."""

import math

import pytest
import torch
from support.networks import ENCODERS, config_of, copied, images, network_of, same

from isim.errors import UserError
from isim.labels.walk.pairs import half_disc
from isim.metrics import IGNORE
from isim.models import affinity, common


def features_of(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


def labels_of(*shape, values=(0, 1, 2, IGNORE)):
    chosen = torch.randint(len(values), shape, generator=torch.Generator().manual_seed(5))
    return torch.tensor(values)[chosen]


def loss_of(features, labels):
    return affinity.affinity_loss(affinity.pair_affinity(features, 5), labels, 5)


@pytest.fixture(scope="module", params=[*((e, 8) for e in ENCODERS), ("resnet10t", 4)])
def network(request):
    """Not changed by any test: those that train build their own."""
    encoder, stride = request.param
    return network_of("affinity", encoder=encoder, map_stride=stride).eval()


@pytest.mark.parametrize("size", [(64, 96), (61, 47), (33, 90)])
def test_affinities_are_those_of_the_map(network, size):
    found = network(images(*size))
    assert torch.equal(found, affinity.pair_affinity(network.features(images(*size)), 5))
    height, width = found.shape[-2:]
    for plane, (dy, dx) in zip(found.unbind(1), half_disc(5), strict=True):
        y, x = torch.arange(height)[:, None] + dy, torch.arange(width) + dx
        inside = (y < height) & (x >= 0) & (x < width)
        assert (plane[:, ~inside] == 0).all()
        assert (plane[:, inside] > 0).all() and (plane[:, inside] <= 1).all()


def test_features_differ_from_pixel_to_pixel_and_bf16_ends_before_the_pairs(network):
    found = network(images(64, 64))
    to_the_right = found[:, half_disc(5).index((0, 1)), :, :-1]
    assert to_the_right.max() < 0.9999 and to_the_right.std() > 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network(images(64, 64)), found, rtol=0.1, atol=0.05)


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


def pairs(height, width, radius):
    """Plane and both pixels of every pair of a map."""
    for plane, (dy, dx) in enumerate(half_disc(radius)):
        for y in range(height):
            for x in range(width):
                if y + dy < height and 0 <= x + dx < width:
                    yield plane, (y, x), (y + dy, x + dx)


class TestPairs:
    @pytest.mark.parametrize("size", [(7, 9), (1, 1), (2, 6), (6, 2)])
    @pytest.mark.parametrize("radius", [2, 5])
    def test_equals_a_loop_over_pixels(self, size, radius):
        features = features_of(2, 3, *size)
        expected = torch.zeros(2, len(half_disc(radius)), *size)
        for plane, one, two in pairs(*size, radius):
            apart = features[:, :, *one] - features[:, :, *two]
            expected[:, plane, *one] = torch.exp(-apart.abs().mean(1))
        torch.testing.assert_close(affinity.pair_affinity(features, radius), expected)

    def test_the_gradient_is_that_of_the_function(self):
        features = features_of(1, 2, 4, 5, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda f: affinity.pair_affinity(f, 3), features)

    def test_no_difference_is_kept_for_the_gradient(self):
        """Autograd alone would keep one as large as the features for each of the 34 offsets."""
        features = features_of(1, 448, 8, 8).requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), id):
            loss_of(features, labels_of(1, 8, 8))
        # Besides: a few planes an offset of exp, log and the masks.
        assert features.numel() <= sum(kept) <= features.numel() + 20 * 34 * 8 * 8


def loop_loss(found, labels, radius):
    """Spec 6 for one pair after the other: the three means."""
    terms = {"background": [], "foreground": [], "negative": []}
    for planes, label in zip(found.tolist(), labels.tolist(), strict=True):
        for plane, (y, x), (y2, x2) in pairs(*labels.shape[1:], radius):
            one, two, value = label[y][x], label[y2][x2], planes[plane][y][x]
            if IGNORE in (one, two):
                continue
            if one != two:
                terms["negative"].append(-math.log(1 - value + 1e-5))
            else:
                terms["foreground" if one else "background"].append(-math.log(value + 1e-5))
    return {name: sum(values) / max(1, len(values)) for name, values in terms.items()}


class TestLoss:
    @pytest.mark.parametrize(
        "values", [(0, 1, 2, IGNORE), (0, 1), (0,), (3,), (1, 2), (0, IGNORE), (IGNORE,)]
    )
    @pytest.mark.parametrize("size", [(6, 7), (1, 1), (1, 5), (4, 2)])
    def test_equals_a_loop_over_pairs(self, values, size):
        labels = labels_of(2, *size, values=values)
        found = affinity.pair_affinity(features_of(2, 3, *size), 5)
        loss = affinity.affinity_loss(found, labels, 5)
        terms = loop_loss(found, labels, 5)
        for name, expected in terms.items():
            assert float(getattr(loss, name)) == pytest.approx(expected, rel=1e-4), name
        total = terms["background"] / 4 + terms["foreground"] / 4 + terms["negative"] / 2
        assert float(loss.total) == pytest.approx(total, rel=1e-4)
        assert loss == affinity.affinity_loss(found, labels.to(torch.uint8), 5), "labels are bytes"

    @pytest.mark.parametrize("values", [(0, 1, 2, IGNORE), (IGNORE,)])
    def test_ignored_pixels_have_no_gradient(self, values):
        features, labels = (
            features_of(1, 3, 5, 6).requires_grad_(),
            labels_of(1, 5, 6, values=values),
        )
        loss = loss_of(features, labels)
        loss.total.backward()
        ignored = labels[0] == IGNORE
        assert ignored.any() and (features.grad[0, :, ignored] == 0).all()
        assert ignored.all() == (loss.total == 0)
        assert ignored.all() or (features.grad[0, :, ~ignored] != 0).any()

    @pytest.mark.parametrize("scale", [0.0, 1e4])
    def test_extreme_affinities_give_finite_gradients(self, scale):
        features = (features_of(1, 3, 5, 6) * scale).requires_grad_()
        loss = loss_of(features, labels_of(1, 5, 6))
        loss.total.backward()
        assert torch.isfinite(loss.total) and torch.isfinite(features.grad).all()


def train(network, steps):
    """Learn that the halves of two images are apart; return the losses."""
    batch, labels = images(64, 64), torch.zeros(2, 8, 8, dtype=torch.int64)
    batch[..., 32:] += 2
    labels[..., 4:] = 1
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    losses = []
    for _ in range(steps):
        loss = affinity.affinity_loss(network(batch), labels, 5)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    return losses


@pytest.mark.parametrize(
    ("encoder", "stem", "stages"),
    [
        ("resnet10t", {"conv1", "bn1"}, {"layer1", "layer2", "layer3", "layer4"}),
        ("mobilenetv2_100", {"conv_stem", "bn1", "blocks.0"}, {f"blocks.{i}" for i in range(1, 7)}),
        ("convnext_atto", {"stem_0", "stem_1", "stages_0"}, {"stages_1", "stages_2", "stages_3"}),
    ],
)
def test_the_stem_stays_and_all_else_learns(encoder, stem, stages):
    network = network_of("affinity", encoder=encoder)
    before = copied(network)
    # Residual branches of zero weight have no gradient inside before the second step.
    train(network, 2)
    changed, kept = set(), set()
    for name, value in network.encoder.model.named_parameters():
        part = ".".join(name.split(".")[: 2 if name.startswith("blocks") else 1])
        stays = torch.equal(value, before[f"encoder.model.{name}"])
        (kept if stays else changed).add(part)
        assert stays is (part in stem), name
    assert kept == stem and changed == stages
    for name, value in network.head.named_parameters():
        assert not torch.equal(value, before[f"head.{name}"]), name
    # Running statistics and counters.
    for name, value in network.named_buffers():
        assert torch.equal(value, before[name]), name


def test_two_regions_are_learned_apart():
    losses = train(network_of("affinity"), 8)
    assert losses[-1] < 0.8 * losses[0]


def trained(path, **changes):
    """Put a checkpoint of train_cam into a file."""
    network = network_of("cam", 1, **changes)
    network(images(64, 64), False)  # Moves the statistics.
    common.save(path, network, config_of("cam", **changes))
    return network


def test_it_starts_from_the_encoder_of_train_cam(tmp_path):
    source, network = trained(tmp_path / "w"), network_of("affinity")
    head = copied(network.head)
    affinity.copy_encoder(network, config_of("affinity"), tmp_path / "w")
    assert same(network.encoder, source.encoder.state_dict()) and same(network.head, head)
    assert any(not p.requires_grad for p in network.encoder.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder": "mobilenetv2_100"}, r"^train_affinity\.weights: .* not resnet10t; set"),
        ({"mean": (0.5,) * 3}, r"^train_affinity\.input_norm: .*normalised otherwise; set"),
        (None, "run `isim train-cam` first"),
    ],
)
def test_another_network_of_train_cam_is_refused(tmp_path, changes, words):
    if changes is not None:
        trained(tmp_path / "w", **changes)
    with pytest.raises(UserError, match=words) as caught:
        affinity.copy_encoder(network_of("affinity"), config_of("affinity"), tmp_path / "w")
    assert "\n" not in str(caught.value)
