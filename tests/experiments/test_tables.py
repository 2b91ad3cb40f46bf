"""Tables: which run fills which cell, blanks, the three forms, wrong names."""

import csv
import io
import json
import re
import signal
import sys
from dataclasses import replace

import pytest

from isim import cli
from isim.experiments import cells, tables
from isim.experiments.runs import Run
from isim.params import SHARED
from isim.runtime import figures, identity

PAPER = cells.load()
TABLES = {table.name: table for table in PAPER.tables}


def cell_of(name, row, column):
    table = TABLES[name]
    return table.cells[table.rows.index(row)][table.columns.index(column)]


def run_of(cell, value, *, name="workspace", when=1.0, images=None, counts=None, **changes):
    """A run of the preset with a cell's parameters and its figure.

    `images` are those scored and `counts` those of splits, by default whole splits; `changes` are
    dotted with two underscores, None takes a parameter away.
    """
    named = {key.split(".")[0] for key in cell.matched}
    flat = {k: v for k, v in PAPER.values.items() if k.split(".")[0] in named}
    flat |= cell.parameters
    flat |= {key.replace("__", "."): new for key, new in changes.items()}
    sections = cells.nest({key: new for key, new in flat.items() if new is not None})
    figure = cell.figure
    scored = {figure.images: images or PAPER.images[figure.scored]} if figure.images else {}
    report = cells.nest({figure.key: value} | scored)
    if figure.where:
        report = [figure.where | {figure.key: str(value)}]
    known = PAPER.images | (counts or {})
    counted = {PAPER.counted["key"].format(split=split): number for split, number in known.items()}
    reports = {figure.file: report, PAPER.counted["file"]: counted}
    lock, before = {}, {}
    # In the order of the pipeline; each reads what the one before wrote.
    for stage in [s for s in PAPER.stages if s in sections]:
        blocks = [block for block, carriers in SHARED.items() if stage in carriers]
        # A figure's sections may lack a block that nothing of it depends on.
        own = {key: sections[key] for key in (stage, *blocks) if key in sections}
        if stage == "train_affinity":
            own["random_walk.affinity"] = sections["random_walk"].get("affinity")
        after = {f"data/{stage}": f"{stage}-{own}"}
        written = {figure.file: f"{value}-{name}"} if stage == figure.stage else {}
        if stage == "prepare":
            written[PAPER.counted["file"]] = str(counted)
        record = {
            "params": {"params.yaml": own},
            "deps": [{"path": path, "md5": md5} for path, md5 in before.items()],
            "outs": [{"path": p, "md5": md5} for p, md5 in (after | written).items()],
        }
        lock |= {out["path"]: (record, out["md5"]) for out in record["outs"]}
        before = after
    return Run(name, when, lock, reports)


def measured(table, *found):
    return tables.measure(TABLES[table], found, PAPER)


ONE = cell_of("2", "DeepLabCAM", "ResNet-101")


@pytest.mark.parametrize("name", [name for name in TABLES if name != "11"])
def test_a_run_fills_its_cell_and_no_other(name):
    table = TABLES[name]
    entry = tables.Measured(pytest.approx(51.234), "workspace", "paper", 1)
    for row, line in zip(table.rows, table.cells, strict=True):
        for column, cell in zip(table.columns, line, strict=True):
            if cell.figure.file:
                assert measured(name, run_of(cell, 0.51234)) == {(row, column): entry}


def test_table_11_takes_the_figures_of_ours():
    found = measured("11", run_of(cell_of("8", "val", "ResNeSt-200"), 0.7))
    assert set(found) == {("ISIM, DeepLabv3 (ResNeSt-200)", "val")}


def named(section, names):
    return {f"{section}.{name}" for name in names.split()}


