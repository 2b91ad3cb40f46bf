"""End of the program by Ctrl-C, SIGTERM, SIGHUP: within seconds, whatever its threads wait for.

A read from a dead mount or a pipe that nobody writes to never returns, and Python waits for its
threads at the end; in the main thread such a read keeps a signal's handler from being called. One
thread waits for the signals themselves, and ends the program if it has not ended by itself.
"""

import os
import signal
import sys
import threading
import time

# Seconds for what is open to be closed: MLflow is told, helpers are stopped.
GRACE = 5.0
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_begun = threading.Event()
_grace = GRACE
_writer = -1
_hook = sys.unraisablehook


def watch_signals() -> None:
    """Watch for Ctrl-C, SIGTERM and SIGHUP from now on; called once, in the main thread.

    Handlers that are set, whenever, are called as ever; a signal that is ignored stays so.
    """
    global _writer, _hook
    _hook, sys.unraisablehook = sys.unraisablehook, _raise_again
    reader, writer = os.pipe()
    _writer = writer
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # A child that was forked shares the pipe: its signals are not ours.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_wait, args=(reader,), name="ending", daemon=True).start()


def unwatch() -> None:
    """Watch no longer, at the end of the program: of who called it, too, if no signal ends it."""
    if not begun():
        signal.set_wakeup_fd(-1)
        os.close(_writer)
        sys.unraisablehook = _hook


def allow(seconds: float) -> None:
    """Give the program so long to end: it waits for processes that take `GRACE` themselves."""
    global _grace
    _grace = seconds


def begun() -> bool:
    """Tell whether a signal ends the program."""
    return _begun.is_set()


def _raise_again(dropped: "sys.UnraisableHookArgs") -> None:
    """Send a signal once more if Python dropped what its handler raised: in a destructor."""
    error, number = dropped.exc_value, 0
    if isinstance(error, KeyboardInterrupt):
        number = signal.SIGINT
    elif isinstance(error, SystemExit) and isinstance(error.code, int):
        number = error.code - 128
    if number not in _ENDS:
        _hook(dropped)
        return
    # Once the destructor has ended, which this must not be part of.
    again = threading.Timer(0.1, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _wait(reader: int) -> None:
    number = 0
    while number not in _ENDS:
        told = os.read(reader, 1)
        if not told:
            os.close(reader)
            return
        number = told[0]
    _begun.set()
    time.sleep(_grace)
    name = signal.Signals(number).name
    # Past the locks of sys.stderr, which another thread may hold.
    os.write(2, f"isim: ended by {name} in the middle of what it waited for\n".encode())
    os._exit(128 + number)
