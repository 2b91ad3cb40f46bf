"""Images below a folder: their ids, and how names in label files find them."""

import importlib.util
import os
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from PIL import Image

from isim.data.files import HEIF, NO_IMAGES
from isim.data.problems import Problem
from isim.errors import UserError, reason

# Left by systems and programs: hidden files are passed over, too.
_ASIDE = {"@eadir", "__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "icon\r"}
# Characters of a name in a label file that is looked up: paths of files are shorter.
_LONGEST = 4096
# Unicode's categories of control characters, and of what ends lines and paragraphs.
_CONTROLS = ("Cc", "Zl", "Zp")
# Files that belong beside images.
_BESIDE = {".csv", ".tsv", ".tab", ".txt", ".json", ".jsonl", ".ndjson", ".xml", ".md", ".yaml",
           ".yml", ".html", ".pdf", ".log", ".zip", ".py", ".ipynb", ".dvc"}  # fmt: skip


@cache
def suffixes() -> frozenset[str]:
    """Suffixes, in small letters, of the image formats that can be read."""
    Image.init()
    known = Image.registered_extensions()
    found = {suffix for suffix, name in known.items() if name in Image.OPEN.keys() - NO_IMAGES}
    heif = HEIF if importlib.util.find_spec("pillow_heif") else set()
    return frozenset(found - HEIF | heif)


@dataclass(frozen=True)
class Listing:
    """Files below a folder.

    Attributes:
        images: Path of each image by its id: the path below the folder, without suffix, with `/`,
            in one Unicode form (NFC).
        others: Paths of files in formats that are not read, by the same path with suffix.
        problems: Names that cannot be used.
    """

    images: Mapping[str, Path]
    others: Mapping[str, Path]
    problems: tuple[Problem, ...] = ()


def images(folder: Path, aside: Collection[Path] = (), read: Collection[str] = ()) -> Listing:
    """List the images below a folder; folders `aside`, and what is hidden, are passed over.

    `read` are the suffixes of files that count; of all formats that can be read if not given.
    """
    wanted = read or suffixes()
    found: dict[str, Path] = {}
    others: dict[str, Path] = {}
    problems: list[Problem] = []
    for path in sorted(_files(folder, {entry.resolve() for entry in aside})):
        name = unicodedata.normalize("NFC", path.relative_to(folder).as_posix())
        if not _is_utf8(name):
            shown = name.encode(errors="replace").decode()
            what = f"the name of {shown} below {folder} is not UTF-8; rename it"
            problems.append(Problem("unusable name", what, shown))
        elif path.suffix.lower() not in wanted:
            others[name] = path
        elif _has_controls(name):
            # In a list of a name a line they would be two, and in a terminal anything.
            what = f"the name of {name!r} below {folder} has control characters; rename it"
            problems.append(Problem("unusable name", what, name))
        else:
            id_ = name[: len(name) - len(path.suffix)]
            first = found.setdefault(id_, path)
            if first is not path:
                what = f"{path} and {first.name} share one id; rename one"
                problems.append(Problem("two files of one id", what, str(path)))
    return Listing(found, others, tuple(problems))


def passed_over(listing: Listing) -> list[Problem]:
    """Tell of files that may be images but are in formats that are not read."""
    found = []
    for path in listing.others.values():
        if path.suffix.lower() not in _BESIDE:
            shown = repr(str(path)) if _has_controls(str(path)) else str(path)
            what = f"{shown} {why_not(path)}"
            found.append(Problem("format that is not read", what, shown, error=False))
    return found


def why_not(path: Path) -> str:
    """Say why a file that is there is not read."""
    if path.suffix.lower() in HEIF:
        return "is in a format that is not read without pillow-heif; run `pip install isim[heic]`"
    return "is in a format that is not read; save it as PNG or JPEG"


def _files(folder: Path, aside: set[Path]) -> Iterator[Path]:
    # Links are followed, as photographs often lie elsewhere; a circle of them only once.
    seen: set[tuple[int, int]] = set()
    for text, names, files in os.walk(folder, onerror=_refuse, followlinks=True):
        here = Path(text)
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:
            names.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        names[:] = sorted(
            name for name in names if not _hidden(name) and (here / name).resolve() not in aside
        )
        yield from (here / name for name in files if not _hidden(name))


def _refuse(error: OSError) -> None:
    # Left out without a word, its images would be missed by nobody.
    raise UserError(
        f"the folder {error.filename} cannot be read ({reason(error)}); fix its permissions, or "
        "move it away"
    )


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _ASIDE


def _has_controls(name: str) -> bool:
    return any(unicodedata.category(char) in _CONTROLS for char in name)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class Names:
    """Finds an image by its name in a label file.

    The name may have folders before it that are not below the listed one, lack folders where no
    other image has it, lack the suffix, and differ in case or in blanks around it; what differs in
    case, or lacks blanks, is in `by_case`.
    """

    def __init__(self, listing: Listing) -> None:
        """Index the images of a listing."""
        self.by_case: dict[str, str] = {}
        self._others: dict[str, Path] = {}
        for known, path in listing.others.items():
            bare = PurePosixPath(known)
            for written in (bare.name, bare.stem):
                self._others.setdefault(written.casefold(), path)
        self._known: dict[str, str] = {}
        self._bare: dict[str, set[str]] = {}
        self._folded: dict[str, set[str]] = {}
        paths = {id_: f"{id_}{path.suffix}" for id_, path in listing.images.items()}
        # Names with suffix come first: `a.jpg` may be the id of a.jpg.png.
        self._known = {id_: id_ for id_ in paths} | {name: id_ for id_, name in paths.items()}
        for name, id_ in self._known.items():
            self._bare.setdefault(PurePosixPath(name).name, set()).add(id_)
            folded = _folded(name)
            self._folded.setdefault(folded, set()).add(id_)
            last = PurePosixPath(folded).name
            self._folded.setdefault(f"*/{last}", set()).add(id_)

    def find(self, name: str) -> set[str]:
        """Find the ids that a name may mean: one where it is clear, none where it is missing."""
        if len(name) > _LONGEST:
            return set()
        given = unicodedata.normalize("NFC", name).replace("\\", "/")
        # A file's name may begin with a blank; those of a table's cell mean nothing.
        for text in dict.fromkeys((given, given.strip())):
            tails = _tails(text)
            for tail in tails:
                if tail in self._known:
                    return {self._known[tail]}
            if found := self._bare.get(tails[0]) if len(tails) == 1 else None:
                return found
        tails = _tails(_folded(given))
        for tail in (*tails, *([f"*/{tails[0]}"] if len(tails) == 1 else [])):
            if found := self._folded.get(tail):
                self.by_case |= dict.fromkeys(found, name)
                return found
        return set()

    def other(self, name: str) -> Path | None:
        """Find the file of a name that is there in a format that is not read."""
        last = unicodedata.normalize("NFC", name.strip()).replace("\\", "/").rpartition("/")[2]
        return self._others.get(last.casefold())


def may_be_one(name: str, other: str, folder: str = "") -> bool:
    """Tell whether two names can be one image's: with fewer folders, without suffix, in any case.

    Where the folders of two names differ, one is mostly that of an image that is missing; but those
    down to the last one that has the name of the listed `folder` in both tell where it lay.
    """
    one, two = _parts(name), _parts(other)
    last = sorted((one.pop(), two.pop()), key=len)
    listed = _parts(folder)[-1]
    if listed in one and listed in two:
        one, two = (parts[len(parts) - parts[::-1].index(listed) :] for parts in (one, two))
    shared = min(len(one), len(two))
    same_folders = one[len(one) - shared :] == two[len(two) - shared :]
    return same_folders and f"{last[1]}.".startswith(f"{last[0]}.")


def _parts(name: str) -> list[str]:
    """Part a name as names are compared, without steps upwards; of a name of none of them `""`."""
    text = _folded(unicodedata.normalize("NFC", name).replace("\\", "/"))
    return [part for part in text.split("/") if part not in ("", ".", "..")] or [""]


def _tails(text: str) -> list[str]:
    """List a path without none, one, ... of its first folders: those before the listed one."""
    parts = [part for part in text.split("/") if part not in ("", ".")]
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _folded(path: str) -> str:
    """Return a path in the form in which case, and blanks around its parts, do not matter."""
    return "/".join(part.strip() for part in path.casefold().split("/"))
