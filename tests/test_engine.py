"""Rates, seeds, and the state that a run goes on from."""

import ctypes
import json
import os
import random
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._inductor.exc import InductorError

from isim import engine
from isim.errors import UserError


def test_poly_schedule_by_hand_and_constant_after_the_horizon():
    factor = partial(engine.poly_factor, horizon=4, power=0.9)
    assert factor(0) == 1
    assert [factor(step) for step in (1, 2, 3)] == pytest.approx([0.75**0.9, 0.5**0.9, 0.25**0.9])
    assert factor(4) == factor(1000) == factor(3)
    assert engine.poly_factor(3, 4, 0) == 1


def small():
    """Convolutions for the memory format; the last part is never trained, as in the warm-up."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3))
    unused = nn.Conv2d(2, 2, 1)
    whole = nn.ModuleDict({"used": network, "unused": unused})
    engine.place(whole, torch.device("cpu"))
    groups = [(network, 0.1), (unused, 0.5)]
    return whole, engine.sgd(groups, momentum=0.9, weight_decay=1e-2)


def train(network, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, 9, 9, generator=generator)
        optimizer.zero_grad()
        network["used"](images).square().mean().backward()
        engine.set_rates(optimizer, engine.poly_factor(step, 10, 0.9))
        optimizer.step()


def test_a_state_goes_on_bit_equal(tmp_path):
    path = tmp_path / "state.safetensors"
    whole = small()
    train(*whole, range(3))
    progress = {"digest": "d", "epochs": [{"miou": float("nan"), "n": 3}]}
    engine.save_state(path, *whole, progress)
    resumed, optimizer = small()
    engine.load_state(path, resumed, optimizer)
    assert str(engine.read_progress(path, "d")) == str(progress)
    assert resumed["used"][0].weight.is_contiguous(memory_format=torch.channels_last)
    for pair in (whole, (resumed, optimizer)):
        train(*pair, range(3, 6))
    ours, theirs = whole[0].state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys() and "used.1.num_batches_tracked" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(theirs["unused.weight"], small()[0]["unused"].weight)
    buffers = (whole[1].state_dict()["state"], optimizer.state_dict()["state"])
    assert buffers[0].keys() == buffers[1].keys()
    for index, buffer in buffers[0].items():
        assert torch.equal(buffer["momentum_buffer"], buffers[1][index]["momentum_buffer"])


def test_rates_of_groups_follow_their_initial_rates():
    _, optimizer = small()
    engine.set_rates(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.25]
    engine.set_rates(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.05])


def test_a_state_of_another_run_or_none_is_no_progress(tmp_path):
    path = tmp_path / "state.safetensors"
    assert engine.read_progress(path, "d") is None
    engine.save_state(path, *small(), {"digest": "d"})
    assert engine.read_progress(path, "d") == {"digest": "d"}
    assert engine.read_progress(path, "other") is None
    path.write_bytes(path.read_bytes()[:100])
    assert engine.read_progress(path, "d") is None
    save_file({"weight": torch.zeros(1)}, path)
    assert engine.read_progress(path, "d") is None


def test_the_digest_follows_all_that_a_run_depends_on(tmp_path, monkeypatch):
    data, code = tmp_path / "data", tmp_path / "code.py"
    (data / "deep").mkdir(parents=True)
    (data / "deep/a.csv").write_text("1")
    code.write_text("pass")

    def digest(section="s", device="cpu", precision="fp32"):
        return engine.run_digest(section, [data], [code], torch.device(device), precision)

    seen = [digest()]
    assert digest() == seen[0]
    seen.append(digest("t"))
    (data / "deep/a.csv").write_text("2")
    seen.append(digest())
    (data / "deep/a.csv").rename(data / "deep/b.csv")
    seen.append(digest())
    (data / "c.csv").write_text("")
    seen.append(digest())
    code.write_text("pass\n")
    seen.append(digest())
    with engine.intra_op_threads(torch.get_num_threads() + 1):
        assert digest() == seen[-1], "another number of processes has other threads"
    seen.append(digest(precision="bf16"))
    for gpu in ("a GPU", "another GPU"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, gpu=gpu: gpu)
        seen.append(digest(device="cuda"))
        assert digest(device="cuda:1") == seen[-1]
    assert len(set(seen)) == len(seen)


def test_the_code_of_a_result_is_all_but_its_presentation():
    names = {path.name for path in engine.code_files("train_cam")}
    assert {"engine.py", "train_cam.py", "crf.py", "losses.py", "dataset.py"} <= names
    assert not {"cli.py", "tracking.py", "viz.py", "evaluate.py"} & names
    assert not {"curves.py", "paper.py", "preset.py", "runs.py", "tables.py", "server.py"} & names


@pytest.mark.parametrize("text", ["two", "-1", "1.5", ""])
def test_a_wrong_number_of_workers_is_named(text, monkeypatch):
    monkeypatch.setenv("ISIM_WORKERS", text)
    with pytest.raises(UserError, match="ISIM_WORKERS"):
        engine.worker_count()


def test_workers_are_as_asked_for_or_the_cores(monkeypatch):
    for number in (0, 3):
        monkeypatch.setenv("ISIM_WORKERS", str(number))
        assert engine.worker_count() == number
    monkeypatch.delenv("ISIM_WORKERS")
    assert engine.worker_count() >= 1


def test_a_device_that_is_not_there_is_named(monkeypatch):
    for name in ("abacus", "cuda:99"):
        monkeypatch.setenv("ISIM_DEVICE", name)
        with pytest.raises(UserError, match=f"ISIM_DEVICE.*{name}"):
            engine.default_device()
    monkeypatch.setenv("ISIM_DEVICE", "cpu")
    assert engine.default_device() == torch.device("cpu")


def test_precision_is_as_asked_for_or_fit_for_the_device():
    cpu = torch.device("cpu")
    assert engine.resolve_precision("bf16", cpu) == "bf16"
    assert engine.resolve_precision("fp32", cpu) == "fp32"
    assert engine.resolve_precision("auto", cpu) in {"fp32", "bf16"}
    weight = torch.ones(2, 2)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with engine.autocast(precision, cpu):
            assert (weight @ weight).dtype == dtype


def test_seeds_decide_all_generators():
    def draw(*parts):
        engine.seed_all(*parts)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(1, 2) == draw(1, 2)
    others = [draw(1, 2), draw(1, 3), draw(2, 1), draw(1)]
    assert all(len({other[place] for other in others}) == 4 for place in range(3))


def test_threads_are_set_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), engine.intra_op_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_an_interrupted_run_outlives_one_try_of_another(tmp_path):
    def begin(digest):
        folder = engine.resume_folder(tmp_path / "resume", digest)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    first, second = begin("first"), begin("second")
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    assert begin("first") == first and second.exists()
    third = begin("third")
    assert not first.exists() and second.exists()
    engine.remove_resume_folder(third)
    assert second.exists()
    engine.remove_resume_folder(second)
    assert not (tmp_path / "resume").exists()


# In a process of its own: what pytest has allocated would blur the figures.
MEMORY = """
import json
import psutil
from isim import engine

