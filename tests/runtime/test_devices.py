"""Devices, precision, random numbers and threads of networks."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch._inductor.exc import InductorError

from isim.errors import UserError
from isim.runtime import devices, processes

CPU = torch.device("cpu")


ALONE = processes._Group()
ONE_OF_FOUR = processes._Group(rank=5, world=8, local_rank=1, local_world=4)


@pytest.mark.parametrize(
    ("group", "name", "told"),
    [
        (ALONE, "abacus", "ISIM_DEVICE.*abacus"),
        (ALONE, "cuda:99", "ISIM_DEVICE.*cuda:99"),
        (ONE_OF_FOUR, "cuda", "4 processes on a host with 1 GPUs"),
        (ONE_OF_FOUR, "cpu:0", "'cpu:0' is one device for 4 processes"),
    ],
)
def test_a_device_that_cannot_be_had_is_named(group, name, told, monkeypatch):
    monkeypatch.setattr(processes, "_group", group)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("ISIM_DEVICE", name)
    with pytest.raises(UserError, match=told):
        devices.default()
    monkeypatch.setenv("ISIM_DEVICE", "cpu")
    assert devices.default() == CPU


def test_of_gpus_the_model_counts_and_not_the_number(monkeypatch):
    kinds = {devices.kind(CPU)}
    for model in ("a GPU", "another GPU"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, model=model: model)
        kinds |= {devices.kind(torch.device(name)) for name in ("cuda", "cuda:1")}
    assert len(kinds) == 3 and all(torch.__version__ in kind for kind in kinds)


def test_precision_is_as_asked_for_or_fit_for_the_device():
    for precision in ("bf16", "fp32"):
        assert devices.resolve_precision(precision, CPU) == precision
    assert devices.resolve_precision("auto", CPU) in {"fp32", "bf16"}
    weight = torch.ones(2, 2)
    for precision, dtype in devices.DTYPES.items():
        with devices.autocast(precision, CPU):
            assert (weight @ weight).dtype == dtype


def test_seeds_decide_all_generators():
    def draw(*parts):
        devices.seed_all(*parts)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(1, 2) == draw(1, 2)
    others = [draw(1, 2), draw(1, 3), draw(2, 1), draw(1)]
    assert all(len(set(draws)) == 4 for draws in zip(*others, strict=True))


def test_threads_are_set_back_after_an_error():
    before = torch.get_num_threads()

    def fail():
        with devices.intra_op_threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == before


def test_a_compiled_forward_is_close_and_leaves_the_names_alone():
    """By inductor itself, with gradients; another call for the same function compiles nothing."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    weight, names = network[0].weight, list(network.state_dict())
    images = torch.randn(2, 3, 9, 9)
    assert devices.torch_compiled(network.forward, False) == network.forward
    try:
        found = devices.torch_compiled(network.forward, True)(images)
    except InductorError as error:
        pytest.skip(f"inductor cannot run here: {str(error).splitlines()[0]}")
    expected = network(images)
    assert torch.allclose(found, expected, atol=1e-5)
    gradients = [torch.autograd.grad(maps.sum(), weight)[0] for maps in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-4)
    assert list(network.state_dict()) == names
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(devices.torch_compiled(network.forward, True)(images), found)
