"""The state that a training goes on from, and the folder that it lies in."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from isim.errors import UserError
from isim.runtime import checkpoint, devices, processes
from isim.training import optimizer

NEW = {"epochs": []}


def small():
    """Convolutions for the memory format; the last part is never trained, as in the warm-up."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3))
    unused = nn.Conv2d(2, 2, 1)
    whole = nn.ModuleDict({"used": network, "unused": unused})
    devices.place(whole, torch.device("cpu"))
    return whole, optimizer.sgd([(network, 0.1), (unused, 0.5)], momentum=0.9, weight_decay=1e-2)


def train(network, sgd, steps):
    for step in steps:
        images = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(step))
        sgd.zero_grad()
        network["used"](images).square().mean().backward()
        optimizer.set_rates(sgd, optimizer.poly_factor(step, 10, 0.9))
        sgd.step()


def test_a_state_goes_on_bit_equal(tmp_path):
    whole, resumed = small(), small()
    assert checkpoint.restore(tmp_path, *whole) == NEW
    train(*whole, range(3))
    progress = {"epochs": [{"miou": float("nan"), "n": 3}]}
    checkpoint.save_state(tmp_path, *whole, progress)
    assert str(checkpoint.restore(tmp_path, *resumed)) == str(progress)
    assert resumed[0]["used"][0].weight.is_contiguous(memory_format=torch.channels_last)
    for pair in (whole, resumed):
        train(*pair, range(3, 6))
    ours, theirs = whole[0].state_dict(), resumed[0].state_dict()
    assert ours.keys() == theirs.keys() and "used.1.num_batches_tracked" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(theirs["unused.weight"], small()[0]["unused"].weight)
    buffers = [sgd.state_dict()["state"] for _, sgd in (whole, resumed)]
    assert buffers[0].keys() == buffers[1].keys()
    for index, buffer in buffers[0].items():
        assert torch.equal(buffer["momentum_buffer"], buffers[1][index]["momentum_buffer"])


def cut(state):
    state.write_bytes(state.read_bytes()[:100])


def strange(state):
    save_file({"weight": torch.zeros(1)}, state)


def of_another_run(state):
    other = state.parent.with_name("other")
    checkpoint.save_state(other, *small(), {"epochs": [1, 2]})
    (other / state.name).rename(state)


@pytest.mark.parametrize("spoil", [Path.touch, Path.unlink, cut, strange, of_another_run])
def test_a_run_goes_on_from_its_own_whole_state_only(spoil, tmp_path):
    folder = checkpoint.resume_folder(tmp_path, "run")
    checkpoint.save_state(folder, *small(), {"epochs": [1]})
    (folder / "labels").mkdir()
    for name in ("a.png", ".tmp-b.png"):
        (folder / "labels" / name).touch()
    spoil(folder / "state.safetensors")
    assert checkpoint.resume_folder(tmp_path, "run") == folder
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    whole = {Path.touch: {"labels/a.png", "state.safetensors"}, Path.unlink: {"labels/a.png"}}
    assert left == whole.get(spoil, set())
    assert checkpoint.restore(folder, *small()) == ({"epochs": [1]} if len(left) == 2 else NEW)


def test_an_interrupted_run_outlives_one_try_of_another(tmp_path):
    base = tmp_path / "resume"
    first, second = (checkpoint.resume_folder(base, name) for name in ("first", "second"))
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    assert checkpoint.resume_folder(base, "first") == first and second.exists()
    third = checkpoint.resume_folder(base, "third")
    assert sorted(base.iterdir()) == [second, third]
    checkpoint.remove(third)
    assert list(base.iterdir()) == [second]
    checkpoint.remove(second)
    assert not base.exists()


def test_half_a_folder_is_no_run(tmp_path, monkeypatch):
    folder = checkpoint.resume_folder(tmp_path, "run")
    (folder / "labels.jsonl").touch()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", interrupt)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.remove(folder)
    assert [path.name for path in tmp_path.iterdir()] == [".removing-run"]
    assert list(checkpoint.resume_folder(tmp_path, "run").iterdir()) == []
    assert list(tmp_path.iterdir()) == [folder]


def interrupt(path, ignore_errors):
    if path.exists():
        raise KeyboardInterrupt


def test_the_first_process_alone_writes(tmp_path, monkeypatch):
    folder = checkpoint.resume_folder(tmp_path, "run")
    monkeypatch.setattr(processes, "_group", processes._Group(rank=1, world=2))
    monkeypatch.setattr(processes, "gather", lambda value: [value, value])
    checkpoint.save_state(folder, *small(), {"epochs": [1]})
    assert list(folder.iterdir()) == [] and checkpoint.restore(folder, *small()) == NEW
    assert not checkpoint.resume_folder(tmp_path, "other").exists()
    checkpoint.remove(folder)
    assert folder.exists()
    monkeypatch.setattr(processes, "gather", lambda value: [value + 1, value])
    with pytest.raises(UserError, match=r"see different states in .*wait a minute"):
        checkpoint.restore(folder, *small())
