"""Kill the pipeline again and again; compare its result with an unbroken run, by `make torture`.

Preset `tiny` runs under DVC in two copies of this repository: once unbroken; and once killed at
random moments, some of them in every stage, each time after which the same command starts again.
A kill ends everything at once (SIGKILL to the whole group), DVC alone, whose stage then ends by
itself, or everything by SIGTERM. Printed are a seed, by which the same moments come again, and a
row a kill.

Exit code 1 if a run fails, an out or a report differs (but for figures of speed), something is left
beside the outs, or a stage that had ended by itself was computed again.
"""

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
FOLDERS = ("data", "models", "reports")
# Figures of speed.
TIMES = {"seconds", "images_per_second", "waiting_share"}
STARTED = re.compile(r"Running stage '([^']+)'")
LAST_CELL = re.compile(rb"<td>[0-9.]+</td></tr>")
AGAIN = "published again"
HOW = ("everything", "DVC alone", "SIGTERM")


@dataclass
class Kill:
    """A kill: of which stage, how, seconds after its start, and what the next start did."""

    stage: str
    how: str
    after: float
    ended: bool = False
    then: str = ""


class Project:
    """A copy of this repository with preset `tiny`, and a log of each of its runs."""

    def __init__(self, folder: Path) -> None:
        """Make the copy in a new folder."""
        self.folder = folder
        # Variables of isim and DVC of the caller are not for this.
        ours = ("DVC_", "GIT_", "ISIM_", "MLFLOW_", "PYTHON")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        state = folder.parent / f"{folder.name}-state"
        self.environment = kept | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "DVC_NO_ANALYTICS": "1",
            "DVC_GLOBAL_CONFIG_DIR": str(state / "global"),
            "DVC_SITE_CACHE_DIR": str(state / "site"),
            "ISIM_DEVICE": "cpu",
            "ISIM_WORKERS": "1",
            "OMP_NUM_THREADS": "1",
        }
        listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, names.split("\0")):
            if (ROOT / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        where: dict[str, Any] = {"cwd": folder, "env": self.environment, "check": True}
        for command in (("git", "init", "--quiet"), ("isim", "preset", "tiny")):
            subprocess.run(command, **where, stdout=subprocess.DEVNULL)

    @property
    def log(self) -> Path:
        """Log of the latest run."""
        return self.folder.parent / f"{self.folder.name}.log"

    def start(self) -> subprocess.Popen[bytes]:
        """Start DVC, as the leader of a group of processes."""
        with self.log.open("wb") as log:
            where: dict[str, Any] = {"cwd": self.folder, "env": self.environment}
            command = ["dvc", "repro"]
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **where
            )

    def started(self) -> list[str]:
        """List the stages that the latest run has started."""
        return STARTED.findall(self.log.read_text(errors="replace"))

    def files(self) -> dict[str, Any]:
        """Contents of all outs and reports by name, without figures of speed."""
        paths = [path for name in FOLDERS for path in (self.folder / name).rglob("*")]
        found = {path.relative_to(self.folder).as_posix(): path for path in paths if path.is_file()}
        return {name: _content(path) for name, path in sorted(found.items())}


def _content(path: Path) -> Any:  # noqa: ANN401 - bytes, or what JSON and CSV hold
    if path.name == "metrics.json":
        return json.loads(path.read_text(), object_hook=_without_times)
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return [_without_times(row) for row in csv.DictReader(file)]
    data = path.read_bytes()
    # The page shows seconds in the last column of the rounds.
    return LAST_CELL.sub(b"</tr>", data) if path.name == "index.html" else data


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in TIMES}


def unbroken(project: Project) -> dict[str, float]:
    """Run the pipeline; returns the seconds of each stage, in their order."""
    begins: dict[str, float] = {}
    process = project.start()
    while process.poll() is None:
        for stage in project.started():
            begins.setdefault(stage, time.monotonic())
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the unbroken run failed:\n{project.log.read_text()[-3000:]}")
    ends = [*list(begins.values())[1:], time.monotonic()]
    return {name: e - begin for (name, begin), e in zip(begins.items(), ends, strict=True)}


