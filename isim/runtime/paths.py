"""Folders of a project, and paths as parameters write them."""

import os
from pathlib import Path
from string import Template

from isim.errors import UserError


def home(root: Path) -> Path:
    """Return the folder that state outside DVC is anchored on: `$DVC_ROOT`, else `root`.

    `dvc exp run --temp` works in a copy that is deleted; DVC_ROOT still names the repository.
    """
    return Path(os.environ.get("DVC_ROOT", root)).resolve()


def resolve_path(text: str, root: Path) -> Path:
    """Expand the variables of a path parameter; a relative path is taken from `home(root)`.

    Raises UserError when one other than `$ISIM_DATA` and `$ISIM_SHARED` has no value.
    """
    defaults = {"ISIM_DATA": "data/raw", "ISIM_SHARED": "../shared"}
    try:
        expanded = Template(text).substitute(defaults | os.environ)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the path {text} uses a variable that is not set; export it or edit it"
        ) from error
    return (home(root) / os.path.expanduser(expanded)).resolve()
