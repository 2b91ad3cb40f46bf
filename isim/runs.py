"""Finished runs: of this workspace and of DVC's experiments, with the parameters they had.

The parameters come from `dvc.lock`, which records what each stage ran with, and not from
`params.yaml`: that may have been edited since. A report counts as long as every stage before it
has outputs that the next one read; what an experiment of an early stage left untouched does not
belong to that experiment.
"""

import csv
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from isim.errors import UserError

Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What was run at one point in time.

    Attributes:
        name: `workspace`, the experiment's name, or the commit's.
        when: Seconds since 1970.
        lock: The content of `dvc.lock`.
        reports: JSON trees, or lists of CSV rows, by path.
    """

    name: str
    when: float
    lock: Tree
    reports: Mapping[str, Any]


def read_all(root: Path) -> tuple[list[Run], str | None]:
    """Every run that is known, and a line that says why some are not, if so.

    Args:
        root: Project folder.

    Returns:
        The workspace's run, if any, then experiments and the commits that they start from.
    """
    found = workspace(root)
    runs = [found] if found else []
    try:
        known = from_dvc(_exp_show(root), lambda revision: _lock_at(root, revision))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        why = str(getattr(error, "stderr", None) or error).strip().splitlines()
        return runs, f"DVC experiments cannot be read ({why[-1] if why else 'no reason given'})"
    return runs + known, None


def workspace(root: Path) -> Run | None:
    """The run whose reports lie in `root`; None without `dvc.lock`.

    Reports that are not those `dvc.lock` names, by their MD5, are left out.
    """
    path = root / "dvc.lock"
    try:
        lock = _parse_lock(path.read_text())
        when = path.stat().st_mtime
    except OSError:
        return None
    reports = {}
    for name, md5 in _outs(lock).items():
        if not name.startswith("reports/") or not name.endswith((".json", ".csv")):
            continue
        try:
            data = (root / name).read_bytes()
        except OSError:
            continue
        if hashlib.md5(data, usedforsecurity=False).hexdigest() == md5:
            text = data.decode()
            csv_rows = list(csv.DictReader(io.StringIO(text))) if name.endswith(".csv") else None
            reports[name] = json.loads(text) if csv_rows is None else csv_rows
    return Run("workspace", when, lock, reports)


def from_dvc(states: list[Tree], lock_at: Callable[[str], str | None]) -> list[Run]:
    """Runs in the output of `dvc exp show --json`.

    Args:
        states: A list of the workspace and commits; a commit has `experiments`, each with `revs`,
            the last state first.
        lock_at: Text of `dvc.lock` at a revision, or None.

    Returns:
        Commits and experiments that have a `dvc.lock`. Queued, running and failed ones have not
        ended.
    """
    runs = []
    for state in states:
        if state["rev"] == "workspace":
            continue
        ended = [
            entry["revs"][0] | {"name": entry.get("name") or entry["revs"][0].get("name")}
            for entry in state.get("experiments") or []
            if (entry.get("executor") or {}).get("state", "success") == "success"
        ]
        for found in (*ended, state):
            data = found.get("data")
            text = lock_at(found["rev"]) if data else None
            if data is None or text is None:
                continue
            reports = {
                path: result["data"]
                for path, result in data["metrics"].items()
                if result.get("data") is not None
            }
            when = datetime.fromisoformat(data["timestamp"]).timestamp()
            name = found.get("name") or found["rev"][:7]
            runs.append(Run(name, when, _parse_lock(text), reports))
    return runs


def at(root: Path, name: str, path: str) -> tuple[str, Tree | None] | None:
    """Read one report of an experiment or a git revision, without a checkout.

    Args:
        root: Project folder.
        name: An experiment's name (the newest of that name), else a git revision.
        path: Of the report, relative to the project folder.

    Returns:
        Its text and the parameters that it was made with (`lineage`); None when the revision
        has no such report, or neither DVC's cache nor its remote does.

    Raises:
        UserError: There is no such experiment or revision.
    """
    # Imported here: it takes a second, and only this needs it.
    import dvc.api
    from dvc.exceptions import DvcException

    revision = _resolve(root, name)
    try:
        text = dvc.api.read(path, repo=str(root), rev=revision)
    except (OSError, DvcException):
        return None
    return text, lineage(_parse_lock(_lock_at(root, revision) or ""), path)


def _resolve(root: Path, name: str) -> str:
    """Commit of an experiment or of a git revision."""
    try:
        form = "--format=%(objectname) %(refname)"
        listed = _output(root, "git", "for-each-ref", "--sort=-creatordate", form, "refs/exps")
        for line in listed.splitlines():
            commit, ref = line.split(" ", 1)
            parts = ref.split("/")
            if _is_experiment(parts) and parts[4] == name:
                return commit
        words = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        return _output(root, "git", *words).strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"there is no experiment or git revision '{name}'; `dvc exp list --all-commits` "
            "lists the experiments"
        ) from error


def _is_experiment(parts: list[str]) -> bool:
    """Tell refs/exps/<2 digits>/<38 digits>/<name> from refs that are DVC's own."""
    return len(parts) == 5 and len(parts[2]) == 2 and len(parts[3]) == 38


