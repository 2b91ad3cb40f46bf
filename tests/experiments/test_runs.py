"""Finished runs: what dvc.lock says they ran with, and which reports belong to them."""

import hashlib
import json

import pytest

from isim.experiments import runs


def stage(params, deps, outs):
    """A stage of dvc.lock; deps and outs are paths with their hashes."""
    return {
        "cmd": "true",
        "params": {"params.yaml": params},
        "deps": [{"path": path, "md5": md5} for path, md5 in deps.items()],
        "outs": [{"path": path, "md5": md5} for path, md5 in outs.items()],
    }


STAGES = {
    "prepare": stage({"prepare": {"source": "voc"}}, {"isim/a.py": "0"}, {"data/p": "1"}),
    "train_cam": stage(
        {"train_cam": {"method": "cam"}},
        {"data/p": "1", "isim/b.py": "0"},
        {"models/c": "2", "data/labels": "3", "reports/train_cam/metrics.json": "4"},
    ),
    "evaluate": stage(
        {"evaluate": {"threshold": 0.3}}, {"models/c": "2"}, {"reports/e/metrics.json": "5"}
    ),
}
EVALUATED = "reports/e/metrics.json"

# Made anew since: train_cam and prepare. And what read one file of an output.
AGAIN = stage({"train_cam": {"method": "deeplabcam"}}, {"data/p": "1"}, {"models/c": "9"})
PREPARED = stage({"prepare": {"source": "shapes"}}, {}, {"data/p": "8"})
INSIDE = stage({"x": {}}, {"data/labels/round_01": "7"}, {"reports/x/metrics.json": "6"})


def lock_of(stages):
    return runs.read_lock(json.dumps({"schema": "2.0", "stages": stages}), None)


def lineage(path, **changed):
    """Parameters on the way to a file, of a lock with other or further stages."""
    return runs.lineage(lock_of(STAGES | changed), path)


def test_the_parameters_of_all_stages_on_the_way_count():
    trained = {"prepare": {"source": "voc"}, "train_cam": {"method": "cam"}}
    assert lineage("reports/train_cam/metrics.json") == trained
    assert lineage(EVALUATED) == trained | {"evaluate": {"threshold": 0.3}}
    assert lineage("models/c", train_cam=AGAIN) == trained | {"train_cam": {"method": "deeplabcam"}}


@pytest.mark.parametrize(
    ("path", "changed"),
    [
        ("reports/other.json", {}),
        # `dvc exp run train_cam` leaves the evaluation of the network before.
        (EVALUATED, {"train_cam": AGAIN}),
        (EVALUATED, {"prepare": PREPARED}),
        # One file of an output: its hash is not known.
        ("reports/x/metrics.json", {"x": INSIDE}),
        # Two stages claim it, or what it was made of.
        (EVALUATED, {"again": STAGES["evaluate"]}),
        (EVALUATED, {"again": STAGES["prepare"]}),
    ],
)
def test_where_nothing_can_be_said_there_are_no_parameters(path, changed):
    assert lineage(path, **changed) is None


@pytest.mark.parametrize("steps", [10, 5])
def test_a_section_in_common_has_one_value_or_nothing_can_be_said(steps):
    """`dvc repro --single-item evaluate` leaves the network of another dCRF."""
    first = stage({"train_cam": {}, "crf": {"steps": 10}}, {}, {"models/c": "2"})
    last = stage({"evaluate": {}, "crf": {"steps": steps}}, {"models/c": "2"}, {"e.json": "5"})
    whole = {"train_cam": {}, "crf": {"steps": 10}, "evaluate": {}}
    assert lineage("e.json", train_cam=first, evaluate=last) == (whole if steps == 10 else None)


