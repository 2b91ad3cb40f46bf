"""The paper's experiments: its figures, parameters that exist, networks that build, commands."""

import fnmatch
import itertools
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from dvc.utils.hydra import apply_overrides
from pydantic import BaseModel
from ruamel.yaml import YAML

from isim import paper, params, preset, tables
from isim.data.voc import CLASSES
from isim.errors import UserError

ROOT = Path(__file__).parent.parent
PAPER = paper.load()
PRESET = preset.folder() / f"{PAPER.preset}.yaml"
CELLS = [cell for table in PAPER.tables for row in table.cells for cell in row if cell.figure]

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


@pytest.mark.parametrize("name", [table.name for table in PAPER.tables])
def test_the_figures_are_those_of_the_specification(name):
    found = [cell.paper for row in PAPER.table(name).cells for cell in row]
    expected = [None if w == "-" else float(w) for w in FIGURES.get(name, "").split()]
    assert found == (expected or [None] * len(found))


def test_both_figures_and_the_sweep_are_there():
    rounds = [cell.figure.where for cell in PAPER.table("fig5").cells[1]]
    assert rounds == [{"epoch": str(epoch)} for epoch in (5, 15, 25, 35, 45)]
    rules = [row[0].parameters for row in PAPER.table("fig4").cells]
    every = [p["train_cam.round_every"] for p in rules if "train_cam.round_every" in p]
    assert every == [2, 5, 10, 25, 50]
    assert [p["train_cam.round_rule"] for p in rules] == ["frequency"] * 5 + ["convergence"]
    swept = [row[0].parameters["train_cam.threshold"] for row in PAPER.table("sec4.1").cells]
    assert swept == [round(0.1 + 0.05 * step, 2) for step in range(11)]


def test_rows_and_columns_set_what_they_are_called():
    def cell(table, row, column):
        found = PAPER.table(table)
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


def test_the_classes_of_table_12_are_voc_s():
    classes = [row[0].figure.where["class"] for row in PAPER.table("12").cells]
    assert classes == ["background", *CLASSES]


def exists(name: str) -> bool:
    """Whether `Params` has the parameter of that dotted name; sections that it has not do."""
    model = params.Params
    for part in name.split("."):
        if part not in model.model_fields:
            return model is params.Params
        inner = model.model_fields[part].annotation
        if not isinstance(inner, type) or not issubclass(inner, BaseModel):
            return True
        model = inner
    return True


def test_every_parameter_exists():
    names = {name for cell in CELLS for name in (*cell.parameters, *cell.matched)}
    assert [name for name in sorted(names) if not exists(name)] == []
    assert exists(PAPER.profile.parameter) and exists(PAPER.counted.trained)
    assert not exists("train_cam.colour") and not exists("train_cam.crf.colour")


def test_every_pattern_is_of_a_parameter():
    """A misspelt one would compare what it is to leave out, and nobody would notice."""
    tree = YAML(typ="safe").load((ROOT / "isim/paper.yaml").read_text())
    values = paper.flatten(PAPER.values)
    patterns = {name: None for name in tree["not_compared"]}
    for figure in tree["figures"].values():
        patterns |= dict.fromkeys((*figure.get("compared", ()), *figure.get("not_compared", ())))
    for name, meant in tree["unused"].items():
        assert name in values
        patterns |= dict.fromkeys(pattern for listed in meant.values() for pattern in listed)
    for pattern in patterns:
        assert fnmatch.filter(values, pattern), pattern
    for needs in PAPER.profile.needs.values():
        assert needs.keys() <= values.keys()


def options(command: str) -> list[str]:
    """The parameters that a line sets, as far as the present sections go."""
    words = shlex.split(command)
    values = [value for flag, value in zip(words, words[1:], strict=False) if flag == "-S"]
    return [v for v in values if v.split("=")[0].split(".")[0] in params.Params.model_fields]


@pytest.fixture(scope="module")
def combinations(tmp_path_factory):
    """Parameters of every experiment, made by DVC's own parser from the commands."""
    path = tmp_path_factory.mktemp("combinations") / "params.yaml"
    made = []
    for command in tables.commands(None).splitlines()[1:-1]:
        path.write_text(PRESET.read_text())
        if changes := options(command):
            apply_overrides(path, changes)
        made.append(params.load(path))
    return made


def test_every_combination_is_valid_and_what_its_cells_want(combinations):
    found = paper.experiments(PAPER.tables)
    assert len(found) == len(combinations) >= 40
    for experiment, made in zip(found, combinations, strict=True):
        values = made.model_dump(mode="json")
        for name, wanted in experiment.parameters.items():
            if name.split(".")[0] in params.Params.model_fields:
                assert tables.equal(paper.dig(values, name), wanted), name


# Sections that a network is built from, with its module and its configuration.
NETWORKS = {
    "train_cam": ("isim.models.cam", "CamConfig"),
    "train_affinity": ("isim.models.affinity", "AffinityConfig"),
    "train_segmenter": ("isim.models.segmenter", "SegmenterConfig"),
}
RENAMED = {"map_stride": "stride"}


