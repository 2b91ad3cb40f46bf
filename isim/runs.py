"""Finished runs: of this workspace and of DVC's experiments, with the parameters they had.

The parameters come from `dvc.lock`, which records what each stage ran with, and not from
`params.yaml`: that may have been edited since. Only which of several entries for one label set is
the present one is read there. A report counts as long as every stage before it
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
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, partial
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
        lock: The content of `dvc.lock`, each output claimed by one stage at most (`parse_lock`).
        reports: JSON trees, or lists of CSV rows, by path.
        fetch: The text of a table that is not in `reports`, by path, or None: DVC shows the
            figures of its experiments, and keeps their tables.
    """

    name: str
    when: float
    lock: Tree
    reports: Mapping[str, Any]
    fetch: Callable[[str], str | None] = field(default=lambda _: None, compare=False)

    def report(self, path: str) -> Any:  # noqa: ANN401 - JSON or CSV rows
        """A JSON tree or a list of CSV rows; None when the run has no such report."""
        if path in self.reports or not path.endswith(".csv"):
            return self.reports.get(path)
        text = self.fetch(path)
        return None if text is None else _parse_report(path, text)


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
        known = from_dvc(
            _exp_show(root),
            lambda revision, path: _text_at(root, revision, path),
            # A table holds the figures of many cells.
            cache(lambda revision, path: _out_at(root, revision, path)),
        )
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        why = str(getattr(error, "stderr", None) or error).strip().splitlines()
        return runs, f"DVC experiments cannot be read ({why[-1] if why else 'no reason given'})"
    return runs + known, None


def workspace(root: Path) -> Run | None:
    """The run whose reports lie in `root`; None without `dvc.lock`.

    Reports that are not those `dvc.lock` names, by their MD5, are left out.
    """
    path, parameters = root / "dvc.lock", root / "params.yaml"
    try:
        lock = parse_lock(path.read_text(), parameters.read_text() if parameters.exists() else None)
        when = path.stat().st_mtime
    except OSError:
        return None
    reports = {}
    for name, claim in _claims(lock).items():
        if not name.startswith("reports/") or not name.endswith((".json", ".csv")):
            continue
        try:
            data = (root / name).read_bytes()
        except OSError:
            continue
        if claim and hashlib.md5(data, usedforsecurity=False).hexdigest() == claim.md5:
            reports[name] = _parse_report(name, data.decode())
    return Run("workspace", when, lock, reports)


def _parse_report(path: str, text: str) -> Any:  # noqa: ANN401 - JSON or CSV rows
    return list(csv.DictReader(io.StringIO(text))) if path.endswith(".csv") else json.loads(text)


def from_dvc(
    states: list[Tree],
    text_at: Callable[[str, str], str | None],
    out_at: Callable[[str, str], str | None],
) -> list[Run]:
    """Runs in the output of `dvc exp show --json`.

    Args:
        states: A list of the workspace and commits; a commit has `experiments`, each with `revs`,
            the last state first.
        text_at: Text of a file that git has, by revision and path, or None.
        out_at: The same of a file that DVC has.

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
            text = text_at(found["rev"], "dvc.lock") if data else None
            if data is None or text is None:
                continue
            reports = {
                path: result["data"]
                for path, result in data["metrics"].items()
                if result.get("data") is not None
            }
            when = datetime.fromisoformat(data["timestamp"]).timestamp()
            name = found.get("name") or found["rev"][:7]
            lock = parse_lock(text, text_at(found["rev"], "params.yaml"))
            runs.append(Run(name, when, lock, reports, partial(out_at, found["rev"])))
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
    revision = _resolve(root, name)
    text = _out_at(root, revision, path)
    if text is None:
        return None
    written = _text_at(root, revision, "dvc.lock") or ""
    lock = parse_lock(written, _text_at(root, revision, "params.yaml"))
    return text, lineage(lock, path)


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
        Sections by name; None when no stage wrote `path` or several claim to, or when one of
        them read what the stage before has written anew since.
    """
    claims = _claims(lock)
    parameters: dict[str, Any] = {}
    todo, done = [path], set()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        claim = claims.get(name)
        if claim is None:
            return None
        for sections in claim.stage.get("params", {}).values():
            parameters |= sections
        for dep in claim.stage.get("deps", []):
            if dep["path"] in claims:
                before = claims[dep["path"]]
                if before is None or dep["md5"] != before.md5:
                    return None
                todo.append(dep["path"])
            elif any(dep["path"].startswith(f"{out}/") for out in claims):
                # One file of a folder: its hash is not in the lock, so nothing can be said.
                return None
    return parameters