@pytest.mark.parametrize("affinity", ["net", "cosine"])
def test_a_value_of_another_section_is_that_section_s_or_nothing_can_be_said(affinity):
    """`dvc repro --single-item random_walk` leaves what train_affinity made for another walk."""
    first = stage({"train_affinity": {"seed": 0}, "random_walk.affinity": "net"}, {}, {"m": "2"})
    last = stage({"random_walk": {"affinity": affinity}}, {"m": "2"}, {"w.json": "5"})
    found = lineage("w.json", train_affinity=first, random_walk=last)
    whole = {"train_affinity": {"seed": 0}, "random_walk": {"affinity": "net"}}
    assert found == (whole if affinity == "net" else None)
    assert lineage("m", train_affinity=first) == {"train_affinity": {"seed": 0}}


def test_the_workspace_gives_the_reports_that_its_lock_names(tmp_path):
    texts = {
        "reports/a/metrics.json": '{"images": 3}',
        "reports/a/per_class.csv": "class,iou\ncat,0.5\n",
        "reports/a/edited.json": "{}",
        "data/labels.csv": "x\n1\n",
    }
    outs = {path: hashlib.md5(text.encode()).hexdigest() for path, text in texts.items()}
    texts["reports/a/edited.json"] = '{"images": 10582}'
    texts["reports/a/foreign.json"] = '{"images": 10582}'
    for path, text in texts.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    outs["reports/a/missing.json"] = "0"
    (tmp_path / "dvc.lock").write_text(json.dumps({"stages": {"a": stage({"a": {}}, {}, outs)}}))
    found = runs.workspace(tmp_path)
    assert found.reports == {
        "reports/a/metrics.json": {"images": 3},
        "reports/a/per_class.csv": [{"class": "cat", "iou": "0.5"}],
    }
    assert found.name == "workspace"
    assert found.when == (tmp_path / "dvc.lock").stat().st_mtime


REPORT = "reports/train_segmenter/random_walk_crf/metrics.json"
# Place, seed and report of two stages that claim it.
NEW, OLD = (0, 7, '{"miou": 0.7}'), (1, 0, '{"miou": 0.6}')


