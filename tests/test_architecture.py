"""The rules of the house, each a test."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from isim.params import OF_MASKS, SHARED, Params
from isim.runtime import identity

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "isim"
PIPELINE = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())
STAGES = list(PIPELINE["stages"])

# Rooms, the highest first. Imports go strictly downwards: rooms of one line do not know each other.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"api", "project"},
    {"stages"},
    {"stage"},
    {"passes", "training"},
    {"models", "reporting"},
    {"labels", "data", "experiments"},
    {"runtime"},
    {"params"},
    {"metrics", "errors"},
]
# Editing these never changes an out: reports are written by the stage itself, parameters are
# tracked by value and params.py holds no defaults, errors are words.
NOT_A_DEPENDENCY = {"cli", "reporting", "params", "errors"}
# Single values that a stage knows of another's section, beside the shared blocks that it carries.
KNOWN = {
    "train_affinity": {"random_walk.affinity"},
    "masks": {f"{section}.{key}" for section, key in OF_MASKS.values()},
}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = set(PATHS) - {"isim"}
TREES = {module: ast.parse(path.read_text()) for module, path in PATHS.items()}


def room(module):
    return module.split(".")[1]


def nodes(kind=ast.AST):
    """Pairs of a module and one of its nodes."""
    found = ((module, node) for module in sorted(MODULES) for node in ast.walk(TREES[module]))
    return ((module, node) for module, node in found if isinstance(node, kind))


@cache
def imports(module):
    """Dotted names that `module` imports, lazily or for type checking too."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} line {node.lineno}: write absolute imports"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in PATHS else node.module for name in full}
    return found


def closure(module):
    """`module` and the modules of isim that it reaches and depends on, packages included."""
    seen, todo = set(), {module}
    while todo - seen:
        name = (todo - seen).pop()
        seen.add(name)
        todo |= {n for n in imports(name) & MODULES if room(n) not in NOT_A_DEPENDENCY}
    return seen


def outside(module):
    """Top-level names of the libraries that `module` imports."""
    return {name.split(".")[0] for name in imports(module)} - {"isim"}


def users_of(library):
    """Modules that import a library or a part of it."""
    found = {
        name: [f"{one}.".startswith(f"{library}.") for one in imports(name)] for name in MODULES
    }
    return {name for name, fits in found.items() if any(fits)}


def test_the_top_has_few_rooms():
    packages = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
    assert len(packages) <= 10
    assert len(list(PACKAGE.glob("*.py"))) <= 8
    assert {room(name) for name in MODULES} == set().union(*LAYERS)


def test_imports_go_down_the_layers():
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    wrong = [
        f"{module} imports {target}"
        for module in sorted(MODULES)
        for target in sorted(imports(module) & MODULES)
        if room(module) != room(target) and level[room(module)] >= level[room(target)]
    ]
    assert wrong == []


def test_modules_of_a_room_have_no_circles():
    graph = {name: imports(name) & MODULES - {name} for name in MODULES}
    # A CycleError tells the circle.
    TopologicalSorter(graph).prepare()


def code_lines(module, node):
    """Lines that are neither blank, nor a comment, nor of a docstring."""
    lines, words = PATHS[module].read_text().splitlines(), set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner):
            words |= set(range(inner.body[0].lineno, inner.body[0].end_lineno + 1))
    numbers = set(range(node.lineno, node.end_lineno + 1)) - words
    return sum(bool(lines[n - 1].strip().partition("#")[0]) for n in numbers)


def test_functions_are_short_and_take_few_parameters():
    wrong = []
    for module, node in nodes(ast.FunctionDef):
        given = node.args.posonlyargs + node.args.args
        places = [argument for argument in given if argument.arg not in ("self", "cls")]
        name = f"{module}:{node.lineno} {node.name}"
        if code_lines(module, node) > 60:
            wrong.append(f"{name} is longer than 60 lines of code")
        if len(places) + len(node.args.kwonlyargs) > 7:
            wrong.append(f"{name} has more than 7 parameters")
        if len(places) > 4:
            wrong.append(f"{name} has more than 4 parameters that are not keyword-only")
    assert wrong == []


def test_who_asks_for_the_number_of_a_process():
    """Nothing but these is written with several processes in mind."""
    found = {
        module
        for module, node in nodes()
        if {"is_main", "rank"} & {getattr(node, field, None) for field in ("attr", "id", "name")}
    }
    allowed = {"isim.stage", "isim.passes.each", "isim.reporting.tracking"}
    assert {name for name in found if room(name) != "runtime"} == allowed


