"""Tables: which run fills which cell, blanks, the three forms, wrong names."""

import csv
import hashlib
import io
import json
import signal
import sys
from dataclasses import replace

import pytest
from ruamel.yaml import YAML

from isim import cli, paper, tables
from isim.runs import Run

PAPER = paper.load()
# In the order of the pipeline; each reads what the one before wrote.
SECTIONS = PAPER.stages


def nested(flat):
    tree = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return tree


def cell_of(table, row, column):
    found = PAPER.table(table)
    return found.cells[found.rows.index(row)][found.columns.index(column)]


def run_of(cell, value, *, name="workspace", when=1.0, images=None, counts=None, **changes):
    """A run of the preset with a cell's parameters and its figure.

    `images` are those scored and `counts` those of splits, by default whole splits; `changes` are
    dotted with two underscores, None takes a parameter away.
    """
    stages_of = {key.split(".")[0] for key in cell.matched}
    flat = {k: v for k, v in paper.flatten(PAPER.values).items() if k.split(".")[0] in stages_of}
    flat |= cell.parameters
    flat |= {key.replace("__", "."): new for key, new in changes.items()}
    flat = {key: new for key, new in flat.items() if new is not None}
    sections = nested(flat)
    figure = cell.figure
    report = [figure.where | {figure.key: str(value)}] if figure.where else None
    if report is None:
        scored = {figure.images: images or PAPER.images[figure.scored]} if figure.images else {}
        report = nested({figure.key: value} | scored)
    known = PAPER.images | (counts or {})
    counted = {PAPER.counted.key.format(split=split): number for split, number in known.items()}
    reports = {figure.file: report, PAPER.counted.file: counted}
    stages, before = {}, {}
    for stage in [s for s in SECTIONS if s in sections]:
        after = {f"data/{stage}": f"{stage}-{sections[stage]}"}
        written = {figure.file: f"{value}-{name}"} if stage == figure.stage else {}
        if stage == "prepare":
            written[PAPER.counted.file] = str(counted)
        stages[stage] = {
            "params": {"params.yaml": {stage: sections[stage]}},
            "deps": [{"path": path, "md5": md5} for path, md5 in before.items()],
            "outs": [{"path": p, "md5": md5} for p, md5 in (after | written).items()],
        }
        before = after
    return Run(name, when, {"stages": stages}, reports)


def measured(table, *found):
    grid = tables.measure(PAPER.table(table), found, PAPER)
    rows, columns = PAPER.table(table).rows, PAPER.table(table).columns
    return {
        (row, column): entry
        for row, line in zip(rows, grid, strict=True)
        for column, entry in zip(columns, line, strict=True)
        if entry
    }


ONE = cell_of("2", "DeepLabCAM", "ResNet-101")


@pytest.mark.parametrize(
    ("table", "row", "column"),
    [
        ("1", "train", "ResNet-50"),
        ("1", "val", "ResNeSt-269"),
        ("2", "CAM", "ResNeSt-50"),
        ("3", "val", "UNetCAM Learnable"),
        ("4", "train", "UNetCAM Non-Learnable"),
        ("5", "val", "CAM"),
        ("6", "DeepLabCAM", "512×512"),
        ("7", "DeepLabCAM+RW", "ResNet-152"),
        ("7", "DeepLabCAM+RW+CRF", "ResNet-152"),
        ("8", "val", "ResNeSt-200"),
        ("9", "val", "ResNet-50"),
        ("10", "val", "ResNet-101"),
        ("12", "cow", "IoU"),
        ("fig4", "every 25 epochs", "seed before dCRF"),
        ("fig4", "on convergence", "pseudo-label of the last round"),
        ("fig5", "pseudo-label", "epoch 25"),
        ("sec4.1", "0.45", "at the best threshold"),
    ],
)
def test_a_run_fills_its_cell_and_no_other(table, row, column):
    cell = cell_of(table, row, column)
    found = measured(table, run_of(cell, 0.51234))
    assert set(found) == {(row, column)}
    assert found[row, column] == tables.Measured(pytest.approx(51.234), "workspace", "paper", 1)


def test_table_11_takes_the_figures_of_ours():
    cell = cell_of("8", "val", "ResNeSt-200")
    found = measured("11", run_of(cell, 0.7))
    assert set(found) == {("ISIM, DeepLabv3 (ResNeSt-200)", "val")}


