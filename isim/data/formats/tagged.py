"""Tags as label files tell them: the form that all formats are read into, and its vocabulary."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from isim import errors
from isim.data.problems import Problem
from isim.errors import UserError

# Names of columns and keys, the likeliest first; they are compared by `plain`.
IMAGE_NAMES = (
    "image", "file_name", "filename", "file", "image_name", "image_path", "image_file", "img",
    "img_name", "img_path", "path", "filepath", "file_path", "photo", "picture", "images", "files",
    "name", "image_id", "img_id", "imageid", "id",
)  # fmt: skip
LABEL_NAMES = (
    "labels", "label", "tags", "tag", "classes", "class", "categories", "category", "class_name",
    "class_names", "label_name", "label_names", "classname", "keywords", "keyword", "objects",
)  # fmt: skip
SPLIT_NAMES = ("split", "subset", "set", "partition", "fold_name")
# A test set is held out from training, as a validation set is.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
BACKGROUND_NAME = "background"
# Python makes no number of more than a few thousand digits.
_DIGITS = 1000
# The label that stands for no label, and texts, in small letters, that may mean this or `unknown`.
NONE_NAME = "none"
NO_NAMES = {"nan", "na", "n/a", "#n/a", "<na>", "null", "-", "--", "?"}


@dataclass(frozen=True)
class Tagged:
    """One image as a label file tells of it.

    Attributes:
        image: Its name as it is written: with or without folder and suffix.
        labels: Distinct names of its classes, sorted; none: it shows none of the classes. None:
            they are unknown.
        where: File, and line or entry, for messages.
        split: train, val or test; empty where the file does not tell.
        otherwise: Another name of the image, to try if there is none of the first.
        objects: The labels are names of annotated objects: each is a class, also `none`.
    """

    image: str
    labels: tuple[str, ...] | None
    where: str
    split: str = ""
    otherwise: str = ""
    objects: bool = False


@dataclass(frozen=True)
class Tags:
    """Content of a label file, in its order.

    `notes` are lines on how it was read, which the user should see and need not act on.
    """

    rows: tuple[Tagged, ...]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


def plain(name: str) -> str:
    """Return a column's name in the form in which names are compared: `File Name` is file_name."""
    return re.sub(r"[\s\-]+", "_", name.strip().lower())


def column(names: Sequence[str], known: Sequence[str]) -> int | None:
    """Find the place of the first of the `known` names; None if there is none."""
    there = [plain(name) for name in names]
    return next((there.index(name) for name in known if name in there), None)


def class_name(text: str) -> str:
    """Return a name as all files are compared by: without blanks around it, in NFC."""
    return unicodedata.normalize("NFC", text).strip()


def distinct(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the names without blanks around them, in one Unicode form, once each, sorted."""
    return tuple(sorted({class_name(label) for label in labels} - {""}))


def split_of(text: str, where: str, problems: list[Problem]) -> str:
    """Read the name of a split: train, val, test or empty. Another one is added to `problems`."""
    if not text.strip():
        return ""
    found = SPLITS.get(text.strip().lower())
    if found is None:
        what = f"{where}: there is no split '{text.strip()[:40]}'; write train, val or test"
        problems.append(Problem("unknown split", what, where))
    return found or ""


def natural(name: str) -> tuple[list[tuple[bool, int, str]], str]:
    """Return the key by which 2 comes before 10, and capitals do not matter."""
    parts = re.split(r"(\d+)", name.casefold())
    # `\d` takes digits of any script, and so does int.
    numbers = [int(part) if part.isdecimal() and len(part) <= _DIGITS else None for part in parts]
    named = zip(numbers, parts, strict=True)
    return [(number is not None, number or 0, part) for number, part in named], name


def text_of(path: Path, most: int = errors.TABLE) -> str:
    r"""Read a text file: UTF-8, with or without byte-order mark, or UTF-16 with one; lines end \n.

    Raises UnicodeDecodeError for another encoding, UserError if it is no regular file or has more
    than `most` bytes, and OSError.
    """
    data = errors.contents(path, most)
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = data.decode("utf-16" if utf16 else "utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines_of(path: Path) -> list[str]:
    """Read the lines of a text file as `text_of` does. Raises UserError when it is none."""
    with errors.reading(path, "write it in UTF-8"):
        return require_lines(path, text_of(path).split("\n"))


def require_lines(path: Path, lines: list[str]) -> list[str]:
    """Check that no line is longer than those of any list or table. Raises UserError if one is."""
    for number, line in enumerate(lines, start=1):
        if len(line) > errors.LINE:
            raise UserError(
                f"{path} line {number} has {len(line):,} characters, more than {errors.LINE:,}; "
                "mend it"
            )
    return lines
