"""A stage that was killed goes on where it was and ends bit-equal to an unbroken run."""

import os
import shutil
import signal
from fnmatch import fnmatch
from typing import NamedTuple

import psutil
import pytest
from support.runs import family, isim, outs, wait_for

KILLED, ENDED = -int(signal.SIGKILL), 0
UNBROKEN = (None, 0)
SEGMENTER = {"stage": "train_segmenter", "arguments": ["round_02"]}


class Life(NamedTuple):
    """How a process ended; steps of the optimizer that it began, images that it finished."""

    code: int
    steps: int = 0
    images: int = 0


@pytest.fixture(scope="module")
def lives(nursery):
    """A function that runs a stage once a (moment, count), which kills it."""

    def life(rank):
        assert rank["code"] in (KILLED, ENDED), rank["said"]
        # CAMs of the images that are drawn come on top.
        images = [name for name in rank["images"] if not fnmatch(name, "round_*/*.npz")]
        return Life(rank["code"], len(rank["losses"]), len(images))

    def live(root, *steps, stage="train_cam", arguments=(), **changes):
        what = {"stage": stage, "arguments": arguments, "changes": changes}
        found = []
        for moment, count in steps:
            death = {"moment": moment, "count": count, "victim": 0} if moment else {}
            found += map(life, nursery(root, 1, **what, **death))
        return found

    return live


@pytest.fixture(scope="module")
def unbroken(copies, lives):
    """A project whose stages nothing has interrupted."""
    root = copies()
    expected = {
        "train_cam": Life(ENDED, 6, 32),
        "export_cams": Life(ENDED, 0, 16 + 8),
        "train_affinity": Life(ENDED, 6, 16),
        "random_walk": Life(ENDED, 0, 16 + 16),
        # Each image of val is written twice, before and after the dCRF.
        "train_segmenter": Life(ENDED, 4, 8 + 8),
        "masks": Life(ENDED, 0, 16 + 8),
        "evaluate": Life(ENDED, 0, 2 + 2),
    }
    for stage, life in expected.items():
        arguments = SEGMENTER["arguments"] if stage == "train_segmenter" else ()
        assert lives(root, UNBROKEN, stage=stage, arguments=arguments) == [life]
        assert kept(root, stage) == []
    return root


@pytest.fixture
def broken(unbroken, copies):
    """A function that copies the project with nothing but what the stages before one made."""

    def copy(stage):
        root = copies(unbroken)
        for name in (".isim", f"reports/{stage}", f"models/{stage}", *OUTS[stage]):
            shutil.rmtree(root / name, ignore_errors=True)
        return root

    return copy


OUTS = {
    "train_cam": ("data/pseudo_labels",),
    "export_cams": ("data/cams",),
    "train_affinity": ("data/affinity_labels",),
    "random_walk": ("data/random_walk",),
    "train_segmenter": ("data/predictions",),
    "masks": ("data/masks",),
    "evaluate": (),
}


def kept(root, stage):
    """What a stage could go on from."""
    folder = root / ".isim/resume" / stage
    return [path.relative_to(folder) for path in folder.rglob("*")]


def assert_equal_outs(root, expected):
    found, wanted = outs(root), outs(expected)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


def test_a_training_that_is_killed_again_and_again_ends_bit_equal(unbroken, broken, lives):
    root = broken("train_cam")
    assert lives(
        root,
        ("before a step of the optimizer", 2),  # in the first epoch: nothing to go on from
        ("after a state was saved", 1),  # right after the epoch, before the round
        ("after a label map", 5),  # within the first round
        ("when a label map is renamed", 5),  # again, with a part of a file lying about
        ("when a model is renamed", 2),  # at the start of the second round, likewise
        ("before a step of the optimizer", 2),  # in the last epoch, with labels
        ("after a folder was copied", 2),  # while publishing: models are there, labels not
        ("when the resume folder is renamed", 1),  # all is published
        ("when a part of a removed folder is gone", 1),
    ) == [
        Life(KILLED, 2),
        Life(KILLED, 2),
        # The image at which a process died may have to be done again.
        Life(KILLED, 0, 5),
        Life(KILLED, 0, 4),
        Life(KILLED, 2, 8),
        Life(KILLED, 2, 16),
        Life(KILLED, 2),
        Life(KILLED),
        Life(KILLED),
    ]
    assert_equal_outs(root, unbroken)
    # What is left of a half removed state is not taken for a whole.
    (again,) = lives(root, UNBROKEN)
    assert again == (ENDED, 6, 32)
    assert_equal_outs(root, unbroken)
    assert kept(root, "train_cam") == []