def lineage(lock: Tree, path: str) -> dict[str, Any] | None:
    """Parameters of the stage that wrote `path` and of all before it.

    Args:
        lock: The content of `dvc.lock`.
        path: An output, relative to the project folder.

    Returns:
        Sections by name; None when no stage wrote `path`, or when one of them read what the
        stage before has written anew since.
    """
    stages = lock["stages"].values()
    makers = {out["path"]: stage for stage in stages for out in stage.get("outs", [])}
    outs = _outs(lock)
    parameters: dict[str, Any] = {}
    todo, done = [path], set()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        if name not in makers:
            return None
        for sections in makers[name].get("params", {}).values():
            parameters |= sections
        for dep in makers[name].get("deps", []):
            if dep["path"] in outs:
                if dep["md5"] != outs[dep["path"]]:
                    return None
                todo.append(dep["path"])
            elif any(dep["path"].startswith(f"{out}/") for out in outs):
                # One file of a folder: its hash is not in the lock, so nothing can be said.
                return None
    return parameters


def writer(lock: Tree, path: str) -> Tree | None:
    """The record in `dvc.lock` of the stage that wrote `path`, or None."""
    for stage in lock["stages"].values():
        if any(out["path"] == path for out in stage.get("outs", [])):
            return stage
    return None


def _outs(lock: Tree) -> dict[str, str]:
    stages = lock["stages"].values()
    return {out["path"]: out.get("md5", "") for stage in stages for out in stage.get("outs", [])}


def _parse_lock(text: str) -> Tree:
    try:
        tree = YAML(typ="safe").load(text)
    except YAMLError:
        # In the middle of a merge, say. Without stages nothing was run.
        tree = None
    return tree if isinstance(tree, dict) and "stages" in tree else {"stages": {}}


def _exp_show(root: Path) -> list[Tree]:
    """Output of `dvc exp show` for HEAD and every commit that an experiment starts from."""
    listed = _output(root, "git", "for-each-ref", "--format=%(refname)", "refs/exps")
    parts = [line.split("/") for line in listed.splitlines()]
    starts = {p[2] + p[3] for p in parts if _is_experiment(p)}
    revisions = [word for start in ("HEAD", *sorted(starts)) for word in ("--rev", start)]
    dvc = (sys.executable, "-m", "dvc", "exp", "show", "--json", *revisions)
    return json.loads(_output(root, *dvc))


def _lock_at(root: Path, revision: str) -> str | None:
    try:
        return _output(root, "git", "show", f"{revision}:./dvc.lock")
    except subprocess.CalledProcessError:
        return None


def _output(root: Path, *command: str) -> str:
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
