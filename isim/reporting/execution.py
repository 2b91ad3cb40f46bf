"""A pipeline execution: which stages belong to it, which are done, and what DVC skipped reported.

DVC alone knows whether a stage is up to date. What it wrote in `dvc.lock` is held against
`params.yaml`, the outs of the stages before, and the code; no image is hashed.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any

from isim.errors import UserError
from isim.params import flatten
from isim.runtime import figures, finished
from isim.runtime.identity import PACKAGE, md5

# Word of a stage, and the label set it runs for, or "".
Key = tuple[str, str]


@dataclass(frozen=True)
class Step:
    """A stage of dvc.yaml: its name there, its word, its label set, what it reads and makes."""

    name: str
    key: Key
    deps: tuple[str, ...] = ()
    outs: tuple[str, ...] = ()

    def reads(self, other: "Step") -> bool:
        """Tell whether it needs what another stage makes."""
        return any(_overlap(dep, out) for dep in self.deps for out in other.outs)


@dataclass(frozen=True)
class Execution:
    """The pipeline of a project as it is now.

    Attributes:
        root: Project folder.
        params: Contents of params.yaml.
        steps: Its stages.
        lock: Entries of dvc.lock, by the stage's name.
    """

    root: Path
    params: Mapping[str, Any]
    steps: tuple[Step, ...]
    lock: Mapping[str, Any] = field(default_factory=dict)

    def missing(self, ran: Mapping[Key, float], just: Key | None = None) -> list[str]:
        """List the stages that are neither up to date nor ran in this execution.

        `ran` has the time at which each stage that ended well began; `just` ended just now, so that
        dvc.lock does not know of it, and what reads from it is to come.
        """
        ended = dict(ran) | ({} if just is None else {just: float("inf")})
        return [
            step.name
            for step in self.steps
            if not self._ran(step, ended) and not self.recorded(step, just)
        ]

    def skipped(self, ran: Mapping[Key, float], just: Key | None = None) -> dict[Key, dict]:  # type: ignore[type-arg]
        """Read the headline figures of stages that are up to date without having run."""
        steps = [step for step in self.steps if step.key not in ran and step.key != just]
        found = {step.key: self._figures(step) for step in steps if self.recorded(step, just)}
        return {key: own for key, own in found.items() if own}

    def recorded(self, step: Step, just: Key | None = None) -> bool:
        """Tell whether dvc.lock has a stage as it would run now; `just` changes what it reads."""
        entry = self.lock.get(step.name)
        after = [other for other in self.steps if other.key == just]
        if not isinstance(entry, dict) or step.key == just or any(map(step.reads, after)):
            return False
        for values in (entry.get("params") or {}).values():
            if any(_plain(v) != _plain(_value(self.params, k)) for k, v in values.items()):
                return False
        made = {out["path"]: out.get("md5") for name in self.lock for out in self._entries(name)}
        for dep in entry.get("deps") or ():
            path, known = dep["path"], dep.get("md5")
            if path in made and made[path] != known:
                return False
            if path not in made and path.startswith("isim") and _md5(self.root / path) != known:
                return False
        return True

    def _entries(self, name: str) -> list[dict[str, Any]]:
        entry = self.lock[name]
        return (entry.get("outs") or []) if isinstance(entry, dict) else []

    def _ran(self, step: Step, ran: Mapping[Key, float]) -> bool:
        """Tell whether a stage ran, and none that it reads from has run since."""
        if step.key not in ran:
            return False
        before = (other for other in self.steps if other.key in ran and step.reads(other))
        return all(ran[other.key] <= ran[step.key] for other in before)

    def _figures(self, step: Step) -> dict[str, float]:
        with contextlib.suppress(OSError, UserError):
            return headline(figures.read(self.root.joinpath("reports", *filter(None, step.key))))
        return {}

    def goes_on(self, missing: list[str]) -> "Process | None":
        """Find the DVC that runs this stage and has some of the missing ones still to run."""
        driver = dvc_above()
        if driver is None:
            return None
        words = driver.words[1:]
        wanted = [s for s in self.steps if {s.name, s.key[0]} & set(words)]
        if not wanted:
            return driver
        # With targets it runs these and what they read from.
        closure: list[Step] = []
        while wanted:
            step = wanted.pop()
            closure.append(step)
            wanted += [s for s in self.steps if step.reads(s) and s not in [*closure, *wanted]]
        return driver if {step.name for step in closure} & set(missing) else None


@dataclass(frozen=True)
class Process:
    """A process: its id, what it was when it started (`started`), and its command line."""

    pid: int
    start: str
    words: tuple[str, ...]


def load(root: Path, params: Mapping[str, Any]) -> Execution:
    """Read dvc.yaml and dvc.lock of a project; without them, isim's own stages are meant."""
    tree, lock = (finished.stages_of(root / name) for name in ("dvc.yaml", "dvc.lock"))
    if tree:
        steps = tuple(step for word, entry in tree.items() for step in _steps(word, entry, params))
    else:
        words = sorted(path.stem for path in (PACKAGE / "stages").glob("*.py"))
        steps = tuple(
            Step(" ".join(filter(None, key)), key)
            for word in words
            if word in params
            for key in _keys(word, params, word == "train_segmenter")
        )
    return Execution(root, params, steps, lock)