def test_a_measurement_that_is_killed_is_made_again_and_nothing_else(copies, lives):
    whole, root = copies(), copies()
    # One round, after the first epoch; 16 images scored after each of the others.
    options = {"epochs": 4, "round_every": 9}
    lives(whole, UNBROKEN, **options)
    found = lives(
        root,
        ("after a ground truth was read", 16 + 16 + 5),  # in the second measurement
        ("after a ground truth was read", 5),  # again
        ("when a measurement is renamed", 1),
        ("after a ground truth was read", 16 + 3),  # in the third
        UNBROKEN,
        **options,
    )
    assert [life.code for life in found] == [KILLED] * 4 + [ENDED]
    assert [life.steps for life in found] == [6, 0, 0, 2, 0]
    assert_equal_outs(root, whole)
    rows = (root / "reports/train_cam/miou.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [["1", "1"], ["2", ""], ["3", ""], ["4", ""]]


def test_changed_parameters_start_anew_and_bf16_ends_bit_equal_too(copies, lives):
    whole, root = copies(), copies()
    lives(whole, UNBROKEN, precision="bf16")
    assert lives(root, ("after a state was saved", 2)) == [Life(KILLED, 4, 16)]
    assert lives(
        root,
        ("before a step of the optimizer", 4),
        ("after a label map", 5),
        UNBROKEN,
        precision="bf16",
    ) == [Life(KILLED, 4, 16), Life(KILLED, 2, 5), Life(ENDED, 2, 12)]
    assert_equal_outs(root, whole)


@pytest.mark.parametrize(
    ("stage", "broken_by"),
    [
        (
            "export_cams",
            {
                ("after a CAM", 5): Life(KILLED, 0, 5),
                ("when a CAM is renamed", 4): Life(KILLED, 0, 3),
                ("after a CAM", 9 + 3): Life(KILLED, 0, 12),  # in the second split
                ("after a folder was copied", 1): Life(KILLED, 0, 6),
            },
        ),
        (
            "train_affinity",
            {
                ("after a label map", 5): Life(KILLED, 0, 5),
                ("when a label map is renamed", 4): Life(KILLED, 0, 3),
                ("before a step of the optimizer", 2): Life(KILLED, 2, 9),  # in the first epoch
                ("before a step of the optimizer", 4): Life(KILLED, 4),  # in the second
                ("after a state was saved", 1): Life(KILLED, 2),
                # The network is published, the labels are not.
                ("after a folder was copied", 1): Life(KILLED, 2),
            },
        ),
        (
            "random_walk",
            {
                # A third image's, before it went through the dCRF.
                ("after a label map", 5): Life(KILLED, 0, 5),
                ("when a label map is renamed", 4): Life(KILLED, 0, 3),
                ("after a folder was copied", 1): Life(KILLED, 0, 26),
            },
        ),
        (
            "train_segmenter",
            {
                ("before a step of the optimizer", 2): Life(KILLED, 2),
                ("before a step of the optimizer", 3): Life(KILLED, 3),  # in the second epoch
                # Of the third image only the prediction before the dCRF.
                ("after a label map", 5): Life(KILLED, 2, 5),
                ("when a refined prediction is renamed", 3): Life(KILLED, 0, 5),
                # The model is there, the predictions are not.
                ("after a folder was copied", 2): Life(KILLED, 0, 8),
            },
        ),
        (
            "masks",
            {
                # The fifth is not in the journal yet.
                ("after a label map", 5): Life(KILLED, 0, 5),
                # By CAMs, the third one.
                ("when a label map is renamed", 15): Life(KILLED, 0, 14),
                ("after a folder was copied", 1): Life(KILLED, 0, 6),
            },
        ),
    ],
)
def test_a_stage_that_is_killed_again_and_again_ends_bit_equal(
    stage, broken_by, unbroken, broken, lives
):
    root = broken(stage)
    options = SEGMENTER if stage == "train_segmenter" else {"stage": stage}
    assert lives(root, *broken_by, UNBROKEN, **options) == [*broken_by.values(), Life(ENDED)]
    assert_equal_outs(root, unbroken)
    assert kept(root, stage) == []


def test_scoring_that_is_killed_scores_the_rest(unbroken, broken, lives):
    root = broken("evaluate")

    def scored():
        journals = root.glob(".isim/resume/evaluate/*/*/*.jsonl")
        return sum(len(path.read_text().splitlines()) for path in journals)

    # 16 and 8 images have CAMs, and 16 have label maps of each of two rounds.
    for count, total in ((5, 5), (16, 21), (24, 45)):
        lives(root, ("after a line of a journal", count), stage="evaluate")
        assert scored() == total
    life = lives(root, ("after a line of a journal", 16 + 8 + 32 - 45 + 1), stage="evaluate")
    assert life == [Life(ENDED)]
    assert_equal_outs(root, unbroken)


def test_a_label_set_is_not_taken_for_another_one(broken, lives):
    root = broken("train_segmenter")
    other = {"stage": "train_segmenter", "arguments": ["ground_truth"]}
    assert lives(root, ("before a step of the optimizer", 3), **SEGMENTER) == [Life(KILLED, 3)]
    assert lives(root, UNBROKEN, **other) == [Life(ENDED, 4, 16)]
    assert {path.parts[0] for path in kept(root, "train_segmenter")} == {"round_02"}
    assert lives(root, UNBROKEN, **SEGMENTER) == [Life(ENDED, 2, 16)]
    assert kept(root, "train_segmenter") == []


def test_signals_leave_a_state_to_go_on_from_and_no_process(unbroken, broken, lives):
    root = broken("train_cam")
    resume = root / ".isim/resume/train_cam"

    def made(name="round_01"):
        found = resume.glob(f"*/pseudo_labels/{name}/[!.]*.png")
        return {path.name: path.stat().st_mtime_ns for path in found}

    def interrupt(process, number, everyone=False):
        helpers = family(process)
        assert helpers
        (os.killpg if everyone else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=60)
        # Helpers of the data loader ask every 5 s whether their parent lives.
        assert psutil.wait_procs(helpers, timeout=60)[1] == []
        assert "Traceback" not in err
        assert any(resume.glob("*/state.safetensors")) and not (root / "models/train_cam").exists()
        return process.returncode

    process = isim(root, "train-cam", ISIM_WORKERS="1")
    wait_for(process, lambda: len(made()) >= 5)
    assert interrupt(process, signal.SIGTERM) == 128 + signal.SIGTERM
    before = made()

    process = isim(root, "train-cam", ISIM_WORKERS="1")
    wait_for(process, lambda: any(resume.glob("*/round_01.json")))
    # Two images a helper are under way; the others are not done again.
    assert len(made()) == 16 and len(before.items() & made().items()) >= len(before) - 2 > 0
    wait_for(process, lambda: family(process))
    # A terminal sends Ctrl-C to the whole group.
    assert interrupt(process, signal.SIGINT, everyone=True) == 128 + signal.SIGINT

    process = isim(root, "train-cam", ISIM_WORKERS="1")
    wait_for(process, lambda: len(made("round_02")) >= 5)
    assert interrupt(process, signal.SIGKILL) == -signal.SIGKILL

    # Helpers and processes do not matter to the state.
    (rest,) = lives(root, UNBROKEN)
    assert (rest.code, rest.steps) == (ENDED, 2)
    assert_equal_outs(root, unbroken)
