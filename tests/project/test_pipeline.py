"""The pipeline of projects is that of the clone, but for what stands for the code."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from isim.experiments import preset
from isim.project import pipeline

ROOT = Path(__file__).parents[2]
OURS = (ROOT / "dvc.yaml").read_text()
WRITE = (
    'python -c "from pathlib import Path; from isim.project.pipeline import COPY, template; '
    "COPY.write_text(template(Path('dvc.yaml').read_text()))\""
)


def read(text):
    return YAML(typ="safe").load(text)


def test_the_copy_is_what_the_template_makes_of_the_clone_s():
    assert pipeline.COPY.read_text() == pipeline.template(OURS), f"write it anew: {WRITE}"
    for name in ("class_bars", "confusion_shares", "lines_by_split"):
        ours = (ROOT / f".dvc/plots/{name}.json").read_bytes()
        assert (pipeline.PLOTS / f"{name}.json").read_bytes() == ours
    plots = {path.name for path in pipeline.PLOTS.iterdir()}
    assert plots == {path.name for path in (ROOT / ".dvc/plots").iterdir()}


def test_every_stage_depends_on_the_lock_once_and_on_all_else_that_is_no_code():
    made, ours = read(pipeline.template(OURS)), read(OURS)
    for stage, entry in ours["stages"].items():
        new = made["stages"][stage]
        data = [dep for dep in entry["deps"] if not dep.startswith("isim/")]
        assert new["deps"] == [*data, "isim.lock"], stage
        assert new["cmd"] == entry["cmd"].removeprefix("python -m "), stage
        for key in entry.keys() - {"deps", "cmd"}:
            assert new[key] == entry[key]
    assert {k: v for k, v in made.items() if k != "stages"} == {
        k: v for k, v in ours.items() if k != "stages"
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"source": "folder", "root": "/photos"}, ["isim.lock", "${prepare.root}"]),
        # DVC would look for a folder of this name.
        ({"source": "voc", "root": "$ISIM_DATA"}, ["isim.lock"]),
        ({"source": "folder", "root": "~/photos"}, ["isim.lock"]),
        ({"source": "shapes", "root": "/photos"}, ["isim.lock"]),
    ],
)
def test_prepare_depends_on_the_data(changes, expected):
    params = preset.parameters("tiny").prepare.model_copy(update=changes)
    stages = read(pipeline.text(params))["stages"]
    assert stages["prepare"]["deps"] == expected
    assert all("prepare." not in dep for name in stages for dep in stages[name]["deps"][:1])


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("auto", ["isim.lock", "${prepare.root}"]),
        ("tags.csv", ["isim.lock", "${prepare.root}"]),
        ("/photos/tags.csv", ["isim.lock", "${prepare.root}"]),
        ("/tags/tags.csv", ["isim.lock", "${prepare.root}", "${prepare.labels}"]),
    ],
)
def test_prepare_depends_on_a_label_file_that_lies_elsewhere(labels, expected):
    tiny = preset.parameters("tiny").prepare
    params = tiny.model_copy(update={"source": "folder", "root": "/photos", "labels": labels})
    assert read(pipeline.text(params))["stages"]["prepare"]["deps"] == expected
