"""A stage that was killed goes on where it was and ends bit-equal to an unbroken run."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

HERE = Path(__file__).parent
# Figures of speed; nothing else may differ.
TIMES = {"seconds", "images_per_second", "waiting_share"}
KILLED, ENDED = int(signal.SIGKILL), 0
UNBROKEN = (None, 0)


def environment(**changes):
    ours = ("DVC_", "ISIM_", "MLFLOW_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    fixed = {"ISIM_DEVICE": "cpu", "ISIM_WORKERS": "0", "OMP_NUM_THREADS": "1"}
    return inherited | fixed | changes


def without_times(path):
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    if path.name == "metrics.json":
        return json.loads(
            path.read_text(), object_hook=lambda d: {k: d[k] for k in d.keys() - TIMES}
        )
    return path.read_bytes()


def outs(root):
    """Every out and report of the stages that can be resumed, by path."""
    folders = (
        "models",
        "data/pseudo_labels",
        "data/cams",
        "data/affinity_labels",
        "data/random_walk",
        "reports/train_cam",
        "reports/export_cams",
        "data/predictions",
        "reports/train_segmenter",
        "reports/train_affinity",
        "reports/random_walk",
    )
    return {
        str(path.relative_to(root)): without_times(path)
        for folder in folders
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }


def assert_equal_outs(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """A function that runs `stage` once a (moment, count), which kills it; what each did."""
    log = tmp_path_factory.mktemp("nursery") / "stderr"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, str(HERE / "killed_stage.py")],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as nursery,
    ):

        def answer(root, stage, arguments, changes, moment, count):
            step = {"root": str(root), "stage": stage, "arguments": arguments, "changes": changes}
            step |= {"moment": moment, "count": count}
            nursery.stdin.write(json.dumps(step) + "\n")
            nursery.stdin.flush()
            line = nursery.stdout.readline()
            assert line, log.read_text()
            return json.loads(line)

        def run(root, *steps, stage="train_cam", arguments=(), **changes):
            return [answer(root, stage, arguments, changes, *step) for step in steps]

        yield run


@pytest.fixture(scope="module")
def copies(prepared_project, tmp_path_factory):
    """A function that makes one more copy of the prepared project."""

    def copy():
        root = tmp_path_factory.mktemp("resume") / "project"
        shutil.copytree(prepared_project, root)
        return root

    return copy


@pytest.fixture(scope="module")
def unbroken(copies, lives):
    """A project whose training nothing has interrupted."""
    root = copies()
    (life,) = lives(root, UNBROKEN)
    assert life == {"signal": ENDED, "epochs": [1, 2, 3], "images": 32}
    assert not (root / ".isim/resume/train_cam").exists()
    return root


def test_a_training_that_is_killed_again_and_again_ends_bit_equal(unbroken, copies, lives):
    root = copies()
    *broken, last = lives(
        root,
        ("before a step of the optimizer", 2),  # in the first epoch: nothing to go on from
        ("after a state was saved", 1),  # right after the epoch, before the round
        ("after a label map", 5),  # within the first round
        ("when a label map is renamed", 5),  # again, with a part of a file lying about
        ("when a model is renamed", 2),  # at the start of the second round, likewise
        ("before a step of the optimizer", 2),  # in the last epoch, with labels
        ("after a folder was copied", 2),  # while publishing: models are there, labels not
        ("when the resume folder is removed", 1),  # all is published
    )
    assert [life["signal"] for life in broken] == [KILLED] * 7
    assert [life["epochs"] for life in broken] == [[], [1], [], [], [2], [], [3]]
    # The image at which a process died may have to be done again.
    assert [life["images"] for life in broken] == [0, 0, 5, 4, 8, 16, 0]
    assert last == {"signal": KILLED, "epochs": [], "images": 0}
    expected = outs(unbroken)
    assert len(expected) == 3 + 32 + 5 + 5
    assert_equal_outs(outs(root), expected)
    # Half of the resume state is gone: what is left of it must not be taken for a whole.
    (again,) = lives(root, UNBROKEN)
    assert again["signal"] == ENDED
    assert_equal_outs(outs(root), expected)
    assert not (root / ".isim/resume/train_cam").exists()


def test_a_measurement_that_is_killed_is_made_again_and_nothing_else(copies, lives):
    whole, root = copies(), copies()
    # One round, after the first epoch; 16 images scored after each of the others.
    options = {"epochs": 4, "round_every": 9}
    lives(whole, UNBROKEN, **options)
    found = lives(
        root,
        ("before an image is scored", 16 + 5),  # in the second measurement, after epoch 3
        ("before an image is scored", 5),  # again
        ("when a measurement is renamed", 1),
        ("before an image is scored", 16 + 3),  # in the third
        UNBROKEN,
        **options,
    )
    assert [life["signal"] for life in found] == [KILLED] * 4 + [ENDED]
    assert [life["epochs"] for life in found] == [[1, 2, 3], [], [], [4], []]
    assert_equal_outs(outs(root), outs(whole))
    rows = (root / "reports/train_cam/miou.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [["1", "1"], ["2", ""], ["3", ""], ["4", ""]]


def test_changed_parameters_start_anew_and_bf16_ends_bit_equal_too(copies, lives):
    whole, root = copies(), copies()
    lives(whole, UNBROKEN, precision="bf16")
    (other,) = lives(root, ("after a state was saved", 2))
    assert (other["signal"], other["epochs"]) == (KILLED, [1, 2])
    steps = (("before a step of the optimizer", 4), ("after a label map", 5), UNBROKEN)
    first, second, third = lives(root, *steps, precision="bf16")
    assert (first["signal"], first["epochs"], first["images"]) == (KILLED, [1], 16)
    assert (second["signal"], second["epochs"], second["images"]) == (KILLED, [2], 5)
    assert (third["signal"], third["epochs"], third["images"]) == (ENDED, [3], 12)
    assert_equal_outs(outs(root), outs(whole))


def test_an_export_that_is_killed_again_and_again_ends_bit_equal(unbroken, copies, lives):
    whole, root = copies(), copies()
    for project in (whole, root):
        shutil.copytree(unbroken / "models", project / "models")
    (life,) = lives(whole, UNBROKEN, stage="export_cams")
    assert life == {"signal": ENDED, "epochs": [], "images": 16 + 8}
    found = lives(
        root,
        ("after a CAM", 5),
        ("when a CAM is renamed", 4),
        ("after a CAM", 9 + 3),  # in the second split
        ("after a folder was copied", 1),
        UNBROKEN,
        stage="export_cams",
    )
    assert [life["signal"] for life in found] == [KILLED] * 4 + [ENDED]
    assert [life["images"] for life in found] == [5, 3, 12, 6, 0]
    assert_equal_outs(outs(root), outs(whole))
    assert not (root / ".isim/resume/export_cams").exists()


def test_a_segmenter_that_is_killed_again_and_again_ends_bit_equal(unbroken, copies, lives):
    whole, root = copies(), copies()
    for project in (whole, root):
        shutil.copytree(unbroken / "data/pseudo_labels", project / "data/pseudo_labels")
    options = {"stage": "train_segmenter", "arguments": ["round_02"]}
    (life,) = lives(whole, UNBROKEN, **options)
    # Each image of val is written twice, before and after the dCRF.
    assert life == {"signal": ENDED, "epochs": [1, 2], "images": 16}
    found = lives(
        root,
        ("before a step of the optimizer", 2),  # in the first epoch: nothing to go on from
        ("before a step of the optimizer", 3),  # in the second
        ("after a label map", 5),  # of the third image only the prediction before the dCRF
        ("when a refined prediction is renamed", 3),
        ("after a folder was copied", 2),  # the model is there, the predictions are not
        UNBROKEN,
        **options,
    )
    assert [life["signal"] for life in found] == [KILLED] * 5 + [ENDED]
    assert [life["epochs"] for life in found] == [[], [1], [2], [], [], []]
    assert [life["images"] for life in found] == [0, 0, 5, 5, 8, 0]
    assert_equal_outs(outs(root), outs(whole))
    assert not (root / ".isim/resume/train_segmenter/round_02").exists()
    # Nor is another label set taken for it.
    (other,) = lives(root, ("before a step of the optimizer", 3), **options, seed=1)
    (ceiling,) = lives(root, UNBROKEN, stage="train_segmenter", arguments=["ground_truth"], seed=1)
    assert (other["epochs"], ceiling["epochs"]) == ([1], [1, 2])
    (rest,) = lives(root, UNBROKEN, **options, seed=1)
    assert rest["epochs"] == [2]


@pytest.fixture(scope="module")
def affine(unbroken, copies, lives):
    """A project with CAMs, and one whose AffinityNet and random walk nothing has interrupted."""
    exported = copies()
    shutil.copytree(unbroken / "models", exported / "models")
    lives(exported, UNBROKEN, stage="export_cams")
    whole = exported.parent / "whole"
    shutil.copytree(exported, whole)
    (life,) = lives(whole, UNBROKEN, stage="train_affinity")
    assert life == {"signal": ENDED, "epochs": [1, 2, 3], "images": 16}
    (life,) = lives(whole, UNBROKEN, stage="random_walk")
    assert life == {"signal": ENDED, "epochs": [], "images": 16 + 16}
    return exported, whole


def test_affinity_and_walk_that_are_killed_again_and_again_end_bit_equal(affine, lives):
    exported, whole = affine
    root = exported.parent / "broken"
    shutil.copytree(exported, root)
    found = lives(
        root,
        ("after a label map", 5),
        ("when a label map is renamed", 4),  # with a part of a file lying about
        ("before a step of the optimizer", 2),  # in the first epoch
        ("before a step of the optimizer", 4),  # in the second
        ("after a state was saved", 1),
        ("after a folder was copied", 1),  # the network is published, the labels are not
        UNBROKEN,
        stage="train_affinity",
    )
    assert [life["signal"] for life in found] == [KILLED] * 6 + [ENDED]
    # The image at which a process died may have to be done again.
    assert [life["images"] for life in found] == [5, 3, 9, 0, 0, 0, 0]
    assert [life["epochs"] for life in found] == [[], [], [], [1], [2], [3], []]
    found = lives(
        root,
        ("after a label map", 5),  # a third image's, before it went through the dCRF
        ("when a label map is renamed", 4),
        ("after a folder was copied", 1),
        UNBROKEN,
        stage="random_walk",
    )
    assert [life["signal"] for life in found] == [KILLED] * 3 + [ENDED]
    assert [life["images"] for life in found] == [5, 3, 26, 0]
    assert_equal_outs(outs(root), outs(whole))
    assert len(list((root / "data/random_walk").rglob("*.png"))) == 16 + 16
    for stage in ("train_affinity", "random_walk"):
        assert not (root / f".isim/resume/{stage}").exists()


def isim(root, command):
    """Start the real command with a helper process, as the leader of a group of processes."""
    return subprocess.Popen(
        [str(Path(sys.executable).parent / "isim"), command],
        cwd=root,
        env=environment(ISIM_WORKERS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def family(process):
    return psutil.Process(process.pid).children(recursive=True)


def assert_all_end(processes):
    # Helpers of the data loader ask every 5 s whether their parent lives.
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []


def test_signals_leave_a_state_to_go_on_from_and_no_process(unbroken, copies, lives):
    root = copies()
    resume = root / ".isim/resume/train_cam"

    def labels(name):
        return lambda: len(list(resume.glob(f"*/pseudo_labels/{name}/[!.]*.png"))) >= 5

    def interrupt(process, number, everyone=False):
        helpers = family(process)
        assert helpers
        (os.killpg if everyone else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=60)
        assert_all_end(helpers)
        assert "Traceback" not in err
        assert any(resume.glob("*/state.safetensors")) and not (root / "models").exists()
        return process.returncode

    process = isim(root, "train-cam")
    wait_for(process, labels("round_01"))
    assert interrupt(process, signal.SIGTERM) == 128 + signal.SIGTERM
    kept = {p.name: p.stat().st_mtime_ns for p in resume.glob("*/pseudo_labels/round_01/[!.]*.png")}

    process = isim(root, "train-cam")
    wait_for(process, lambda: any(resume.glob("*/round_01.json")))
    now = {p.name: p.stat().st_mtime_ns for p in resume.glob("*/pseudo_labels/round_01/[!.]*.png")}
    # Two images a helper are under way; the others are not done again.
    assert len(now) == 16 and len(kept.items() & now.items()) >= len(kept) - 2 > 0
    wait_for(process, lambda: family(process))
    # A terminal sends Ctrl-C to the whole group.
    assert interrupt(process, signal.SIGINT, everyone=True) == 128 + signal.SIGINT

    process = isim(root, "train-cam")
    wait_for(process, labels("round_02"))
    assert interrupt(process, signal.SIGKILL) == -signal.SIGKILL

    (rest,) = lives(root, UNBROKEN)
    assert rest["epochs"] == [3], "helpers and processes do not matter to the state"
    assert_equal_outs(outs(root), outs(unbroken))