def resident():
    return psutil.Process().memory_info().rss / 2**20

def fill(size):
    return [b"x" * size for _ in range(2**28 // size)]

found = {"start": resident()}
with engine.keep_freed_memory():
    for name, size in (("large", 2**24), ("small", 2**16)):
        fill(size)
        found[f"{name}, freed"] = resident()
        engine.trim_freed_memory()
        found[f"{name}, trimmed"] = resident()
    with engine.keep_freed_memory():
        pass
    fill(2**24)
    found["nested, freed"] = resident()
found["after"] = resident()
blocks = fill(2**16)
holes = blocks[::64]
del blocks
found["holes"] = resident()
engine.trim_freed_memory()
found["holes, trimmed"] = resident()
print(json.dumps(found))
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt"
)
def test_freed_memory_is_kept_inside_the_block_until_it_is_trimmed():
    """In MiB of resident memory, 256 a time; large blocks first, before the heap has their room."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    grown = {name: value - found["start"] for name, value in found.items()}
    for name in ("small, freed", "nested, freed", "large, freed", "holes"):
        assert grown[name] > 160, (name, found)
    for name in ("small, trimmed", "large, trimmed", "after", "holes, trimmed"):
        assert grown[name] < 96, (name, found)


def test_a_compiled_forward_is_close_and_leaves_the_names_alone():
    """By inductor itself, with gradients; another call for the same function compiles nothing."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    images, names = torch.randn(2, 3, 9, 9), list(network.state_dict())
    assert engine.compiled(network.forward, False) == network.forward
    try:
        found = engine.compiled(network.forward, True)(images)
    except InductorError as error:
        pytest.skip(f"inductor cannot run here: {str(error).splitlines()[0]}")
    found.sum().backward()
    gradient, network[0].weight.grad = network[0].weight.grad, None
    expected = network(images)
    expected.sum().backward()
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(gradient, network[0].weight.grad, atol=1e-4)
    assert list(network.state_dict()) == names
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(engine.compiled(network.forward, True)(images), found)
