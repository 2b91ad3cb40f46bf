"""Trainings of small networks on small images."""

from types import SimpleNamespace

import pytest
from support import images
from support.networks import config_of, network_of
from support.sections import changed

from isim.runtime import devices
from isim.runtime.here import Here
from isim.training import batches
from isim.training.steps import AffinityStep, CamStep, SegmenterStep

SEGMENTER = ("train_segmenter", SegmenterStep)
OTHERS = {"affinity": ("train_affinity", AffinityStep)}
OTHERS |= {"deeplabv2": SEGMENTER, "deeplabv3": SEGMENTER}


@pytest.fixture(scope="session")
def items(tmp_path_factory):
    """Eight images of several sizes, each with a mask of the three classes."""
    return images.make(tmp_path_factory.mktemp("images"), (*images.SIZES, (64, 64)))


@pytest.fixture
def here(tmp_path):
    return Here(tmp_path / "resume", "fp32", "train_it")


@pytest.fixture(autouse=True)
def _alone(recorder):
    with devices.intra_op_threads(1):
        yield


@pytest.fixture
def make(items, here, tiny):
    """A function that makes a training: network, crops with labels, step, params.

    Two steps of four crops an epoch; labels are the masks, or what `labels` finds.
    """
    masks = {item.id: item.mask for item in items}

    def training(
        name="unetcam_learnable", items=items, labels=masks.__getitem__, scales=None, **changes
    ):
        section, kind = OTHERS.get(name, ("train_cam", CamStep))
        params = changed(getattr(tiny, section), **{"crop": 32, "batch": 4, "epochs": 3} | changes)
        network, config = network_of(name), config_of(name)
        devices.place(network, here.device)
        crops = batches.of_crops(items, config, params, here.device, labels=[labels], scales=scales)
        crops.dataset.use_labels(0)
        size = [crops.size] if kind is CamStep else []
        step = kind(here, network, params, *size)
        return SimpleNamespace(here=here, network=network, crops=crops, step=step, params=params)

    return training
