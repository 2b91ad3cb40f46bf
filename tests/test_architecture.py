"""The rules of the house, each a test: layers, code dependencies of stages, one word per stage."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from isim.engine import code_files
from isim.params import Params

ROOT = Path(__file__).parent.parent
PIPELINE = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())
STAGES = list(PIPELINE["stages"])

# Imports go strictly downwards; modules of one level do not know each other, except within
# a package where ALLOWED_INSIDE says so.
LEVELS = [
    {"isim.errors"},
    {"isim.atomic", "isim.pairs", "isim.paper"},
    {"isim.compiled", "isim.distributed"},
    {"isim.params"},
    {
        "isim.engine",
        "isim.journal",
        "isim.tracking",
        "isim.data",
        "isim.models",
        "isim.gpu",
        "isim.labels",
        "isim.metrics",
        "isim.rounds",
        "isim.viz",
        "isim.preset",
        "isim.results",
        "isim.runs",
        "isim.launcher",
    },
    {
        "isim.curves",
        "isim.tables",
        "isim.server",
        "isim.workers",
        "isim.pictures",
        "isim.splits",
        "isim.batches",
        "isim.meter",
    },
    {"isim.affinity_workers", "isim.walk_workers"},
    {"isim.stream"},
    {"isim.regeneration"},
    {"isim.training", "isim.segmenter_training", "isim.prediction"},
    {"isim.stages"},
    {"isim.cli"},
    {"isim.__main__"},
]
ALLOWED_INSIDE = {"isim.data", "isim.models", "isim.labels", "isim.gpu"}
# Editing these never changes an out: reports are written by the stage itself, parameters are
# tracked by value and params.py holds no defaults.
NOT_A_DEPENDENCY = {"isim.cli", "isim.tracking", "isim.viz", "isim.params"}


def path_of(module: str) -> Path:
    base = ROOT.joinpath(*module.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted((ROOT / "isim").rglob("*.py"))
MODULES = {module_of(path) for path in FILES}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text())


def kernels(module: str) -> set[str]:
    """C++ sources that `module` loads."""
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "compiled.library":
            (argument,) = node.args
            assert isinstance(argument, ast.Constant), f"{module}: name the library by a literal"
            found.add(f"isim/cpp/{argument.value}.cpp")
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """Dotted names that `module` imports, lazily or for type checking too."""
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} line {node.lineno}: write absolute imports"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else str(node.module))
    return frozenset(found)


def closure(module: str) -> set[str]:
    """`module` and the modules of isim that it reaches, minus those in NOT_A_DEPENDENCY."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += (imports(name) & MODULES) - NOT_A_DEPENDENCY
    # Packages hold no code (tested below), so they are nothing to depend on.
    return {name for name in seen if path_of(name).name != "__init__.py"}


def outside(module: str) -> set[str]:
    """Top-level names of the libraries that `module` imports."""
    return {name.split(".")[0] for name in imports(module)} - {"isim"}