def headline(tree: Mapping[str, Any]) -> dict[str, float]:
    """Choose the figures of a stage that runs are compared by, named as the stage itself does.

    Those are the mIoUs, `<split>_<figure>`; where there is none, the numbers that no split has.
    """
    flat = {name.replace(".", "_"): value for name, value in flatten(tree).items()}
    mious = {name: value for name, value in flat.items() if name.endswith("miou")}
    return _numbers(mious) or _numbers(tree)


def started(pid: int) -> str:
    """Describe when a process started, on which boot; "" where there is none, or no /proc.

    An id alone says little: after a reboot, or in a container, another process has it.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {_stat(pid)[19]}"
    except (OSError, IndexError, UnicodeDecodeError):
        return ""


def alive(pid: str, start: str) -> bool:
    """Tell whether the process that a run recorded is still there; `start` is "" where unknown."""
    if start:
        return pid.isdigit() and started(int(pid)) == start
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass  # a living process of another user
    return True


def dvc_above() -> Process | None:
    """Find the DVC that started this process, if one did."""
    pid = os.getppid()
    while pid > 0:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            parent = int(_stat(pid)[1])
        except (OSError, ValueError, IndexError):
            return None
        words = [word for word in command.split("\0") if word]
        for place, word in enumerate(words[:4]):
            if PurePosixPath(word).name in ("dvc", "dvc.exe"):
                return Process(pid, started(pid), tuple(words[place:]))
        pid = parent
    return None


def _stat(pid: int) -> list[str]:
    """Fields of a process's stat behind its name, which may hold spaces: 1 its parent, 19 start."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()


def _steps(word: str, entry: Mapping[str, Any], params: Mapping[str, Any]) -> Iterator[Step]:
    if word not in params or not isinstance(entry, dict):
        return
    matrix = "matrix" in entry
    for place, key in enumerate(_keys(word, params, matrix)):
        sets = params["label_sets"] if matrix else ()
        known = {**params, "item": {"labels": sets[place] if matrix else {}}}
        deps = [_filled(dep, known) for dep in entry.get("deps") or ()]
        outs = [*(entry.get("outs") or ()), *(entry.get("metrics") or ())]
        made = [_filled(next(iter(o)) if isinstance(o, dict) else o, known) for o in outs]
        name = f"{word}@labels{place}" if matrix else word
        yield Step(name, key, tuple(deps), tuple(made))


def _keys(word: str, params: Mapping[str, Any], matrix: bool) -> list[Key]:
    sets = params.get("label_sets") or ()
    return [(word, entry["name"]) for entry in sets] if matrix else [(word, "")]


def _filled(text: str, known: Mapping[str, Any]) -> str:
    return re.sub(r"\$\{([\w.]+)\}", lambda found: str(_value(known, found[1])), str(text))


def _value(tree: Any, name: str) -> Any:  # noqa: ANN401 - any YAML value
    for part in name.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _plain(value: Any) -> str:  # noqa: ANN401 - any YAML value
    return json.dumps(value, sort_keys=True, default=str)


def _numbers(tree: Mapping[str, Any]) -> dict[str, float]:
    kinds = {
        k: v for k, v in tree.items() if isinstance(v, int | float) and not isinstance(v, bool)
    }
    return {name: float(value) for name, value in kinds.items() if isfinite(value)}


def _overlap(one: str, other: str) -> bool:
    """Tell whether two paths are the same, or one lies below the other."""
    return PurePosixPath(one).is_relative_to(other) or PurePosixPath(other).is_relative_to(one)


@cache
def _md5(path: Path) -> str | None:
    # The code does not change while it runs.
    return md5(path) if path.exists() else None
