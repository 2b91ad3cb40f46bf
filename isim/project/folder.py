"""The folder of a project: written whole or not at all, and brought to another isim."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from isim import errors
from isim.errors import UserError
from isim.experiments import overlay, preset
from isim.params import flatten, read_yaml, validate
from isim.project import lock, pipeline
from isim.project.choices import Chosen
from isim.runtime import atomic

PARAMS, PIPELINE = "params.yaml", pipeline.FILE
OURS = (PARAMS, PIPELINE, lock.FILE)

_DVC_CONFIG = """\
[core]
    analytics = false
    autostage = true
[cache]
    type = "reflink,hardlink,symlink,copy"
[plots]
    html_template = plots/page.html
"""
_GITIGNORE = """\
# Outs of the pipeline: DVC keeps them.
/data/
/models/
/reports/*/pictures
/reports/*/*/pictures
/reports/*/*.csv
/reports/*/*/*.csv
/reports/*.csv
/reports/*.html
/reports/page
/reports/server
/dvc_plots/

# Tracking and resume state
/.isim/
/mlartifacts/
/mlflow.db*
"""
_DVCIGNORE = """\
# What DVC never needs to walk through.
.venv
.isim
mlartifacts
"""
_README = """\
# {name}

Masks from image-level tags, by isim. The images are read from {root}.

    dvc repro           # runs what is new or has changed: images, tags, masks, params.yaml
    isim plan           # how long that takes, and how much disk and memory
    isim results        # what there is so far

Every parameter is in `params.yaml`, with a comment; results are in `reports/` and `data/`.
`isim.lock` names the isim that they come from: after an update of isim run `isim upgrade`.
Keep a result for good: `git add . && git commit`.
"""


def require_new(folder: Path) -> None:
    """Check that `folder` can become a project. Raises UserError when it is one, or no folder."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a new folder")
    for name in OURS:
        if (folder / name).exists():
            raise UserError(
                f"{folder} already has a {name}; name a new folder, or change the parameters there"
            )


def create(folder: Path, chosen: Chosen) -> list[str]:
    """Write a project, with git and DVC repositories where there are none; nothing is changed.

    After a failure everything is as it was. Returns lines on what was left as it is.

    Raises:
        UserError: `folder` is a project already, data and results would overlap, git or DVC fail,
            or it cannot be written.
    """
    require_new(folder)
    params = chosen.params
    pipeline.require_apart(params.prepare, folder)
    readme = _README.format(name=folder.resolve().name, root=params.prepare.root)
    ignored = _GITIGNORE + _inside(Path(params.prepare.root), folder.resolve())
    # The parameters last: with them it is a project.
    texts = {
        "README.md": readme,
        ".gitignore": ignored,
        ".dvcignore": _DVCIGNORE,
        lock.FILE: lock.text(),
        PIPELINE: pipeline.text(params.prepare),
        PARAMS: chosen.yaml,
    }
    with _undone_after_failure(folder) as there:
        atomic.make_directory(folder)
        _repositories(folder, there)
        kept = [name for name in texts if name in there]
        for name in (name for name in texts if name not in there):
            atomic.write_text(folder / name, texts[name])
    return [f"{folder / name} was there and is left as it is" for name in kept]


def _inside(root: Path, folder: Path) -> str:
    """Ignore images that lie in the project: they would become part of its git repository."""
    if not root.is_absolute() or not root.is_relative_to(folder) or root == folder:
        return ""
    return f"\n# The images\n/{root.relative_to(folder).as_posix()}/\n"


@contextlib.contextmanager
def _undone_after_failure(folder: Path) -> Iterator[set[str]]:
    """Yield the names in a folder, which is to be written to; remove all others after an error."""
    existed = folder.exists()
    there = {path.name for path in folder.iterdir()} if existed else set()
    try:
        yield there
    except BaseException:
        for path in folder.iterdir() if folder.exists() else ():
            if path.name not in there:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _repositories(folder: Path, there: set[str]) -> None:
    """Run `git init` outside of a git repository, `dvc init` where the folder is no DVC root."""
    git = shutil.which("git")
    if git and not _inside_git(git, folder):
        _run([git, "init", "--quiet"], folder)
    if ".dvc" not in there:
        how = [] if (folder / ".git").exists() else ["--subdir"]
        _run(
            [sys.executable, "-m", "dvc", "init", "--quiet", *(how if git else ["--no-scm"])],
            folder,
        )
        atomic.write_text(folder / ".dvc/config", _DVC_CONFIG)
    for path in sorted(pipeline.PLOTS.iterdir()):
        if not (folder / ".dvc/plots" / path.name).exists():
            atomic.write_bytes(folder / ".dvc/plots" / path.name, path.read_bytes())


def _inside_git(git: str, folder: Path) -> bool:
    asked = [git, "rev-parse", "--is-inside-work-tree"]
    done = subprocess.run(asked, cwd=folder, capture_output=True, encoding="utf-8")
    return done.returncode == 0 and done.stdout.strip() == "true"


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
    if done.returncode:
        name = " ".join(part for part in command[-4:] if not part.startswith(("-", "/")))
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise UserError(f"{name} failed in {folder}: {lines[-1][:150]}; mend that and try again")


def upgrade(root: Path) -> list[str]:
    """Bring a project to the isim that runs: parameters, pipeline, lock; returns what was done.

    New parameters get the values of preset own-images, those that are gone are dropped. Stages of
    one's own in dvc.yaml stay.

    Raises:
        UserError: It is no project, its parameters are wrong, or it cannot be written.
    """
    path = root / lock.FILE
    if not path.exists():
        raise UserError(f"{root} has no {lock.FILE}: no project; make one with `isim init`")
    told, (text, lines) = [], _parameters(read_yaml(root / PARAMS))
    params = validate(overlay.plain(text), PARAMS)
    pipeline.require_apart(params.prepare, root)
    if lines:
        atomic.write_text(root / PARAMS, text)
        told += lines
    wanted = _with_own_stages(root / PIPELINE, pipeline.text(params.prepare))
    if not (root / PIPELINE).exists() or errors.text(root / PIPELINE) != wanted:
        atomic.write_text(root / PIPELINE, wanted)
        told.append(f"{PIPELINE}: written anew; `git diff {PIPELINE}` shows what is different")
    with errors.reading(path, "delete it, and make the project anew by `isim init`"):
        locked, own = errors.text(path), lock.text()
    if locked != own:
        atomic.write_text(path, own)
        names = f"{lock.named(locked)} -> {lock.named(own)}"
        told.append(f"{lock.FILE}: isim {names}; `dvc repro` runs all stages anew")
    return told or [f"nothing to do: the project is of isim {lock.named(own)}"]


# What projects did before they had these parameters, where the preset says otherwise.
_BEFORE = {"train_segmenter.features.scales": [1.0]}


def _parameters(own: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Put a project's values into the parameters that there are now; tell which are new or gone."""
    tree = YAML(typ="rt").load(preset.text("own-images"))
    now, before = flatten(overlay.plain(overlay.dump(tree))), flatten(own)
    new, gone = [n for n in now if n not in before], [n for n in before if n not in now]
    kept = {n: value for n, value in (_BEFORE | before).items() if n in now}
    now |= kept
    for name, value in kept.items():
        section = tree
        *places, last = name.split(".")
        for place in places:
            section = section[place]
        overlay.merge(section, {last: value})
    lines = [f"{PARAMS}: new, {name}: {now[name]}" for name in new]
    lines += [f"{PARAMS}: gone, {name} (it was {before[name]})" for name in gone]
    return overlay.dump(tree), lines


def _with_own_stages(path: Path, wanted: str) -> str:
    """Add the stages of the file `path` that run something else than isim to a pipeline's text."""
    old = read_yaml(path) if path.exists() else {}
    with errors.reading(path, "delete it: it is written anew", "is no pipeline of DVC"):
        stages = {
            name: stage
            for name, stage in old.get("stages", {}).items()
            if not str(stage.get("cmd", "")).startswith("isim ")
        }
    if not stages:
        return wanted
    tree = YAML(typ="rt").load(wanted)
    tree["stages"].update(stages)
    return overlay.dump(tree)
