"""Finished runs, of this workspace and of DVC's experiments, with the parameters of `dvc.lock`.

`params.yaml` may have been edited since: it only says which record of a label set is present.
"""

import contextlib
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

from isim import errors
from isim.errors import UserError
from isim.params import flatten
from isim.runtime import atomic, figures
from isim.runtime.identity import md5_of

Tree = Mapping[str, Any]
# Record in `dvc.lock` of the stage that wrote an output, and the output's MD5, by path; None where
# several stages claim it.
Lock = Mapping[str, tuple[Tree, str] | None]


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    `fetch` gives the text of a table that is not in `reports`, by path, or None: DVC shows the
    figures of its experiments, and keeps their tables.
    """

    name: str  # `workspace`, the experiment's name, or the commit's
    when: float  # seconds since 1970
    lock: Lock
    reports: Mapping[str, Any]  # JSON trees, or lists of CSV rows, by path
    fetch: Callable[[str], str | None] = field(default=lambda _: None, compare=False)

    def report(self, path: str) -> Any:  # noqa: ANN401 - JSON or CSV rows
        """A JSON tree or a list of CSV rows; None when the run has no such report.

        Figures are a tree, that of `runtime.figures`, also of a run before there was such a table.
        """
        found = self.reports.get(path)
        if found is None and path.endswith(".csv"):
            text = self.fetch(path) if path in self.lock else None
            found = None if text is None else parse(path, text)
        if not path.endswith(figures.FILE):
            return found
        if found is None:
            old = self.reports.get(_old(path))
            return None if old is None else figures.of_old(old)
        return figures.tree(found) if isinstance(found, list) else found

    def written(self, path: str) -> str:
        """`path`, or the file that a run had before there was a table of figures."""
        old = _old(path)
        return old if path not in self.lock and old in self.lock else path


def read_all(root: Path) -> tuple[list[Run], str | None]:
    """Read every run known in the project folder, and a line that says why some are not, if so.

    The workspace's run, if any, comes first.
    """
    found = workspace(root)
    runs = [found] if found else []
    try:
        # Cached, as a table holds the figures of many cells.
        runs += from_dvc(_exp_show(root), partial(_text_at, root), cache(partial(_out_at, root)))
    # What is recorded of an experiment may be of any state.
    except Exception as error:
        why = str(getattr(error, "stderr", None) or error).strip().splitlines()
        return runs, f"DVC experiments cannot be read ({why[-1] if why else errors.reason(error)})"
    return runs, None


def workspace(root: Path) -> Run | None:
    """The run whose reports lie in `root`; None without `dvc.lock`.

    Reports that are not those `dvc.lock` names, by their MD5, are left out.
    """
    path, parameters = root / "dvc.lock", root / "params.yaml"
    if not path.exists():
        return None
    with errors.reading(path, "restore it by git, or run `dvc repro`", "is damaged"):
        values = errors.text(parameters) if parameters.exists() else None
        lock = read_lock(errors.text(path), values)
        when = path.stat().st_mtime
    reports = {}
    for name, claim in lock.items():
        if not name.startswith("reports/") or not name.endswith((".json", ".csv")):
            continue
        if not (root / name).exists():
            continue
        with errors.reading(root / name, "run `dvc repro` again", "is damaged"):
            data = errors.contents(root / name)
            if claim and md5_of(data) == claim[1]:
                reports[name] = parse(name, data.decode())
    return Run("workspace", when, lock, reports)


def parse(path: str, text: str) -> Any:  # noqa: ANN401 - JSON or CSV rows
    """Read the text of a report by its path: a JSON tree, or a list of CSV rows."""
    return atomic.parse_csv(text) if path.endswith(".csv") else json.loads(text)


def _old(path: str) -> str:
    return path.removesuffix(figures.FILE) + figures.OLD if path.endswith(figures.FILE) else path


def at(root: Path, revision: str) -> Run:
    """Read the run of a git revision or of a DVC experiment, by its name, as git has it.

    A revision without results has no report. Raises UserError for one that there is not.
    """
    commit = _commit(root, revision)
    text = partial(_text_at, root, commit)
    lock = read_lock(text("dvc.lock") or "", text("params.yaml"))
    names = [name for name in lock if name.startswith("reports/") and name.endswith(".json")]
    texts = {name: found for name in names if (found := text(name)) is not None}
    reports = {}
    for name, found in texts.items():
        # One in the middle of a merge holds nothing.
        with contextlib.suppress(ValueError):
            reports[name] = parse(name, found)
    return Run(revision, 0.0, lock, reports, partial(_out_at, root, commit))


def _commit(root: Path, revision: str) -> str:
    """Find the commit of a revision, an experiment's name included."""
    git = ("git", "rev-parse", "--verify", "--quiet", "--end-of-options")
    try:
        names = _output(root, "git", "for-each-ref", "--format=%(refname)", "refs/exps")
        named = [ref for ref in names.splitlines() if ref.endswith(f"/{revision}")]
        for ref in (revision, *named):
            with contextlib.suppress(subprocess.CalledProcessError):
                return _output(root, *git, f"{ref}^{{commit}}").strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"{root} is in no git repository, or git is missing: no revisions"
        ) from error
    except ValueError as error:
        raise UserError(f"no revision {revision[:80]!r}: {error}") from error
    raise UserError(
        f"no git revision or DVC experiment {revision[:80]!r}; `git log` and `dvc exp list` have "
        "their names"
    )


