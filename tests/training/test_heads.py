"""Heads and classifiers on cached features: statistics, memory, and that they learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.networks import config_of, frozen_network_of, network_of, same

from isim.data.files import read_label_map
from isim.data.prepared import Item
from isim.errors import UserError
from isim.labels.seeds import seeds
from isim.models import cam, common
from isim.models.frozen import FrozenNetwork, PatchHead
from isim.params import Head
from isim.training import heads

CPU = torch.device("cpu")
CHANNELS, LAST = 9, 6
GRIDS = ((3, 4), (4, 4), (5, 3), (4, 4), (2, 6), (4, 3))
HEAD = {"width": 16, "dropout": 0.1, "batch": 64, "steps": 60, "rate": 0.02, "weight_decay": 0.01}


@pytest.fixture
def truths():
    """Labels of the patches of each image: the background and, but for one, two of 1..3."""
    rng = np.random.default_rng(0)
    classes = [rng.permutation([1, 2, 3])[:2] for _ in GRIDS]
    grids = [rng.choice([0, *some], size) for some, size in zip(classes, GRIDS, strict=True)]
    return [np.uint8(grid * (number != 2)) for number, grid in enumerate(grids)]


@pytest.fixture
def maps(truths):
    """Features (C, h, w) float16 of each image, far from standard and apart by label."""
    rng = np.random.default_rng(1)
    centres = np.concatenate([rng.normal(0, 1, (4, LAST - 2)), np.eye(4)[:, 1:]], 1)
    centres = np.concatenate([np.ones((4, 2)), centres[:, :-1], centres[:, -1:]], 1)
    made = []
    for truth in truths:
        values = centres[truth].transpose(2, 0, 1)
        noisy = 3 + 0.5 * values + rng.normal(0, 0.1, values.shape)
        noisy[0] = 2.5  # a channel that never varies
        made.append(noisy.astype(np.float16))
    return made


@pytest.fixture
def make_patches(truths, maps):
    def make(given=maps):
        items = []
        for number, truth in enumerate(truths):
            label = np.float32([(truth == value).any() for value in (1, 2, 3)])
            items.append(Item(str(number), Path(), None, label))
        return heads.Patches(items, lambda item: given[int(item.id)], CPU)

    return make


def network(kind="none", width=16):
    torch.manual_seed(0)
    head = None if kind == "none" else PatchHead(kind, CHANNELS, 4, width=width)
    return FrozenNetwork(torch.nn.Identity(), (CHANNELS, LAST), classes=3, head=head)


def rows(maps):
    """All patches (N, C) in the order of the images, in double precision."""
    return np.concatenate([m.reshape(len(m), -1).T for m in maps]).astype(np.float64)


def test_statistics_are_those_of_all_patches(make_patches, maps):
    patches = make_patches()
    assert patches.sizes == list(GRIDS)
    centre, spread, pooled = (found.numpy() for found in patches.means())
    assert {found.dtype for found in (centre, spread, pooled)} == {np.dtype(np.float32)}
    every = rows(maps)
    np.testing.assert_allclose(centre, every.mean(0), rtol=1e-5)
    np.testing.assert_allclose(spread[1:], every.std(0)[1:], rtol=1e-3)
    assert spread[0] == 1, "one that never varies is left as it is"
    expected = [m.reshape(CHANNELS, -1).mean(1, dtype=np.float64) for m in maps]
    np.testing.assert_allclose(pooled, expected, rtol=1e-5)


def test_all_patches_are_held_in_their_order(make_patches, maps):
    held, places = make_patches().held
    assert held.dtype == torch.float16
    assert np.array_equal(held, rows(maps).astype(np.float16))
    assert [list(some) for some in places] == [list(range(h * w)) for h, w in GRIDS]


@pytest.mark.parametrize("budget", [2 * CHANNELS * 31, 1])
def test_where_memory_is_short_every_image_keeps_a_share(budget, make_patches, maps, monkeypatch):
    monkeypatch.setattr(heads, "BUDGET", budget)
    held, places = make_patches().held
    counts = [h * w for h, w in GRIDS]
    share = min(1, budget / (2 * CHANNELS * sum(counts)))
    assert [len(some) for some in places] == [int(np.ceil(share * count)) for count in counts]
    for some, count in zip(places, counts, strict=True):
        assert (np.diff(some) > 0).all() and some[0] >= 0 and some[-1] < count
    firsts = np.cumsum([0, *counts[:-1]])
    whole = [first + some for first, some in zip(firsts, places, strict=True)]
    assert np.array_equal(held, rows(maps).astype(np.float16)[np.concatenate(whole)])
    again, same_places = make_patches().held
    assert torch.equal(again, held) and str(same_places) == str(places), "drawn alike again"


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("budget", [heads.BUDGET, 2 * CHANNELS * 31])
def test_a_head_learns_patches_that_can_be_told_apart(
    kind, budget, here, make_patches, truths, maps, monkeypatch
):
    monkeypatch.setattr(heads, "BUDGET", budget)
    patches, labels = make_patches(), [truth.flatten() for truth in truths]
    for given in labels:
        given[::3] = 255  # not seen

    def train(seed=(3, 1), steps=90):
        net = network(kind)
        net.centre[:], net.spread[:], _ = patches.means()
        params = Head(kind=kind, **HEAD | {"steps": steps})
        loss = heads.train_head(here, net, patches, labels, params=params, seed=seed)
        return net, loss

    net, loss = train()
    with torch.no_grad():
        found = net.label_scores(net.standardise(torch.from_numpy(rows(maps)))).argmax(1)
    right = found.numpy() == np.concatenate([truth.ravel() for truth in truths])
    assert right.mean() > 0.95 and 0 < loss < train(steps=3)[1]
    again, other = train(), train((3, 2))
    assert again[1] == loss and same(again[0], net.state_dict())
    assert not same(other[0], net.state_dict())
    assert torch.equal(net.classifier.weight, network(kind).classifier.weight), "the head alone"


@pytest.mark.parametrize("budget", [heads.BUDGET, 2 * CHANNELS * 31])
@pytest.mark.parametrize("pooling", ["gap", "mil"])
def test_classifiers_learn_what_is_where(pooling, budget, make_patches, truths, maps, monkeypatch):
    monkeypatch.setattr(heads, "BUDGET", budget)
    patches = make_patches()

    def train(seed=0, steps=60):
        net = network()
        given = {"pooling": pooling, "steps": steps, "rate": 0.05}
        return net, *heads.train_classifier(net, patches, seed=seed, **given)

    net, loss, logits = train()
    tags = np.stack([item.known_label for item in patches.items])
    with torch.no_grad():
        scores = net.class_scores(net.standardise(torch.from_numpy(rows(maps)))).numpy()
    centre, spread, _ = patches.means()
    assert torch.equal(net.centre, centre) and torch.equal(net.spread, spread)
    ends = np.cumsum([h * w for h, w in GRIDS])[:-1]
    expected = np.stack([part.mean(0) for part in np.split(scores, ends)])
    if pooling == "mil":
        tenth = [
            np.sort(part, 0)[::-1][: max(1, round(len(part) / 10))].mean(0)
            for part in np.split(scores, ends)
        ]
        expected = np.stack(tenth)
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    assert np.median(logits[tags > 0]) > np.median(logits[tags == 0]) + 1
    assert 0 < loss < train(steps=2)[1]
    # Each class's own patches are highest.
    labels = np.concatenate([truth.ravel() for truth in truths])
    for value in (1, 2, 3):
        own, others = scores[labels == value, value - 1], scores[labels != value, value - 1]
        assert np.median(own) > np.quantile(others, 0.9)
    assert same(train()[0], net.state_dict()) and not same(train(1)[0], net.state_dict())


def test_the_loss_of_mil_is_that_of_the_definition(make_patches, maps, monkeypatch):
    """A tag is scored by its highest tenth, what is not there on every patch."""
    patches, net = make_patches(), network()
    torch.nn.init.normal_(net.classifier.weight)
    net.centre[:], net.spread[:], _ = patches.means()
    labels = torch.from_numpy(np.stack([item.known_label for item in patches.items]))
    losses = []
    for given, tags in zip(maps, labels.numpy(), strict=True):
        scores = net.class_scores(net.standardise(torch.from_numpy(rows([given]))))
        scores = np.sort(scores.detach().numpy(), 0)[::-1]
        count = max(1, round(len(scores) / 10))
        for column, present in zip(scores.T, tags, strict=True):
            terms = [-column[:count].mean()] if present else column
            losses.append(np.mean([np.log1p(np.exp(term)) for term in terms]))
    found = heads._mil_loss(net, patches, labels).item()
    assert found == pytest.approx(np.mean(losses))


def test_without_a_labelled_patch_no_head_can_learn(here, make_patches, truths):
    labels = [np.full(truth.size, 255, np.uint8) for truth in truths]
    params = Head(kind="linear", **HEAD)
    with pytest.raises(UserError, match=r"^train_it: no patch .* is labelled, .*; lower") as caught:
        heads.train_head(here, network("linear"), make_patches(), labels, params=params, seed=(0,))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    labels[3][5] = 0
    heads.train_head(here, network("linear"), make_patches(), labels, params=params, seed=(0,))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("pooling", ["gap", "mil"])
def test_a_loss_that_is_no_number_is_told(pooling, here, make_patches, maps, truths):
    maps[1][4, 2, 2] = np.inf
    patches = make_patches(maps)
    with pytest.raises(UserError, match=r"^the loss is nan: lower the rate of the classifier"):
        heads.train_classifier(network(), patches, seed=0, pooling=pooling, steps=9, rate=0.01)
    labels = [truth.ravel() for truth in truths]
    given = {"params": Head(kind="mlp", **HEAD), "seed": (0,)}
    with pytest.raises(UserError, match=r"^the loss is (nan|inf): lower the rate of the head"):
        heads.train_head(here, network("mlp"), patches, labels, **given)


def test_label_maps_become_labels_of_the_grids(items):
    sizes = [(3, 4), (3, 3), (4, 3), (6, 8), (2, 2), (3, 4), (3, 3), (4, 4)]
    masks = {item.id: item.mask for item in items}
    found = heads.label_grids(items, masks.__getitem__, sizes, share=0.5)
    for item, size, labels in zip(items, sizes, found, strict=True):
        assert np.array_equal(labels, seeds.reduced(read_label_map(item.mask), size, 0.5))
    assert {0, 1, 2, 3} <= set(np.concatenate(found))
    with pytest.raises(UserError, match="nothing"):
        heads.label_grids(items, lambda _: Path("nothing.png"), sizes, share=0.5)
    with pytest.raises(UserError, match="m1"):
        heads.label_grids(items[:1], lambda _: masks["01"], sizes, share=0.5)


def test_what_was_saved_is_loaded_with_its_head(here, tmp_path):
    saved, path = frozen_network_of(), tmp_path / "model.safetensors"
    common.save(path, saved, config_of("frozen"))
    net = network_of("frozen", 1, head_kind="none")
    assert heads.load(here, net, path, cam.load) == config_of("frozen")
    assert same(net, saved.state_dict()) and not net.training
    common.save(path, network_of("cam"), config_of("cam"))
    with pytest.raises(TypeError, match="another method"):
        heads.load(here, net, path, cam.load)