@pytest.mark.parametrize(
    ("names", "present"),
    [
        (["random_walk_crf"], 0),
        (["round_02", "random_walk_crf", "ground_truth"], 1),
        (["ground_truth", "seeds", "random_walk", "random_walk_crf"], None),
        (["ground_truth"], None),
        (None, None),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_of_two_records_of_a_label_set_the_one_in_the_list_counts(
    names, present, swapped, tmp_path
):
    """DVC keeps what it recorded of a matrix whose list has changed since."""
    stages = {
        f"train_segmenter@labels{place}": stage(
            {"train_segmenter": {"seed": seed}},
            {"models/c": "2"},
            {REPORT: hashlib.md5(text.encode()).hexdigest()},
        )
        for place, seed, text in ((OLD, NEW) if swapped else (NEW, OLD))
    }
    text = json.dumps({"stages": STAGES | stages})
    listed = None
    if names is not None:
        listed = json.dumps({"label_sets": [{"name": name, "path": "data/x"} for name in names]})
        (tmp_path / "params.yaml").write_text(listed)
    (tmp_path / REPORT).parent.mkdir(parents=True)
    _, seed, report = NEW if present == 0 else OLD
    (tmp_path / REPORT).write_text(report)
    (tmp_path / "dvc.lock").write_text(text)
    here = runs.workspace(tmp_path)
    texts = {"dvc.lock": text, "params.yaml": listed}
    (there,) = runs.from_dvc([state("a" * 40)], lambda _, path: texts[path], lambda *_: None)
    assert here.lock == there.lock
    found = runs.lineage(here.lock, REPORT)
    if present is None:
        assert found is here.lock[REPORT] is None and REPORT not in here.reports
        return
    # The network before it is as it was.
    assert set(found) == {"prepare", "train_cam", "train_segmenter"}
    assert found["train_segmenter"]["seed"] == seed
    assert here.reports == {REPORT: json.loads(report)}


def test_a_workspace_without_a_run(tmp_path):
    assert runs.workspace(tmp_path) is None
    (tmp_path / "dvc.lock").write_text("<<<<<<< HEAD\n\tx: [")
    assert runs.workspace(tmp_path).reports == {}


def state(rev, time="2026-01-02T03:04:05", **more):
    data = {"rev": rev, "timestamp": time, "metrics": {"m.json": {"data": {"rev": rev}}}}
    return {"rev": rev, "name": None, "data": data, "error": None, "experiments": None} | more


def entry(*states, name=None, ended=None):
    return {"revs": states, "name": name, "executor": ended and {"state": ended}}


def test_experiments_and_commits_are_runs_unless_they_have_not_ended():
    broken = state("e" * 40)
    broken["data"]["metrics"]["bad.json"] = {"error": {"type": "YAMLError", "msg": "x"}}
    newer = state("a" * 40, time="2026-02-01T00:00:00")
    experiments = [
        entry(newer, state("9" * 40), name="dry-toad"),
        entry(broken, name="big-cat", ended="success"),
        entry(state("f" * 40), name="worn-owl", ended="failed"),
        entry(state("d" * 40), ended="queued"),
        entry(state("b" * 40, data=None, error={"msg": "gone"}), name="lost"),
    ]
    main = state("c" * 40, name="main", experiments=experiments)
    states = [state("workspace", time=None), main, state("1" * 40), state("0" * 40)]
    texts = {(rev * 40, "dvc.lock"): json.dumps({"stages": STAGES}) for rev in "acef1"}
    found = runs.from_dvc(states, lambda *wanted: texts.get(wanted), lambda *_: None)
    assert [run.name for run in found] == ["dry-toad", "big-cat", "main", "1111111"]
    assert found[0].reports == {"m.json": {"rev": "a" * 40}} and found[0].lock == lock_of(STAGES)
    assert set(found[1].reports) == {"m.json"}
    assert found[0].when > found[2].when


def test_without_git_the_workspace_stands_alone_and_a_line_says_so(tmp_path, monkeypatch):
    (tmp_path / "dvc.lock").write_text(json.dumps({"stages": STAGES}))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found, note = runs.read_all(tmp_path)
    assert [run.name for run in found] == ["workspace"]
    assert "DVC experiments" in note and "\n" not in note
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git" in runs.read_all(tmp_path)[1]


PIPELINE = """\
stages:
  train_cam:
    cmd: python report.py
    params:
      - train_cam
    metrics:
      - reports/train_cam/metrics.json:
          cache: false
    outs:
      - reports/train_cam/per_class.csv
"""
SCRIPT = """\
import json, os
from ruamel.yaml import YAML
crop = YAML().load(open("params.yaml"))["train_cam"]["crop"]
os.makedirs("reports/train_cam", exist_ok=True)
json.dump({"crop": crop}, open("reports/train_cam/metrics.json", "w"))
open("reports/train_cam/per_class.csv", "w").write(f"class,iou\\ncat,{crop / 1000}\\n")
"""


def test_real_experiments_are_read_with_what_they_ran_with(make_repository):
    folder, call = make_repository(PIPELINE, SCRIPT)
    call("dvc", "exp", "run", "--quiet", "--temp", "-n", "larger", "-S", "train_cam.crop=320")
    # Experiments stay with the commit that they started from.
    call("git", "commit", "--quiet", "--allow-empty", "--message", "later")
    # Edited since: no run has this.
    (folder / "params.yaml").write_text("train_cam:\n  crop: 512\n")
    found, note = runs.read_all(folder)
    assert note is None
    path = "reports/train_cam/metrics.json"
    crops = {run.name: runs.lineage(run.lock, path)["train_cam"]["crop"] for run in found}
    assert crops["workspace"] == 256 and crops["larger"] == 320
    assert all(run.reports[path] == {"crop": crops[run.name]} for run in found)
    assert 512 not in crops.values() and len(found) == 4
    # Tables lie in DVC's cache, where `dvc exp show` does not look.
    table = "reports/train_cam/per_class.csv"
    assert [table in run.reports for run in found] == [run.name == "workspace" for run in found]
    for run in found:
        assert run.report(table) == [{"class": "cat", "iou": str(crops[run.name] / 1000)}]
        assert run.report("reports/train_cam/rounds.csv") is None
        assert run.report("reports/other.json") is None