def cached(root: Path) -> Callable[[str], str | None]:
    """Return what reads a file of the project's DVC cache by its md5: its text, or None."""

    @cache
    def folder() -> Any:  # noqa: ANN401 - DVC's cache
        # Imported here: it takes a second, and only this needs it.
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        try:
            with Repo(str(root)) as repo:
                return repo.cache.local
        except (OSError, DvcException):
            return None

    def read(md5: str) -> str | None:
        if not md5 or folder() is None:
            return None
        try:
            return errors.text(Path(folder().oid_to_path(md5)))
        except (OSError, ValueError, UserError):
            return None

    return read


def from_dvc(
    states: list[Tree],
    text_at: Callable[[str, str], str | None],
    out_at: Callable[[str, str], str | None],
) -> list[Run]:
    """Runs in the output of `dvc exp show --json`: commits and experiments with a `dvc.lock`.

    Queued, running and failed ones have not ended. By revision and path, `text_at` gives the text
    of a file that git has, `out_at` of one that DVC has, or None.
    """
    ended: list[tuple[str | None, Tree]] = []
    for state in states:
        if state["rev"] == "workspace":
            continue
        for entry in state.get("experiments") or []:
            if (entry.get("executor") or {}).get("state", "success") == "success":
                last = entry["revs"][0]
                ended.append((entry.get("name") or last.get("name"), last))
        ended.append((state.get("name"), state))
    runs = []
    for name, state in ended:
        data, revision = state.get("data"), state["rev"]
        text = text_at(revision, "dvc.lock") if data else None
        if data is None or text is None:
            continue
        metrics = {path: found.get("data") for path, found in data["metrics"].items()}
        runs.append(
            Run(
                name or revision[:7],
                datetime.fromisoformat(data["timestamp"]).timestamp(),
                read_lock(text, text_at(revision, "params.yaml")),
                {path: report for path, report in metrics.items() if report is not None},
                partial(out_at, revision),
            )
        )
    return runs


def read_lock(text: str, parameters: str | None) -> Lock:
    """Read `dvc.lock`, with each output left to the stage that writes it now.

    DVC does not drop what it recorded of a matrix whose list has changed since: a label set
    that moved to another place in the list is claimed by the stage of its old place, too. The
    list is in `parameters`, the text of the `params.yaml` beside it. A damaged lock, in
    the middle of a merge say, holds nothing.
    """
    listed = _tree(parameters or "").get("label_sets") or []
    labels = [str(entry.get("name")) for entry in listed if isinstance(entry, dict)]
    claims: dict[str, list[tuple[str, tuple[Tree, str]]]] = {}
    for name, stage in _tree(text).get("stages", {}).items():
        for out in stage.get("outs", []):
            claims.setdefault(out["path"], []).append((name, (stage, out.get("md5", ""))))
    lock: dict[str, tuple[Tree, str] | None] = {}
    for path, several in claims.items():
        present = [claim for name, claim in several if _is_present(name, path, labels)]
        left = present or [claim for _, claim in several]
        lock[path] = left[0] if len(left) == 1 else None
    return lock


def _is_present(stage: str, path: str, labels: list[str]) -> bool:
    """Tell if a stage of the matrix (`dvc.yaml`) is at the place of the label set in `path`."""
    _, _, place = stage.partition("@labels")
    known = place.isdecimal() and int(place) < len(labels)
    return known and labels[int(place)] in path.split("/")


def lineage(lock: Lock, path: str) -> dict[str, Any] | None:
    """Parameters of the stage that wrote `path` and of all before it: sections by name.

    Returns:
        None when no stage wrote `path` or several claim to; when one of them read what the stage
        before has written anew since, as after an experiment of an early stage alone; or when
        they had different values of a section in common, or of one parameter.
    """
    parameters: dict[str, Any] = {}
    todo, done = [path], set()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        claim = lock.get(name)
        if claim is None:
            return None
        stage, _ = claim
        for sections in stage.get("params", {}).values():
            # Several stages have a section in common: one may have been run alone since.
            if any(parameters.get(key, value) != value for key, value in sections.items()):
                return None
            parameters |= sections
        for dep in stage.get("deps", []):
            if dep["path"] in lock:
                _, md5 = lock[dep["path"]] or (None, None)
                if dep["md5"] != md5:
                    return None
                todo.append(dep["path"])
            elif any(dep["path"].startswith(f"{out}/") for out in lock):
                # One file of a folder: its hash is not in the lock, so nothing can be said.
                return None
    # A stage may know a single value of another's section, such as random_walk.affinity.
    single = {key: parameters.pop(key) for key in list(parameters) if "." in key}
    known = flatten(parameters)
    return None if any(known.get(k, v) != v for k, v in single.items()) else parameters


def _tree(text: str) -> dict[str, Any]:
    try:
        tree = YAML(typ="safe").load(text)
    except YAMLError:
        tree = None
    return tree if isinstance(tree, dict) else {}


def _exp_show(root: Path) -> list[Tree]:
    """Output of `dvc exp show` for HEAD and every commit that an experiment starts from."""
    listed = _output(root, "git", "for-each-ref", "--format=%(refname)", "refs/exps")
    # An experiment is refs/exps/<2 digits>/<38 digits>/<name>; other refs are DVC's own.
    parts = [line.split("/") for line in listed.splitlines()]
    starts = {p[2] + p[3] for p in parts if len(p) == 5 and len(p[2]) == 2 and len(p[3]) == 38}
    revisions = [word for start in ("HEAD", *sorted(starts)) for word in ("--rev", start)]
    dvc = (sys.executable, "-m", "dvc", "exp", "show", "--json", *revisions)
    states: list[Tree] = json.loads(_output(root, *dvc))
    return states


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
        return str(dvc.api.read(path, repo=str(root), rev=revision))
    except (OSError, DvcException):
        return None


def _output(root: Path, *command: str) -> str:
    return subprocess.run(
        command, cwd=root, capture_output=True, encoding="utf-8", check=True
    ).stdout