def test_one_room_for_each_library():
    assert users_of("mlflow") <= {"isim.reporting.store", "isim.reporting.tracking"}
    assert users_of("torch.distributed") == {"isim.runtime.processes", "isim.runtime.launcher"}
    assert users_of("hashlib") == {"isim.runtime.identity"}
    assert users_of("pydensecrf") == {"isim.labels.crf.refine"}
    # Whoever shows progress elsewhere shows it in a terminal alone.
    assert users_of("tqdm") == {"isim.runtime.progress"}


def test_labels_and_metrics_are_pure():
    """Arrays or tensors in and out: no paths, environment, devices or progress."""
    for name in MODULES:
        if room(name) in ("labels", "metrics"):
            assert not {"pathlib", "os", "io", "logging", "tqdm"} & outside(name), name
            assert "torch" not in outside(name) or name.endswith(".batched"), name


def test_a_kernel_lies_beside_its_reference_and_its_batches():
    for source in PACKAGE.rglob("*.cpp"):
        rooms = {path.name for path in source.parent.iterdir()}
        assert {"kernel.cpp", "kernel.py", "batched.py"} <= rooms, source.parent


def defined(node):
    """Names that a statement assigns or defines."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    parts = [part for target in targets for part in ast.walk(target)]
    return {getattr(part, "id", "") for part in parts} | {getattr(node, "name", "")}


def test_what_is_defined_once():
    expected = [
        ("BACKGROUND", "isim.metrics"),
        ("IGNORE", "isim.metrics"),
        ("md5", "isim.runtime.identity"),
        ("resolve_path", "isim.runtime.paths"),
        ("voc_palette", "isim.data.files"),
    ]
    tops = [(module, node) for module in MODULES for node in TREES[module].body]
    found = [(name, module) for module, node in tops for name in defined(node)]
    assert sorted(entry for entry in found if entry[0] in dict(expected)) == expected


def test_tests_mirror_the_house():
    """tests/a/test_b.py tests isim/a/b.py, or all of a kind in the folder isim/a."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        folder = PACKAGE / path.parent.relative_to(ROOT / "tests")
        assert folder.is_dir(), f"{path}: there is no {folder}"
    tested = {
        ".".join(("isim", *path.parent.relative_to(ROOT / "tests").parts, path.stem[5:]))
        for path in (ROOT / "tests").rglob("test_*.py")
    }
    modules = {name for name in MODULES if PATHS[name].name != "__init__.py"}
    # A few lines each, which every command runs; sources have a contract that tests all of them.
    sources = {name for name in modules if name.startswith("isim.data.sources.")}
    assert modules - tested - sources == {"isim.__main__"}


# -- DVC ----------------------------------------------------------------------------------------


def path_of(dependency):
    """Modules of a code dependency, a file or a package."""
    path = ROOT / dependency
    return {name for name, file in PATHS.items() if file == path or path in file.parents}


@pytest.mark.parametrize("stage", STAGES)
def test_code_dependencies_hold_what_a_stage_imports(stage):
    deps = [dep for dep in PIPELINE["stages"][stage]["deps"] if dep.startswith("isim/")]
    needed = {name for name in closure(f"isim.stages.{stage}") if not is_empty(name)}
    # The page is what its stage makes.
    if stage == "report":
        needed |= {name for name in MODULES if name.startswith("isim.reporting.page.")}
    held = set().union(*map(path_of, deps))
    assert needed <= held, f"{stage} lacks {sorted(needed - held)}"
    for dep in deps:
        assert path_of(dep) & needed, f"{stage} does not need {dep}"
    assert deps == sorted(deps)


def is_empty(module):
    """Tell whether a package's own file holds words only."""
    values = [getattr(node, "value", None) for node in TREES[module].body]
    words = all(isinstance(value, ast.Constant) for value in values)
    return PATHS[module].name == "__init__.py" and words