# A cell of every figure, with parameters of which each alone makes another figure of it.
NETWORK = "split encoder weights output_stride input_norm crop batch epochs "
DEEPLABCAM = {"prepare.source"} | named(
    "train_cam",
    NETWORK + "method encoder_norm atrous_rates decoder_channels warmup_epochs round_rule "
    "segmentation_weight scales flip threshold",
)
DEEPLABCAM |= {name for name in PAPER.values if name.startswith("crf.")}
TRAINED = DEEPLABCAM | {"train_cam.round_every"}
CAMS = TRAINED | named("export_cams", "scales flip stride")
SEEDS = CAMS | {"evaluate.threshold"}
WALK = CAMS | named(
    "train_affinity",
    NETWORK + "stride radius foreground_threshold background_threshold rate head_factor momentum "
    "weight_decay poly_power",
)
WALK |= named("random_walk", "affinity beta steps_log2 background alpha")
REFINED = WALK | {"random_walk.crf_after"}
SEGMENTER = REFINED | named(
    "train_segmenter",
    NETWORK + "method encoder_norm decoder_channels scale_min scale_max optimizer.momentum "
    "optimizer.weight_decay optimizer.rate optimizer.head_factor optimizer.poly_power test_scales "
    "test_flip",
)
DEPENDS = {
    ("1", "train", "ResNet-101"): TRAINED,
    ("1", "val", "ResNet-101"): TRAINED | {"train_cam.eval_split"},
    ("2", "DeepLabCAM", "ResNet-101"): SEEDS,
    ("5", "val", "UNetCAM Learnable"): SEEDS - {"train_cam.atrous_rates"},
    ("7", "DeepLabCAM+RW", "ResNet-101"): WALK,
    ("7", "DeepLabCAM+RW+CRF", "ResNet-101"): REFINED,
    ("8", "val", "ResNet-101"): SEGMENTER,
    ("10", "val", "ResNet-101"): SEGMENTER - {"train_segmenter.decoder_channels"},
    ("12", "cat", "IoU"): SEGMENTER,
    ("fig4", "on convergence", "pseudo-label of the last round"): DEEPLABCAM
    | named("train_cam.convergence", "patience tolerance cap"),
    ("sec4.1", "0.40", "at the best threshold"): SEEDS
    | named("evaluate", "sweep_start sweep_stop sweep_step"),
}


@pytest.mark.parametrize("place", DEPENDS)
def test_a_run_with_another_value_of_what_a_figure_depends_on_fills_nothing(place):
    """And one with another value of anything else fills the cell as before."""
    cell, wanted = cell_of(*place), DEPENDS[place]
    sections = {name.split(".")[0] for name in wanted}
    listed = set().union(*DEPENDS.values())
    for name, value in PAPER.values.items():
        if name.split(".")[0] not in sections or name.endswith("optimizer.profile"):
            continue
        # A parameter that is new to these lists counts until paper.yaml says otherwise.
        if name in cell.matched and name not in listed:
            continue
        other = not value if isinstance(value, bool) else "other"
        run = run_of(cell, 0.5, **{name.replace(".", "__"): other})
        assert (place[1:] not in measured(place[0], run)) == (name in wanted), name


@pytest.mark.parametrize(
    ("changes", "fills"),
    [
        ({}, True),
        ({"train_cam__split": "train"}, False),
        ({"train_cam__flip": 1}, False),
        ({"evaluate__threshold": None}, False),
        ({"counts": {"trainaug": 562}}, False),
        ({"counts": {"trainaug": None}}, False),
        ({"images": 562}, False),
        # Numbers compare by value.
        ({"train_cam__crop": 320.0, "train_cam__seed": 3}, True),
    ],
)
def test_another_run_fills_nothing(changes, fills):
    assert bool(measured("2", run_of(ONE, 0.5, **changes))) == fills


def test_splits_are_counted_where_a_figure_has_no_count_of_its_own():
    """Classification of a part of val, or the IoU of one class on it."""
    for place in (("1", "val", "ResNet-50"), ("12", "cat", "IoU")):
        cell = cell_of(*place)
        # A split that neither was trained on nor scored does not matter.
        for split, fills in (("val", False), ("trainaug", False), ("train", True)):
            found = measured(place[0], run_of(cell, 0.9, counts={split: 240}))
            assert set(found) == ({place[1:]} if fills else set())
        run = run_of(cell, 0.9)
        del run.reports[PAPER.counted["file"]]
        assert measured(place[0], run) == {}


def test_a_profile_brings_what_it_needs():
    official = {"train_cam__optimizer__profile": "official"}
    assert measured("2", run_of(ONE, 0.5, **official)) == {}
    found = measured("2", run_of(ONE, 0.5, **official, train_cam__batch=32))
    assert [entry.profile for entry in found.values()] == ["official"]
    assert measured("2", run_of(ONE, 0.5, train_cam__batch=32)) == {}


def test_table_12_is_read_from_the_tables_of_experiments():
    cell = cell_of("12", "sheep", "IoU")
    text = "source,class,iou\nval,cat,0.9\ntest,sheep,0.8\nval,sheep,0.7\n"
    wanted = []
    run = replace(run_of(cell, 0), fetch=lambda path: wanted.append(path) or text)
    del run.reports[cell.figure.file]
    found = {row: entry.value for (row, _), entry in measured("12", run).items()}
    assert found == {"cat": pytest.approx(90), "sheep": pytest.approx(70)}
    assert set(wanted) == {cell.figure.file}
    # No table of a run that does not match is asked for: it may have to come from a remote.
    wanted.clear()
    run.lock["data/train_cam"][0]["params"]["params.yaml"]["train_cam"]["crop"] = 448
    assert measured("12", run) == {} and wanted == []


def test_figures_without_a_value_stay_blank():
    for value in (None, float("nan"), "much"):
        assert measured("2", run_of(ONE, value)) == {}
    assert measured("2", replace(run_of(ONE, 0.5), reports={})) == {}


