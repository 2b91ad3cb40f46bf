"""Masks as people have them, read as class ids: grey values, palettes, colours, black and white."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isim.data import files
from isim.data.formats import tagged
from isim.data.formats.tagged import BACKGROUND_NAME
from isim.data.problems import Problem
from isim.errors import UserError
from isim.metrics import BACKGROUND, IGNORE

# Formats that keep every value; a JPEG would invent colours, that is classes.
SUFFIXES = {".png", ".bmp", ".tif", ".tiff", ".gif"}
# Files beside the images that give each class its colour in masks; the last is CVAT's.
TABLES = ("colors.txt", "colours.txt", "labelmap.txt")
# Names in a table, and in `prepare.mask_values`, of what is no class.
OTHERS = {BACKGROUND_NAME: BACKGROUND, "ignore": IGNORE, "void": IGNORE}
Color = tuple[int, int, int]
_COLORS = "table of colours"


@dataclass(frozen=True)
class Scheme:
    """Meaning of the values in masks of K classes.

    Attributes:
        classes: K.
        values: Class id of each grey value, by `prepare.mask_values`; 0 stays the background and
            255 is ignored unless they are named. Empty: values are class ids.
        colors: Class id of each colour of a table; empty: VOC's palette, where class id i has the
            i-th colour.
        complete: False where a fault of the parameter or the table was told: what values mean is
            not known then, and masks are read for their size alone.
    """

    classes: int
    values: Mapping[int, int] = field(default_factory=dict)
    colors: Mapping[Color, int] = field(default_factory=dict)
    complete: bool = True


def scheme(
    classes: tuple[str, ...], mask_values: Mapping[int, str], root: Path, problems: list[Problem]
) -> Scheme:
    """Find what values in masks mean: by the parameter, and a table of colours in `root`.

    Names that are no class, lines of the table that are none, and a table that is unreadable are
    added to `problems`.
    """
    ids = OTHERS | {name: place for place, name in enumerate(classes, start=1)}
    known = ", ".join(classes)[:100]
    faults: list[Problem] = []

    def id_of(name: str, kind: str, where: str, file: str) -> int:
        if name not in ids:
            what = f"{where}: '{name[:60]}' is no class; known: {known}, background, ignore"
            faults.append(Problem(kind, what, file))
        return ids.get(name, IGNORE)

    values = {
        value: id_of(tagged.class_name(name), "mask_values of no class", "prepare.mask_values", "")
        for value, name in mask_values.items()
    }
    found = next((root / name for name in TABLES if (root / name).is_file()), None)
    colors: dict[Color, tuple[int, int]] = {}
    for color, name, number in () if found is None else _table(found, faults):
        where = f"{found} line {number}"
        id_ = id_of(name, _COLORS, where, str(found))
        first, earlier = colors.setdefault(color, (id_, number)) if name in ids else (id_, number)
        # Two names may mean the same, as `void` and `ignore` do.
        if first != id_:
            what = f"{where}: '{name[:60]}' has the colour of line {earlier}; change one"
            faults.append(Problem(_COLORS, what, str(found)))
    problems += faults
    named = {color: id_ for color, (id_, _) in colors.items()}
    return Scheme(len(classes), values, named, complete=not faults)


def _table(path: Path, faults: list[Problem]) -> list[tuple[Color, str, int]]:
    """Read lines such as `cat 128 0 0`, `cat:128,0,0::` or `cat #800000`: colour, name, line."""
    found: list[tuple[Color, str, int]] = []
    try:
        lines = tagged.lines_of(path)
    except UserError as error:
        faults.append(Problem(_COLORS, str(error), str(path)))
        return found
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or re.match(r"#(?![0-9a-fA-F]{6}\b)", text):
            continue
        plain = re.fullmatch(
            r"(.+?)[\s:,;]+(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})[:\s].*", f"{text} "
        )
        coded = re.fullmatch(r"(.+?)[\s:,;]+#([0-9a-fA-F]{6})", text)
        if plain:
            color = tuple(int(part) for part in plain.groups()[1:])
        elif coded:
            color = tuple(bytes.fromhex(coded[2]))
        else:
            color = ()
        if len(color) != 3 or max(color) > 255:
            what = (
                f"{path} line {number}: expected a class and its colour, such as `cat 128 0 0` or "
                f"`cat #800000`; found: {text[:60]}"
            )
            faults.append(Problem(_COLORS, what, str(path)))
            continue
        name = tagged.class_name((plain or coded)[1])  # type: ignore[index]
        found.append(((color[0], color[1], color[2]), name, number))
    return found


def read(path: Path, given: Scheme) -> tuple[NDArray[np.uint8], bool]:
    """Read a mask (H, W) uint8: class ids, 0 background, 255 ignored, or values that are none.

    The second result tells whether every later reader finds the same in the file itself: an 8-bit
    PNG of class ids.

    Raises:
        UserError: It is unreadable, or has a colour that is no class's.
    """
    raw = files.read_raw_mask(path)
    if not given.complete:
        plane = raw.values if raw.colors is None else raw.colors[..., 0]
        return np.full(np.shape(plane), IGNORE, np.uint8), False  # type: ignore[arg-type]
    simple = raw.simple and not given.values
    values: NDArray[np.uint8] | None = raw.values
    if raw.colors is not None and (given.colors or values is None):
        values, simple = _by_colors(path, raw.colors, given), False
    if values is None:
        raise UserError(f"mask {path} holds neither values nor colours; save it as 8-bit PNG")
    if given.values and (raw.colors is None or not given.colors):
        values = _by_values(path, values, given)
    return values, simple


def _by_values(path: Path, values: NDArray[np.uint8], given: Scheme) -> NDArray[np.uint8]:
    named = {BACKGROUND: BACKGROUND, IGNORE: IGNORE} | dict(given.values)
    there = np.unique(values)
    unknown = [str(value) for value in there.tolist() if value not in named]
    if unknown:
        raise UserError(
            f"mask {path} has values that prepare.mask_values does not name: "
            f"{', '.join(unknown)[:60]}; name them"
        )
    table = np.zeros(256, np.uint8)
    table[list(named)] = list(named.values())
    found: NDArray[np.uint8] = table[values]
    return found


def _by_colors(path: Path, colors: NDArray[np.uint8], given: Scheme) -> NDArray[np.uint8]:
    """Look up (H, W, 3) colours; grey ones that no table has are values."""
    known = dict(given.colors)
    if not known:
        palette = files.voc_palette()
        places = [*range(given.classes + 1), IGNORE]
        known = {
            (int(r), int(g), int(b)): i
            for i, (r, g, b) in zip(places, palette[places], strict=True)
        }
    else:
        known.setdefault((0, 0, 0), BACKGROUND)
    codes = colors.astype(np.int64) @ np.array([65536, 256, 1])
    there, inverse = np.unique(codes, return_inverse=True)
    by_code = {(r << 16) + (g << 8) + b: id_ for (r, g, b), id_ in known.items()}
    unknown = [code for code in there.tolist() if code not in by_code]
    if not unknown:
        table = np.array([by_code[code] for code in there.tolist()], np.uint8)
        found: NDArray[np.uint8] = table[inverse.reshape(codes.shape)]
        return found
    grey: NDArray[np.uint8] = colors[..., 0]
    if not given.colors and bool((colors == grey[..., None]).all()):
        return grey.copy()
    first = tuple(unknown[0].to_bytes(3, "big"))
    raise UserError(
        f"mask {path} has {len(unknown)} colours that are no class's, such as {first}; list the "
        f"classes' colours in {TABLES[0]} (`cat 128 0 0`), and save masks without smoothing"
    )
