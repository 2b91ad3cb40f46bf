"""Helper threads keep order and bounds, and end when they are not needed."""

import os
import signal
import threading
import time

import pytest

from isim.errors import UserError
from isim.runtime import helpers, processes


def test_workers_are_as_asked_for_or_the_share_of_the_cores(monkeypatch):
    for text in ("two", "-1", "1.5", ""):
        monkeypatch.setenv("ISIM_WORKERS", text)
        with pytest.raises(UserError, match="ISIM_WORKERS"):
            helpers.worker_count()
    for number in (0, 3):
        monkeypatch.setenv("ISIM_WORKERS", str(number))
        assert helpers.worker_count() == number
    monkeypatch.delenv("ISIM_WORKERS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for local_world, workers in ((1, 8), (4, 2), (9, 1)):
        group = processes._Group(world=local_world, local_world=local_world)
        monkeypatch.setattr(processes, "_group", group)
        assert helpers.worker_count() == workers


def slow_square(number):
    # Later ones are done earlier.
    time.sleep((20 - number) / 2000)
    return number**2


@pytest.mark.parametrize("options", [{}, {"threads": 0}, {"threads": 3}, {"depth": 9}])
def test_results_come_in_order_with_a_bounded_number_of_calls_ahead(options, monkeypatch):
    monkeypatch.setenv("ISIM_WORKERS", "2")
    depth = options.get("depth", 2 * options.get("threads", 2))
    read = []

    def source():
        for number in range(20):
            read.append(number)
            yield number

    for consumed, result in enumerate(helpers.in_threads(slow_square, source(), **options)):
        assert result == consumed**2
        # The next value is read when a result was taken: it may take long.
        assert len(read) == min(20, consumed + max(1, depth))
    assert list(helpers.in_threads(slow_square, [], **options)) == []


def test_an_error_is_raised_and_drops_what_has_not_begun():
    called, threads = [], threading.active_count()

    def work(number):
        called.append(number)
        if number == 1:
            raise UserError("the second")
        time.sleep(0.01)

    with pytest.raises(UserError, match="the second"):
        list(helpers.in_threads(work, range(100), threads=1, depth=50))
    assert len(called) < 10 and threading.active_count() == threads


@pytest.mark.parametrize("good", [0, 1, 2, 7])
def test_an_error_of_the_stream_itself_is_raised(good):
    def stream():
        yield from range(good)
        raise UserError("no more")

    found = helpers.in_threads(str, stream(), threads=1, depth=3)
    with pytest.raises(UserError, match="no more"):
        list(found)


def test_each_thread_is_started_and_the_bar_is_titled(capsys, monkeypatch):
    started = threading.local()

    def start():
        started.yes = True

    found = helpers.in_threads(lambda _: started.yes, range(6), threads=2, start=start)
    assert list(found) == [True] * 6
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    list(helpers.in_threads(str, range(6), "check", threads=1))
    assert "check: " in capsys.readouterr().err
    list(helpers.in_threads(str, range(6), threads=1))
    assert capsys.readouterr().err == ""


def test_signals_are_held_until_the_end_of_the_block():
    seen = []

    def hold():
        with helpers.signals_held():
            os.kill(os.getpid(), signal.SIGINT)
            seen.append("went on")

    with pytest.raises(KeyboardInterrupt):
        hold()
    assert seen == ["went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
