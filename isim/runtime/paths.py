"""Folders of a project, and paths as parameters write them."""

import os
import re
import shlex
from pathlib import Path
from string import Template

from isim.errors import UserError, cut, reason


def home(root: Path) -> Path:
    """Return the folder that state outside DVC is anchored on: `$DVC_ROOT`, else `root`.

    `dvc exp run --temp` works in a copy that is deleted; DVC_ROOT still names the repository.
    """
    return Path(os.environ.get("DVC_ROOT", root)).resolve()


def resolve_path(text: str, root: Path) -> Path:
    """Expand the variables of a path parameter; a relative path is taken from `home(root)`.

    Raises UserError when one other than `$ISIM_DATA` and `$ISIM_SHARED` has no value, and for the
    address of a server.
    """
    defaults = {"ISIM_DATA": "data/raw", "ISIM_SHARED": "../shared"}
    try:
        expanded = Template(text).substitute(defaults | os.environ)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the path {text} uses a variable that is not set; export it or edit it"
        ) from error
    if re.match(r"[A-Za-z][\w+.-]*://", expanded):
        # As a path it would lose a slash, and a password in it its disguise.
        raise UserError(f"{expanded} is an address, no path; fetch the file, and name that")
    try:
        return (home(root) / os.path.expanduser(expanded)).resolve()
    # Links in a circle, a name of thousands of characters.
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"the path {text} leads nowhere ({reason(error)}); mend it") from error


def number_of(name: str, least: int, most: int) -> int | None:
    """Return the whole number that an environment variable holds, None where it is not set.

    Raises UserError when it holds anything else, or a number outside `least`..`most`.
    """
    text = os.environ.get(name)
    if text is None:
        return None
    # `str.isdigit` takes digits of any script, some of which are no numbers.
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        told = cut(text, 40)
        raise UserError(
            f"{name}: expected a number such as 2, from {least} to {most}, got '{told}'; mend or "
            "unset it"
        )
    return int(text)


def words_of(name: str, usual: str = "") -> list[str]:
    """Part the value of an environment variable into words, as a shell does.

    Raises UserError when it is no such line, for instance by a quote that is not closed.
    """
    try:
        return shlex.split(os.environ.get(name) or usual)
    except ValueError as error:
        raise UserError(f"{name} is no command line ({reason(error)}); mend or unset it") from error
