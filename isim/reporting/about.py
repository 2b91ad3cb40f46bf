"""Words about a run: its name, who ran it, and a description for the user interface."""

import contextlib
import getpass
import json
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from isim import errors
from isim.errors import UserError, without_secrets
from isim.params import flatten

# Parameters that tell two runs of one name apart, at most.
MOST_DIFFERENCES = 3
# Figures of a description; all others stand below it.
MOST_FIGURES, MOST_FIRST = 16, 6
# Beginning of stages' words in the order that figures are told in.
_LAST_FIRST = ("masks", "train_segmenter", "random_walk", "evaluate", "train_cam")


def name(params: Mapping[str, Any]) -> str:
    """Name an execution by what matters most: `deeplabcam mobilenetv2_100 seed 1`."""
    cam = params.get("train_cam") or {}
    encoder = str(cam.get("encoder", "")).partition(".")[0]
    words = [str(cam.get("method", "")), encoder, f"seed {cam.get('seed', 0)}"]
    return clean(" ".join(filter(None, words)))[:120]


def differences(params: Mapping[str, Any], other: Mapping[str, str]) -> list[str]:
    """Name parameters, with values, in which an execution differs from an other of its name.

    `other` has the values that MLflow holds, by dotted name.
    """
    found = []
    for key, value in texts(params).items():
        if key in other and other[key] != value:
            words = key.split(".")
            short = words[-1] if words[0] == "train_cam" else f"{words[0]}.{words[-1]}"
            found.append(clean(f"{short} {value}")[:40])
    return found[:MOST_DIFFERENCES]


def texts(tree: Mapping[str, Any]) -> dict[str, str]:
    """Write the values of a tree of parameters as MLflow gets them, by dotted name."""
    return {
        key: clean(value if isinstance(value, str) else json.dumps(value, default=str))
        for key, value in flatten(tree).items()
    }


def author(root: Path) -> str:
    """Return who runs it: the user that git knows, else the login."""
    if told := git(root, "config", "user.name"):
        return clean(told)[:100]
    # Containers run as numbers that have no name.
    with contextlib.suppress(KeyError, OSError, ImportError):
        return clean(getpass.getuser())
    return "unknown"


def git(root: Path, *arguments: str) -> str:
    """Ask git about the project; "" where there is no git or no answer."""
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        told = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, check=True, timeout=30
        ).stdout
        return told.decode(errors="replace").strip()
    return ""


def release() -> str:
    """Return the version of isim."""
    with contextlib.suppress(Exception):
        return version("isim")
    return "unknown"


def data_set(root: Path, params: Mapping[str, Any]) -> str:
    """Name the data: the source, its folder, and how many images there are a split."""
    prepare = params.get("prepare") or {}
    source = str(prepare.get("source", "data"))
    folder = "" if source == "shapes" else Path(str(prepare.get("root", ""))).name
    counts = ""
    with contextlib.suppress(AttributeError):
        splits = _prepared(root).get("splits", {})
        counts = ", ".join(f"{count} {split}" for split, count in splits.items())
    return clean(" ".join(filter(None, (source, folder))) + (f": {counts}" if counts else ""))[:400]


def classes(root: Path) -> list[str]:
    """List the names of the classes of the prepared data; none where there is no data."""
    found = _prepared(root).get("classes", [])
    return [str(one) for one in found] if isinstance(found, list) else []


def _prepared(root: Path) -> dict[str, Any]:
    """Read what the prepared data say of themselves; nothing where they cannot be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError, UserError):
        found = errors.json_of(root / "data/prepared/dataset.json")
        return found if isinstance(found, dict) else {}
    return {}


def description(
    params: Mapping[str, Any],
    data: str,
    figures: Mapping[str, float],
    *,
    pictures: Mapping[str, str],
    lines: Iterable[str] = (),
) -> str:
    """Write a run's description as Markdown: pictures first, which are shown before "more".

    `pictures` are addresses by title; `figures` those that runs are compared by.
    """
    cam = params.get("train_cam") or {}
    parts = [
        f"**{_escaped(cam.get('method', ''))}** on {_escaped(cam.get('encoder', ''))} "
        f"(weights: {_escaped(cam.get('weights', ''))}), seed {cam.get('seed', '')}; "
        f"data: {_escaped(data)}",
        *lines,
    ]
    chosen = _chosen(figures)
    first = [f"{_escaped(key)} **{chosen[key]:.4g}**" for key in list(chosen)[:MOST_FIRST]]
    if first:
        parts.append(", ".join(first))
    for title, url in pictures.items():
        parts.append(f"{_escaped(title)}:\n\n![{_escaped(title)}]({url})")
    if len(chosen) > len(first):
        rows = "\n".join(f"| {_escaped(key)} | {value:.4g} |" for key, value in chosen.items())
        parts.append(f"| figure | value |\n|---|---|\n{rows}")
    return clean("\n\n".join(parts))[:7500]


def clean(text: str) -> str:
    """Return a text that every store takes: no secret, no NUL, no half characters of odd paths."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return without_secrets(text.replace("\0", "\\0"))


def _chosen(figures: Mapping[str, float]) -> dict[str, float]:
    """Choose mIoUs, those of the last stages first; else what there is."""
    mious = {k: v for k, v in figures.items() if k.endswith("miou")} or dict(figures)

    def place(key: str) -> int:
        places = [i for i, word in enumerate(_LAST_FIRST) if key.startswith(word)]
        return places[0] if places else len(_LAST_FIRST)

    return dict(sorted(mious.items(), key=lambda one: place(one[0]))[:MOST_FIGURES])


def _escaped(text: object) -> str:
    """Write a text into a cell of Markdown."""
    words = str(text).replace("\\", "\\\\")
    for mark in "|*_`[]<>!":
        words = words.replace(mark, f"\\{mark}")
    return " ".join(words.split())
