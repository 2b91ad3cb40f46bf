"""A signal ends the program within seconds, whatever its threads wait for."""

import os
import signal
import subprocess
import sys
import time
from itertools import product

import psutil
import pytest

from isim.runtime import ending

PROGRAM = """
import contextlib, ctypes, os, signal, sys, time
from isim import cli
from isim.runtime import helpers

def told(word):
    print(word, flush=True)

def blocked_thread(fifo):
    list(helpers.in_threads(lambda path: open(path).read(), [fifo, fifo], threads=2))

def blocked_main(fifo):
    open(fifo).read()

def blocked_for_good(fifo):
    # As on a dead mount, or in a library: a lock of C, taken twice.
    lock = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(lock)
    ctypes.CDLL(None).pthread_mutex_lock(lock)

def blocked_loader(fifo):
    from torch.utils.data import DataLoader

    class Images:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return open(fifo).read()

    loader = DataLoader(Images(), num_workers=1, worker_init_fn=helpers.start_loader)
    with helpers.signals_held():
        batches = iter(loader)
    next(batches)

def in_a_destructor(fifo):
    class Slow:
        def __del__(self):
            told("begun")
            time.sleep(20)

    Slow()
    time.sleep(20)

def app():
    try:
        if sys.argv[1] != "in_a_destructor":
            told("begun")
        globals()[sys.argv[1]](sys.argv[2])
    finally:
        told("closed")

# The tests may run under nohup.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
cli.app = app
cli.main()
"""


@pytest.mark.parametrize(
    ("where", "number"),
    [
        *product(
            ["blocked_thread", "blocked_main", "blocked_for_good", "blocked_loader"],
            [signal.SIGTERM, signal.SIGINT],
        ),
        ("blocked_for_good", signal.SIGHUP),
    ],
)
def test_a_read_that_never_returns_does_not_outlive_a_signal(where, number, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    command = [sys.executable, "-c", PROGRAM, where, tmp_path / "fifo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        helpers = []
        while where == "blocked_loader" and not helpers:
            helpers = psutil.Process(process.pid).children()
        time.sleep(0.5)
        began = time.monotonic()
        process.send_signal(number)
        try:
            rest, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    code = process.returncode
    # The rest is for a busy machine.
    assert time.monotonic() - began < ending.GRACE + 5
    uncaught = number == signal.SIGINT and where != "blocked_for_good"
    assert code in ({128 + number, -number} if uncaught else {128 + number})
    assert rest == ("" if where == "blocked_for_good" else "closed\n")
    assert psutil.wait_procs(helpers, timeout=5)[1] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_a_handler_raises_in_a_destructor_is_not_dropped(number, tmp_path):
    command = [sys.executable, "-c", PROGRAM, "in_a_destructor", tmp_path]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        rest, told = process.communicate(timeout=60)
    # Neither was it ended by force.
    assert rest == "closed\n" and "isim: ended" not in told
    assert "Exception ignored" not in told
    assert process.returncode in (128 + number, -number)
