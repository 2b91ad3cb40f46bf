"""Finished runs: what dvc.lock says they ran with, and which reports belong to them."""

import hashlib
import json

import pytest
from ruamel.yaml import YAML

from isim import runs
from isim.errors import UserError


def stage(params, deps, outs):
    """A stage of dvc.lock; deps and outs are paths with their hashes."""
    return {
        "cmd": "true",
        "params": {"params.yaml": params},
        "deps": [{"path": path, "md5": md5} for path, md5 in deps.items()],
        "outs": [{"path": path, "md5": md5} for path, md5 in outs.items()],
    }


LOCK = {
    "schema": "2.0",
    "stages": {
        "prepare": stage({"prepare": {"source": "voc"}}, {"isim/a.py": "0"}, {"data/p": "1"}),
        "train_cam": stage(
            {"train_cam": {"method": "cam"}},
            {"data/p": "1", "isim/b.py": "0"},
            {"models/c": "2", "data/labels": "3", "reports/train_cam/metrics.json": "4"},
        ),
        "evaluate": stage(
            {"evaluate": {"threshold": 0.3}}, {"models/c": "2"}, {"reports/e/metrics.json": "5"}
        ),
    },
}


def dump(tree, path):
    with path.open("w") as file:
        YAML(typ="safe").dump(tree, file)


def changed(**stages):
    return {**LOCK, "stages": LOCK["stages"] | stages}


def test_the_parameters_of_all_stages_on_the_way_count():
    assert runs.lineage(LOCK, "reports/train_cam/metrics.json") == {
        "prepare": {"source": "voc"},
        "train_cam": {"method": "cam"},
    }
    assert set(runs.lineage(LOCK, "reports/e/metrics.json")) == {"prepare", "train_cam", "evaluate"}


def test_a_report_that_no_stage_wrote_has_no_parameters():
    assert runs.lineage(LOCK, "reports/other.json") is None
    assert runs.lineage({"stages": {}}, "reports/e/metrics.json") is None


def test_what_was_made_from_older_outputs_does_not_count():
    """`dvc exp run train_cam` leaves the evaluation of the network before."""
    again = stage({"train_cam": {"method": "deeplabcam"}}, {"data/p": "1"}, {"models/c": "9"})
    assert runs.lineage(changed(train_cam=again), "models/c")["train_cam"]["method"] != "cam"
    assert runs.lineage(changed(train_cam=again), "reports/e/metrics.json") is None
    prepared = stage({"prepare": {"source": "shapes"}}, {}, {"data/p": "8"})
    assert runs.lineage(changed(prepare=prepared), "reports/e/metrics.json") is None


def test_a_file_within_an_output_cannot_be_judged():
    inside = stage({"x": {}}, {"data/labels/round_01": "7"}, {"reports/x/metrics.json": "6"})
    assert runs.lineage(changed(x=inside), "reports/x/metrics.json") is None


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
    dump({"stages": {"a": stage({"a": {}}, {}, outs)}}, tmp_path / "dvc.lock")
    found = runs.workspace(tmp_path)
    assert found.reports == {
        "reports/a/metrics.json": {"images": 3},
        "reports/a/per_class.csv": [{"class": "cat", "iou": "0.5"}],
    }
    assert found.name == "workspace"
    assert found.when == (tmp_path / "dvc.lock").stat().st_mtime


REPORT = "reports/train_segmenter/random_walk_crf/metrics.json"
NEW, OLD = '{"miou": 0.7}', '{"miou": 0.6}'


def moved(*entries):
    """A lock in which each (place, seed, text) of `entries` claims the report of one label set."""
    stages = {
        f"train_segmenter@labels{place}": stage(
            {"train_segmenter": {"seed": seed}},
            {"models/c": "2"},
            {REPORT: hashlib.md5(text.encode()).hexdigest()},
        )
        for place, seed, text in entries
    }
    return json.dumps({"stages": LOCK["stages"] | stages})