def writer(lock: Tree, path: str) -> Tree | None:
    """The record in `dvc.lock` of the stage that wrote `path`, or None."""
    claim = _claims(lock).get(path)
    return claim.stage if claim else None


@dataclass(frozen=True)
class _Claim:
    """A stage's record in `dvc.lock` and the MD5 of one of its outputs."""

    stage: Tree
    md5: str


def _claims(lock: Tree) -> dict[str, _Claim | None]:
    """Who wrote each output, by path; None where several stages claim it."""
    found: dict[str, _Claim | None] = {}
    for stage in lock["stages"].values():
        for out in stage.get("outs", []):
            path = out["path"]
            found[path] = None if path in found else _Claim(stage, out.get("md5", ""))
    return found


def parse_lock(text: str, parameters: str | None) -> Tree:
    """Read `dvc.lock`, with each output left to the stage that writes it now.

    DVC does not drop what it recorded of a matrix whose list has changed since: a label set
    that moved to another place in the list is claimed by the stage of its old place, too.

    Args:
        text: Of `dvc.lock`; damaged, it holds no stages.
        parameters: Of the `params.yaml` beside it, which has the list, or None.

    Returns:
        The tree. An output that several stages claim is left to the one that `parameters` has;
        without one, to all of them.
    """
    tree = _tree(text)
    if "stages" not in tree:
        # In the middle of a merge, say. Without stages nothing was run.
        return {"stages": {}}
    listed = _tree(parameters or "").get("label_sets") or []
    labels = [str(entry.get("name")) for entry in listed if isinstance(entry, dict)]
    stages = tree["stages"]
    outs = [(name, out) for name, stage in stages.items() for out in stage.get("outs", [])]
    present = {out["path"]: name for name, out in outs if _is_present(name, out["path"], labels)}
    kept: dict[str, list[Tree]] = {name: [] for name in stages}
    for name, out in outs:
        if present.get(out["path"], name) == name:
            kept[name].append(out)
    return tree | {"stages": {name: stages[name] | {"outs": kept[name]} for name in stages}}


def _is_present(stage: str, path: str, labels: list[str]) -> bool:
    """Whether a stage of the matrix (`dvc.yaml`) is at the place of the label set in `path`."""
    _, _, place = stage.partition("@labels")
    known = place.isdecimal() and int(place) < len(labels)
    return known and labels[int(place)] in path.split("/")


def _tree(text: str) -> dict[str, Any]:
    try:
        tree = YAML(typ="safe").load(text)
    except YAMLError:
        tree = None
    return tree if isinstance(tree, dict) else {}


def _exp_show(root: Path) -> list[Tree]:
    """Output of `dvc exp show` for HEAD and every commit that an experiment starts from."""
    listed = _output(root, "git", "for-each-ref", "--format=%(refname)", "refs/exps")
    parts = [line.split("/") for line in listed.splitlines()]
    starts = {p[2] + p[3] for p in parts if _is_experiment(p)}
    revisions = [word for start in ("HEAD", *sorted(starts)) for word in ("--rev", start)]
    dvc = (sys.executable, "-m", "dvc", "exp", "show", "--json", *revisions)
    return json.loads(_output(root, *dvc))


def _text_at(root: Path, revision: str, path: str) -> str | None:
    try:
        return _output(root, "git", "show", f"{revision}:./{path}")
    except subprocess.CalledProcessError:
        return None


def _out_at(root: Path, revision: str, path: str) -> str | None:
    # Imported here: it takes a second, and only this needs it.
    import dvc.api
    from dvc.exceptions import DvcException

    try:
        text: str = dvc.api.read(path, repo=str(root), rev=revision)
    except (OSError, DvcException):
        return None
    return text


def _output(root: Path, *command: str) -> str:
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
