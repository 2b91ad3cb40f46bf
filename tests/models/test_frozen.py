"""Networks whose encoder is frozen: features, planes and probabilities against plain versions."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.networks import CLASSES, config_of, frozen_network_of, module_of, same
from support.vits import shrink
from torchvision.transforms.v2 import functional as TF

from isim.errors import UserError
from isim.labels.dense import batched as dense
from isim.labels.seeds import seeds
from isim.models import cam, common, frozen
from isim.params import DenseWalk

CONFIG = config_of("frozen")
ALONE = config_of("frozen", head_kind="none")
WALK = DenseWalk(tau=0.1, beta=3.0, temperature=1.0, steps=2).model_dump()
NO_TAGS = torch.zeros(0, dtype=torch.int64)
# Of the encoder's last two maps.
CHANNELS = (48, 64)


@pytest.fixture(scope="module")
def network():
    """A network with a head."""
    return frozen_network_of()


@pytest.fixture(scope="module")
def alone():
    """A network without one."""
    return frozen_network_of(head_kind="none")


@pytest.fixture(scope="module")
def maps():
    """Features (C, 3, 5) of an image whose neighbouring patches are alike."""
    coarse = torch.randn(1, sum(CHANNELS), 2, 3, generator=torch.Generator().manual_seed(1))
    return 0.05 * F.interpolate(coarse, (3, 5), mode="bilinear")[0]


def pictures(height, width, count=2):
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(count, 3, 4, 5, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (255 * smooth).to(torch.uint8)


def standard(network, maps):
    """Features (C, h, w) as standardised patches (N, C), in double precision."""
    patches = maps.double().flatten(1).T
    return ((patches - network.centre.double()) / network.spread.double()).numpy()


def scores_of(network, maps):
    """Scores (N, K) of the classifier, a sum for each patch and class."""
    weight = network.classifier.weight.double().numpy()[:, :, 0, 0]
    return np.array([[row[-CHANNELS[1] :] @ w for w in weight] for row in standard(network, maps)])


def labelled(network, maps):
    """Scores (N, L) of the head."""
    layers = [network.head.hidden, network.head.scores]
    values = torch.from_numpy(standard(network, maps))
    first, second = (
        [part.detach().double() for part in (layer.weight, layer.bias)] for layer in layers
    )
    return ((values @ first[0].T + first[1]).relu() @ second[0].T + second[1]).numpy()


def raised(plane):
    """A plane in (0, 1) whose odds are multiplied until the highest are 3 : 1, if they are less."""
    odds = plane / (1 - plane)
    odds = odds * max(1, 3 / odds.max())
    return odds / (1 + odds)


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((48, 64), 64, (48, 64)),
        ((37, 53), 64, (48, 64)),
        ((200, 100), 70, (64, 32)),
        # A very narrow one has at least one patch.
        ((7, 300), 64, (16, 64)),
        ((20, 20), 128, (128, 128)),
    ],
)
def test_sides_are_the_nearest_multiples_of_the_stride(size, side, expected):
    view = frozen.views(pictures(*size), side, CONFIG)
    assert view.shape == (2, 3, *expected) and view.dtype == torch.float32
    resized = TF.resize(pictures(*size), list(expected), antialias=True)
    assert torch.equal(view, common.normalize(resized, CONFIG.mean, CONFIG.std))


def test_features_are_the_mean_of_an_image_and_its_mirror_image(network):
    pixels = pictures(48, 64)
    found = frozen.features(network.encoder, CONFIG, pixels)
    assert found.shape == (2, sum(CHANNELS), 3, 4) and found.dtype == torch.float32
    for image, of_image in zip(pixels, found, strict=True):
        view = common.normalize(image[None], CONFIG.mean, CONFIG.std)
        there, back = (network.encoder(v)[-2:] for v in (view, view.flip(-1)))
        pairs = zip(there, back, strict=True)
        plain = torch.cat([(one + other.flip(-1)) / 2 for one, other in pairs], 1)
        torch.testing.assert_close(of_image, plain[0], rtol=0, atol=1e-5)
    mirrored = frozen.features(network.encoder, CONFIG, pixels.flip(-1))
    torch.testing.assert_close(mirrored, found.flip(-1), rtol=0, atol=1e-6)
    assert float((found - found.flip(-1)).abs().max()) > 1e-3, "the images are not symmetric"


def test_a_mean_of_planes_keeps_what_is_between_and_loses_no_tag(network):
    network = copy.deepcopy(network)
    apart = [torch.tensor([[[0.76, 0.1, 0.3]]]), torch.tensor([[[0.1, 0.76, 0.3]]])]
    assert torch.equal(network.mean(apart[:1], (1, 3)), apart[0])
    found = network.mean(apart, (1, 3))[0, 0]
    assert found.max() == pytest.approx(0.75) and found[0] == found[1] > 0.5 and found[2] > 0.3
    high = [torch.tensor([[[0.9, 0.2]]]), torch.tensor([[[0.8, 0.4]]])]
    torch.testing.assert_close(network.mean(high, (1, 2)), torch.tensor([[[0.85, 0.3]]]))
    grown = [F.interpolate(one[None], (4, 6), mode="bilinear")[0] for one in high]
    small = F.interpolate(high[1][None], (2, 4), mode="bilinear")[0]
    found = frozen.averaged([high[0], high[1], small], (4, 6))
    third = F.interpolate(small[None], (4, 6), mode="bilinear")[0]
    torch.testing.assert_close(found, (grown[0] + grown[1] + third) / 3)
    assert frozen.averaged([high[0][:0]] * 2, (4, 6)).shape == (0, 4, 6)
    network.head = None
    torch.testing.assert_close(
        network.mean(apart, (1, 3))[0, 0, :2], torch.ones(2), rtol=0, atol=1e-4
    )


def test_features_of_several_sides_are_joined_stage_by_stage(network):
    """On the grid of the largest, the finer map of an earlier stage made coarser."""
    pixels, sides = pictures(48, 64), (64, 96)
    config = replace(CONFIG, sides=sides, stages=3)
    parts = {}
    for side in sides:
        view = frozen.views(pixels, side, config)
        there, back = (network.encoder(v)[-3:] for v in (view, view.flip(-1)))
        parts[side] = [(one + other.flip(-1)) / 2 for one, other in zip(there, back, strict=True)]
    expected = [
        F.interpolate(parts[side][stage], (4, 6), mode="bilinear")
        for stage in range(3)
        for side in (96, 64)
    ]
    sizes = [tuple(part.shape[1:]) for part in parts[64]]
    assert sizes == [(32, 6, 8), (48, 3, 4), (64, 3, 4)]
    found = frozen.features(network.encoder, config, pixels)
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=0, atol=1e-5)
    again = frozen.features(network.encoder, replace(config, sides=sides[::-1]), pixels)
    assert torch.equal(found, again), "the order of the sides does not matter"
    # What a network is built for: the last stage's channels are its classifier's.
    built = frozen.build(config)
    assert len(built.centre) == found.shape[1] == 2 * (32 + sum(CHANNELS))
    assert built.classifier.in_channels == 2 * CHANNELS[1]
    torch.testing.assert_close(found[:, -2 * CHANNELS[1] : -CHANNELS[1]], expected[4])


def test_features_are_standardised_by_channel(network, maps):
    found = network.standardise(maps.half().flatten(1).T)
    expected = standard(network, maps.half())
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_cams_are_linear_in_the_last_stage_s_features(alone):
    one, two = torch.randn(2, 7, sum(CHANNELS), generator=torch.Generator().manual_seed(2))
    mixed = alone.class_scores(2 * one - 3 * two)
    torch.testing.assert_close(mixed, 2 * alone.class_scores(one) - 3 * alone.class_scores(two))
    # Their mean is the image's logits.
    torch.testing.assert_close(alone.logits(one, "gap"), alone.class_scores(one.mean(0)[None])[0])
    changed = torch.cat([torch.rand(7, CHANNELS[0]), one[:, CHANNELS[0] :]], 1)
    assert torch.equal(alone.class_scores(changed), alone.class_scores(one))


def test_planes_without_a_head_are_the_classes_cams(alone, maps):
    scores = scores_of(alone, maps)
    found = alone.planes(maps, torch.tensor([3, 1]), ALONE)
    assert found.shape == (2, 3, 5) and found.dtype == torch.float32
    for plane, label in zip(found, (3, 1), strict=True):
        positive = np.maximum(scores[:, label - 1], 0).reshape(3, 5)
        np.testing.assert_allclose(plane, positive / (positive.max() + 1e-5), atol=1e-4)


def test_planes_of_a_head_are_above_a_half_where_the_class_is_likeliest(network):
    ids, generator = np.array([1, 3]), torch.Generator().manual_seed(1)
    maps = 0.05 * torch.randn(sum(CHANNELS), 12, 15, generator=generator)
    scores = labelled(network, maps)
    found = network.planes(maps, torch.from_numpy(ids), CONFIG).numpy()
    odds = np.exp(scores - scores.max(1, keepdims=True))
    for plane, label in zip(found, ids, strict=True):
        part = odds[:, label] / (odds[:, label] + odds[:, 0])
        np.testing.assert_allclose(plane.ravel(), part, atol=1e-4)
    known = np.concatenate([[0], ids])
    likeliest = known[scores[:, known].argmax(1)].reshape(12, 15)
    assert (seeds.seed(found, ids, 0.5) == likeliest).all() and set(likeliest.flat) == set(known)


@pytest.mark.parametrize("kind", ["mlp", "none"])
@pytest.mark.parametrize("affinity", ["cosine", "class_distribution", "attention"])
def test_planes_walk_along_the_affinity(kind, affinity, network, alone, maps):
    network = network if kind == "mlp" else alone
    config, ids = replace(CONFIG, head_kind=kind, affinity=affinity, **WALK), torch.tensor([2, 1])
    attention = torch.rand(15, 15, generator=torch.Generator().manual_seed(4))
    if kind == "mlp":
        scores = labelled(network, maps)
        still = torch.from_numpy(scores[:, [2, 1]] - scores[:, :1]).sigmoid().T.unflatten(1, (3, 5))
    else:
        still = network.planes(maps, ids, replace(config, affinity="none"))
    patches = network.standardise(maps.flatten(1).T)
    if affinity == "cosine":
        matrix = dense.cosine(patches, 0.1, 3.0)
    elif affinity == "attention":
        matrix = dense.attention(attention)
    else:
        matrix = dense.class_distribution(network.label_scores(patches), 1.0)
    rows = (matrix / matrix.sum(1, keepdim=True)).double().numpy()
    expected = []
    for plane in still:
        box = np.ones(15)
        if affinity == "attention":
            box = (
                dense.boxes(plane / (plane.max() + 1e-5) if kind == "mlp" else plane, 0.4)
                .flatten()
                .numpy()
            )
        walked = plane.flatten().double().numpy()
        for _ in range(2):
            walked = rows @ (box * walked)
        walked = walked.clip(1e-6, 1 - 1e-6) if kind == "mlp" else walked
        expected.append(raised(walked) if kind == "mlp" else walked / (walked.max() + 1e-5))
    found = network.planes(maps, ids, config, attention).flatten(1)
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-4)
    unwalked = network.planes(maps, ids, replace(config, affinity="none"))
    assert float((found - unwalked.flatten(1)).abs().max()) > 0.02
    assert torch.equal(network.planes(maps, ids, replace(config, steps=0)), unwalked)


def test_a_class_that_is_there_is_likely_somewhere(network, maps):
    """The odds of a plane that stays low are all raised alike; the others stay."""
    lower = copy.deepcopy(network)
    lower.head.scores.bias[2] -= 20
    ids = torch.tensor([3, 2])
    before, after = (each.planes(maps, ids, CONFIG) for each in (network, lower))
    scores = labelled(lower, maps)
    for label, plane in zip(ids.tolist(), after, strict=True):
        odds = np.exp(scores[:, label] - scores[:, 0]).clip(1e-6, 1e6)
        np.testing.assert_allclose(plane.ravel(), raised(odds / (1 + odds)), atol=1e-3)
    assert torch.equal(after[0], before[0]) and float(before[0].max()) > 0.75
    assert float(after[1].max()) == pytest.approx(0.75)


def test_a_walk_along_attention_needs_some(network, maps):
    config = replace(CONFIG, affinity="attention", **WALK)
    with pytest.raises(ValueError, match="needs the attention"):
        network.planes(maps, torch.tensor([1]), config)


@pytest.mark.parametrize("affinity", ["none", "cosine", "class_distribution", "attention"])
def test_an_image_of_no_class_has_no_planes(affinity, network, alone, maps):
    for each in (network, alone):
        config = replace(CONFIG, affinity=affinity, **WALK)
        assert each.planes(maps, NO_TAGS, config).shape == (0, 3, 5)


def test_probabilities_are_the_softmax_over_all_labels(network, maps):
    scores = labelled(network, maps)
    odds = np.exp(scores - scores.max(1, keepdims=True))
    expected = (odds / odds.sum(1, keepdims=True)).T.reshape(4, 3, 5)
    found = network.probabilities(maps)
    assert found.shape == (4, 3, 5) and found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_heads_drop_values_only_where_they_are_told_to(kind):
    torch.manual_seed(0)
    head = frozen.PatchHead(kind, 12, 4, width=64)
    patches = torch.randn(200, 12)
    assert torch.equal(head(patches), head(patches)) and head(patches).shape == (200, 4)
    dropped = torch.stack([head(patches, 0.3) for _ in range(300)])
    assert not torch.equal(dropped[0], dropped[1])
    if kind == "linear":
        torch.testing.assert_close(dropped.mean(0), head(patches), rtol=0, atol=0.35)


@pytest.mark.parametrize("name", ["frozen", "frozen_segmenter"])
@pytest.mark.parametrize("kind", ["none", "linear", "mlp"])
def test_a_checkpoint_holds_all_that_is_needed(name, kind, tmp_path, maps):
    config = config_of(name, head_kind=kind)
    network, path = frozen_network_of(name, head_kind=kind), tmp_path / "model.safetensors"
    common.save(path, network, config)
    loaded, read = module_of(config).load(path)
    assert read == config and not loaded.training and same(loaded, network.state_dict())
    assert (loaded.head is None) == (kind == "none")
    assert torch.equal(loaded.probabilities(maps), network.probabilities(maps))


def test_one_of_another_stage_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    common.save(path, frozen_network_of("frozen_segmenter"), config_of("frozen_segmenter"))
    with pytest.raises(UserError, match="is not a checkpoint of train_cam"):
        cam.load(path)


def test_its_encoder_keeps_its_statistics_and_leaves_no_trace(network):
    torch.manual_seed(0)
    built = frozen.build(CONFIG)
    buffers = dict(built.encoder.named_buffers()).items()
    assert all(b.eq(1 if k.endswith("running_var") else 0).all() for k, b in buffers)
    before = torch.get_rng_state()
    built.train()
    frozen.features(built.encoder, CONFIG, pictures(32, 48))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(b.eq(1 if k.endswith("running_var") else 0).all() for k, b in buffers)


@pytest.mark.parametrize("encoder", ["vit_small_patch14_dinov2.lvd142m", "mobilenetv2_100"])
def test_it_is_built_on_the_meta_device_for_large_encoders_too(encoder):
    with torch.device("meta"):
        built = frozen.build(replace(CONFIG, encoder=encoder, sides=(512,), stages=1))
    last = {"m": 320, "v": 384}[encoder[0]]
    assert built.classifier.weight.shape == (3, last, 1, 1) and built.centre.is_meta
    assert built.head.scores.out_features == len(CLASSES) + 1


@pytest.mark.parametrize("name", ["frozen", "frozen_segmenter"])
@pytest.mark.parametrize("encoder", ["resnet10x", "test_vit_relpos", "densenet121"])
def test_an_encoder_that_cannot_serve_is_refused_when_built(name, encoder):
    config = config_of(name, encoder=encoder)
    with pytest.raises(UserError, match=rf"^{config.stage}\.encoder: .*'{encoder}'.*; choose") as e:
        module_of(config).build(config)
    assert "\n" not in str(e.value)


def test_attention_of_a_convolutional_encoder_is_refused_in_one_line(network):
    """When the network is built, too: features of many images take hours."""
    for ask in (
        partial(frozen.attention, network.encoder, CONFIG, pictures(48, 64)),
        partial(cam.build, replace(CONFIG, affinity="attention")),
    ):
        with pytest.raises(
            UserError, match=r"^affinity attention needs .*, not test_eff.*; u"
        ) as e:
            ask()
        assert "\n" not in str(e.value) and len(str(e.value)) < 300


@pytest.mark.parametrize("encoder", ["test_vit", "vit_small_patch14_dinov2"])
def test_attention_is_the_mean_of_an_image_and_its_mirror_image(encoder, monkeypatch):
    shrink(monkeypatch)
    config = config_of("frozen", encoder=encoder, sides=(48, 64), stages=1)
    network = frozen_network_of(encoder=encoder, sides=(48, 64), stages=1)
    pixels = pictures(48, 64)
    found = frozen.attention(network.encoder, config, pixels)
    grid = frozen.features(network.encoder, config, pixels).shape[2:]
    assert grid == (3, 4) and found.shape == (2, 12, 12)
    view = common.normalize(pixels, config.mean, config.std)
    # Row and column of each patch, as it lies there.
    there, back = (
        network.encoder.attention(v).reshape(2, 3, 4, 3, 4) for v in (view, view.flip(-1))
    )
    expected = (there + back.flip(2, 4)) / 2
    torch.testing.assert_close(found, expected.reshape(2, 12, 12), rtol=0, atol=1e-6)
    assert float((there - back.flip(2, 4)).abs().max()) > 1e-5
    walked = network.planes(
        frozen.features(network.encoder, config, pixels[:1])[0],
        torch.tensor([2, 3]),
        replace(config, affinity="attention", **WALK),
        found[0],
    )
    assert walked.shape == (2, 3, 4) and walked.isfinite().all()