def label_sets(*names):
    return json.dumps({"label_sets": [{"name": name, "path": "data/x"} for name in names]})


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
    entries = [(0, 7, NEW), (1, 0, OLD)]
    text = moved(*(reversed(entries) if swapped else entries))
    listed = label_sets(*names) if names is not None else None
    lock = runs.parse_lock(text, listed)
    found, record = runs.lineage(lock, REPORT), runs.writer(lock, REPORT)
    (tmp_path / REPORT).parent.mkdir(parents=True)
    (tmp_path / "dvc.lock").write_text(text)
    if listed:
        (tmp_path / "params.yaml").write_text(listed)
    (tmp_path / REPORT).write_text(NEW if present == 0 else OLD)
    here = runs.workspace(tmp_path)
    experiment = runs.from_dvc(
        [state("a" * 40)],
        lambda _, path: text if path == "dvc.lock" else listed,
        lambda *_: None,
    )[0]
    if present is None:
        assert found is record is None and REPORT not in here.reports
        assert runs.lineage(experiment.lock, REPORT) is None
        return
    _, seed, _ = entries[present]
    assert found["train_segmenter"]["seed"] == seed
    assert record["params"]["params.yaml"]["train_segmenter"]["seed"] == seed
    assert here.reports == {REPORT: json.loads(NEW if present == 0 else OLD)}
    assert runs.lineage(experiment.lock, REPORT) == runs.lineage(here.lock, REPORT) == found
    # The network before it is as it was.
    assert set(found) == {"prepare", "train_cam", "train_segmenter"}


def test_two_records_of_a_path_are_no_run():
    twice = changed(again=LOCK["stages"]["evaluate"])
    assert runs.lineage(twice, "reports/e/metrics.json") is None
    assert runs.writer(twice, "reports/e/metrics.json") is None
    # Nor is what was made of it.
    twice = changed(again=LOCK["stages"]["prepare"])
    assert runs.lineage(twice, "reports/e/metrics.json") is None


def test_a_workspace_without_a_run(tmp_path):
    assert runs.workspace(tmp_path) is None
    (tmp_path / "dvc.lock").write_text("<<<<<<< HEAD\n\tx: [")
    assert runs.workspace(tmp_path).reports == {}


def state(rev, time="2026-01-02T03:04:05", **more):
    data = {"rev": rev, "timestamp": time, "metrics": {"m.json": {"data": {"rev": rev}}}}
    return {"rev": rev, "name": None, "data": data, "error": None, "experiments": None} | more


def entry(*states, name=None, executor=None):
    return {"revs": list(states), "name": name, "executor": executor}


def test_experiments_and_commits_are_runs_unless_they_have_not_ended():
    broken = state("e" * 40)
    broken["data"]["metrics"]["bad.json"] = {"error": {"type": "YAMLError", "msg": "x"}}
    states = [
        state("workspace", time=None),
        state(
            "c" * 40,
            name="main",
            experiments=[
                entry(
                    state("a" * 40, time="2026-02-01T00:00:00"), state("9" * 40), name="dry-toad"
                ),
                entry(broken, name="big-cat", executor={"state": "success"}),
                entry(state("f" * 40), name="worn-owl", executor={"state": "failed"}),
                entry(state("d" * 40), executor={"state": "queued"}),
                entry(state("b" * 40, data=None, error={"msg": "gone"}), name="lost"),
            ],
        ),
        state("1" * 40),
        state("0" * 40),
    ]
    texts = {(rev * 40, "dvc.lock"): json.dumps(LOCK) for rev in "acef1"}
    found = runs.from_dvc(states, lambda *wanted: texts.get(wanted), lambda *_: None)
    assert [run.name for run in found] == ["dry-toad", "big-cat", "main", "1111111"]
    assert found[0].reports == {"m.json": {"rev": "a" * 40}} and found[0].lock == LOCK
    assert set(found[1].reports) == {"m.json"}
    assert found[0].when > found[2].when


def test_without_git_the_workspace_stands_alone_and_a_line_says_so(tmp_path, monkeypatch):
    dump(LOCK, tmp_path / "dvc.lock")
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


@pytest.fixture
def repository(make_repository):
    """A repository whose one stage reports a parameter."""
    return make_repository(PIPELINE, SCRIPT)


def test_real_experiments_are_read_with_what_they_ran_with(repository):
    folder, call = repository
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


def test_a_report_is_read_from_a_revision_without_a_checkout(repository):
    folder, call = repository
    call("dvc", "exp", "run", "--quiet", "--temp", "-n", "larger", "-S", "train_cam.crop=320")
    path = "reports/train_cam/metrics.json"
    (folder / path).unlink()
    for name, crop in (("larger", 320), ("HEAD", 256)):
        text, parameters = runs.at(folder, name, path)
        assert json.loads(text) == {"crop": crop} and parameters == {"train_cam": {"crop": crop}}
    assert not (folder / path).exists()
    assert runs.at(folder, "larger", "reports/other.json") is None
    for name in ("smaller", "--all", "HEAD~7"):
        with pytest.raises(UserError, match=f"no experiment or git revision '{name}'") as caught:
            runs.at(folder, name, path)
        assert "\n" not in str(caught.value)