def test_what_an_experiment_left_untouched_does_not_count():
    run = run_of(ONE, 0.5)
    run.lock["data/export_cams"] = (run.lock["data/export_cams"][0], "made anew")
    assert measured("2", run) == {}


def test_the_newest_of_several_runs_counts():
    found = [
        run_of(ONE, 0.50, name="old", when=1),
        run_of(ONE, 0.52, name="new", when=3, train_cam__optimizer__profile="custom"),
        run_of(ONE, 0.51, name="middle", when=2),
    ]
    entries = measured("2", *found)
    wanted = tables.Measured(pytest.approx(52), "new", "custom", 3)
    assert entries == {("DeepLabCAM", "ResNet-101"): wanted}
    note = "here, DeepLabCAM, ResNet-101: new, optimizer profile custom, newest of 3 runs"
    assert note in tables.text(TABLES["2"], entries)
    # An experiment that was applied to the workspace is one run.
    entries = measured("2", found[0], replace(found[0], name="workspace", when=9))
    assert [entry.matching for entry in entries.values()] == [1]


def test_text_has_the_paper_s_figure_over_ours():
    text = tables.text(TABLES["2"], measured("2", run_of(ONE, 0.5678)))
    rows = [line.split() for line in text.splitlines()]
    assert rows[0][:2] == ["Table", "2."]
    place = next(i for i, row in enumerate(rows) if row[:2] == ["DeepLabCAM", "paper"])
    assert rows[place][2:] == ["54.89", "57.11", "58.35", "56.91", "63.09", "62.48", "61.11"]
    assert rows[place + 1] == ["here", "-", "56.78", "-", "-", "-", "-", "-"]
    # Methods of others have no line of ours.
    text = tables.text(TABLES["11"], {})
    assert sum(line.split()[:1] == ["here"] for line in text.splitlines()) == 4


@pytest.mark.parametrize("table", PAPER.tables, ids=list(TABLES))
def test_markdown_rows_have_as_many_cells_as_the_header(table):
    text = tables.markdown(table, {})
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {len(table.columns) + 3}
    assert text.startswith(f"## {table.heading}\n")
    assert all(f"- {note}" in text for note in table.notes)
    assert not re.search(r"\b(spec|design|issue)\b", text), "these are documents of ours"


def test_csv_has_a_line_a_cell():
    found = [measured(name, run_of(ONE, 0.5)) for name in TABLES]
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(PAPER.tables, found))))
    assert len(rows) == sum(len(t.rows) * len(t.columns) for t in PAPER.tables)
    filled = [row for row in rows if row["measured"]]
    assert {row["table"] for row in filled} == {"2", "7", "11"}
    entry = "2 DeepLabCAM ResNet-101 57.11 50.0000 workspace paper 1"
    assert list(filled[0].values()) == entry.split()
    cow = next(row for row in rows if row["row"] == "cow")
    assert cow["paper"] == cow["measured"] == "" and cow["matching_runs"] == "0"


@pytest.fixture
def printed(monkeypatch, capsys):
    """A function that runs `isim tables`: exit code, output and errors."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["isim", "tables", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return (stop.value.code, *capsys.readouterr())

    return main


def test_the_command_reads_the_workspace_and_prints_commands(printed, tmp_path, monkeypatch):
    run = run_of(ONE, 0.4321)
    for path, report in run.reports.items():
        figures.write((tmp_path / path).parent, report, 1.5)
        (out,) = (out for out in run.lock[path][0]["outs"] if out["path"] == path)
        out["md5"] = identity.md5(tmp_path / path)
    stages = {str(id(stage)): stage for stage, _ in run.lock.values()}
    (tmp_path / "dvc.lock").write_text(json.dumps({"stages": stages}))
    # There is no git.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    code, out, err = printed("--table", "2")
    assert code == 0 and "43.21" in out and out.count("Table 2.") == 1
    assert "DVC experiments cannot be read" in err and err.count("\n") == 1
    assert printed("--table", "3")[1].count("43.21") == 0
    out = printed()[1]
    assert all(f"{table.heading}\n" in out for table in PAPER.tables)
    assert "Table 12. " in out and "Figure 4. " in out and "Section 4.1. " in out
    assert "| 43.21 |" in printed("--table", "2", "--markdown")[1]
    line = "2,DeepLabCAM,ResNet-101,57.11,43.2100,workspace,paper,1\n"
    assert line in printed("--table", "2", "--csv")[1]
    code, out, _ = printed("--commands", "--table", "6")
    assert code == 0 and out == cells.commands("6") + "\n"
    assert out.count("dvc exp run --queue") == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--table", "13"), r"no table '13'.*1, 2, 3.*fig4"),
        (("--table", "13", "--commands"), "no table '13'"),
        (("--csv", "--markdown"), "exclude each other"),
    ],
)
def test_wrong_usage_is_one_line(arguments, words, printed):
    code, out, err = printed(*arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and re.search(words, err)