# A cell of every figure, with parameters of which each alone makes another figure of it.
DEEPLABCAM = (
    "prepare.source train_cam.method train_cam.split train_cam.encoder train_cam.weights "
    "train_cam.output_stride train_cam.encoder_norm train_cam.input_norm train_cam.atrous_rates "
    "train_cam.decoder_channels train_cam.crop train_cam.batch train_cam.epochs "
    "train_cam.warmup_epochs train_cam.round_rule train_cam.segmentation_weight train_cam.scales "
    "train_cam.flip train_cam.threshold train_cam.crf.bilateral_srgb "
)
CAMS = DEEPLABCAM + "train_cam.round_every export_cams.scales export_cams.flip export_cams.stride "
WALK = CAMS + (
    "train_affinity.split train_affinity.encoder train_affinity.weights train_affinity.stride "
    "train_affinity.output_stride train_affinity.input_norm train_affinity.radius "
    "train_affinity.foreground_threshold train_affinity.background_threshold "
    "train_affinity.crf.steps train_affinity.crop train_affinity.batch train_affinity.epochs "
    "train_affinity.rate train_affinity.head_factor train_affinity.momentum "
    "train_affinity.weight_decay train_affinity.poly_power "
    "random_walk.beta random_walk.steps_log2 random_walk.background random_walk.alpha "
)
REFINED = WALK + "random_walk.crf_after random_walk.crf.steps "
SEGMENTER = REFINED + (
    "train_segmenter.method train_segmenter.split train_segmenter.encoder train_segmenter.weights "
    "train_segmenter.output_stride train_segmenter.encoder_norm train_segmenter.input_norm "
    "train_segmenter.decoder_channels train_segmenter.crop train_segmenter.batch "
    "train_segmenter.epochs train_segmenter.scale_min train_segmenter.scale_max "
    "train_segmenter.optimizer.momentum train_segmenter.optimizer.weight_decay "
    "train_segmenter.optimizer.rate train_segmenter.optimizer.head_factor "
    "train_segmenter.optimizer.poly_power train_segmenter.test_scales train_segmenter.test_flip "
)
DEPENDS = {
    ("1", "train", "ResNet-101"): DEEPLABCAM + "train_cam.round_every",
    ("1", "val", "ResNet-101"): DEEPLABCAM + "train_cam.round_every train_cam.eval_split",
    ("2", "DeepLabCAM", "ResNet-101"): CAMS + "evaluate.threshold",
    ("5", "val", "UNetCAM Learnable"): CAMS.replace("train_cam.atrous_rates", "")
    + "evaluate.threshold evaluate.crf.gt_prob",
    ("7", "DeepLabCAM+RW", "ResNet-101"): WALK,
    ("7", "DeepLabCAM+RW+CRF", "ResNet-101"): REFINED,
    ("8", "val", "ResNet-101"): SEGMENTER,
    ("10", "val", "ResNet-101"): SEGMENTER.replace("train_segmenter.decoder_channels", ""),
    ("12", "cat", "IoU"): SEGMENTER,
    ("fig4", "on convergence", "pseudo-label of the last round"): DEEPLABCAM
    + "train_cam.convergence.patience train_cam.convergence.tolerance train_cam.convergence.cap",
    ("sec4.1", "0.40", "at the best threshold"): CAMS
    + "evaluate.threshold evaluate.sweep_start evaluate.sweep_stop evaluate.sweep_step",
}


@pytest.mark.parametrize("place", DEPENDS)
def test_a_run_with_another_value_of_what_a_figure_depends_on_fills_nothing(place):
    """And one with another value of anything else fills the cell as before."""
    cell = cell_of(*place)
    wanted = set(DEPENDS[place].split())
    sections = {name.split(".")[0] for name in wanted}
    for name, value in paper.flatten(PAPER.values).items():
        if name.split(".")[0] not in sections or name.endswith(("crf.steps", "optimizer.profile")):
            continue
        other = not value if isinstance(value, bool) else "other"
        run = run_of(cell, 0.5, **{name.replace(".", "__"): other})
        # One value of a dCRF stands for all of them but for what computes it.
        dependent = name in wanted or any(
            name.startswith(known.rpartition(".")[0] + ".")
            for known in wanted
            if ".crf." in known and not name.endswith(".backend")
        )
        assert (place[1:] not in measured(place[0], run)) == dependent, name


