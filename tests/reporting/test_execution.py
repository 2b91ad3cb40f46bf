"""Which stages of a pipeline are done, as dvc.lock and the runs of an execution tell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from isim.experiments import preset
from isim.params import read_yaml
from isim.reporting import execution
from isim.runtime import figures

ROOT = Path(__file__).parents[2]
PARAMS = {"prepare": {"n": 1}, "train_cam": {"n": 2}, "evaluate": {"n": 3}, "label_sets": []}


@pytest.fixture
def project(tmp_path):
    """A pipeline of three stages in a row, all of them recorded."""
    names = ("prepare", "train_cam", "evaluate")
    stages, lock = {}, {}
    for before, name in zip((None, *names), names, strict=False):
        deps = [f"data/{before}"] if before else []
        stages[name] = {"cmd": "x", "deps": deps, "outs": [f"data/{name}"], "params": [name]}
        lock[name] = {
            "deps": [{"path": path, "md5": path} for path in deps],
            "outs": [{"path": f"data/{name}", "md5": f"data/{name}"}],
            "params": {"params.yaml": {name: PARAMS[name]}},
        }
        folder = tmp_path / "reports" / name
        folder.mkdir(parents=True)
        figures.write(folder, {"n": 1, "train": {"cam_miou": 0.5, "images": 3}}, None)
        # The headline has other names, by which DVC compares.
        (folder / "metrics.json").write_text('{"cam": {"train": 0.5}}')
    write(tmp_path, "dvc.yaml", stages)
    write(tmp_path, "dvc.lock", lock)
    return tmp_path


def write(root, name, stages):
    YAML(typ="safe").dump({"stages": stages}, root / name)


def lock_of(root):
    return YAML(typ="safe").load((root / "dvc.lock").read_text())["stages"]


def test_stages_with_what_they_were_recorded_with_are_done(project):
    found = execution.load(project, PARAMS)
    assert found.missing({}) == []
    # What reads from a stage that ended just now is to come.
    assert found.missing({}, ("prepare", "")) == ["train_cam"]
    assert found.missing({}, ("evaluate", "")) == []
    changed = execution.load(project, {**PARAMS, "train_cam": {"n": 5}})
    assert changed.missing({}) == ["train_cam"]


@pytest.mark.parametrize("text", ["", "stages: [", "a: b", "stages:\n  prepare: 3\n", "\udcff"])
def test_a_lock_that_says_nothing_says_that_nothing_is_done(text, project):
    (project / "dvc.lock").write_text(text, errors="surrogateescape")
    missing = execution.load(project, PARAMS).missing({})
    assert sorted(missing) == ["evaluate", "prepare", "train_cam"]


def test_an_out_made_anew_makes_its_readers_missing(project):
    lock = lock_of(project)
    lock["prepare"]["outs"][0]["md5"] = "other"
    write(project, "dvc.lock", lock)
    assert execution.load(project, PARAMS).missing({}) == ["train_cam"]


def test_without_a_record_the_runs_count_in_their_order(project):
    (project / "dvc.lock").unlink()
    found = execution.load(project, PARAMS)
    times = {("prepare", ""): 1.0, ("train_cam", ""): 2.0}
    assert found.missing(times) == ["evaluate"]
    assert found.missing(times, ("evaluate", "")) == []
    # prepare ran again: what had read from it is of before.
    assert "train_cam" in found.missing({**times, ("prepare", ""): 3.0}, ("evaluate", ""))


def test_skipped_stages_tell_their_figures(project):
    found = execution.load(project, PARAMS)
    skipped = found.skipped({("train_cam", ""): 1.0}, ("evaluate", ""))
    assert skipped == {("prepare", ""): {"train_cam_miou": 0.5}}
    (project / "reports/prepare/figures.csv").unlink()
    old = {"n": 1, "splits": {"val": {"miou": 0.4}}}
    (project / "reports/prepare/metrics.json").write_text(json.dumps(old))
    skipped = found.skipped({("train_cam", ""): 1.0}, ("evaluate", ""))
    assert skipped == {("prepare", ""): {"val_miou": 0.4}}


def test_the_real_pipeline_is_understood(tmp_path):
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    (tmp_path / "params.yaml").write_text(preset.text("tiny"))
    params = read_yaml(tmp_path / "params.yaml")
    names = [step.name for step in execution.load(tmp_path, params).steps]
    count = len(params["label_sets"])
    assert [name for name in names if "@" in name] == [
        f"train_segmenter@labels{place}" for place in range(count)
    ]
    (tmp_path / "dvc.yaml").unlink()
    keys = {step.key for step in execution.load(tmp_path, params).steps}
    assert len(keys) == len(names)


def test_a_process_is_known_by_its_start():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        start = execution.started(other.pid)
        assert execution.alive(str(other.pid), start) and start
        # Another process has its number now.
        assert not execution.alive(str(os.getpid()), start)
        other.communicate(b"\n")
    assert not execution.alive(str(other.pid), start)
    assert not execution.alive("no number", "") and execution.alive(str(os.getpid()), "")


@pytest.mark.parametrize(
    ("words", "goes_on"),
    [((), True), (("evaluate",), False), (("evaluate", "report"), True), (("-S", "x=1"), True)],
)
def test_dvc_goes_on_with_what_its_targets_need(words, goes_on, project, monkeypatch):
    above = execution.Process(1, "", ("dvc", "repro", *words))
    monkeypatch.setattr(execution, "dvc_above", lambda: above)
    stages = YAML(typ="safe").load((project / "dvc.yaml").read_text())["stages"]
    write(project, "dvc.yaml", stages | {"report": {"cmd": "x", "deps": ["data/evaluate"]}})
    found = execution.load(project, {**PARAMS, "report": {}})
    missing = found.missing({}, ("evaluate", ""))
    assert missing == ["report"] and (found.goes_on(missing) is above) == goes_on


def test_dvc_is_found_among_the_processes_above(tmp_path):
    script = tmp_path / "dvc"
    script.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\n"
        "code = 'from isim.reporting import execution as e; print(e.dvc_above().words)'\n"
        "subprocess.run(['sh', '-c', '\"$0\" -c \"$1\"; true', sys.executable, code], check=True)\n"
    )
    script.chmod(0o755)
    told = subprocess.check_output([script, "repro", "evaluate"], text=True)
    assert told.strip().endswith("'repro', 'evaluate')")
