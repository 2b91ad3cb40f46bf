"""Random walks: label maps of the dense power, before and after dCRF."""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from support.images import counted, opened
from support.networks import config_of, network_of

from isim.data.files import read_cam, read_label_map, write_cam
from isim.errors import UserError
from isim.labels.crf import refine as crf
from isim.labels.walk import walk
from isim.models.common import normalize
from isim.params import MOST_SIDE, DenseWalk
from isim.passes import counts, features, walks
from isim.passes.walks import Stored
from isim.runtime.here import Here


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("background", ["power", "constant"])
def test_labels_are_of_the_dense_power(background, run, models, items, stored, tiny, tmp_path):
    # Whose sides are multiples of the map's stride.
    whole = [items[place] for place in (0, 3, 4)]
    lines = run("walks.walk", tmp_path, whole, background=background, steps_log2=4).lines
    network, config = models["affinity"]
    plain, after = tmp_path / "labels/train", tmp_path / "labels/train_crf"
    for item in whole:
        image, pixels, _ = opened(item)
        with torch.no_grad():
            near = network(normalize(pixels, config.mean, config.std))[0].numpy()
        planes, ids, size = read_cam(stored / f"{item.id}.npz")
        h, w = (side // 8 for side in size)
        # From stride 4 to 8: the mean of two by two.
        small = planes.reshape(len(ids), h, 2, w, 2).mean((2, 4))
        flat = np.concatenate([(1 - small.max(0))[None] ** 16, small]).reshape(-1, h * w)
        each_pixel = np.eye(h * w, dtype=np.float32).reshape(h * w, h, w)
        step = walk.walk(each_pixel, walk.transition(near, 5, 8), 0).reshape(h * w, h * w)
        planes = (flat @ np.linalg.matrix_power(step, 2**4)).reshape(-1, h, w).astype(np.float32)
        plane = planes[0] if background == "power" else 0.3
        label, refined = (read_label_map(path / f"{item.id}.png") for path in (plain, after))
        assert (label != walk.label_map(planes[1:], ids, size, plane)).mean() < 0.005
        assert np.array_equal(refined, crf.refine(image, label, ids, tiny.random_walk.crf))
    for name, path in (("walk", plain), ("walk_crf", after)):
        assert np.array_equal(counts.total(lines, name, (4, 4)), counted(whole, path))


# Networks by a name: method, encoder, and what else is theirs.
GRID = {"encoder": "resnet10t", "output_stride": 8, "affinity": "none"}
FROZEN = GRID | {"sides": (64,), "stages": 2, "head_kind": "none"}
DENSE = {
    "trained": ("cam", GRID),
    "trained ViT": ("cam", GRID | {"encoder": "test_vit"}),
    "frozen": ("frozen", FROZEN),
    "frozen with a head": ("frozen", FROZEN | {"head_kind": "mlp", "head_width": 8}),
    "frozen ViT": ("frozen", FROZEN | {"encoder": "test_vit", "stages": 1}),
}
CASES = [
    *((name, "cosine") for name in DENSE),
    *((name, "class_distribution") for name in ("trained", "frozen", "frozen with a head")),
    *((name, "attention") for name in ("trained ViT", "frozen ViT")),
]
WALK = DenseWalk(tau=0.2, beta=2, temperature=0.2, steps=2)


@torch.no_grad()
def dense_network(name, pixels):
    """Network of a name to whom patches of an image are not all alike, and its configuration."""
    method, changes = DENSE[name]
    network, config = network_of(method, **changes).eval(), config_of(method, **changes)
    for key, weight in network.named_parameters():
        if key.endswith("qkv.weight"):
            weight *= 100
        elif key.startswith("head."):
            weight *= 5
    stages = network.encoder(normalize(pixels, config.mean, config.std))
    last = stages[-1][0].flatten(1)  # (C, N)
    if method == "frozen":
        every = torch.cat(stages[-config.stages :], 1)[0].flatten(1)
        network.spread[:] = every.std(1) + every.std()
        network.centre[:] = every.mean(1) + 0.1 * network.spread
        last = torch.randn(last.shape)
    # Scores of a class that differ from patch to patch by about 2.
    weight, mean = torch.randn(3, len(last)), last.mean(1)
    weight -= (weight @ mean / mean.square().sum())[:, None] * mean
    network.classifier.weight[:] = (2 * weight / (weight @ last).std())[..., None, None]
    return network, config


@torch.no_grad()
def patches_of(network, config, pixels):
    """(N, C) patches to compare and (N, L) scores of an image whose sides are patches."""
    view = normalize(pixels, config.mean, config.std)
    stages = [
        (one + other.flip(-1))[0].flatten(1).T.double() / 2
        for one, other in zip(network.encoder(view), network.encoder(view.flip(-1)), strict=True)
    ]
    weight = network.classifier.weight.flatten(1).T.double()
    if not config.sides:
        scores = stages[-1] @ weight
        patches = stages[-1] - stages[-1].mean(0)
    else:
        patches = (torch.cat(stages[-config.stages :], 1) - network.centre) / network.spread
        scores = patches[:, -len(weight) :] @ weight
        if network.head is not None:
            return patches.numpy(), network.head(patches.float()).double().numpy()
    return patches.numpy(), np.pad(scores.numpy(), ((0, 0), (1, 0)))


def alike(affinity, network, config, pixels):
    """Affinity (N, N), its rows divided by their sums, by the equations."""
    patches, scores = patches_of(network, config, pixels)
    if affinity == "cosine":
        units = patches / np.linalg.norm(patches, axis=1, keepdims=True)
        near = ((units @ units.T - WALK.tau) / (1 - WALK.tau)).clip(0) ** WALK.beta
    elif affinity == "class_distribution":
        p = np.exp(scores / WALK.temperature)
        p = (p / p.sum(1, keepdims=True))[:, None]
        mixed = (p + p.swapaxes(0, 1)) / 2
        js = (p * np.log(p / mixed) + p.swapaxes(0, 1) * np.log(p.swapaxes(0, 1) / mixed)).sum(
            2
        ) / 2
        near = 1 - js / np.log(2)
    else:
        view = normalize(pixels, config.mean, config.std)
        h, w = (side // config.output_stride for side in view.shape[2:])
        mirrored = np.arange(h * w).reshape(h, w)[:, ::-1].ravel()
        one, other = (network.encoder.attention(each)[0].numpy() for each in (view, view.flip(-1)))
        near = np.float64(one + other[mirrored][:, mirrored])
        for _ in range(3):
            near /= near.sum(0, keepdims=True)
            near /= near.sum(1, keepdims=True)
        near = (near + near.T) / 2
        near = near @ near
    return near / near.sum(1, keepdims=True)


def boxed(plane):
    """Mark the boxes round the parts of a CAM above 0.4."""
    mask = np.zeros(plane.shape, bool)
    parts = cv2.connectedComponentsWithStats(np.uint8(plane > 0.4), connectivity=8)[2][1:]
    for x, y, width, height, _ in parts:
        mask[y : y + height, x : x + width] = True
    return mask


def walked_by_hand(affinity, network, config, pixels, planes):
    """Planes (K', h, w) after the background plane, each walked on its own."""
    step = alike(affinity, network, config, pixels)
    found = []
    for number, plane in enumerate([(1 - planes.max(0, initial=0)) ** 16, *planes]):
        inside = boxed(plane) if affinity == "attention" and number else np.ones_like(plane, bool)
        move = np.linalg.matrix_power(step * inside.ravel(), WALK.steps)
        found.append((move @ plane.ravel()).reshape(plane.shape))
    return np.float32(found)


@pytest.mark.parametrize(("name", "affinity"), CASES)
def test_dense_walks_are_those_of_the_equations(
    name, affinity, on_gpu, items, stored, tiny, tmp_path, monkeypatch
):
    network, config = dense_network(name, opened(items[0])[1])
    background = "power" if on_gpu else "constant"
    given = {"affinity": affinity, "dense_walk": WALK, "background": background}
    params = tiny.random_walk.model_copy(update=given)
    # Whose longer side is 64; two are of one size, one has no class.
    whole = [items[place] for place in (0, 2, 5)]
    cut, found = walk.label_map, {}

    def label_map(walked, ids, size, plane):
        # With the background's, if it walks.
        found[tuple(ids)] = np.concatenate([*([plane[None]] if on_gpu else []), walked])
        return cut(walked, ids, size, plane)

    monkeypatch.setattr(walk, "label_map", label_map)
    options = {"params": params, "cams": Stored(stored), "num_labels": 4}
    here = Here(tmp_path, "fp32")
    walking = replace(config, affinity=affinity)
    source = features.ready(here, network, walking, whole)
    lines = walks.walk_dense(here, source, config, whole, **options).lines
    for item in whole:
        pixels = opened(item)[1]
        planes, ids, size = read_cam(stored / f"{item.id}.npz")
        h, w = (side // 8 for side in size)
        # From stride 4 to 8: the mean of two by two.
        small = planes.reshape(len(ids), h, 2, w, 2).mean((2, 4))
        expected = walked_by_hand(affinity, network, config, pixels, small)[not on_gpu :]
        walked = found[tuple(ids)]
        assert np.allclose(walked, expected, atol=2e-4)
        assert not len(ids) or expected.std((1, 2)).max() > 0.005, "patches that are not alike"
    total = counts.total(lines, "walk", (4, 4))
    assert np.array_equal(total, counted(whole, tmp_path / "labels/train"))


@pytest.mark.parametrize("name", ["walk", "walk_dense"])
def test_probabilities_keep_their_values_under_a_constant_threshold(
    name, models, items, tiny, tmp_path
):
    """A class that is nowhere likelier than the background is background; a CAM has a maximum."""
    item, folder = items[0], tmp_path / "cams/train"
    planes = np.zeros((2, 12, 16), np.float32)
    planes[0, :, :8], planes[1, :, 8:] = 0.9, 0.4
    write_cam(folder / f"{item.id}.npz", planes, item.class_ids, (48, 64))
    # With such exponents a pixel is like itself alone.
    alone = DenseWalk(tau=0.9, beta=1e4, temperature=1, steps=1)
    given = {"affinity": "cosine", "dense_walk": alone, "beta": 10_000, "steps_log2": 0}
    given |= {"background": "constant", "threshold": 0.5}
    params = tiny.random_walk.model_copy(update=given)
    pair = models["affinity" if name == "walk" else "cam"]
    for probable, classes in ((True, [1]), (False, [1, 2])):
        here, cams = Here(tmp_path / f"{probable}", "fp32"), Stored(folder, probable)
        options = {"params": params, "cams": cams, "num_labels": 4}
        getattr(walks, name)(here, *pair, [item], **options)
        label = read_label_map(here.resume / f"labels/train/{item.id}.png")
        assert set(np.unique(label)) - {0} == set(classes)


@pytest.mark.parametrize(
    ("size", "side"), [((375, 500), 500), ((4000, 6000), 2508), ((2048, 2048), 2048)]
)
def test_huge_images_are_walked_at_a_size_that_fits(size, side):
    sides = walks._sized(config_of("cam"), torch.zeros(1, 3, *size, dtype=torch.uint8)).sides
    assert sides == (side,)
    made = config_of("cam").output_stride
    assert math.prod(one * side / max(size) / made for one in size) <= MOST_SIDE**2


def test_attention_of_an_encoder_that_has_none_is_refused(models, tiny):
    params = tiny.random_walk.model_copy(update={"affinity": "attention"})
    with pytest.raises(UserError, match=r"plain vision transformer, not resnet10t; use"):
        walks.require_attention(*models["cam"], params)