@pytest.mark.parametrize(
    "changes",
    [
        {"train_cam__split": "train"},
        {"train_cam__flip": 1},
        {"evaluate__threshold": None},
        {"counts": {"trainaug": 562}},
        {"counts": {"trainaug": None}},
        {"images": 562},
    ],
)
def test_another_run_fills_nothing(changes):
    assert measured("2", run_of(ONE, 0.5)) != {}
    assert measured("2", run_of(ONE, 0.5, **changes)) == {}


def test_splits_are_counted_where_a_figure_has_no_count_of_its_own():
    """Classification of a part of val, or the IoU of one class on it."""
    for place in (("1", "val", "ResNet-50"), ("12", "cat", "IoU")):
        cell = cell_of(*place)
        assert set(measured(place[0], run_of(cell, 0.9))) == {place[1:]}
        assert measured(place[0], run_of(cell, 0.9, counts={"val": 240})) == {}
        assert measured(place[0], run_of(cell, 0.9, counts={"trainaug": 562})) == {}
        # A whole split that neither was trained on nor scored does not matter.
        assert measured(place[0], run_of(cell, 0.9, counts={"train": 562}))
        run = run_of(cell, 0.9)
        del run.reports[PAPER.counted.file]
        assert measured(place[0], run) == {}


def test_a_profile_brings_what_it_needs():
    official = {"train_cam__optimizer__profile": "official"}
    assert measured("2", run_of(ONE, 0.5, **official)) == {}
    found = measured("2", run_of(ONE, 0.5, **official, train_cam__batch=32))
    assert [entry.profile for entry in found.values()] == ["official"]
    assert measured("2", run_of(ONE, 0.5, train_cam__batch=32)) == {}


def test_numbers_compare_by_value():
    more = {"train_cam__crop": 320.0, "train_cam__seed": 3}
    assert measured("2", run_of(ONE, 0.5, **more))


def test_table_12_is_read_from_the_tables_of_experiments():
    cell = cell_of("12", "sheep", "IoU")
    text = "source,class,iou\nval,cat,0.9\ntest,sheep,0.8\nval,sheep,0.7\n"
    wanted = []
    run = replace(run_of(cell, 0), name="exp")
    reports = {path: report for path, report in run.reports.items() if path != cell.figure.file}
    run = replace(run, reports=reports, fetch=lambda path: wanted.append(path) or text)
    found = measured("12", run)
    assert {key: entry.value for key, entry in found.items()} == {
        ("cat", "IoU"): pytest.approx(90),
        ("sheep", "IoU"): pytest.approx(70),
    }
    assert set(wanted) == {cell.figure.file}
    # No table of a run that does not match is asked for: it may have to come from a remote.
    wanted.clear()
    run.lock["stages"]["train_cam"]["params"]["params.yaml"]["train_cam"]["crop"] = 448
    assert measured("12", run) == {} and wanted == []


def test_figures_without_a_value_stay_blank():
    for value in (None, float("nan"), "much"):
        assert measured("2", run_of(ONE, value)) == {}
    assert measured("2", replace(run_of(ONE, 0.5), reports={})) == {}


def test_what_an_experiment_left_untouched_does_not_count():
    run = run_of(ONE, 0.5)
    run.lock["stages"]["export_cams"]["outs"][0]["md5"] = "made anew"
    assert measured("2", run) == {}


def test_the_newest_of_several_runs_counts():
    found = [
        run_of(ONE, 0.50, name="old", when=1),
        run_of(ONE, 0.52, name="new", when=3, train_cam__optimizer__profile="custom"),
        run_of(ONE, 0.51, name="middle", when=2),
    ]
    entry = measured("2", *found)["DeepLabCAM", "ResNet-101"]
    assert entry == tables.Measured(pytest.approx(52), "new", "custom", 3)
    grid = tables.measure(PAPER.table("2"), found, PAPER)
    note = "here, DeepLabCAM, ResNet-101: new, optimizer profile custom, newest of 3 runs"
    assert note in tables.text(PAPER.table("2"), grid)


