"""One process does all; a process of many does its part (together: tests/test_distributed.py)."""

import torch

from isim.runtime import processes


def test_one_process_does_everything_and_starts_nothing(tmp_path):
    with processes.started(tmp_path):
        assert processes.mine([1, 2, 3]) == [1, 2, 3]
        assert processes.gather("a") == ["a"] and processes.broadcast(None) is None
        assert processes.sum_figures({"a": 1.5}) == {"a": 1.5}
        assert not processes.total(torch.ones(1, requires_grad=True)).requires_grad
        assert processes.own_seed() == () and processes.is_main()
        assert not torch.distributed.is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_each_thing_belongs_to_one_process_and_each_draws_its_own_numbers(monkeypatch):
    parts, seeds = [], set()
    for rank in range(3):
        monkeypatch.setattr(processes, "_group", processes._Group(rank=rank, world=3))
        parts += processes.mine(range(10))
        seeds.add(processes.own_seed())
    assert sorted(parts) == list(range(10)) and len(seeds) == 3
