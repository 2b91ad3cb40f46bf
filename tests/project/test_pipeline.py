"""The pipeline of projects is that of the clone, but for what stands for the code."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from isim.errors import UserError
from isim.experiments import overlay, preset
from isim.project import lock, pipeline

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
    for path in (ROOT / ".dvc/plots").iterdir():
        assert (pipeline.PLOTS / path.name).read_bytes() == path.read_bytes()
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


@pytest.mark.parametrize("root", ["/p/fruit", "/p", "/p/fruit/data", "/p/fruit/data/masks/x", "."])
def test_data_and_results_that_overlap_are_refused(root):
    params = preset.parameters("own-images").prepare.model_copy(update={"root": root})
    with pytest.raises(UserError, match="would lie in each other"):
        pipeline.require_apart(params, Path("/p/fruit"))
    for apart in ("/p/fruit/photos", "/p/photos", "../photos", "data/raw"):
        pipeline.require_apart(params.model_copy(update={"root": apart}), Path("/p/fruit"))


@pytest.mark.parametrize(
    ("root", "labels", "dep"),
    [
        ("/photos", "/tags.csv", "${prepare.labels}"),
        ("/photos", "../tags.csv", "/tags.csv"),
        ("../photos", "../tags.csv", "../tags.csv"),
        ("/photos", "lists/tags.csv", None),
        ("/photos", "/photos/tags.csv", None),
    ],
)
def test_paths_that_were_set_later_are_dependencies_after_an_upgrade(root, labels, dep, tmp_path):
    text = preset.text("own-images")
    before = preset.parameters("own-images").prepare
    (tmp_path / lock.FILE).touch()
    changed = overlay.plain(text)
    changed["prepare"] |= {"root": root, "labels": labels}
    with (tmp_path / "params.yaml").open("w") as file:
        YAML().dump(changed, file)
    given = before.model_copy(update={"root": root, "labels": labels})
    first = before.model_copy(update={"root": root, "labels": "auto"})
    (tmp_path / pipeline.FILE).write_text(pipeline.text(first))
    if dep:
        with pytest.raises(UserError, match=r"tags.csv, which .*run `isim upgrade`"):
            pipeline.require(tmp_path)
    else:
        pipeline.require(tmp_path)
    (tmp_path / pipeline.FILE).write_text(pipeline.text(given))
    pipeline.require(tmp_path)
    deps = read(pipeline.text(given))["stages"]["prepare"]["deps"]
    assert deps == ["isim.lock", "${prepare.root}", *([dep] if dep else [])]
    # One may write paths oneself, too; a clone has no lock.
    own = pipeline.text(given).replace("${prepare.root}", root)
    (tmp_path / pipeline.FILE).write_text(own)
    pipeline.require(tmp_path)
    (tmp_path / pipeline.FILE).write_text(pipeline.COPY.read_text())
    with pytest.raises(UserError, match="photos, which"):
        pipeline.require(tmp_path)
    (tmp_path / lock.FILE).unlink()
    pipeline.require(tmp_path)
