"""Runs of stages in other processes, and all that they leave."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
from support.projects import read_rows

# Figures of speed; nothing else may differ.
TIMES = {"seconds", "images_per_second", "waiting_share"}


def environment(**changes):
    """Variables of a process on the CPU, without helpers and without settings of ours."""
    ours = ("DVC_", "ISIM_", "MLFLOW_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    fixed = {"ISIM_DEVICE": "cpu", "ISIM_WORKERS": "0", "OMP_NUM_THREADS": "1"}
    return inherited | fixed | changes


def isim(root, *command, **variables):
    """Start the real command, as the leader of a group of processes."""
    where = {"cwd": root, "env": environment(PYTHONPATH=Path(__file__).parents[2], **variables)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "isim", *command]
    return subprocess.Popen(command, start_new_session=True, **where, **pipes)


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def family(process):
    return psutil.Process(process.pid).children(recursive=True)


@contextmanager
def nursery(log):
    """A function that runs a step of many_processes.py; what the process of each rank did."""
    command = [sys.executable, Path(__file__).with_name("many_processes.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # As a command does before it loads torch.
    own = environment(TORCH_CPP_LOG_LEVEL="ERROR")
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, env=own, stderr=stderr, **pipes) as process,
    ):

        def run(roots, processes, **what):
            roots = [str(root) for root in (roots if isinstance(roots, list) else [roots])]
            step = what | {"roots": roots, "processes": processes}
            print(json.dumps(step), file=process.stdin, flush=True)
            line = process.stdout.readline()
            assert line, log.read_text()
            return json.loads(line)

        yield run


def without_times(path):
    """Contents of a file, without the figures of speed in tables and metrics."""
    if path.suffix == ".csv":
        return [{k: row[k] for k in row.keys() - TIMES} for row in read_rows(path)]
    if path.name == "metrics.json":
        text = path.read_text()
        return json.loads(
            text, object_hook=lambda found: {k: found[k] for k in found.keys() - TIMES}
        )
    return path.read_bytes()


def outs(root):
    """Every out and report of the stages that can be resumed, by path."""
    aside = ("data/prepared", "reports/prepare")
    files = [path for name in ("data", "models", "reports") for path in (root / name).rglob("*")]
    names = {str(path.relative_to(root)): path for path in sorted(files) if path.is_file()}
    return {k: without_times(path) for k, path in names.items() if not k.startswith(aside)}