def level_of(module: str) -> int:
    for level, names in enumerate(LEVELS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return level
    raise AssertionError(f"{module} has no place in LEVELS of {__file__}")


def in_package(module: str, *names: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def violations() -> Iterator[str]:
    for module in sorted(MODULES - {"isim"}):
        for target in sorted(imports(module) & (MODULES - {"isim"})):
            package = ".".join(module.split(".")[:2])
            inside = in_package(target, package) and package in ALLOWED_INSIDE
            if not inside and level_of(target) >= level_of(module):
                yield f"{module} imports {target}"


def test_imports_go_down_the_layers():
    assert list(violations()) == []


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_in_dvc_yaml_equal_the_import_closure(stage):
    modules = closure(f"isim.stages.{stage}")
    sources = {source for name in modules for source in kernels(name)}
    expected = sorted(sources | {str(path_of(name).relative_to(ROOT)) for name in modules})
    found = sorted(dep for dep in PIPELINE["stages"][stage]["deps"] if dep.startswith("isim/"))
    listing = "\n".join(f"      - {name}" for name in expected)
    assert found == expected, f"deps of {stage} in dvc.yaml should be\n{listing}"


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_can_be_resumed_whatever_changes_in_code_that_no_stage_uses(stage):
    files = [path for path in code_files(stage) if path.name != "__init__.py"]
    counted = {module_of(path) for path in files if path.suffix == ".py"}
    assert {path for path in files if path.suffix == ".cpp"} == set(ROOT.glob("isim/cpp/*.cpp"))
    used = {name for each in STAGES for name in closure(f"isim.stages.{each}")}
    assert closure(f"isim.stages.{stage}") <= counted <= used | {"isim.params"}


def test_one_word_per_stage():
    from typer.main import get_command

    from isim.cli import app

    modules = {path.stem for path in (ROOT / "isim/stages").glob("*.py")} - {"__init__"}
    others = {"curves", "preset", "results", "server-archive", "tables"}
    commands = set(get_command(app).commands) - others
    # The list of label sets says what a stage runs for; no stage is handed it.
    assert set(STAGES) == set(Params.model_fields) - {"label_sets"} == modules
    assert {stage.replace("_", "-") for stage in STAGES} == commands
    for name, stage in PIPELINE["stages"].items():
        label_set = " ${item.labels.name}" if "matrix" in stage else ""
        assert stage["cmd"] == f"python -m isim {name.replace('_', '-')}{label_set}"
        assert stage["params"] == [name]
        for out in output_paths(stage):
            if out.startswith("reports/"):
                assert out.startswith(f"reports/{name}/")


def output_paths(stage: dict) -> Iterator[str]:
    for kind in ("outs", "metrics", "plots"):
        for entry in stage.get(kind, []):
            yield entry if isinstance(entry, str) else next(iter(entry))


def test_outs_keep_the_run_cache_working():
    """A plain out without cache, or one that persists, switches DVC's run-cache off."""
    for stage in PIPELINE["stages"].values():
        assert not stage.get("always_changed")
        for entry in stage.get("outs", []):
            options = {} if isinstance(entry, str) else next(iter(entry.values()))
            assert options.get("cache", True) and not options.get("persist", False)


def test_packages_hold_no_code():
    for path in (ROOT / "isim").rglob("__init__.py"):
        for node in ast.parse(path.read_text()).body:
            constant = isinstance(getattr(node, "value", None), ast.Constant)
            assert constant, f"{path}: stages do not depend on it, so it must hold no code"


def test_only_tracking_imports_mlflow():
    assert {name for name in MODULES if "mlflow" in outside(name)} == {"isim.tracking"}


def test_only_the_crf_imports_pydensecrf():
    assert {name for name in MODULES if "pydensecrf" in outside(name)} == {"isim.labels.crf"}


def test_one_module_communicates_and_one_starts_processes():
    users = {n for n in MODULES if any(in_package(m, "torch.distributed") for m in imports(n))}
    assert users == {"isim.distributed", "isim.launcher"}


def test_labels_and_metrics_know_no_paths_devices_or_logging():
    for name in MODULES:
        if in_package(name, "isim.labels", "isim.metrics"):
            assert not {"pathlib", "os", "io", "logging", "torch", "tqdm"} & outside(name), name


def test_workers_do_not_load_torch():
    entries = ("isim.workers", "isim.affinity_workers", "isim.walk_workers")
    reached = {library for e in entries for name in closure(e) for library in outside(name)}
    assert not {"torch", "torchvision", "timm", "segmentation_models_pytorch"} & reached


def test_only_stages_build_paths_from_parameters():
    for name in MODULES:
        # `isim.server` reads the prepared data as a stage does, and is none.
        if not in_package(name, "isim.stages", "isim.params", "isim.server"):
            used = {node.id for node in ast.walk(tree_of(name)) if isinstance(node, ast.Name)}
            assert "resolve_path" not in used, name
        if in_package(name, "isim.data", "isim.models", "isim.engine", "isim.regeneration"):
            literals = [n.value for n in ast.walk(tree_of(name)) if isinstance(n, ast.Constant)]
            for text in (text for text in literals if isinstance(text, str)):
                start = text.startswith(("data/", "models/", "reports/"))
                assert not start, f"{name} names the project path {text}"


def test_no_cuda_calls_and_no_pickles():
    for name in MODULES:
        assert not {"pickle", "cPickle", "dill", "joblib"} & outside(name), name
        for node in ast.walk(tree_of(name)):
            if isinstance(node, ast.Attribute):
                called = ast.unparse(node)
                assert node.attr != "cuda" or called.startswith("torch."), f"{name}: {called}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = any(ast.unparse(word) == "weights_only=True" for word in node.keywords)
                assert safe, f"{name} loads pickles"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False", f"{name} allows pickles"


def test_parameters_have_no_defaults():
    """A default would be a value that DVC does not track."""

    def check(model: type[BaseModel]) -> None:
        for key, field in model.model_fields.items():
            assert field.is_required(), f"{model.__name__}.{key} has a default"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                check(field.annotation)

    check(Params)


def test_the_cli_imports_nothing_heavy():
    code = "import sys, isim.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "mlflow", "numpy", "cv2", "dvc", "pydantic", "matplotlib", "ruamel.yaml"}
    assert not heavy & set(done.stdout.split())
