"""The folder of a project: written whole or not at all, upgraded, and nothing else is touched."""

import shutil
import subprocess

import pytest
from support.photos import put

from isim.errors import UserError
from isim.experiments import overlay
from isim.params import load
from isim.project import choices, folder, lock, pipeline
from isim.project.choices import Wishes


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """Parameters of a project of 12 photographs."""
    base = tmp_path_factory.mktemp("chosen")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISIM_DEVICE", "cpu")
        return choices.make(Wishes(put(base / "photos", 12), weights="none"), base / "project")


@pytest.fixture
def fast(monkeypatch):
    """Makes folders in the place of git's and DVC's repositories, which take seconds."""

    def run(command, where):
        name = ".git" if "git" in command[0] else ".dvc"
        (where / name).mkdir()
        (where / ".dvcignore").touch()

    monkeypatch.setattr(folder, "_run", run)
    monkeypatch.setattr(folder, "_inside_git", lambda git, where: False)


def everything(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_project_has_all_that_dvc_needs_and_git_sees_no_result(chosen, tmp_path):
    root = tmp_path / "below/fruit"
    assert folder.create(root, chosen) == []
    names = {path.name for path in root.iterdir()}
    assert names == {*folder.OURS, "README.md", ".gitignore", ".dvcignore", ".git", ".dvc"}
    assert load(root / "params.yaml") == chosen.params
    assert (root / "dvc.yaml").read_text() == pipeline.text(chosen.params.prepare)
    lock.require(root)
    plots = {path.name for path in (root / ".dvc/plots").iterdir()}
    assert plots == {path.name for path in pipeline.PLOTS.iterdir()}
    stages = overlay.plain((root / "dvc.yaml").read_text())["stages"].values()
    outs = [out for stage in stages for out in stage["outs"] if "${" not in out]
    asked = ["git", "check-ignore", "--no-index", *outs, "mlflow.db", ".isim/resume"]
    ignored = subprocess.run(asked, cwd=root, capture_output=True, text=True).stdout.split()
    assert ignored == [*outs, "mlflow.db", ".isim/resume"]
    status = subprocess.run(["git", "status"], cwd=root, capture_output=True, text=True)
    assert status.returncode == 0


def test_in_another_repository_there_is_one_of_dvc_alone(chosen, tmp_path):
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    folder.create(tmp_path / "fruit", chosen)
    assert not (tmp_path / "fruit/.git").exists()
    assert (tmp_path / "fruit/.dvc/config").exists() and not (tmp_path / ".dvc").exists()


@pytest.mark.parametrize("name", folder.OURS)
def test_a_project_is_never_overwritten(name, chosen, tmp_path, fast):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"already has a {name}"):
        folder.create(tmp_path, chosen)
    assert everything(tmp_path) == {tmp_path / name: b"mine"}


def test_what_is_in_the_folder_stays(chosen, tmp_path, fast):
    for name in ("README.md", ".gitignore", "notes.txt"):
        (tmp_path / name).write_text("mine")
    told = folder.create(tmp_path, chosen)
    assert [line.split("/")[-1].split(" ")[0] for line in told] == ["README.md", ".gitignore"]
    for name in ("README.md", ".gitignore", "notes.txt"):
        assert (tmp_path / name).read_text() == "mine"
    assert (tmp_path / "params.yaml").exists()


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_after_a_failure_all_is_as_it_was(existed, error, chosen, tmp_path, fast, monkeypatch):
    root = tmp_path / "fruit"
    if existed:
        root.mkdir()
        (root / "notes.txt").write_text("mine")
    write = folder.atomic.write_text

    def fail(path, text):
        if path.name == "dvc.yaml":
            raise error
        write(path, text)

    monkeypatch.setattr(folder.atomic, "write_text", fail)
    with pytest.raises(type(error)):
        folder.create(root, chosen)
    assert everything(tmp_path) == ({root / "notes.txt": b"mine"} if existed else {})
    assert [path.name for path in tmp_path.iterdir()] == (["fruit"] if existed else [])


