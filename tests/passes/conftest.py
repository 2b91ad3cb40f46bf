"""Passes by name; the images, CAMs and networks that they go over; the way of a GPU."""

from functools import cache
from importlib import import_module

import pytest
import torch
from support import images
from support.networks import config_of, frozen_network_of, network_of

from isim.data import files
from isim.passes import stream
from isim.passes.features import Features
from isim.passes.kept import Kept
from isim.passes.walks import Stored
from isim.runtime import devices
from isim.runtime.here import Here

# Kinds that have a frozen one beside them.
FROZEN = {"cam": "frozen", "deeplabv2": "frozen_segmenter"}


@pytest.fixture(scope="session")
def items(tmp_path_factory):
    """Images of several sizes, each with a mask."""
    return images.make(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def stored(items, tmp_path_factory):
    """Folder of the items' CAMs and label maps."""
    return images.put_results(tmp_path_factory.mktemp("results") / "train", items)


@pytest.fixture(scope="session")
def models():
    """Networks with their configurations, by kind."""
    names = ("cam", "deeplabv2", "affinity")
    found = {name: (network_of(name).eval(), config_of(name)) for name in names}
    # Such as training makes: not all of one class.
    torch.nn.init.normal_(found["cam"][0].classifier.weight)
    for branch in found["deeplabv2"][0].head.branches:
        torch.nn.init.normal_(branch.weight, std=0.1)
    for name in FROZEN.values():
        found[name] = frozen_network_of(name), config_of(name)
    return found


@pytest.fixture(scope="session")
def run(items, stored, models, tiny):
    """A function that runs a pass, `module.function`, in a folder.

    `changes` are of its section, or arguments of its own. `module.function frozen` is by a frozen
    network, whose features are prepared first.
    """
    ids = [item.id for item in items]
    split = {"parts": {"train": frozenset(ids), "inner": frozenset(ids[:3])}}
    scored = {"folder": stored, "num_labels": 4, "parts": split["parts"]}
    walked = {"cams": Stored(stored), "num_labels": 4}
    seeded = {"stored": {id_: stored / f"{id_}.npz" for id_ in ids}, "threshold": 0.3}
    # Network, section of the parameters, and what else it is given.
    passes = {
        "pseudo_labels.regenerate": ("cam", "train_cam", {"name": "a"}),
        "stored_cams.export": ("cam", "export_cams", {"split": "train"}),
        "affinity_labels.make": ("", "train_affinity", {"cams": stored, "num_labels": 4}),
        "walks.walk": ("affinity", "random_walk", walked),
        "walks.walk_dense": ("cam", "random_walk", walked),
        "predictions.predict": ("deeplabv2", "train_segmenter", split),
        "scores.cams": ("", "evaluate", scored | {"pictured": ids[1:2]}),
        "scores.labels": ("", "", scored),
        "seeds.write": ("", "", seeded),
        "seeds.score": ("cam", "train_cam", {}),
        "classification.classify": ("cam", "", {"longer_side": 96}),
    }

    def run(name, folder, items=items, **changes):
        name, _, frozen = name.partition(" ")
        network, section, options = passes[name]
        here, given = Here(folder, "fp32"), models.get(network, ())
        if frozen:
            cached = Features(here, *models[FROZEN[network]])
            cached.prepare(items)
            given = cached, models[FROZEN[network]][1]
        if section:
            own = {"affinity": "cosine"} if name == "walks.walk_dense" else {}
            section = getattr(tiny, section)
            own |= {key: changes.pop(key) for key in changes.keys() & type(section).model_fields}
            options = options | {"params": section.model_copy(update=own)}
        if name == "predictions.predict":
            options = options | {"kept": Kept(here, "predictions", {})}
        module, function = name.split(".")
        function = getattr(import_module(f"isim.passes.{module}"), function)
        return function(here, *given, items=items, **options, **changes)

    return run


@pytest.fixture(scope="session")
def whole(run, tmp_path_factory):
    """A function that returns what a pass gives that nothing interrupts, and its folder."""
    folder = cache(lambda name: tmp_path_factory.mktemp("whole"))
    return cache(lambda name: (run(name, folder(name)), folder(name)))


@pytest.fixture
def here(tmp_path):
    return Here(tmp_path / "resume", "fp32")


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """On the CPU without helpers."""
    monkeypatch.setenv("ISIM_DEVICE", "cpu")
    monkeypatch.setenv("ISIM_WORKERS", "0")
    with devices.intra_op_threads(1):
        yield


@pytest.fixture(params=["on a CPU", "as on a GPU"])
def on_gpu(request, monkeypatch):
    """Tell whether the test goes the way of a GPU: on CPU tensors, three images a group."""
    if request.param == "on a CPU":
        return False
    in_batches, cpu = stream._computed_in_batches, torch.device("cpu")
    for name in ("groups", "refines"):
        monkeypatch.setattr(stream, name, lambda _: True)
    monkeypatch.setattr(stream, "GROUP", 3)
    monkeypatch.setattr(stream, "_computed_in_threads", lambda f, some: in_batches(f, some, cpu))
    return True


@pytest.fixture
def read_ids(monkeypatch):
    """Ids of the images that are decoded from now on, in order."""
    ids, read = [], files.read_image
    monkeypatch.setattr(files, "read_image", lambda path: ids.append(path.stem) or read(path))
    return ids
