"""The command line: help, exit codes, one-line errors, presets, the result table."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from ruamel.yaml import YAML
from typer.testing import CliRunner

from isim import cli, params, preset
from isim.errors import UserError

ROOT = Path(__file__).parent.parent
PARAMS = (ROOT / "params.yaml").read_text()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the shipped params.yaml, as working directory."""
    (tmp_path / "params.yaml").write_text(PARAMS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_main(monkeypatch, capsys, *arguments):
    """Exit code, stdout and stderr of `isim ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["isim", *arguments])
    # The entry point installs a handler for SIGTERM, which pytest must not keep.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_help_names_every_command():
    answer = CliRunner().invoke(cli.app, ["--help"])
    assert answer.exit_code == 0
    stages = ("prepare", "train-cam", "export-cams", "train-affinity", "random-walk")
    others = ("preset", "results", "tables", "curves", "server-archive")
    for name in (*stages, "train-segmenter", "evaluate", *others):
        assert f"  {name} " in answer.stdout


@pytest.mark.parametrize("arguments", [["nonsense"], ["preset", "--nonsense"], ["results", "x"]])
def test_wrong_usage_is_exit_code_2(arguments, monkeypatch, capsys):
    code, _, err = run_main(monkeypatch, capsys, *arguments)
    assert code == 2 and "Usage:" in err


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (r"  threshold: .*", "  treshold: 0.3", ["treshold", "did you mean threshold"]),
        (r"  threshold: .*", "  threshold: high", ["train_cam.threshold", "high"]),
        (r"  batch: .*", "  batch: 0", ["train_cam.batch", "greater than 0"]),
        (r"  source: .*", "  source: coco", ["prepare.source", "coco", "voc"]),
        (r"  warmup_epochs: .*", "  warmup_epochs: 999", ["train_cam", "warmup_epochs", "epochs"]),
        (r"    profile: .*", "    profile: official", ["train_cam", "profile", "custom"]),
        (r"\nprepare:", "\n\tprepare:", ["params.yaml", "line"]),
    ],
)
def test_bad_parameters_are_one_line_and_exit_code_2(
    old, new, expected, project, monkeypatch, capsys
):
    # Not the values that happen to be in params.yaml: they change with every experiment.
    text, found = re.subn(old, new, PARAMS, count=1)
    assert found
    (project / "params.yaml").write_text(text)
    code, out, err = run_main(monkeypatch, capsys, "train-cam")
    assert code == 2 and out == ""
    assert err.startswith("isim: error: ") and err.count("\n") == 1
    for words in expected:
        assert words in err


def test_a_missing_parameter_file_names_the_fix(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_main(monkeypatch, capsys, "prepare")
    assert code == 2 and "isim preset demo" in err and err.count("\n") == 1


def raise_in_results(monkeypatch, error):
    def fail(root):
        raise error

    monkeypatch.setattr("isim.results.table", fail)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "data/x.png"),
        RuntimeError("Error while serializing: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line_and_exit_code_2(error, monkeypatch, capsys):
    raise_in_results(monkeypatch, error)
    code, _, err = run_main(monkeypatch, capsys, "results")
    assert code == 2 and err.count("\n") == 1 and "no space left" in err


def test_a_defect_keeps_its_traceback(monkeypatch, capsys):
    raise_in_results(monkeypatch, ValueError("a defect"))
    monkeypatch.setattr(sys, "argv", ["isim", "results"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(ValueError, match="a defect"):
        cli.main()


@pytest.mark.parametrize("error", [RuntimeError("a loader was killed"), UserError("a worker died")])
def test_what_an_end_brings_about_does_not_hide_it(error, monkeypatch, capsys):
    def table(root):
        try:
            cli._terminate(signal.SIGTERM, None)
        finally:
            raise error

    monkeypatch.setattr("isim.results.table", table)
    code, _, err = run_main(monkeypatch, capsys, "results")
    assert code == 143 and not err


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_unwind_the_command(number, expected, tmp_path):
    """Context managers run, no traceback is shown and the exit code names the signal."""
    code = (
        "import sys, time, pathlib, isim.results\n"
        "from isim import cli\n"
        "def table(root):\n"
        "    try:\n"
        "        pathlib.Path('started').touch()\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        pathlib.Path('unwound').touch()\n"
        "isim.results.table = table\n"
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


def test_a_tracking_server_that_is_not_there_stops_the_stage_before_it_writes(project):
    environment = os.environ | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "isim", "prepare"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("isim: error: cannot") and done.stderr.count("\n") == 1
    assert "MLFLOW_TRACKING_URI" in done.stderr
    assert not (project / "data").exists() and not (project / "reports").exists()


def test_a_stage_waits_for_another_run_of_itself(tmp_path, monkeypatch):
    """Both would use one resume folder: `dvc exp run --temp` beside `dvc repro`."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / ".isim").mkdir()
    code = (
        "from pathlib import Path\n"
        "from isim import cli\n"
        "with cli._alone('prepare', Path.cwd()):\n"
        "    Path('entered').touch()\n"
    )
    command = [sys.executable, "-c", code]
    with FileLock(tmp_path / ".isim/prepare.lock"):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        assert "waiting for another run of prepare" in process.stderr.readline()
        assert not (tmp_path / "entered").exists()
    process.communicate(timeout=60)
    assert process.returncode == 0 and (tmp_path / "entered").exists()


@pytest.mark.parametrize(
    ("blocked", "words"),
    [(".isim", "fix the permissions"), (".isim/prepare.lock", "it is a folder")],
)
def test_a_lock_that_cannot_be_made_is_named(blocked, words, tmp_path, monkeypatch):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    if blocked == ".isim":
        (tmp_path / blocked).touch()
    else:
        (tmp_path / blocked).mkdir(parents=True)
    with pytest.raises(UserError, match=f"cannot write .*{blocked}: .*{words}"):
        with cli._alone("prepare", tmp_path):
            raise AssertionError("entered without the lock")


def comments(text):
    return [line.strip() for line in text.splitlines() if line.strip().startswith("#")]


@pytest.mark.parametrize("name", sorted(preset.titles()))
def test_a_preset_is_written_and_comments_stay(name, project, monkeypatch, capsys):
    code, out, _ = run_main(monkeypatch, capsys, "preset", name)
    assert code == 0 and name in out
    text = (project / "params.yaml").read_text()
    assert YAML(typ="safe").load(text) == YAML(typ="safe").load(preset.text(name))
    assert comments(text) == comments(PARAMS)
    assert "[" not in "".join(line.split("#")[0] for line in text.splitlines()), "block style"


def test_presets_come_back_to_the_same_file(project):
    path = project / "params.yaml"
    preset.write("tiny", path)
    before = path.read_text()
    preset.write("voc-cam-resnet50", path)
    preset.write("tiny", path)
    assert path.read_text() == before


def test_a_comment_after_a_list_stays_when_the_list_grows_or_shrinks(project):
    path = project / "params.yaml"
    text = PARAMS.replace("  decoder_channels:", "  # after a list\n  decoder_channels:")
    for rates in ("[6]", "[1, 2, 3, 4, 5]"):
        start, _, rest = text.partition("  atrous_rates:")
        path.write_text(f"{start}  atrous_rates: {rates}{rest[rest.index('  # after') - 1 :]}")
        preset.write("voc-cam-resnet50", path)
        lines = path.read_text().splitlines()
        place = lines.index("  # after a list")
        assert lines[place + 1].startswith("  decoder_channels:")
        assert lines[place - 1] == "    - 18"


def test_a_preset_needs_no_params_yaml(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, _ = run_main(monkeypatch, capsys, "preset", "tiny")
    written = (tmp_path / "params.yaml").read_text()
    assert code == 0 and written == (preset.folder() / "tiny.yaml").read_text()


def test_an_unknown_preset_lists_the_known(project, monkeypatch, capsys):
    code, _, err = run_main(monkeypatch, capsys, "preset", "tony")
    assert code == 2 and "tony" in err and "tiny" in err
    assert (project / "params.yaml").read_text() == PARAMS


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["colour=red"], "no axis 'colour'; write AXIS=VALUE with one of method, backbone"),
        (["method"], "no axis 'method'; write AXIS=VALUE"),
        (["backbone=ResNet-18"], "backbone has no 'ResNet-18'; choose one of ResNet-50, ResNet-1"),
        (["size=320x320", "procedure="], "procedure has no ''"),
        (["method=CAM", "Method=deeplabcam"], "method is set twice, to 'CAM' and 'DeepLabCAM'"),
        (["method=CAM", "method=CAM"], "method is set twice"),
    ],
)
@pytest.mark.parametrize("name", ["tiny", "voc-rounds-every-2"])
def test_unknown_settings_are_one_line_and_nothing_is_written(
    name, settings, words, project, monkeypatch, capsys
):
    code, out, err = run_main(monkeypatch, capsys, "preset", name, *settings)
    assert code == 2 and out == "" and words in err and err.count("\n") == 1
    assert (project / "params.yaml").read_text() == PARAMS


