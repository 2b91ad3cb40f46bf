"""The command line: help, exit codes, one-line errors, presets, signals."""

import ast
import errno
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from isim import cli, params
from isim.errors import UserError
from isim.experiments import overlay, preset
from isim.runtime import identity

ROOT = Path(__file__).parent.parent
PARAMS = (ROOT / "params.yaml").read_text()
COMMANDS = get_command(cli.app).commands


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the shipped params.yaml, as working directory."""
    (tmp_path / "params.yaml").write_text(PARAMS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def main(monkeypatch, capsys):
    """A function that runs `isim ARGUMENTS` in this process: exit code, stdout and stderr."""
    # The entry point installs a handler for SIGTERM, which pytest must not keep.
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["isim", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return run


def assert_one_line(err, *words):
    assert err.startswith("isim: error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize("columns", ["60", "80"])
def test_help_names_every_command_with_its_whole_first_sentence(columns):
    answer = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": columns})
    assert answer.exit_code == 0
    listed = " ".join(answer.stdout.partition("Commands:")[2].split())
    sentences = {
        name: command.callback.__doc__.split("\n")[0] for name, command in COMMANDS.items()
    }
    assert listed == " ".join(f"{name} {sentence}" for name, sentence in sentences.items())
    assert all(sentence.endswith(".") for sentence in sentences.values())
    assert list(COMMANDS)[:2] == ["prepare", "train-cam"]


def test_help_and_errors_name_no_internal_document():
    words = re.compile(r"\b(spec|design)\b", re.IGNORECASE)
    for name in ([], *([name] for name in COMMANDS)):
        assert not words.search(CliRunner().invoke(cli.app, [*name, "--help"]).stdout)
    for path in (ROOT / "isim").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                assert not words.search(ast.unparse(node)), f"{path}:{node.lineno}"


def test_the_version_is_that_of_the_package(main):
    assert main("--version") == (0, f"isim {version('isim')}\n", "")


@pytest.mark.parametrize("arguments", [["nonsense"], ["preset", "--nonsense"], ["results", "x"]])
def test_wrong_usage_is_exit_code_2(arguments, main):
    code, _, err = main(*arguments)
    assert code == 2 and "Usage:" in err


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (r"  threshold: .*", "  treshold: 0.3", ["treshold", "did you mean threshold"]),
        (r"  threshold: .*", "  threshold: high", ["train_cam.threshold", "high"]),
        (r"  batch: .*", "  batch: 0", ["train_cam.batch", "greater than or equal to 1"]),
        (r"  source: .*", "  source: cityscapes", ["prepare.source", "cityscapes", "voc"]),
        (r"  warmup_epochs: .*", "  warmup_epochs: 999", ["train_cam", "warmup_epochs", "epochs"]),
        (r"    profile: .*", "    profile: official", ["train_cam", "profile", "custom"]),
        (r"\nprepare:", "\n\tprepare:", ["params.yaml", "line"]),
    ],
)
def test_bad_parameters_are_one_line_and_exit_code_2(old, new, expected, project, main):
    # Not the values that happen to be in params.yaml: they change with every experiment.
    text, found = re.subn(old, new, PARAMS, count=1)
    assert found
    (project / "params.yaml").write_text(text)
    code, out, err = main("train-cam")
    assert code == 2 and out == ""
    assert_one_line(err, *expected)


def test_a_missing_parameter_file_names_the_fix(tmp_path, monkeypatch, main):
    monkeypatch.chdir(tmp_path)
    code, _, err = main("prepare")
    assert code == 2
    assert_one_line(err, "isim preset demo")


def test_an_unknown_label_set_lists_the_known(project, main):
    for command in (("train-segmenter", "none"), ("server-archive", "none", "val")):
        code, out, err = main(*command)
        assert code == 2 and out == ""
        assert_one_line(err, "no label set 'none'", "last_round")


def raise_in_results(monkeypatch, error):
    def fail(root):
        raise error

    monkeypatch.setattr("isim.reporting.results.table", fail)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "data/x.png"),
        RuntimeError("Error while serializing: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line_and_exit_code_2(error, monkeypatch, main):
    raise_in_results(monkeypatch, error)
    code, _, err = main("results")
    assert code == 2
    assert_one_line(err, "no space left")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "not enough memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU"), "2.00 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "batch or crop"),
        (ImportError("torch.so: failed to map segment", name="torch._C"), "cannot be loaded"),
        (OSError("libcublas.so.12: cannot open shared object file"), "libcublas.so.12"),
        (ModuleNotFoundError("No module named 'boto3'", name="boto3"), "pip install it"),
    ],
)
def test_what_the_machine_lacks_is_one_line_and_exit_code_2(error, words, monkeypatch, main):
    """It is no fault of isim's, that should be reported."""
    raise_in_results(monkeypatch, error)
    code, _, err = main("results")
    assert code == 2 and "report it" not in err
    assert_one_line(err, words)


