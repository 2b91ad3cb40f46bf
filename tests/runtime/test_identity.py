"""Digests follow all that a result depends on, and nothing else."""

import os
import shutil
import subprocess
import sys

import pytest

from isim.runtime import identity


def test_the_code_of_a_result_is_all_but_its_presentation_and_other_stages():
    """Every import of a stage is among it: tests/test_architecture.py."""

    def names(stage):
        return {str(path.relative_to(identity.PACKAGE)) for path in identity.code_files(stage)}

    found = names("evaluate")
    assert {"stage.py", "params.py", "runtime/identity.py", "labels/crf/kernel.cpp"} <= found
    assert {name for name in found if name.startswith("stages/e")} == {"stages/evaluate.py"}
    assert not any(name.startswith(("cli.py", "reporting/", "experiments/")) for name in found)
    prepare = names("prepare")
    readers = {name for name in prepare if name.startswith("data/sources/")}
    assert "data/sources/voc.py" in readers
    assert found - prepare == {"stages/evaluate.py"}
    assert prepare - found == {"stages/prepare.py"} | readers


def test_the_digest_of_code_follows_names_and_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "PACKAGE", tmp_path)
    seen = []
    for command in (
        lambda: (tmp_path / "metrics.py").write_text("1"),
        lambda: (tmp_path / "metrics.py").write_text("2"),
        lambda: (tmp_path / "metrics.py").rename(tmp_path / "meter.py"),
        lambda: (tmp_path / "passes").mkdir(),
        lambda: (tmp_path / "meter.py").rename(tmp_path / "passes/meter.py"),
        lambda: (tmp_path / "passes/kernel.cpp").write_text(""),
        lambda: (tmp_path / "cli.py").write_text(""),
    ):
        command()
        seen.append(identity.of_code("evaluate"))
    assert len(set(seen)) == 5
    assert seen[2] == seen[3] and seen[5] == seen[6], "folders and the CLI are no code of a result"


def test_a_page_is_no_code_of_a_stage_but_of_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "PACKAGE", tmp_path)
    (tmp_path / "reporting/page").mkdir(parents=True)
    (tmp_path / "experiments").mkdir()
    seen = []
    for name in (
        "metrics.py",
        "reporting/x.py",
        "reporting/page/index.html.j2",
        "experiments/x.py",
    ):
        (tmp_path / name).touch()
        seen.append((identity.of_code("report"), identity.of_code()))
    assert len({stage for stage, _ in seen}) == 1
    assert len({every for _, every in seen}) == 3 and seen[2] == seen[3]


def test_the_digest_of_parameters_depends_on_every_value():
    tree = {"crf": {"steps": 10, "weights": [4, 3]}, "seed": 1}
    assert identity.digest(tree) == identity.digest({"seed": 1, "crf": dict(tree["crf"])})
    others = [tree | {"seed": 2}, tree | {"crf": {"steps": 10, "weights": [3, 4]}}, {}]
    assert len({identity.digest(other) for other in [tree, *others]}) == 4


def test_md5_is_that_of_dvc(tmp_path):
    data = tmp_path / "data"
    for name in ("b.txt", "a/c.txt", "a.txt", "a/d/ä.txt"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(name)
    (data / "__pycache__").mkdir()
    (data / "__pycache__/x.pyc").write_text("x")
    (tmp_path / ".dvcignore").write_text("__pycache__\n")
    # The process's own `dvc` may be any; this is the one of the environment.
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    subprocess.run([*dvc, "add", "-q", "data"], cwd=tmp_path, check=True)
    assert f"md5: {identity.md5(data)}\n" in (tmp_path / "data.dvc").read_text()
    assert identity.md5(data / "b.txt") == identity.md5_of(b"b.txt")


def renamed(folder):
    (folder / "a").rename(folder / "c")


def touched(folder):
    os.utime(folder / "a", (1, 1))


def rewritten(folder):
    """The same size, and the same time of writing."""
    before = (folder / "a").stat()
    (folder / "a").write_text("y")
    os.utime(folder / "a", ns=(before.st_atime_ns, before.st_mtime_ns))


def deeper(folder):
    (folder / "deep/deeper/new").touch()


@pytest.mark.parametrize("change", [renamed, touched, rewritten, deeper, shutil.rmtree])
def test_times_tell_of_changes_without_a_read(change, tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep/deeper").mkdir(parents=True)
    (folder / "a").write_text("x")
    # A circle, a pipe that nobody writes to, and a link to nothing.
    (folder / "deep/circle").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    (folder / "lost").symlink_to("none")
    places = [folder, tmp_path / "missing"]
    before = identity.of_times(places)
    assert before == identity.of_times(places)
    change(folder)
    assert before != identity.of_times(places)