def test_a_preset_with_settings_is_written(project, monkeypatch, capsys):
    words = ("method=CAM", "backbone=ResNet-101", "procedure=every 2 epochs")
    code, out, _ = run_main(monkeypatch, capsys, "preset", "voc-deeplabcam-resnet50", *words)
    assert code == 0 and all(word in out for word in words)
    written = params.load(project / "params.yaml")
    assert (written.train_cam.method, written.train_cam.round_every) == ("cam", 2)
    assert written.train_cam.encoder == written.train_affinity.encoder == "resnet101.tv_in1k"
    assert comments((project / "params.yaml").read_text()) == comments(PARAMS)


def test_a_preset_leaves_a_file_with_unknown_parameters_alone(project):
    path = project / "params.yaml"
    path.write_text(PARAMS.replace("train_cam:", "train_cam:\n  colour: red", 1))
    before = path.read_text()
    with pytest.raises(UserError, match="colour"):
        preset.write("tiny", path)
    assert path.read_text() == before


@pytest.mark.parametrize("arguments", [["preset"], ["preset", "--list"]])
def test_presets_are_listed_with_their_titles(arguments):
    answer = CliRunner().invoke(cli.app, arguments)
    assert answer.exit_code == 0
    for name, title in preset.titles().items():
        assert any(
            line.startswith(name) and line.endswith(title) for line in answer.stdout.splitlines()
        )