def test_a_path_that_the_system_refuses_is_one_line_and_exit_code_2(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")
    for arguments in (("n" * 300, "--out", "o"), ("a.png", "--out", "n" * 300)):
        code, _, err = main("predict", *arguments, "--model", "m")
        assert code == 2
        assert_one_line(err, "File name too long", "name another path")


def test_below_a_project_an_error_tells_where_that_is(main, project, monkeypatch):
    (project / "dvc.yaml").write_text("stages: {}")
    (project / "reports/x").mkdir(parents=True)
    monkeypatch.chdir(project / "reports/x")
    code, _, err = main("plan")
    assert code == 2
    assert_one_line(err, f"the project {project} is above: run isim there")


def test_a_defect_keeps_its_traceback(monkeypatch, main, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    raise_in_results(monkeypatch, ValueError("a defect"))
    code, _, err = main("results")
    assert code == 1 and err.startswith("isim: error: ValueError: a defect; ")
    (kept,) = tmp_path.rglob("isim-*.txt")
    assert "ValueError: a defect" in kept.read_text() and kept.name in err


@pytest.mark.parametrize("error", [RuntimeError("a loader was killed"), UserError("a worker died")])
def test_what_an_end_brings_about_does_not_hide_it(error, monkeypatch, main):
    def table(root):
        try:
            cli._terminate(signal.SIGTERM, None)
        finally:
            raise error

    monkeypatch.setattr("isim.reporting.results.table", table)
    assert main("results") == (143, "", "")


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_signals_unwind_the_command(number, expected, tmp_path):
    """Context managers run, no traceback is shown and the exit code names the signal."""
    code = (
        "import sys, time, pathlib, signal\n"
        # The tests may run under nohup.
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from isim import cli\n"
        "from isim.reporting import results\n"
        "def table(root):\n"
        "    try:\n"
        "        pathlib.Path('started').touch()\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        pathlib.Path('unwound').touch()\n"
        "results.table = table\n"
        "sys.argv = ['isim', 'results']\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == expected
    assert (tmp_path / "unwound").exists()
    assert "Traceback" not in err


def test_ctrl_c_in_the_first_second_shows_no_traceback(monkeypatch):
    class Imported:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "isim.cli", Imported())
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("isim", run_name="__main__")
    assert stop.value.code == 130


def test_streams_that_are_closed_take_what_is_printed(tmp_path):
    """Elsewhere it would come into the file that is opened next, or end the command."""
    code = (
        "import os, pathlib, signal, subprocess, sys\n"
        "from isim import cli\n"
        "def app():\n"
        "    database = open('database', 'w+')\n"
        "    print('told'), print('told', file=sys.stderr), sys.stderr.flush()\n"
        "    subprocess.run(['sh', '-c', 'echo told; echo told >&2; cat'], check=True)\n"
        "    os.write(1, b'told'), os.write(2, b'told')\n"
        "    pathlib.Path('ended').write_text(repr(signal.getsignal(signal.SIGHUP)))\n"
        "cli.app = app\n"
        "cli.main()\n"
    )
    shell = 'trap "" HUP; exec "$0" -c "$1" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", shell, sys.executable, code], cwd=tmp_path, check=True)
    # As nohup has set it.
    assert "SIG_IGN" in (tmp_path / "ended").read_text()
    assert (tmp_path / "database").read_text() == ""


def test_a_tracking_server_that_is_not_there_stops_a_stage_before_it_writes(project):
    environment = os.environ | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "isim", "prepare"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert_one_line(done.stderr, "cannot", "MLFLOW_TRACKING_URI")
    assert not (project / "data").exists() and not (project / "reports").exists()


def test_prepare_refuses_data_that_the_pipeline_does_not_depend_on(project, main, monkeypatch):
    from isim.project import growth, lock, pipeline

    monkeypatch.setattr("isim.stage.start", lambda stage, root: print("started"))
    monkeypatch.setattr(growth, "of_project", lambda root: {"train": [True], "val": [False]})
    (project / lock.FILE).write_text(lock.text())
    preset.write("own-images", project / "params.yaml")
    params = preset.parameters("own-images").prepare
    (project / "dvc.yaml").write_text(pipeline.text(params))
    code, out, told = main("prepare")
    assert (code, out) == (0, "started\n")
    assert told.startswith("isim: note: 1 images of train have a mask") and told.count("\n") == 1
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(
        text.replace("labels: auto", "labels: /elsewhere/tags.csv")
    )
    code, _, told = main("prepare")
    assert code == 2 and told.count("\n") == 1 and "run `isim upgrade`" in told
    assert main("train-cam") == (0, "started\n", "")


def test_a_label_file_that_the_pipeline_does_not_see_is_told_by_the_next_stage(
    project, main, monkeypatch
):
    monkeypatch.setattr("isim.stage.start", lambda stage, root: print("started"))
    (project / "params.yaml").write_text(
        preset.text("own-images").replace("root: my_data", f"root: {project / 'raw'}")
    )
    (project / "raw/cat").mkdir(parents=True)
    assert main("train-cam") == (0, "started\n", "")
    (project / "raw.csv").write_text("image,labels\n")
    code, out, told = main("train-cam")
    assert (code, out) == (0, "started\n")
    assert told.startswith("isim: note: labels are read from ") and told.count("\n") == 1
    assert f"prepare.labels: {project / 'raw.csv'}, then run `isim upgrade`" in told
    # The process that started this one has told it.
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main("train-cam") == (0, "started\n", "")


def test_names_of_any_script_in_a_locale_without_utf8(project):
    """As Python sees Latin 1 or ASCII; in `LC_ALL=C` alone it takes UTF-8 by itself."""
    raw = project / "Fotos für 日本"
    rows = ["image,labels", "ä.png,größe", "日本.png,", "b.png,größe"]
    raw.mkdir()
    (raw / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    for number, name in enumerate(("ä", "日本", "b")):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(raw / f"{name}.png")
    preset.write("own-images", project / "params.yaml")
    text = (project / "params.yaml").read_text(encoding="utf-8")
    values = text.replace("root: my_data", f"root: {raw}").replace(
        "val_fraction: 0.2", "val_fraction: 0"
    )
    (project / "params.yaml").write_text(values, encoding="utf-8")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "isim", "prepare"]
    done = subprocess.run(command, cwd=project, env=os.environ | locale, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    labels = (project / "data/prepared/labels.csv").read_text(encoding="utf-8").splitlines()
    assert labels == ["id,labels,known", "b,größe,1", "ä,größe,1", "日本,,1"]


def test_a_stage_imports_nothing_before_it_needs_it():
    """Every stage pays for its start: what few lines use, those lines import."""
    late = ["matplotlib", "mlflow", "pandas", "scipy", "sklearn", "torch.distributed.run"]
    code = (
        "import importlib, json, sys\n"
        "found = {}\n"
        "for word in sys.argv[1:]:\n"
        "    importlib.import_module(f'isim.stages.{word}')\n"
        "    found[word] = list(sys.modules)\n"
        "print(json.dumps(found))\n"
    )
    # First those that run no network: modules add up.
    plain = ["prepare", "evaluate"]
    stages = {path.stem for path in (identity.PACKAGE / "stages").glob("[a-z]*.py")}
    command = [sys.executable, "-c", code, *plain, *sorted(stages - {*plain})]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for word, modules in json.loads(done.stdout).items():
        unwanted = [*late, "torch", "timm", "torchvision"] if word in plain else late
        assert [name for name in unwanted if name in modules] == [], word


@pytest.mark.parametrize("settings", [(), ("method=CAM", "backbone=ResNet-101")])
def test_a_preset_is_written_and_comments_stay(settings, project, main):
    name = "voc-deeplabcam-resnet50"
    code, out, _ = main("preset", name, *settings)
    assert code == 0 and all(word in out for word in (name, *settings))
    text = (project / "params.yaml").read_text()
    assert overlay.plain(text) == overlay.plain(preset.text(name, settings))
    assert params.load(project / "params.yaml") == preset.parameters(name, settings)

    def comments(text):
        return [line.strip() for line in text.splitlines() if line.strip().startswith("#")]

    assert comments(text) == comments(PARAMS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tony"], ["tony", "tiny"]),
        (["tiny", "colour=red"], ["no axis 'colour'; write AXIS=VALUE with one of method, backb"]),
        (["tiny", "method"], ["no axis 'method'; write AXIS=VALUE"]),
        (["tiny", "backbone=ResNet-18"], ["backbone has no 'ResNet-18'; choose one of ResNet-50"]),
        (["voc-rounds-every-2", "size=320x320", "procedure="], ["procedure has no ''"]),
        (["tiny", "method=CAM", "Method=deeplabcam"], ["set twice, to 'CAM' and 'DeepLabCAM'"]),
        (["voc-rounds-every-2", "method=CAM", "method=CAM"], ["method is set twice"]),
        (["--list", "nope"], ["--list", "nope"]),
        (["--list", "tiny", "method=CAM"], ["--list", "tiny"]),
    ],
)
def test_unknown_presets_and_settings_are_one_line_and_nothing_is_written(
    words, expected, project, main
):
    code, out, err = main("preset", *words)
    assert code == 2 and out == ""
    assert_one_line(err, *expected)
    assert (project / "params.yaml").read_text() == PARAMS


def test_a_preset_leaves_a_file_with_unknown_parameters_alone(project, main):
    path = project / "params.yaml"
    before = PARAMS.replace("train_cam:", "train_cam:\n  colour: red", 1)
    path.write_text(before)
    code, _, err = main("preset", "tiny")
    assert code == 2 and path.read_text() == before
    assert_one_line(err, "colour")


@pytest.mark.parametrize("arguments", [["preset"], ["preset", "--list"]])
def test_presets_are_listed_with_their_titles(arguments, main):
    code, out, _ = main(*arguments)
    found = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in out.splitlines()}
    assert code == 0 and found == preset.titles()


def test_results_before_a_run_say_what_to_do(project, main):
    code, _, err = main("results")
    assert code == 2
    assert_one_line(err, "dvc repro")


def test_predict_leaves_out_what_is_unreadable_and_says_so(main, tmp_path, monkeypatch):
    import numpy as np
    from PIL import Image
    from support import checkpoints

    model = checkpoints.save("frozen_segmenter", tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save("a.png")
    options = ["--model", str(model), "--out", "masks"]
    assert main("predict", "a.png", *options, "--overlay")[0] == 0
    assert sorted(path.name for path in Path("masks").iterdir()) == [
        *("a.png", "a_overlay.jpg", "classes.json")
    ]
    Path("broken.png").write_text("no image")
    code, _, err = main("predict", "a.png", "broken.png", *options)
    assert code == 1 and "left out" in err and "broken.png" in err
    code, _, err = main("predict", "a.png", "--out", "masks")
    assert code == 2
    assert_one_line(err, "train_segmenter", "--model PATH")
    assert main("predict", "a.png", "--model", str(model))[0] == 2, "no --out"
    assert main("predict", "a.png", *options, "--min-confidence", "1.5")[0] == 2


def test_export_writes_masks_of_a_folder(main, tmp_path, monkeypatch):
    import numpy as np
    from PIL import Image

    from isim.data import files

    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save("images/a.png")
    files.write_label_map(Path("masks/a.png"), np.ones((3, 4), np.uint8))
    Path("masks/classes.json").write_text(json.dumps(files.class_list(["background", "cat"])))
    given = ["--from", "masks", "--images", "images"]
    code, out, _ = main("export", "coco", "all.json", *given)
    assert code == 0 and out == "all.json: 1 annotations of 1 images\n"
    assert json.loads(Path("all.json").read_text())["annotations"][0]["area"] == 12
    code, _, err = main("export", "coco", "all.json", *given, "--copy")
    assert code == 2
    assert_one_line(err, "--copy means nothing for coco")
    assert main("export", "pascal", "x")[0] == 2
