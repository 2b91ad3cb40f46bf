"""Stages run in this process, in a project in which all but the segmenters is finished."""

import importlib
import shutil

import pytest
from support.projects import read_report
from support.sections import changed, of_frozen

from isim.runtime import devices


@pytest.fixture(autouse=True)
def _one_thread():
    with devices.intra_op_threads(1):
        yield


@pytest.fixture
def finished(finished_project, tmp_path, recorder):
    """A finished project of the test's own."""
    shutil.copytree(finished_project, tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture(scope="session")
def by_frozen(copies, record, run, tiny):
    """A project after train_cam and export_cams by method frozen; never change it, copy it."""
    root = copies()
    with pytest.MonkeyPatch.context() as monkeypatch, devices.intra_op_threads(1):
        record(monkeypatch)
        run("train_cam", root, **of_frozen(tiny.train_cam, crf_every_round=True))
        run("export_cams", root)
    return root


@pytest.fixture(scope="session")
def run(tiny):
    """A function that runs a stage, maybe on a label set, with some changes: its report."""

    def run(stage, root, *label_set, **changes):
        params = changed(getattr(tiny, stage), **changes)
        importlib.import_module(f"isim.stages.{stage}").run(params, *label_set, root)
        return read_report(root, "/".join((stage, *label_set)))

    return run