def configuration(section: BaseModel, config_class: type) -> object:
    given = {"classes": CLASSES, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    values = {
        field.name: given[field.name]
        if field.name in given
        else getattr(section, RENAMED.get(field.name, field.name))
        for field in fields(config_class)
    }
    return config_class(**values)


@cache
def builds(name: str, config: object) -> bool:
    module = import_module(NETWORKS[name][0])
    with torch.device("meta"):
        network = module.build(config)
    return all(parameter.is_meta for parameter in network.parameters())


def configurations(combinations) -> Iterator[tuple[str, object]]:
    for made in combinations:
        for name in NETWORKS.keys() & params.Params.model_fields.keys():
            module, config_class = NETWORKS[name]
            yield (
                name,
                configuration(getattr(made, name), getattr(import_module(module), config_class)),
            )


def test_every_network_builds(combinations):
    distinct = set(configurations(combinations))
    encoders = {config.encoder for name, config in distinct if name == "train_cam"}
    methods = {config.method for name, config in distinct if name == "train_cam"}
    assert len(encoders) == 7 and methods == set(params.METHODS)
    for name, config in sorted(distinct, key=repr):
        assert builds(name, config), config


@pytest.mark.parametrize("name", [None, *(table.name for table in PAPER.tables)])
def test_every_cell_has_an_experiment_and_no_experiment_is_there_twice(name):
    chosen = PAPER.tables if name is None else (PAPER.table(name),)
    found = paper.experiments(chosen)
    for cell in (cell for table in chosen for row in table.cells for cell in row if cell.figure):
        assert any(
            cell.figure.stage in experiment.stages
            and all(experiment.parameters.get(k) == v for k, v in cell.parameters.items())
            for experiment in found
        )
    assert len({repr(sorted(e.parameters.items())) for e in found}) == len(found)


def test_commands_of_a_table():
    lines = tables.commands("4").splitlines()
    assert lines[0] == f"isim preset {PAPER.preset}" and lines[-1] == "dvc queue start"
    assert lines[2] == (
        "dvc exp run --queue evaluate -S train_cam.method=unetcam_learnable "
        "-S train_cam.split=train -S 'export_cams.splits=[train,val]'"
    )
    assert len(lines) == 5
    # The walk after DeepLabCAM gives its seeds, too; CAM needs runs of its own.
    stages = [line.split(" -S")[0] for line in tables.commands("7").splitlines()[1:-1]]
    assert (
        stages
        == ["dvc exp run --queue evaluate"] * 7 + ["dvc exp run --queue evaluate random_walk"] * 7
    )


def test_runs_predict_what_the_server_scores():
    assert PAPER.values["train_segmenter"]["eval_splits"] == ["val", "test"]
    assert "eval_splits" not in tables.commands(None)


def test_the_runs_of_figure_4_have_names_by_which_they_are_drawn():
    def lines(table):
        return [line for line in tables.commands(table).splitlines() if " --queue " in line]

    named = [line.split()[5] for line in lines("fig4") if line.split()[4] == "--name"]
    assert len(named) == len(lines("fig4"))
    assert named == [
        *(f"fig4-every-{every}-epochs" for every in (2, 5, 10, 25, 50)),
        "fig4-on-convergence",
    ]
    assert not [line for line in lines("2") if "--name" in line]
    # Among all tables they keep their names, whatever else these runs are for.
    assert sorted(line.split()[5] for line in lines(None) if "--name" in line) == sorted(named)
    text = (ROOT / "docs/experiments.md").read_text()
    assert f"    isim curves {' '.join(named)}\n" in text


def test_no_network_is_trained_twice():
    """Two runs with the same training share it: `train_cam` differs in values that count."""

    def trained(experiment):
        section = {k: v for k, v in experiment.parameters.items() if k.startswith("train_cam.")}
        values = paper.flatten(PAPER.values) | section
        return {k: v for k, v in values.items() if k.startswith("train_cam.")}

    for one, other in itertools.combinations(paper.experiments(PAPER.tables), 2):
        differ = {k for k, v in trained(one).items() if trained(other)[k] != v}
        assert differ != {"train_cam.score_every"}


def test_values_are_written_as_dvc_reads_them():
    assert paper.literal(True) == "true"
    assert paper.literal([{"name": "a", "path": "b/c"}]) == "[{name:a,path:b/c}]"
    assert paper.literal(0.15) == "0.15"


def test_the_documentation_shows_these_commands():
    text = (ROOT / "docs/experiments.md").read_text()
    for table in PAPER.tables:
        command = f"isim tables --commands --table {table.name}"
        block = f"    {command}\n\n```sh\n{tables.commands(table.name)}\n```\n"
        assert block in text, f"docs/experiments.md must show what `{command}` prints"


def test_an_unknown_table_is_named():
    with pytest.raises(UserError, match="no table '13'.*1, 2, 3.*fig4") as caught:
        PAPER.table("13")
    assert "\n" not in str(caught.value)