@pytest.mark.parametrize("words", [["nope"], ["tiny", "method=CAM"]])
def test_a_list_of_presets_takes_no_name(words, project, monkeypatch, capsys):
    code, out, err = run_main(monkeypatch, capsys, "preset", "--list", *words)
    assert code == 2 and out == "" and "--list" in err and words[0] in err
    assert err.count("\n") == 1 and (project / "params.yaml").read_text() == PARAMS


def write_reports(root, rounds, metrics):
    for name, text in (("train_cam/rounds.csv", rounds), ("evaluate/metrics.json", metrics)):
        path = root / "reports" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


HEADER = "round,epoch,cam_miou,pseudo_label_miou,masked_share,seconds,images_per_second\n"


def test_results_are_in_percent(project, monkeypatch, capsys):
    write_reports(
        project,
        HEADER + "1,5,0.31234,0.4,0.1,12.34,9\n2,15,0.456,nan,0.0,11,9\n",
        '{"train": {"cam_miou": 0.5, "cam_miou_oracle": 0.625, "cam_crf_miou": null},'
        ' "round_01": {"pseudo_label_miou": 0.4}}',
    )
    code, out, _ = run_main(monkeypatch, capsys, "results")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert ["1", "5", "31.2", "40.0", "12.3"] in rows
    assert ["2", "15", "45.6", "-", "11.0"] in rows
    assert ["train", "50.0", "62.5", "-"] in rows
    assert "round_01" not in out
    assert "make ui" in out


def test_results_show_the_random_walk_where_there_is_one(project, monkeypatch, capsys):
    write_reports(project, HEADER, "{}")
    assert "random walk, %" not in run_main(monkeypatch, capsys, "results")[1]
    path = project / "reports/random_walk/metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text(
        '{"precision": "fp32", "map_stride": 8, "val": {"walk_miou": null},'
        ' "train": {"walk_miou": 0.7425, "walk_crf_miou": 0.7483}}'
    )
    code, out, _ = run_main(monkeypatch, capsys, "results")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and ["train", "74.2", "74.8"] in rows and ["val", "-", "-"] in rows
    path.write_text('{"train": {"images": 4}}')
    code, _, err = run_main(monkeypatch, capsys, "results")
    assert code == 2 and "random_walk" in err and err.count("\n") == 1


def test_columns_of_the_segmenters_are_below_their_heads(project, monkeypatch, capsys):
    write_reports(project, HEADER, "{}")
    for place, name in enumerate(("last_round", "random_walk_crf")):
        path = project / f"reports/train_segmenter/{name}/metrics.json"
        path.parent.mkdir(parents=True)
        splits = f'{{"val": {{"miou": 0.{place + 1}, "crf_miou": 0.5}}}}'
        path.write_text(f'{{"label_set": "{name}", "splits": {splits}}}')
    _, out, _ = run_main(monkeypatch, capsys, "results")
    lines = out.partition("mIoU of the segmenters, %\n")[2].splitlines()[:3]
    assert [line.split()[0] for line in lines] == ["trained", "last_round", "random_walk_crf"]
    words = ("split", "val", "val")
    assert len({line.index(word) for line, word in zip(lines, words, strict=True)}) == 1
    assert len(set(map(len, lines))) == 1


@pytest.mark.parametrize(
    ("rounds", "metrics"),
    [
        ("round,epoch\n1,5\n", "{}"),
        (HEADER + "1,5,a,b,0,1,1\n", "{}"),
        (HEADER, "{"),
        (HEADER, '{"val": 1}'),
    ],
)
def test_damaged_reports_are_an_error(rounds, metrics, project, monkeypatch, capsys):
    write_reports(project, rounds, metrics)
    code, _, err = run_main(monkeypatch, capsys, "results")
    assert code == 2 and "dvc repro" in err and err.count("\n") == 1


def test_results_before_a_run_say_what_to_do(project, monkeypatch, capsys):
    code, _, err = run_main(monkeypatch, capsys, "results")
    assert code == 2 and "dvc repro" in err
