"""The paper's experiments: its figures, parameters that exist, networks that build, commands."""

import fnmatch
import itertools
import re
import shlex
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides
from torch import nn

from isim import params
from isim.data.sources.voc import CLASSES
from isim.experiments import cells, overlay, preset, tables
from isim.models import affinity, cam, segmenter
from isim.params import flatten

DOCUMENTATION = Path(__file__).parents[2] / "docs/experiments.md"
PAPER = cells.load()


TABLES = {table.name: table for table in PAPER.tables}


def cells_of(*chosen):
    return [c for table in chosen for c in itertools.chain(*table.cells) if c.figure]


def first_of(table):
    """The first cell of each row."""
    return [row[0] for row in TABLES[table].cells]


# Spec 9, row after row.
FIGURES = {
    "1": "95.86 96.35 96.58 97.46 97.96 98.49 98.61 93.52 93.33 93.95 95.44 96.38 96.2 96.31",
    "2": "48.93 50.33 50.83 53.49 57.78 57.33 54.75 54.89 57.11 58.35 56.91 63.09 62.48 61.11",
    "3": "48.93 54.30 53.75 47.59 53.01 52.41",
    "4": "48.14 52.75 51.90 46.60 51.32 50.56",
    "5": "53.18 59.90 58.74 50.72 57.11 57.01",
    "6": "57.52 57.78 55.34 54.94 62.86 63.09 57.94 56.26",
    "7": "48.93 50.33 50.83 53.49 57.78 57.33 54.75 54.89 57.11 58.35 56.91 63.09 62.48 61.11 "
    "74.25 76.40 78.54 75.65 76.78 77.47 79.10 74.83 77.09 79.41 75.97 77.29 77.93 79.64",
    "8": "67.87 70.51 72.28 69.77 73.52 74.90 74.76 67.89 71.45 72.41 69.88 73.25 74.98 74.90",
    "9": "69.09 70.51 71.54 70.39 73.55 73.70 73.37 69.46 71.45 71.62 70.43 73.39 74.50 73.50",
    "10": "68.64 70.60 72.60 68.83 70.38 72.94",
    "11": "48 59.7 61.7 63.7 48.3 65.9 63.5 64.8 - - 64.9 65.3 - - 64.1 64.3 55.4 63.4 64.5 65.7 "
    "58.4 66.4 66.1 66.8 61.85 72.46 66.9 67.7 - - 68.7 69.3 57.11 77.09 70.61 70.38 "
    "- - 70.4 70.7 69.4 71.6 70.9 70.8 - - 71.2 71.4 57.11 77.09 70.51 71.45 - - 69.5 71.6 "
    "69.4 71.6 71.0 71.8 62.45 74.67 71.9 72.2 62.48 77.93 72.60 72.94 62.48 77.93 74.90 74.98",
    "12": "93.07 89.51 37.46 84.24 63.12 72.56 91.70 87.14 92.16 37.49 - "
    "66.95 88.32 85.73 84.89 83.48 60.10 85.77 57.01 74.88 53.77",
}


@pytest.mark.parametrize("name", TABLES)
def test_the_figures_are_those_of_the_specification(name):
    found = [cell.paper for row in TABLES[name].cells for cell in row]
    expected = [None if w == "-" else float(w) for w in FIGURES.get(name, "").split()]
    assert found == (expected or [None] * len(found))


def test_both_figures_and_the_sweep_are_there():
    rounds = [cell.figure.where for cell in TABLES["fig5"].cells[1]]
    assert rounds == [{"epoch": str(epoch)} for epoch in (5, 15, 25, 35, 45)]
    rules = [cell.parameters for cell in first_of("fig4")]
    every = [p["train_cam.round_every"] for p in rules if "train_cam.round_every" in p]
    assert every == [2, 5, 10, 25, 50]
    assert [p["train_cam.round_rule"] for p in rules] == ["frequency"] * 5 + ["convergence"]
    swept = [cell.parameters["train_cam.threshold"] for cell in first_of("sec4.1")]
    assert swept == [round(0.1 + 0.05 * step, 2) for step in range(11)]


def test_rows_and_columns_set_what_they_are_called():
    def cell(table, row, column):
        found = TABLES[table]
        return found.cells[found.rows.index(row)][found.columns.index(column)]

    one = cell("4", "val", "UNetCAM Learnable")
    assert one.figure.key == "val.cam_miou"
    assert one.matched["train_cam.method"] == "unetcam_learnable"
    assert one.matched["train_cam.split"] == "train"
    assert one.matched["prepare.source"] == "voc"
    assert cell("3", "train", "CAM").figure.key == "trainaug.cam_miou"
    assert cell("6", "CAM", "448×448").matched["train_cam.crop"] == 448
    own, common = (cell(table, "val", "ResNeSt-200").matched for table in "89")
    assert own["train_cam.encoder"] == common["train_cam.encoder"] == "resnest200e"
    assert own["train_affinity.encoder"] == own["train_segmenter.encoder"] == "resnest200e"
    assert common["train_segmenter.encoder"] == "resnet101.tv_in1k"
    assert cell("10", "val", "ResNet-50").matched["train_segmenter.method"] == "deeplabv2"
    # A seed depends on neither AffinityNet nor a segmenter.
    assert not [name for name in one.matched if "affinity" in name or "segmenter" in name]
    classes = [cell.figure.where["class"] for cell in first_of("12")]
    assert classes == ["background", *CLASSES]


