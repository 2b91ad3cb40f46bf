"""The lock: a project's results come from one isim."""

import pytest
from ruamel.yaml import YAML

from isim.errors import UserError
from isim.project import lock
from isim.runtime import identity


def test_a_folder_without_a_lock_is_a_clone(tmp_path):
    lock.require(tmp_path)


def test_another_version_or_other_code_is_refused_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / lock.FILE).write_text(lock.text())
    lock.require(tmp_path)
    for name, other in (("version", lambda _: "9.9"), ("identity.of_code", lambda: "other")):
        with monkeypatch.context() as changed:
            changed.setattr(f"isim.project.lock.{name}", other)
            with pytest.raises(UserError, match=r"isim.lock.*isim upgrade") as error:
                lock.require(tmp_path)
        text = str(error.value)
        assert len(text) < 300 and ("9.9" in text or "other" in text)


def test_the_code_is_that_of_all_stages_and_of_nothing_else():
    counted = {path.relative_to(identity.PACKAGE).as_posix() for path in identity.code_files()}
    stages = {path.name for path in (identity.PACKAGE / "stages").glob("*.py")}
    assert {name[7:] for name in counted if name.startswith("stages/")} == stages
    assert {"data/sources/folder.py", "labels/crf/kernel.cpp", "params.py"} <= counted
    aside = ("cli.py", "project/", "experiments/")
    assert not [name for name in counted if name.startswith(aside)]


def test_all_that_the_clone_s_stages_depend_on_is_counted():
    clone = identity.PACKAGE.parent
    stages = YAML(typ="safe").load((clone / "dvc.yaml").read_text())["stages"].values()
    deps = {clone / dep for stage in stages for dep in stage["deps"] if dep.startswith("isim/")}
    files = {path for dep in deps for path in (dep.rglob("*") if dep.is_dir() else [dep])}
    files = {path for path in files if path.is_file() and "__pycache__" not in path.parts}
    assert {".py", ".cpp", ".j2", ".js", ".css"} == {path.suffix for path in files}
    assert files <= set(identity.code_files())
