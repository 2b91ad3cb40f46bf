"""Progress: a line every ten seconds at the latest, what it says, and what is recorded."""

import errno
import re
import threading
from itertools import pairwise

import pytest

from isim.runtime import helpers, progress


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """The clock of a teller of the test's own."""
    made = Clock()
    monkeypatch.setattr(progress, "_teller", progress._Teller(made))
    return made


def pass_by(clock, seconds, capsys):
    """Let time pass in looks at the clock; the seconds at which lines came, and the lines."""
    found, start = [], clock.now
    while clock.now < start + seconds:
        clock.now += progress.LOOK
        progress._teller.look()
        found += [(clock.now, line) for line in capsys.readouterr().out.splitlines()]
    return found


def test_a_line_comes_at_the_latest_after_ten_seconds_whatever_goes_on(clock, capsys):
    """In a loop, in one long step of it, in what is no loop at all, and right after a line."""
    assert progress.EVERY == 10
    progress._teller.told, seen = clock.now, [clock.now]
    with progress.task("training", 3, "epoch") as epochs:
        for _ in range(3):
            seen += [at for at, _ in pass_by(clock, 37, capsys)]
            epochs.add()
            progress.tell("an epoch is over")
            assert capsys.readouterr().out == "an epoch is over\n"
            seen.append(clock.now)
    seen += [at for at, _ in pass_by(clock, 61, capsys)]
    gaps = [b - a for a, b in pairwise(seen)]
    assert max(gaps) <= 10 and len(seen) > 15


def test_a_line_says_what_how_many_how_fast_and_the_time_left(clock, capsys):
    progress._teller.name = "train_cam"
    stream = progress.track(["a", "b", "c", "d"] * 100, "features")
    for _ in range(100):
        next(stream)
        clock.now += 0.25
    progress._teller.look()
    # The last one is not done with yet.
    expected = "train_cam: features: 99 of 400 images, 4.0 a second, 1 min 16 s left\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("total", "unit", "done", "expected"),
    [
        (5, "image", 0, "work: 0 of 5 images"),
        (1, "image", 0, "work: 0 of 1 image"),
        (None, "file", 40, "work: 40 files, 2.0 a second"),
        (5, "step", 1, "work: 1 of 5 steps, 20.0 s each, 1 min 20 s left"),
        (3000, "MB", 1000, "work: 1,000 of 3,000 MB, 50.0 a second, 40 s left"),
        (None, "", 0, "work, 20 s"),
    ],
)
def test_words_of_a_task(total, unit, done, expected, clock):
    with progress.task("work", total, unit) as task:
        clock.now += 20
        task.add(done)
        assert task.text(clock.now) == expected


def test_what_an_earlier_run_did_has_taken_no_time(clock):
    with progress.task("training", 50, "epoch", before=40) as task:
        clock.now += 20
        task.add(2)
        assert task.text(clock.now) == "training: 42 of 50 epochs, 10.0 s each, 1 min 20 s left"


def test_tasks_inside_tasks_are_told_from_the_outermost_on(clock):
    with progress.task("features"), progress.task("", 4, "image") as images:
        images.add()
        clock.now += 2
        line = progress._teller.line(clock.now)
    assert line == "features: 1 of 4 images, 2.0 s each, 6 s left"
    assert progress._teller.line(clock.now + 1000) == "33 min 22 s"


def test_a_stage_is_watched_from_another_thread(clock, capsys, monkeypatch):
    """Nothing that the stage does needs to come by."""
    told = threading.Event()
    monkeypatch.setattr(progress, "LOOK", 0.001)
    monkeypatch.setattr(progress._teller, "write", lambda line: told.set())
    with progress.watched("evaluate"):
        assert not told.wait(0.05)
        clock.now += 10
        assert told.wait(30)
    assert threading.active_count() == len(threading.enumerate())
    assert "progress" not in {thread.name for thread in threading.enumerate()}


def test_a_line_that_cannot_be_written_does_not_end_the_watch(clock, capsys, monkeypatch):
    """A log on a disk that is full for a minute gets the lines of later."""
    told = threading.Event()

    def write(line):
        clock.now += 10
        if clock.now < 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        told.set()

    monkeypatch.setattr(progress, "LOOK", 0.001)
    monkeypatch.setattr(progress._teller, "write", write)
    with progress.watched("evaluate"):
        clock.now += 10
        assert told.wait(30)
    assert capsys.readouterr().err == ""


def test_loops_are_recorded_with_the_time_that_is_their_own(clock):
    with progress.recorded() as ended, progress.task("round"):
        clock.now += 1
        for _ in progress.track(range(3), "images"):
            clock.now += 2
    assert [(one.titles, one.unit, one.done, one.seconds) for one in ended] == [
        (("round", "images"), "image", 3, 6),
        (("round",), "", 0, 1),
    ]


def test_what_threads_do_is_counted_when_it_is_done(clock):
    with progress.recorded() as ended:
        assert list(helpers.in_threads(abs, [-1, -2], "sizes", threads=2)) == [1, 2]
    assert [(one.titles, one.done) for one in ended] == [(("sizes",), 2)]


def test_quiet_swallows_all_but_the_lines_of_progress(clock, capsys):
    with progress.quiet(), progress.task("dry run", 2, "stage"):
        print("of the stage")
        progress.tell("of the stage")
        clock.now += 10
        progress._teller.look()
    assert capsys.readouterr().out == "dry run: 0 of 2 stages\n"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.2, "0 s"), (59.6, "1 min 0 s"), (112, "1 min 52 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds, expected):
    assert progress.duration(seconds) == expected
    assert re.fullmatch(r"[\d a-z]+", expected)
