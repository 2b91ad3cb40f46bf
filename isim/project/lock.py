"""isim.lock: the isim that a project's results are made by, as a dependency of every stage."""

from importlib.metadata import version
from pathlib import Path

from isim import errors
from isim.errors import UserError
from isim.runtime import identity

FILE = "isim.lock"


def text() -> str:
    """Text of the file for the isim that runs: its version and a digest of the stages' code."""
    return (
        "# The isim that makes the results of this project. `isim upgrade` rewrites this file;\n"
        "# the stages then run anew.\n"
        f"version: {version('isim')}\n"
        f"code: {identity.of_code()}\n"
    )


def require(root: Path) -> None:
    """Check that a project is locked to the isim that runs; a folder without a lock is a clone.

    Raises:
        UserError: It is locked to another one.
    """
    path = root / FILE
    if not path.exists():
        return
    with errors.reading(path, "run `isim upgrade` to write it anew"):
        locked, own = errors.text(path), text()
    if locked != own:
        raise UserError(
            f"{FILE} is of isim {named(locked)}, this is isim {named(own)}: their results must not "
            "mix; run `isim upgrade` to go on with this one, whose stages then run anew, or "
            "install the other"
        )


def named(locked: str) -> str:
    """Name the isim of a lock file's text."""
    values = dict(line.split(": ", 1) for line in locked.splitlines() if ": " in line)
    return f"{values.get('version', '?')} (code {values.get('code', '?')})"
