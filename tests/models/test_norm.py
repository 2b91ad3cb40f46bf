"""Shared batch normalisation in one process; test_distributed.py has several."""

import copy

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from isim.errors import UserError
from isim.models import norm
from isim.runtime import processes


@pytest.fixture
def together(monkeypatch):
    """A run of two processes, of which the other one has no images."""
    monkeypatch.setattr(processes, "world", lambda: 2)
    monkeypatch.setattr(processes, "equalise", lambda tensors: list(tensors))
    monkeypatch.setattr(processes, "total", lambda tensor: tensor)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_it_computes_what_the_plain_layer_does(kind, together):
    plain = nn.Sequential(kind(4))
    shared = copy.deepcopy(plain)
    norm.synchronise(shared)
    assert isinstance(shared[0], norm.SharedNorm)
    for seed in range(2):
        images = 3 + torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(shared(images), plain(images))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], value)
    torch.testing.assert_close(shared.eval()(images), plain.eval()(images))
    assert shared.train()(images.bfloat16()).dtype == torch.bfloat16


def test_alone_nothing_changes():
    network = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm1d(4))
    norm.synchronise(network)
    assert [type(layer) for layer in network] == [nn.BatchNorm2d, nn.BatchNorm1d]


def test_another_kind_is_refused(together):
    with pytest.raises(UserError, match=r"normalises by BatchNorm1d.*choose another encoder"):
        norm.synchronise(nn.Sequential(nn.BatchNorm1d(4)))
