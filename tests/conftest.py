"""Fixtures that several test modules share."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import runs

from isim.experiments import preset

# As the entry point does, before torch is imported: on a busy machine threads that spin make the
# suite several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each has a core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

VOC_NAMES = {"bird": 3, "cat": 8, "cow": 10, "dog": 12, "person": 15}
MakeDevkit = Callable[..., Path]
ROOT = Path(__file__).parent.parent
TINY = preset.parameters("tiny")
# They start the most processes: begun last, one would run while the other worker has none left.
LONG = (
    "project/test_recipe.py",
    "test_pipeline.py",
    "test_resume.py",
    "test_distributed.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Run the whole suite in two workers, a file in one; named files here, as a debugger needs."""
    option = config.option
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    # A worker reads the same command line; `-n` says otherwise, and without xdist there is none.
    free = getattr(option, "numprocesses", 0) is None and not hasattr(config, "workerinput")
    if whole and free and not (option.usepdb or option.collectonly):
        option.numprocesses, option.dist, option.loadscopereorder = 2, "loadfile", False


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        places = {str(ROOT / "tests" / name): place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: places.get(str(item.path), len(LONG)))


@pytest.fixture(autouse=True)
def _ctrl_c():
    """A background job starts with Ctrl-C ignored, and so would processes that tests interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _make_devkit(
    devkit: Path,
    splits: Mapping[str, Sequence[str]],
    names: Sequence[str] = ("cat", "person"),
    size: tuple[int, int] = (24, 32),
) -> Path:
    """Write a tiny VOC devkit; each image shows all `names`, side by side, and a void border."""
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Segmentation"):
        (devkit / folder).mkdir(parents=True, exist_ok=True)
    for split, ids in splits.items():
        listing = "".join(f"{name}\n" for name in ids)
        (devkit / f"ImageSets/Segmentation/{split}.txt").write_text(listing)
        for number, name in enumerate(ids):
            noise = np.random.default_rng(number).integers(0, 255, (*size, 3), np.uint8)
            Image.fromarray(noise).save(devkit / f"JPEGImages/{name}.jpg")
            if split == "test":
                continue
            mask = np.zeros(size, np.uint8)
            for column, label in enumerate(names):
                mask[4:12, 2 + 6 * column : 6 + 6 * column] = VOC_NAMES[label]
            mask[12] = 255
            Image.fromarray(mask).save(devkit / f"SegmentationClass/{name}.png")
            objects = "".join(f"<object><name>{label}</name></object>" for label in names)
            xml = f"<annotation>{objects}</annotation>"
            (devkit / f"Annotations/{name}.xml").write_text(xml)
    return devkit


@pytest.fixture
def make_devkit() -> MakeDevkit:
    return _make_devkit


class Recorder:
    """Takes the place of MLflow, which has its own tests and costs seconds."""

    run_id = "none"

    def __init__(self):
        self.figures = {}
        self.pictures = set()

    def metrics(self, values, step=None):
        self.figures |= {(name, step): value for name, value in values.items()}

    def image(self, key, image, step):
        self.pictures.add((key, step))

    def __getattr__(self, name):
        return lambda *_: None


def _record(monkeypatch):
    recorder = Recorder()

    @contextmanager
    def stage_run(*_, **__):
        yield recorder

    monkeypatch.setattr("isim.reporting.tracking.stage_run", stage_run)
    for name in ("DVC_ROOT", "DVC_EXP_NAME", "ISIM_DATA", "ISIM_SHARED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ISIM_DEVICE", "cpu")
    monkeypatch.setenv("ISIM_WORKERS", "0")
    return recorder


@pytest.fixture
def recorder(monkeypatch):
    """Stages run in this process, on the CPU without helpers, and report to the recorder."""
    return _record(monkeypatch)


@pytest.fixture(scope="session")
def record():
    """A function that puts a recorder in place of MLflow, for fixtures of a wider scope."""
    return _record


@pytest.fixture(scope="session")
def tiny():
    """Parameters of the preset `tiny`."""
    return TINY


@pytest.fixture(scope="session")
def prepared_project(tmp_path_factory):
    """A project folder after stage `prepare` of preset `tiny`; never change it, copy it."""
    from isim.stages import prepare

    root = tmp_path_factory.mktemp("prepared")
    preset.write("tiny", root / "params.yaml")
    with pytest.MonkeyPatch.context() as monkeypatch:
        _record(monkeypatch)
        prepare.run(TINY.prepare, root)
    return root


@pytest.fixture(scope="session")
def finished_project(prepared_project, tmp_path_factory):
    """A project of preset `tiny` with all but the segmenters; never change it, copy it."""
    from isim.runtime import devices
    from isim.stages import evaluate, export_cams, random_walk, train_affinity, train_cam

    root = tmp_path_factory.mktemp("finished") / "project"
    shutil.copytree(prepared_project, root)
    with pytest.MonkeyPatch.context() as monkeypatch, devices.intra_op_threads(1):
        _record(monkeypatch)
        train_cam.run(TINY.train_cam, root)
        export_cams.run(TINY.export_cams, root)
        train_affinity.run(TINY.train_affinity, root)
        random_walk.run(TINY.random_walk, root)
        evaluate.run(TINY.evaluate, root)
    return root


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """A function that runs a step in processes of its own: they import once a session."""
    with runs.nursery(tmp_path_factory.mktemp("nursery") / "stderr") as run:
        yield run


@pytest.fixture(scope="session")
def copies(prepared_project, tmp_path_factory):
    """A function that makes one more copy of a project, by default of the prepared one."""

    def copy(project=prepared_project):
        root = tmp_path_factory.mktemp("copy") / "project"
        shutil.copytree(project, root)
        return root

    return copy


@pytest.fixture
def project(prepared_project, tmp_path, recorder):
    """A prepared project of the test's own."""
    shutil.copytree(prepared_project, tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def make_repository(tmp_path, monkeypatch):
    """A function that makes a repository of one stage, run once: its folder and a caller."""
    for name in [name for name in os.environ if name.startswith(("DVC_", "GIT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for name in ("GLOBAL_CONFIG_DIR", "SYSTEM_CONFIG_DIR", "SITE_CACHE_DIR"):
        monkeypatch.setenv(f"DVC_{name}", str(tmp_path / name))
    folder = tmp_path / "project"
    folder.mkdir()

    def call(*command):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def make(pipeline, script):
        call("git", "init", "--quiet")
        call("git", "config", "user.name", "Tester")
        call("git", "config", "user.email", "tester@example.org")
        call("dvc", "init", "--quiet")
        (folder / "params.yaml").write_text("train_cam:\n  crop: 256\n")
        (folder / "dvc.yaml").write_text(pipeline)
        (folder / "report.py").write_text(script)
        call("dvc", "repro", "--quiet")
        call("git", "add", "--all")
        call("git", "commit", "--quiet", "--message", "run")
        return folder, call

    return make