def test_scoring_depends_on_no_network():
    assert not any(room(name) in ("models", "training") for name in closure("isim.stages.evaluate"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_is_resumed_whatever_changes_in_code_that_it_does_not_use(stage):
    counted = {module_of(path) for path in identity.code_files(stage) if path.suffix == ".py"}
    assert closure(f"isim.stages.{stage}") <= counted
    others = {f"isim.stages.{other}" for other in STAGES if other != stage}
    assert not counted & others
    assert not any(room(name) in ("cli", "reporting", "experiments") for name in counted - {"isim"})


def test_one_word_per_stage():
    from typer.main import get_command

    from isim.cli import app

    modules = {path.stem for path in (PACKAGE / "stages").glob("*.py")} - {"__init__"}
    others = {"init", "plan", "preset", "results", "server-archive", "tables", "upgrade"}
    others |= {"compare", "export", "masks-wanted", "predict", "ui"}
    commands = set(get_command(app).commands) - others
    # The list of label sets says what a stage runs for; no stage is handed it.
    sections = set(Params.model_fields) - {"label_sets"} - set(SHARED)
    assert set(STAGES) == sections == modules
    assert {stage.replace("_", "-") for stage in STAGES} == commands
    for name, stage in PIPELINE["stages"].items():
        label_set = " ${item.labels.name}" if "matrix" in stage else ""
        assert stage["cmd"] == f"python -m isim {name.replace('_', '-')}{label_set}"
        carried = {block for block, carriers in SHARED.items() if name in carriers}
        assert set(stage["params"]) == {name} | carried | KNOWN.get(name, set())
        entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
        outs = [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]
        reports = [out for out in outs if out.startswith("reports/")]
        # The page is where a person looks first.
        page = {"reports/index.html", "reports/page"} if name == "report" else set()
        assert all(out.startswith(f"reports/{name}/") or out in page for out in reports)


def test_outs_keep_the_run_cache_working():
    """A plain out without cache, or one that persists, switches DVC's run-cache off."""
    for stage in PIPELINE["stages"].values():
        assert not stage.get("always_changed")
        for entry in stage.get("outs", []):
            options = {} if isinstance(entry, str) else next(iter(entry.values()))
            assert options.get("cache", True)
            assert not options.get("persist", False)


# -- Parameters, paths and safety ----------------------------------------------------------------


def test_parameters_have_no_defaults():
    """A default would be a value that DVC does not track."""

    def check(model):
        for key, field in model.model_fields.items():
            assert field.is_required(), f"{model.__name__}.{key} has a default"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                check(field.annotation)

    check(Params)


def test_only_stages_name_the_places_of_results():
    for name, node in nodes(ast.Constant):
        if room(name) in ("passes", "training", "models", "labels", "runtime"):
            # Data sets lie in data/raw by default, which is no result.
            place = str(node.value).startswith(("data/", "models/", "reports/"))
            assert not place or node.value == "data/raw", f"{name} names the path {node.value}"


def test_no_cuda_calls_and_no_pickles():
    for name in MODULES:
        assert not {"pickle", "cPickle", "dill", "joblib"} & outside(name), name
    for name, node in nodes(ast.Attribute):
        called = ast.unparse(node)
        assert node.attr != "cuda" or called.startswith("torch."), f"{name}: {called}"
    for name, node in nodes(ast.Call):
        if ast.unparse(node.func) == "torch.load":
            safe = any(ast.unparse(word) == "weights_only=True" for word in node.keywords)
            assert safe, f"{name} loads pickles"
    for name, node in nodes(ast.keyword):
        refused = node.arg != "allow_pickle" or ast.unparse(node.value) == "False"
        assert refused, f"{name} allows pickles"


def test_the_cli_imports_nothing_heavy():
    code = "import sys, isim.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "mlflow", "numpy", "cv2", "dvc", "pydantic", "matplotlib", "ruamel.yaml"}
    assert not heavy & set(done.stdout.split())


def test_text_files_are_utf8_whatever_the_locale_is():
    """Names of images and classes are of any script."""
    for name, node in nodes(ast.Call):
        called = getattr(node.func, "attr", "")
        words = {word.arg for word in node.keywords}
        modes = [ast.unparse(argument) for argument in node.args[:1]]
        opens = called == "open" and not any("b" in mode or mode == "path" for mode in modes)
        library = ast.unparse(node.func) in ("Image.open", "tarfile.open", "os.open")
        if called in ("read_text", "write_text") or (opens and not library):
            ours = ast.unparse(node.func) in ("atomic.write_text",)
            assert ours or "encoding" in words, f"{name}:{node.lineno} names no encoding"
        assert "text" not in words or called != "run", f"{name}:{node.lineno}: encoding= for text="