def kill(project: Project, order: Sequence[str], wanted: Kill) -> Kill:
    """Start DVC, and kill it when the wanted stage, or a later one, has run for a while."""
    process, place = project.start(), order.index(wanted.stage)
    while not (found := [s for s in project.started() if order.index(s) >= place]):
        if process.poll() is not None:
            raise SystemExit(f"a run failed, or was complete:\n{project.log.read_text()[-3000:]}")
        time.sleep(0.02)
    wanted.stage = found[0]
    time.sleep(wanted.after)
    if wanted.how == "DVC alone":
        runs = bool(psutil.Process(process.pid).children())
        process.kill()
        process.wait()
        # What it has started ends by itself.
        _wait(process.pid)
        wanted.ended = runs and "Traceback" not in project.log.read_text(errors="replace")
        return wanted
    number = signal.SIGKILL if wanted.how == "everything" else signal.SIGTERM
    os.killpg(process.pid, number)
    process.wait()
    _wait(process.pid)
    return wanted


def _wait(group: int) -> None:
    """Wait until no process of a group is left."""

    def alive() -> bool:
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                    return True
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return False

    end = time.monotonic() + 600
    while alive():
        if time.monotonic() > end:
            raise SystemExit("a process outlives the kill")
        time.sleep(0.1)


def tell(project: Project, before: Kill | None, *, complete: bool = False) -> list[str]:
    """Note and print what the start after a kill did; returns what is wrong with that.

    `complete` says that it ran to the end.
    """
    if before is None:
        return []
    stage, seconds, started = before.stage, f"{before.after:.1f} s", project.started()
    if AGAIN in project.log.read_text(errors="replace"):
        before.then = AGAIN
    else:
        # The next kill may have come before it could tell.
        before.then = "went on" if len(started) > 1 or complete else "was killed, too"
    print(f"{stage:<28} {before.how:<12} {seconds:>8}  {before.then}", flush=True)
    # Whatever ended by itself was not recorded: DVC was gone.
    lost = before.ended and started[:1] == [stage] and before.then == "went on"
    return [f"{stage} ended and was computed again"] if lost else []


def main() -> None:
    """Print the rows; see the head of the file."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1000))
    parser.add_argument("--minutes", type=float, default=12, help="no kill after that")
    given = parser.parse_args()
    end, draw = time.monotonic() + 60 * given.minutes, random.Random(given.seed)
    print(f"seed {given.seed}", flush=True)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        whole, broken = (Project(Path(name) / word) for word in ("unbroken", "broken"))
        seconds = unbroken(whole)
        order = list(seconds)
        print(f"unbroken: {len(order)} stages, {sum(seconds.values()):.0f} s", flush=True)
        print(f"{'stage':<28} {'killed':<12} {'after':>8}  the next start", flush=True)
        done = 0
        last: Kill | None = None
        for number in range(given.kills):
            if time.monotonic() > end:
                break
            stage = order[number * len(order) // given.kills]
            # Also shortly after its end, when DVC records it.
            after = draw.uniform(0, 1.1 * seconds[stage])
            wanted = Kill(stage, HOW[number % len(HOW)], after)
            found = kill(broken, order, wanted)
            wrong += tell(broken, last)
            if last and last.then == "was killed, too" and last.stage == found.stage:
                found.ended |= last.ended
            last, done = found, done + 1
        process = broken.start()
        if process.wait():
            raise SystemExit(f"the last run failed:\n{broken.log.read_text()[-3000:]}")
        wrong += tell(broken, last, complete=True)
        wrong += _differences(whole, broken)
    print(f"{done} of {given.kills} kills: " + ("; ".join(wrong) or "the result is equal"))
    raise SystemExit(bool(wrong))


def _differences(whole: Project, broken: Project) -> list[str]:
    expected, found = whole.files(), broken.files()
    names = sorted(expected.keys() | found.keys())
    return [f"{name} differs" for name in names if expected.get(name) != found.get(name)]


if __name__ == "__main__":
    main()
