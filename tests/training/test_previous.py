"""The last network: what a run begins with, goes on with, and leaves."""

import re
from dataclasses import replace

import pytest
from support.networks import config_of, copied, frozen_network_of, network_of, same
from support.sections import changed

from isim.errors import UserError
from isim.models import common
from isim.training import previous
from isim.training.previous import LastNetwork

ABOUT = {"rounds": 3, "supervision": "image labels"}


@pytest.fixture
def last(tmp_path, tiny):
    """A function that gives the place of the last network to a run of some parameters."""
    (tmp_path / "prepared").mkdir()

    def last(**changes):
        params = changed(tiny.train_cam, start="previous", **changes)
        return LastNetwork(tmp_path / ".isim", params, tmp_path / "prepared")

    return last


@pytest.fixture
def trained(last, tmp_path):
    """A function that ends a run with a network: the network."""

    def trained(value, name="cam", **changes):
        config = config_of(name, **changes)
        network = frozen_network_of(name) if name == "frozen" else network_of(name)
        network.classifier.weight.data[:] = value
        common.save(tmp_path / "model.safetensors", network, config)
        last().keep(tmp_path / "model.safetensors", network, config, about=ABOUT)
        return network

    return trained


def begun(place, name="cam", **changes):
    network = frozen_network_of(name) if name == "frozen" else network_of(name)
    return network, place.begin(network, config_of(name, **changes))


def first_weight(begun):
    return float(begun[0].classifier.weight.detach()[0, 0, 0, 0])


def test_the_first_run_begins_without_and_says_so(last, capsys):
    network, started = begun(last())
    assert started is None and same(network, copied(network_of("cam")))
    assert "there is no previous network; starts from the enc" in capsys.readouterr().out


def test_a_run_has_the_weights_of_the_last_one_and_tells_which(last, trained, capsys):
    previous = trained(2.0)
    assert re.search(r"network (\w{8}) is kept .*deleted at any time", capsys.readouterr().out)
    network, started = begun(last())
    assert same(network, copied(previous)) and (started.rounds, started.supervision) == (
        3,
        "image labels",
    )
    words = rf"previous network {started.identity} \(round 3, \d{{4}}-\d\d-\d\d \d\d:\d\d UTC\)"
    assert re.search(words, capsys.readouterr().out)


@pytest.mark.parametrize("first", [None, 1.0])
def test_a_run_that_was_killed_goes_on_with_what_it_began_with(first, last, trained):
    if first is not None:
        trained(first)
    before = begun(last())[0]
    trained(2.0)
    place = last()
    assert same(begun(place)[0], copied(before))
    # Another run takes the latest; when this one has ended, so does the next.
    assert first_weight(begun(last(seed=7))) == 2
    place.end()
    assert first_weight(begun(last())) == 2


def test_a_frozen_one_keeps_its_encoder(last, trained):
    trained(1.0, "frozen")
    network, started = begun(last(), "frozen")
    assert same(network, copied(frozen_network_of("frozen"))) and started.network is not network
    other = frozen_network_of("frozen")
    next(other.encoder.parameters()).data += 1
    with pytest.raises(UserError, match=r"^train_cam\.start: .*encoder has other weights.*none$"):
        last().begin(other, config_of("frozen"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ("a", "b", "c", "new")}, "classes are not those"),
        ({"classes": tuple(f"{'x' * 99}{n}" for n in range(99))}, "and 96 more"),
        ({"method": "deeplabcam"}, "has method cam, this run deeplabcam"),
        ({"encoder": "test_vit"}, "this run test_vit"),
        ({"output_stride": 32}, "has output_stride 16, this run 32"),
    ],
    ids=["classes", "many", "method", "encoder", "stride"],
)
def test_another_kind_of_network_is_one_line(changes, words, last, trained):
    trained(1.0)
    with pytest.raises(UserError, match=rf"^train_cam\.start: .*{words}.*start: none$") as caught:
        last().begin(network_of("cam"), replace(config_of("cam"), **changes))
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    # It began nothing: what is trained meanwhile counts.
    trained(5.0)
    assert first_weight(begun(last())) == 5


def test_classes_in_another_order_are_others(last, trained):
    trained(1.0)
    config = config_of("cam")
    with pytest.raises(UserError, match="another order"):
        last().begin(network_of("cam"), replace(config, classes=config.classes[::-1]))


def test_one_of_another_isim_is_told(last, trained, capsys, monkeypatch):
    trained(1.0)
    monkeypatch.setattr(previous.identity, "of_code", lambda stage: "other")
    begun(last())
    assert "by another isim)" in capsys.readouterr().out


@pytest.mark.parametrize("about", ["{}", "[]", "3", '{"identity": "a", "rounds": 1}'])
def test_one_that_tells_too_little_is_damaged(about, last, trained, tmp_path):
    network = trained(1.0)
    path = tmp_path / ".isim/previous/train_cam.safetensors"
    common.save(path, network, config_of("cam"), about=about)
    with pytest.raises(UserError, match="is damaged; delete the folder"):
        begun(last())


@pytest.mark.parametrize("length", [1, 100, -5])
def test_a_damaged_one_is_told(length, last, trained, tmp_path):
    trained(1.0)
    path = tmp_path / ".isim/previous/train_cam.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"is damaged; delete the folder .*/\.isim/previous to"):
        begun(last())
