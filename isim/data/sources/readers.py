"""Table of the data sources: each name that `prepare.source` can have, and its reader."""

from collections.abc import Callable
from pathlib import Path

from isim import errors
from isim.data.sources import coco, folder, shapes, voc
from isim.data.sources.source import Source
from isim.errors import UserError
from isim.params import Prepare

READERS: dict[str, Callable[[Prepare, Path, Path], Source]] = {
    "coco": coco.read,
    "folder": folder.read,
    "shapes": shapes.read,
    "voc": voc.read,
}
# Those that make their images themselves and have no folder of their own.
GENERATED = {"shapes"}


def read(params: Prepare, root: Path, out: Path) -> Source:
    """Read the source that `params` name from `root`; files that it makes go to `out`.

    Raises:
        UserError: The data is missing, unreadable or not of the described form.
    """
    with errors.reading(f"the data in {root}", "mend the file, or move it away"):
        try:
            return READERS[params.source](params, root, out)
        except OSError as error:
            raise UserError(
                f"cannot read {error.filename}: {error.strerror}; fix its permissions, or mend that"
            ) from error