def test_an_experiment_that_was_applied_to_the_workspace_is_one_run():
    run = run_of(ONE, 0.5, name="exp")
    entry = measured("2", run, replace(run, name="workspace", when=9))
    assert [e.matching for e in entry.values()] == [1]


def test_text_has_the_paper_s_figure_over_ours():
    table = PAPER.table("2")
    grid = tables.measure(table, [run_of(ONE, 0.5678)], PAPER)
    rows = [line.split() for line in tables.text(table, grid).splitlines()]
    assert rows[0][:2] == ["Table", "2."]
    place = next(i for i, row in enumerate(rows) if row[:2] == ["DeepLabCAM", "paper"])
    assert rows[place][2:] == ["54.89", "57.11", "58.35", "56.91", "63.09", "62.48", "61.11"]
    assert rows[place + 1] == ["here", "-", "56.78", "-", "-", "-", "-", "-"]
    # Methods of others have no line of ours.
    text = tables.text(PAPER.table("11"), tables.measure(PAPER.table("11"), [], PAPER))
    assert sum(line.split()[:1] == ["here"] for line in text.splitlines()) == 4


@pytest.mark.parametrize("name", [table.name for table in PAPER.tables])
def test_markdown_rows_have_as_many_cells_as_the_header(name):
    table = PAPER.table(name)
    text = tables.markdown(table, tables.measure(table, [], PAPER))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {len(table.columns) + 3}
    assert text.startswith(f"## {table.heading}\n")
    assert all(f"- {note}" in text for note in table.notes)


def test_csv_has_a_line_a_cell():
    grids = [tables.measure(table, [run_of(ONE, 0.5)], PAPER) for table in PAPER.tables]
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(PAPER.tables, grids))))
    assert len(rows) == sum(len(t.rows) * len(t.columns) for t in PAPER.tables)
    filled = [row for row in rows if row["measured"]]
    assert {row["table"] for row in filled} == {"2", "7", "11"}
    assert filled[0] | {} == {
        "table": "2",
        "row": "DeepLabCAM",
        "column": "ResNet-101",
        "paper": "57.11",
        "measured": "50.0000",
        "run": "workspace",
        "optimizer_profile": "paper",
        "matching_runs": "1",
    }
    cow = next(row for row in rows if row["row"] == "cow")
    assert cow["paper"] == cow["measured"] == "" and cow["matching_runs"] == "0"


def main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["isim", "tables", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with the run of one cell, and without git."""
    run = run_of(ONE, 0.4321)
    for path, report in run.reports.items():
        data = json.dumps(report)
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(data)
        for stage in run.lock["stages"].values():
            for out in stage["outs"]:
                if out["path"] == path:
                    out["md5"] = hashlib.md5(data.encode()).hexdigest()
    with (tmp_path / "dvc.lock").open("w") as file:
        YAML(typ="safe").dump(run.lock, file)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_reads_the_workspace(workspace, monkeypatch, capsys):
    code, out, err = main(monkeypatch, capsys, "--table", "2")
    assert code == 0 and "43.21" in out and out.count("Table 2.") == 1
    assert "DVC experiments cannot be read" in err and err.count("\n") == 1
    assert main(monkeypatch, capsys, "--table", "3")[1].count("43.21") == 0
    code, out, _ = main(monkeypatch, capsys)
    assert [name for name in range(1, 13) if f"Table {name}. " not in out] == []
    assert "Figure 4. " in out and "Section 4.1. " in out
    assert "| 43.21 |" in main(monkeypatch, capsys, "--table", "2", "--markdown")[1]
    code, out, _ = main(monkeypatch, capsys, "--table", "2", "--csv")
    assert "2,DeepLabCAM,ResNet-101,57.11,43.2100,workspace,paper,1" in out.splitlines()


def test_the_command_prints_commands(monkeypatch, capsys):
    code, out, _ = main(monkeypatch, capsys, "--commands", "--table", "6")
    assert code == 0 and out == tables.commands("6") + "\n"
    assert out.count("dvc exp run --queue") == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--table", "13"), "no table '13'"),
        (("--table", "13", "--commands"), "no table '13'"),
        (("--csv", "--markdown"), "exclude each other"),
    ],
)
def test_wrong_usage_is_one_line(arguments, words, monkeypatch, capsys):
    code, out, err = main(monkeypatch, capsys, *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err