def test_images_inside_of_the_project_stay_out_of_git(chosen, tmp_path, fast):
    prepare = chosen.params.prepare.model_copy(update={"root": str(tmp_path / "fruit/photos")})
    inside = chosen.params.model_copy(update={"prepare": prepare})
    given = choices.Chosen(chosen.yaml, inside, chosen.found, chosen.choices)
    folder.create(tmp_path / "fruit", given)
    assert (tmp_path / "fruit/.gitignore").read_text().endswith("\n/photos/\n")


@pytest.mark.parametrize("place", [".", "fruit", "images/deep/fruit"])
def test_no_project_lies_in_its_images(place, chosen, tmp_path, fast):
    prepare = chosen.params.prepare.model_copy(update={"root": str(tmp_path)})
    inside = chosen.params.model_copy(update={"prepare": prepare})
    given = choices.Chosen(chosen.yaml, inside, chosen.found, chosen.choices)
    with pytest.raises(UserError, match="would lie in each other; make the project outside"):
        folder.create(tmp_path / place, given)
    assert not [*tmp_path.iterdir()]


def test_a_file_cannot_become_a_project(chosen, tmp_path):
    (tmp_path / "fruit").touch()
    with pytest.raises(UserError, match="is a file"):
        folder.create(tmp_path / "fruit", chosen)


@pytest.fixture
def project(chosen, tmp_path, fast):
    folder.create(tmp_path / "fruit", chosen)
    return tmp_path / "fruit"


def test_an_upgrade_of_the_same_isim_changes_nothing(project):
    before = everything(project)
    (line,) = folder.upgrade(project)
    assert line.startswith("nothing to do") and everything(project) == before


def test_an_upgrade_rewrites_the_lock_and_tells_what_follows(project, monkeypatch):
    monkeypatch.setattr("isim.project.lock.identity.of_code", lambda: "newer")
    (line,) = folder.upgrade(project)
    assert "newer" in line and "all stages anew" in line
    lock.require(project)


def test_an_upgrade_brings_pipeline_and_parameters_along_and_keeps_values(project):
    path, pipe = project / "params.yaml", project / "dvc.yaml"
    text = path.read_text()
    assert text.count("  pooling: gap\n") == 1 and text.count("    rounds: 3\n") == 1
    changed = text.replace("    pooling: gap\n", "").replace("    rounds: 3\n", "    rounds: 2\n")
    scales = "    scales:\n      - 0.75\n      - 1.0\n"
    assert changed.count(scales) == 1
    path.write_text(f"{changed.replace(scales, '')}mine: 1\n")
    tree = pipe.read_text()
    own = "  publish:\n    cmd: cp -r data/random_walk /srv\n"
    start = tree.index("\nplots:")
    pipe.write_text(f"{tree[:start]}{own}{tree[start:]}".replace("      - dense_walk\n", ""))
    told = folder.upgrade(project)
    assert [line.split(",")[0] for line in told] == [
        "params.yaml: new",
        "params.yaml: new",
        "params.yaml: gone",
        "dvc.yaml: written anew; `git diff dvc.yaml` shows what is different",
    ]
    params = load(path)
    assert params.train_cam.frozen.rounds == 2 and params.train_cam.frozen.pooling == "gap"
    assert params.train_segmenter.features.scales == (1.0,), "as it was before there were scales"
    assert params.prepare.source == "folder"
    stages = overlay.plain(pipe.read_text())["stages"]
    assert stages.pop("publish")["cmd"].startswith("cp")
    assert stages == overlay.plain(tree)["stages"]
    assert folder.upgrade(project)[0].startswith("nothing to do")


def test_an_upgrade_needs_a_project(tmp_path):
    with pytest.raises(UserError, match="isim init"):
        folder.upgrade(tmp_path)


def test_git_that_fails_is_one_line(chosen, tmp_path):
    (tmp_path / "fruit").mkdir()
    (tmp_path / "fruit/.git").write_text("nonsense")
    with pytest.raises(UserError, match=r"failed in .*fruit"):
        folder.create(tmp_path / "fruit", chosen)
    assert [path.name for path in (tmp_path / "fruit").iterdir()] == [".git"]
    shutil.rmtree(tmp_path / "fruit")
