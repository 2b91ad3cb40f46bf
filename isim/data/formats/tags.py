"""Tags of images, read from a file."""

import csv
from pathlib import Path

from isim.errors import UserError


def tags_of(path: Path) -> dict[str, tuple[str, ...]]:
    """Read a CSV with a header and two columns, an image and its tags separated by `;`.

    Returns the tags by the image's name without its suffix. An empty cell means: no tag.

    Raises:
        UserError: The file is missing, no UTF-8 text, or has a line without two columns.
    """
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); give a CSV of images and tags") from error
    found: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != 2:
            raise UserError(
                f"{path} line {number} has {len(row)} columns ({','.join(row)[:80]}); write "
                "`image,tags` with ; between tags"
            )
        tags = (tag.strip() for tag in row[1].split(";"))
        found[str(Path(row[0]).with_suffix("")) if Path(row[0]).suffix else row[0]] = tuple(
            filter(None, tags)
        )
    return found
