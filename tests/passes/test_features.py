"""Cached features: those of each image, computed once whatever an image is called."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.images import opened
from support.networks import config_of, frozen_network_of
from support.vits import shrink

from isim.errors import UserError
from isim.models import frozen
from isim.passes import stream
from isim.passes.features import Features
from isim.runtime.here import Here

EVERY = [f"0{number}" for number in range(7)]


@pytest.fixture
def network():
    return frozen_network_of()


@pytest.fixture
def prepare(here, network, items):
    """A function that prepares features, some things of theirs changed: what keeps them."""

    def prepare(items=items, here=here, network=network, **changes):
        made = Features(here, network, config_of("frozen", **changes))
        made.prepare(items)
        return made

    return prepare


def contents(made):
    return {path.name: path.read_bytes() for path in made.folder.iterdir()}


@pytest.mark.usefixtures("on_gpu")
def test_features_are_those_of_each_image_alone(prepare, network, items):
    made = prepare(sides=(64, 48))
    for item in items:
        found = made.of(item)
        assert found.dtype == np.float16 and not found.flags.writeable
        config = config_of("frozen", sides=(64, 48))
        alone = frozen.features(network.encoder, config, opened(item)[1])[0]
        # The encoder is folded for inference, which rounds otherwise.
        np.testing.assert_allclose(found, alone, rtol=0, atol=2e-3)
        tensor = made.tensor(item)
        assert tensor.dtype == torch.float32 and torch.equal(tensor.half(), torch.tensor(found))
    assert len(contents(made)) == 7


def test_small_images_of_large_sides_fill_no_memory(prepare, monkeypatch, tmp_path):
    seen, features = [], frozen.features

    def spied(network, config, images):
        seen.append(len(images))
        return features(network, config, images)

    whole = contents(prepare())
    monkeypatch.setattr(frozen, "features", spied)
    side = max(config_of("frozen").sides)
    monkeypatch.setattr(stream, "batch_pixels", lambda device: 2 * side**2)
    made = prepare(here=Here(tmp_path / "other", "fp32"))
    assert set(seen) == {1} and len(contents(made)) == len(whole)


def test_they_are_found_again_by_content(prepare, items, read_ids, tmp_path, capsys):
    prepare()
    assert sorted(read_ids) == EVERY
    read_ids.clear()
    copy = replace(items[1], id="copy", image=tmp_path / "renamed.png")
    shutil.copy(items[1].image, copy.image)
    made = prepare([*items, copy])
    assert read_ids == [] and np.array_equal(made.of(copy), made.of(items[1]))
    # Another run, another classifier and another head, too.
    prepare(items, network=frozen_network_of(head_kind="linear"), head_kind="linear")
    assert read_ids == []
    counts = re.findall(r"features of (\d) images \((\d) computed now\)", capsys.readouterr().out)
    assert counts == [("7", "7"), ("8", "0"), ("7", "0")]


@pytest.mark.parametrize("affinity", ["none", "attention"])
def test_answers_are_the_means_of_those_at_each_scale(affinity, prepare, items, monkeypatch):
    shrink(monkeypatch)
    changes = {"encoder": "test_vit", "stages": 1, "affinity": affinity, "steps": 1}
    network = frozen_network_of(sides=(64,), **changes)
    alone = [prepare(network=network, sides=(side,), **changes) for side in (64, 96)]
    config = config_of("frozen", sides=(64,), feature_scales=(1.0, 1.5), **changes)
    both = Features(alone[0]._here, network, config)
    both.prepare(items)
    assert both.folder == alone[0].folder
    tagged = [item for item in items if len(item.class_ids)]
    for item in tagged:
        grids = [one.planes(config, item) for one in alone]
        assert grids[0].shape != grids[1].shape
        for size in ((50, 70), tuple(grids[0].shape[1:])):
            pair = [F.interpolate(grid[None], size, mode="bilinear")[0] for grid in grids]
            found = both.planes(config, item, size)
            torch.testing.assert_close(found, network.mean(pair, size), rtol=0, atol=1e-6)
        assert torch.equal(found, both.planes(config, item)), "on the grid of scale 1"
        pair = [one.probabilities(item, (50, 70)) for one in alone]
        found = both.probabilities(item, (50, 70))
        torch.testing.assert_close(found, (pair[0] + pair[1]) / 2, rtol=0, atol=1e-6)
    untagged = next(item for item in items if not len(item.class_ids))
    assert both.planes(config, untagged, (50, 70)).shape == (0, 50, 70)


@pytest.mark.parametrize(("scales", "own"), [((0.75, 1.0), 7), ((0.75,), 5)])
def test_only_images_that_are_asked_about_have_other_scales(scales, own, here, items, network):
    made = Features(here, network, config_of("frozen", feature_scales=scales))
    made.prepare(items[:2], others=items[2:])
    other = made.scales[0]
    assert other.folder != made.folder and (made in made.scales) == (1.0 in scales)
    assert len(contents(made)) == own and len(contents(other)) == 2
    assert max(other.of(items[0]).shape[1:]) == 3 < max(made.of(items[-1]).shape[1:])


def test_attention_is_kept_beside_them(prepare, items, read_ids, monkeypatch):
    shrink(monkeypatch)
    changes = {"encoder": "test_vit", "sides": (64, 48), "stages": 1, "affinity": "attention"}
    network = frozen_network_of(**changes)
    without = prepare(network=network, **changes | {"affinity": "cosine"})
    maps = {item.id: without.of(item).copy() for item in items}
    assert len(contents(without)) == 7
    read_ids.clear()
    made = prepare(network=network, **changes)
    assert made.folder == without.folder and len(contents(made)) == 14
    assert sorted(read_ids) == EVERY
    config = config_of("frozen", **changes)
    for item in items:
        expected = frozen.attention(network.encoder, config, opened(item)[1])[0]
        np.testing.assert_allclose(made.attention(item), expected, rtol=0, atol=1e-3)
        assert np.array_equal(made.of(item), maps[item.id])
        given = (made.tensor(item), torch.from_numpy(item.class_ids), config)
        if len(item.class_ids):
            planes = network.planes(*given, made.attention(item))
            assert torch.equal(made.planes(config, item), planes)
    read_ids.clear()
    prepare(network=network, **changes)
    assert read_ids == []
    path = made._files(items[0])[1]
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=f"^{path} is gone or damaged; delete it"):
        made.attention(items[0])


def test_equal_images_are_computed_once(prepare, items, read_ids):
    made = prepare([*items, *(replace(item, id=f"again{item.id}") for item in items)])
    assert len(read_ids) == 7 == len(contents(made))


def test_the_size_is_told(prepare, items, monkeypatch, capsys):
    monkeypatch.setattr(np, "save", lambda stream, _: stream.write(bytes(5_000_000)))
    made = prepare()
    words = rf"7 images \(7 computed now\) at 64 px, 0\.04 GB in {made.folder} \(may be d"
    assert re.search(words, capsys.readouterr().out)


@pytest.mark.parametrize(
    "changes",
    [
        {"sides": (48,)},
        {"sides": (64, 48)},
        {"stages": 1},
        {"output_stride": 32},
        {"mean": (0.5, 0.5, 0.5)},
        {"encoder": "test_resnet"},
        {"weights": 1e-3},
        {"here": "bf16"},
    ],
    ids=str,
)
def test_what_they_depend_on_has_another_folder(changes, prepare, here, items, network, read_ids):
    first = prepare(items[:2])
    if "encoder" in changes:
        network = frozen_network_of(encoder="test_resnet")
    if "weights" in changes:
        network = frozen_network_of()
        next(network.encoder.parameters()).view(-1)[0] += changes.pop("weights")
    other = Here(here.resume, changes.pop("here", "fp32"))
    second = prepare(items[:2], here=other, network=network, **changes)
    assert second.folder.parent == first.folder.parent == here.resume / "features"
    assert second.folder != first.folder and len(read_ids) == 4
    assert not np.array_equal(first.of(items[0]), second.of(items[0]))
    assert prepare(items[:2]).folder == first.folder and len(read_ids) == 4


def test_an_image_that_changes_is_computed_anew(prepare, items, read_ids, tmp_path):
    moved = [replace(item, image=tmp_path / item.image.name) for item in items[:3]]
    for item in items[:3]:
        shutil.copy(item.image, tmp_path / item.image.name)
    before = prepare(moved).of(moved[1])
    shutil.copy(items[4].image, moved[1].image)
    read_ids.clear()
    made = prepare(moved)
    assert read_ids == ["01"] and made.of(moved[1]).shape != before.shape


def test_what_is_deleted_is_computed_again_and_what_is_damaged_told(prepare, items, read_ids):
    made = prepare()
    expected = contents(made)
    gone, half = sorted(made.folder.iterdir())[:2]
    gone.unlink()
    read_ids.clear()
    assert contents(prepare()) == expected and len(read_ids) == 1
    damaged = next(item for item in items if made._files(item) == [half])
    for bytes_ in (b"", expected[half.name][:-7], expected[half.name][:60], b"nothing"):
        half.write_bytes(bytes_)
        with pytest.raises(UserError, match=f"^{half} is gone or damaged; delete it") as caught:
            prepare().of(damaged)
        assert "\n" not in str(caught.value)
    for array in (np.zeros((2, 2, 2)), np.zeros((2, 2), np.float16)):
        np.save(half, array)
        with pytest.raises(UserError, match="is gone or damaged"):
            made.of(damaged)
    half.unlink()
    with pytest.raises(UserError, match="is gone or damaged"):
        made.of(damaged)
    shutil.rmtree(made.folder)
    assert contents(prepare()) == expected


def test_threads_do_not_matter(prepare, tmp_path, monkeypatch):
    one = contents(prepare())
    monkeypatch.setenv("ISIM_WORKERS", "3")
    torch.set_num_threads(3)
    assert contents(prepare(here=Here(tmp_path / "other", "fp32"))) == one


def test_what_is_no_image_or_no_number_is_one_line(prepare, items, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"none\.png"):
        prepare([replace(items[0], image=tmp_path / "none.png")])
    broken = torch.full((1, 2, 3, 4), torch.inf)
    monkeypatch.setattr(frozen, "features", lambda *_: broken)
    words = rf"^the encoder's features of {items[0].image} are not finite; set .*precision to fp32"
    with pytest.raises(UserError, match=words):
        prepare(items[:1])
    assert not list(tmp_path.rglob("*.npy"))
