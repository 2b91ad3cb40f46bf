"""What is installed: every imported library is declared and pinned, and a wheel is complete."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from support import installs

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = packages_distributions()
# Run, or loaded by a library, rather than imported.
TOOLS = {"codespell", "mkdocs-material", "mkdocstrings", "mypy", "pre-commit", "psycopg2-binary"}
TOOLS |= {"flask-wtf"}
TOOLS |= {"pytest-xdist", "ruff", "setuptools"}


def plain(name):
    """The name of a distribution as PyPI compares it, without a version."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


RUNTIME = {plain(requirement) for requirement in PROJECT["dependencies"]}
DEV = {plain(requirement) for requirement in PROJECT["optional-dependencies"]["dev"]}
# Imported where they are wanted, with a hint to install them.
EXTRAS = {
    plain(requirement)
    for name, extra in PROJECT["optional-dependencies"].items()
    for requirement in extra
    if name != "dev"
}


@cache
def libraries(*folders):
    """Distributions whose packages the files of `folders` import, lazily too."""
    names = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    folders = ("benchmarks", "tests", "tests/support")
    own = {path.stem for folder in folders for path in (ROOT / folder).iterdir()}
    outside = names - sys.stdlib_module_names - own - {"isim"}
    unknown = outside - DISTRIBUTIONS.keys()
    assert not unknown, f"nothing that is installed provides {sorted(unknown)}"
    # A namespace such as ruamel has several distributions: one that is declared is enough.
    return {
        min(map(plain, DISTRIBUTIONS[name]), key=lambda d: d not in RUNTIME | DEV | EXTRAS)
        for name in outside
    }


def test_what_is_imported_is_declared():
    assert libraries("isim") <= RUNTIME | EXTRAS
    assert libraries("tests", "benchmarks") <= RUNTIME | DEV | EXTRAS


def test_what_is_declared_is_imported():
    assert libraries("isim") >= RUNTIME | EXTRAS
    assert libraries("tests", "benchmarks") >= DEV - TOOLS
    assert not RUNTIME & DEV


def test_constraints_are_versions_alone_and_pin_what_is_declared():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pinned = [plain(line) for line in lines]
    assert len(set(pinned)) == len(pinned)
    assert {*pinned} >= RUNTIME | DEV | EXTRAS


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Names in a wheel."""
    return set(zipfile.ZipFile(installs.wheel(tmp_path_factory.mktemp("wheel"))).namelist())


def test_a_wheel_holds_the_code_kernels_paper_presets_and_types(wheel):
    kinds = {".py", ".cpp", ".json", ".yaml", ".typed", ".j2", ".css", ".js", ".html"}
    files = [path for path in (ROOT / "isim").rglob("*") if path.suffix in kinds]
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    assert {name for name in wheel if name.startswith("isim/")} == expected
    for kernel in ("crf", "walk"):
        assert f"isim/labels/{kernel}/kernel.cpp" in wheel
    assert {"isim/py.typed", "isim/experiments/paper.yaml"} <= wheel
    assert any(name.startswith("isim/experiments/presets/") for name in wheel)


def test_hooks_before_a_commit_are_those_of_make_lint():
    config = YAML(typ="safe").load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert [line.strip().removesuffix(" .") for line in recipe[1].splitlines()] == hooks


@pytest.mark.parametrize("folder", ["data", "models"])
def test_git_keeps_of_outs_the_page_about_them_alone(folder, tmp_path):
    def ignored(name):
        command = ["git", "check-ignore", "--quiet", "--no-index", f"{folder}/{name}"]
        return subprocess.run(command, cwd=tmp_path).returncode == 0

    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    assert (ROOT / folder / "README.md").exists()
    assert not ignored("README.md")
    assert ignored("other.md") and ignored("prepared/train.csv") and ignored("a/README.md")