def test_every_parameter_exists_and_every_pattern_is_of_one():
    """A misspelt one would compare what it is to leave out, and nobody would notice."""
    tree = overlay.plain(Path(cells.__file__).with_name("paper.yaml").read_text())
    names = {name for cell in cells_of(*PAPER.tables) for name in (*cell.parameters, *cell.matched)}
    names |= {PAPER.profile["parameter"], PAPER.counted["trained"], *tree["unused"]}
    names |= {name for needs in PAPER.profile["needs"].values() for name in needs}
    # The base has all parameters; `label_sets`, a list, is one of its own.
    assert names <= PAPER.values.keys()
    patterns = {*tree["not_compared"]}
    for figure in tree["figures"].values():
        patterns |= {*figure.get("compared", ()), *figure.get("not_compared", ())}
    for meant in tree["unused"].values():
        patterns |= {*itertools.chain(*meant.values())}
    assert [p for p in patterns if not fnmatch.filter(PAPER.values, p)] == []


@pytest.fixture(scope="module")
def combinations(tmp_path_factory):
    """Parameters of every experiment, made by DVC's own parser from the commands."""
    path = tmp_path_factory.mktemp("combinations") / "params.yaml"
    made, first = [], preset.text(PAPER.preset)
    for command in cells.commands(None).splitlines()[1:-1]:
        path.write_text(first)
        words = itertools.pairwise(shlex.split(command))
        apply_overrides(path, [value for flag, value in words if flag == "-S"])
        made.append(params.load(path))
    return made


def test_every_combination_is_valid_and_what_its_cells_want(combinations):
    found = cells.experiments(PAPER.tables)
    assert len(found) == len(combinations) >= 40
    for experiment, made in zip(found, combinations, strict=True):
        values = flatten(made.model_dump(mode="json"))
        for name, wanted in experiment.parameters.items():
            assert tables.equal(values[name], wanted), name


def networks(made):
    """Modules and configurations of the networks of an experiment."""
    yield cam, cam.configure(made.train_cam, CLASSES)
    yield affinity, affinity.configure(made.train_affinity)
    yield segmenter, segmenter.configure(made.train_segmenter, CLASSES)


def test_every_network_builds(combinations, monkeypatch):
    # Weights are not drawn, which takes most of the time; what they are does not matter here.
    for name in (name for name in dir(nn.init) if name.endswith("_") and name[0] != "_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    distinct = dict.fromkeys(pair for made in combinations for pair in networks(made))
    trained = [config for module, config in distinct if module is cam]
    assert len({config.encoder for config in trained}) == 7
    assert {config.method for config in trained} == set(params.METHODS) - {"frozen"}
    for module, config in distinct:
        module.build(config)


@pytest.mark.parametrize("name", [None, *TABLES])
def test_every_cell_has_an_experiment_and_no_experiment_is_there_twice(name):
    chosen = PAPER.chosen(name)
    found = cells.experiments(chosen)
    for cell in cells_of(*chosen):
        assert any(
            cell.figure.stage in experiment.stages
            and all(experiment.parameters.get(k) == v for k, v in cell.parameters.items())
            for experiment in found
        )
    assert len({repr(sorted(e.parameters.items())) for e in found}) == len(found)


def test_commands_of_a_table():
    lines = cells.commands("4").splitlines()
    assert lines[0] == f"isim preset {PAPER.preset}" and lines[-1] == "dvc queue start"
    assert lines[2] == (
        "dvc exp run --queue evaluate -S train_cam.method=unetcam_learnable "
        "-S train_cam.split=train -S 'export_cams.splits=[train,val]'"
    )
    assert len(lines) == 5
    # The walk after DeepLabCAM gives its seeds, too; CAM needs runs of its own.
    stages = [line.split(" -S")[0] for line in cells.commands("7").splitlines()[1:-1]]
    queued = "dvc exp run --queue evaluate"
    assert stages == [queued] * 7 + [f"{queued} random_walk"] * 7
    # Runs predict what the server scores, and none is there for another `score_every` alone.
    assert PAPER.values["train_segmenter.eval_splits"] == ["val", "test"]
    assert not re.search("eval_splits|score_every", cells.commands(None))


def test_the_runs_of_figure_4_have_names_by_which_they_are_drawn():
    def names(table):
        return re.findall(r"--queue --name (\S+)", cells.commands(table))

    named = [f"fig4-every-{every}-epochs" for every in (2, 5, 10, 25, 50)] + ["fig4-on-convergence"]
    assert names("fig4") == named and names("2") == []
    assert cells.commands("fig4").count("--queue") == len(named)
    # Among all tables they keep their names, whatever else these runs are for.
    assert sorted(names(None)) == sorted(named)
    assert f"    dvc plots diff {' '.join(named)}\n" in DOCUMENTATION.read_text()


def test_values_are_written_as_dvc_reads_them():
    for value, text in ((True, "true"), (0.15, "0.15"), ([{"name": "a"}], "[{name:a}]")):
        assert cells.literal(value) == text


def test_the_documentation_shows_these_commands():
    text = DOCUMENTATION.read_text()
    for name in TABLES:
        command = f"isim tables --commands --table {name}"
        block = f"    {command}\n\n```sh\n{cells.commands(name)}\n```\n"
        assert block in text, f"docs/experiments.md must show what `{command}` prints"
