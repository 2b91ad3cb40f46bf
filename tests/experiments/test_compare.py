"""`isim compare`: figures of this isim and of an older one, and dashes for what a run has not."""

import json
import re

import pytest

from isim.errors import UserError
from isim.experiments import compare
from isim.experiments.runs import Run
from isim.runtime import atomic, figures

TRAINED = {"params.yaml": {"train_cam": {"method": "frozen", "encoder": "vit", "seed": 3}}}
# The same results, as this isim reports them and as the one before did.
NEW = {
    "train_cam": {"rounds": 2, "cam_miou": 0.4, "pseudo_label_miou": 0.5},
    "evaluate": {"cam": {"val": 0.1, "train": 0.41}, "crf": {"val": 0.1, "train": 0.51}},
    "random_walk": {"walk": {"train": 0.61}},
    "train_segmenter/last_round": {"last_round": {"train": 0.2, "val": 0.71}},
}
OLD = {
    "train_cam": {"rounds": 2, "cam_miou": 0.4, "pseudo_label_miou": 0.5, "method": "frozen"},
    "evaluate": {"train": {"images": 4, "cam_miou": 0.41, "cam_crf_miou": 0.51}},
    "random_walk": {"train": {"walk_miou": 0.3, "walk_crf_miou": 0.61}, "affinity": "net"},
    "train_segmenter/last_round": {"splits": {"val": {"miou": 0.71}}},
}


def run_of(reports, lock=None, name="HEAD"):
    paths = {f"reports/{stage}/metrics.json": report for stage, report in reports.items()}
    return Run(name, 0.0, lock or {"models/train_cam": ({"params": TRAINED}, "1")}, paths)


def rows_of(*found, monkeypatch, cache=None, **options):
    monkeypatch.setattr(compare.runs, "read_all", lambda _: (list(found), None))
    monkeypatch.setattr(compare.runs, "cached", lambda _: (cache or {}).get)
    return compare.table("root", (), **options)[0].splitlines()


@pytest.mark.parametrize("reports", [NEW, OLD])
def test_a_row_has_the_figures_of_a_run(reports, monkeypatch):
    head, row, *_ = rows_of(run_of(reports), monkeypatch=monkeypatch)
    assert len(re.split("  +", head)) == len(compare.HEAD) == 10
    assert row.split() == ["HEAD", "frozen", "vit", "3", "2", "41.0", "51.0", "61.0", "71.0", "-"]


def test_what_a_run_has_not_is_a_dash(monkeypatch):
    without = NEW | {"train_cam": {"rounds": 1}, "evaluate": {}, "random_walk": []}
    found = (run_of({}, {"x": None}), run_of(without | {"train_segmenter/last_round": {}}))
    _, empty, few, *_ = rows_of(*found, monkeypatch=monkeypatch)
    assert empty.split() == ["HEAD", *"-" * 9]
    assert few.split() == ["HEAD", "frozen", "vit", "3", "1", *"-----"]


def test_minutes_are_those_of_all_stages_or_unknown(monkeypatch):
    lock = {f"reports/{stage}/seconds.csv": ({}, stage) for stage in ("a", "b")}
    texts = {
        "a": atomic.csv_text([{"split": "", "seconds": 90.0}, {"split": "val", "seconds": 7.0}]),
        "b": atomic.csv_text([{"split": "", "seconds": 60.0}]),
    }
    assert figures.SPEED == "seconds.csv"
    for cache, told in ((texts, "2.5"), ({"a": texts["a"]}, "-"), ({}, "-")):
        row = rows_of(run_of({}, lock), monkeypatch=monkeypatch, cache=cache)[1]
        assert row.split()[-1] == told


def test_markdown_is_a_table(monkeypatch):
    found = run_of(NEW, name="a|b")
    head, rule, row, *_ = rows_of(found, monkeypatch=monkeypatch, markdown=True)
    assert head.count("|") == rule.count("|") == row.replace("\\|", "").count("|") == 11


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
      - models/train_cam
      - reports/train_cam/seconds.csv
"""
SCRIPT = """\
import json, os
from ruamel.yaml import YAML
crop = YAML().load(open("params.yaml"))["train_cam"]["crop"]
for name in ("reports/train_cam", "models/train_cam"):
    os.makedirs(name, exist_ok=True)
open("models/train_cam/x", "w").write(str(crop))
json.dump({"rounds": crop}, open("reports/train_cam/metrics.json", "w"))
open("reports/train_cam/seconds.csv", "w").write(f"split,seconds\\n,{crop}\\n")
"""


def test_revisions_and_experiments_of_a_repository_are_compared(make_repository):
    folder, call = make_repository(PIPELINE, SCRIPT)
    call("dvc", "exp", "run", "--quiet", "--temp", "-n", "larger", "-S", "train_cam.crop=600")
    (folder / "dvc.lock").unlink()
    call("git", "commit", "--quiet", "--all", "--message", "without results")
    text, note = compare.table(folder, ("HEAD~1", "larger", "HEAD"))
    before, larger, nothing = (line.split() for line in text.splitlines()[1:4])
    assert before == ["HEAD~1", *"---", "256", *"----", "4.3"]
    assert note == "without results, for there is no dvc.lock with any: HEAD"
    assert compare.table(folder, ("HEAD~1", "larger"))[1] is None
    assert larger == ["larger", *"---", "600", *"----", "10.0"] and nothing == ["HEAD", *"-" * 9]
    for unknown in ("nowhere", "--all", "HEAD~99", "a\nb", "x" * 500, "a\0b"):
        with pytest.raises(UserError, match=r"\Ano .*revision") as told:
            compare.table(folder, (unknown,))
        assert len(str(told.value)) < 300 and "\n" not in str(told.value)


def test_without_a_run_or_git_a_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(UserError, match=r"no run to compare.*dvc repro"):
        compare.table(tmp_path, ())
    with pytest.raises(UserError, match="in no git repository"):
        compare.table(tmp_path, ("HEAD",))
    (tmp_path / "dvc.lock").write_text(json.dumps({"stages": {}}))
    assert compare.table(tmp_path, ())[0].splitlines()[1].startswith("workspace")
