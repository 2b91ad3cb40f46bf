"""A stage finds its device when that is asked for, and makes figures once."""

import subprocess
import sys

import torch

from isim.runtime import processes
from isim.runtime.here import Here


def test_device_and_precision_are_those_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv("ISIM_DEVICE", "cpu")
    here = Here(tmp_path, "bf16")
    assert (here.device, here.precision) == (torch.device("cpu"), "bf16")


def test_a_stage_without_networks_loads_no_torch():
    code = "import sys, isim.runtime.here, isim.runtime.checkpoint; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout.split()


def test_a_cache_is_the_project_s_where_there_is_one(tmp_path):
    resume = tmp_path / ".isim/resume/train_segmenter/round_02/0123"
    assert Here(resume).cache == tmp_path / ".isim"
    assert Here(tmp_path / "resume").cache == tmp_path / "resume"


def test_figures_are_made_once(tmp_path, monkeypatch):
    here, made = Here(tmp_path), []

    def make():
        made.append(1)
        return {"miou": float("nan"), "n": len(made)}

    first = here.once("round_01", make)
    assert str(here.once("round_01", make)) == str(first) == "{'miou': nan, 'n': 1}"
    assert here.once("round_02", make)["n"] == 2
    # Another process goes by the first one's record, and writes none.
    monkeypatch.setattr(processes, "_group", processes._Group(rank=1, world=2))
    monkeypatch.setattr(processes, "broadcast", lambda value: value)
    assert here.once("round_03", make)["n"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round_01.json", "round_02.json"]
