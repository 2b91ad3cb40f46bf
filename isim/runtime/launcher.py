"""Start a stage as several processes: torchrun inside the command, with its exit codes.

`ISIM_PROCESSES` is their number on this host, `ISIM_TORCHRUN` holds any other option of torchrun.
"""

import contextlib
import io
import logging
import os
import signal
from collections.abc import Sequence
from typing import NoReturn

from isim.errors import UserError
from isim.runtime import ending, paths
from isim.runtime.processes import LOST

# Processes of a machine.
_MOST = 1024


def started() -> bool:
    """Tell whether torchrun has started this process, as one of several."""
    return "LOCAL_RANK" in os.environ


def options() -> list[str]:
    """Return the options of torchrun that the environment asks for; none: it is not to be started.

    Raises UserError when `$ISIM_PROCESSES` is no number of at least 1.
    """
    if started():
        return []
    count, others = paths.number_of("ISIM_PROCESSES", 1, _MOST), paths.words_of("ISIM_TORCHRUN")
    each = [] if count is None else ["--nproc-per-node", str(count)]
    if not others:
        return ["--standalone", *each] if count not in (None, 1) else []
    return [*others, *each]


def launch(torchrun: Sequence[str], command: Sequence[str]) -> NoReturn:
    """Run a command of isim in several processes, by torchrun, then end with its exit code.

    Raises UserError when torchrun does not take the options, a process was killed, or contact to
    another host was lost.
    """
    # The processes themselves print all there is to say.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            arguments = parse_args([*torchrun, "--module", "isim", *command])
    except SystemExit:
        reason = complaint.getvalue().strip().rpartition("error: ")[2]
        raise UserError(f"ISIM_TORCHRUN: {reason}") from None
    if arguments.training_script != "isim":
        # torchrun would run that instead.
        raise UserError(f"ISIM_TORCHRUN: {arguments.training_script} is no option; take it out")
    if (number := str(arguments.nproc_per_node)).isdecimal() and int(number) > _MOST:
        raise UserError(f"ISIM_TORCHRUN: {number} processes, more than {_MOST}; ask for fewer")
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        # As nohup has it; torchrun would end all when the terminal is closed.
        arguments.signals_to_handle = "SIGTERM,SIGINT,SIGQUIT"
    # It waits for its processes, and does nothing else.
    ending.allow(3 * ending.GRACE)
    logging.disable(logging.CRITICAL)
    try:
        run(arguments)
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        again = "run the same command again: what is finished is kept"
        if 2 in codes:  # The process has told the error.
            raise SystemExit(2) from None
        for code in codes - {-signal.SIGTERM}:
            if code < 0:
                name = signal.Signals(-code).name
                told = f"one of the processes was ended by {name} (out of memory?); {again}"
                raise UserError(told) from None
        if codes <= {LOST, -signal.SIGTERM, 128 + signal.SIGTERM}:
            told = f"a process on another host has ended; see there, then {again}"
            raise UserError(told) from None
        raise SystemExit(1) from None
    except (DistError, ValueError, OSError) as error:
        raise UserError(
            f"the processes cannot be started: {str(error).splitlines()[0]}; check "
            "ISIM_PROCESSES and ISIM_TORCHRUN, and that the other hosts can be reached"
        ) from error
    raise SystemExit(0)
