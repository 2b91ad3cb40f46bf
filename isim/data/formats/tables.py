"""Tables of labels (CSV): any usual separator and header; a cell, a row or a column a label."""

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from isim import errors
from isim.data.formats import tagged
from isim.data.formats.tagged import IMAGE_NAMES, LABEL_NAMES, SPLIT_NAMES, Tagged, Tags
from isim.data.problems import Problem
from isim.errors import UserError

SUFFIXES = {".csv", ".tsv", ".tab", ".txt"}
DELIMITERS = ",;\t|"
# Cells of a column that stands for a class.
_YES = {"1", "1.0", "true", "yes", "y", "x"}
_NO = {"0", "0.0", "false", "no", "n", "-1", ""}
# Columns of 0 and 1, or of numbers, that annotation tools write beside those of classes; names are
# compared without `_`.
_NO_CLASSES = {
    "fold", "kfold", "index", "unnamed:0", "row", "difficult", "crowd", "iscrowd", "truncated",
    "istruncated", "occluded", "isoccluded", "groupof", "isgroupof", "isdepiction", "isinside",
    "segmented", "verified", "reviewed", "checked", "width", "height", "depth", "channels", "size",
    "area", "xmin", "ymin", "xmax", "ymax", "confidence", "score", "weight",
}  # fmt: skip
# A tuple or a set of Python, whose names are quoted; no text can be parted in two ways.
_NAME = r"""(?:"[^"]*"|'[^']*')"""
_QUOTED = rf"[({{]\s*(?:{_NAME}\s*,\s*)*(?:{_NAME}\s*)?[)}}]"
_UNUSED = "columns that are not used"
# Line of the file and its cells.
_Line = tuple[int, list[str]]


def read(path: Path) -> Tags:
    """Read a table of labels.

    The header names a column of images, and one of labels, or none: then every column of 0 and 1
    is a class, and another cell in it a problem. Labels in a cell are parted by `;` or `|`, in a
    file that has none by `,`, quoted or not. Several rows of an image are taken together by who
    reads the tags.

    Raises:
        UserError: The file is unreadable, not UTF-8, has no such header, or a quote that is not
            closed; the line is shown.
    """
    header, lines = _parsed(path)
    image = tagged.column(header, IMAGE_NAMES)
    if image is None:
        raise _no_header(path, header)
    others = [name if place != image else "" for place, name in enumerate(header)]
    label, split = (tagged.column(others, names) for names in (LABEL_NAMES, SPLIT_NAMES))
    table = _Table(path, header, image, split, lines)
    return table.one_hot() if label is None else table.labelled(label)


def _parsed(path: Path) -> tuple[list[str], list[_Line]]:
    """Read header and lines, without empty ones."""
    try:
        text = tagged.text_of(path)
        tagged.require_lines(path, text.split("\n"))
        first, _, rest = text.lstrip("\n").partition("\n")
        skipped = len(text) - len(text.lstrip("\n")) + 1
        if first.lower().startswith("sep=") and len(first) == 5:
            # Excel's own line on the separator.
            header, _, rest = rest.partition("\n")
            skipped, delimiter = skipped + 1, first[4]
        else:
            header, delimiter = first, _delimiter(first)
        if delimiter in "\n\"'":
            raise _no_header(path, [first])
        names = next(csv.reader([header], delimiter=delimiter), [])
        lines = _lines(path, list(io.StringIO(rest)), delimiter, skipped)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"cannot read {path} ({errors.reason(error)}); write one with the columns "
            "image,labels in UTF-8"
        ) from error
    return [name.strip() for name in names], lines


def _lines(path: Path, given: list[str], delimiter: str, skipped: int) -> list[_Line]:
    """Part lines into cells; `skipped` are the lines of the file before them."""
    reader = csv.reader(given, delimiter=delimiter)
    found = []
    start = 0
    while start < len(given):
        try:
            cells = next(reader)
            # Read again, for a quote that another row's closes takes the rows between for a cell.
            list(csv.reader(given[start : reader.line_num], delimiter=delimiter, strict=True))
        except csv.Error as error:
            if reader.line_num - start > 1 or "unexpected end" in str(error):
                raise UserError(
                    f"{path}: unclosed quote, line {skipped + start + 1}; close it, or write '\"\"'"
                    f" for a quote in a cell; found: {_short(given[start].strip())}"
                ) from error
            if "expected after" not in str(error):
                raise
        start = reader.line_num
        if any(map(str.strip, cells)):
            found.append((skipped + reader.line_num, cells))
    return found


def _delimiter(header: str) -> str:
    """Choose the separator by which a header has the most names that are known, else cells."""
    known = {*IMAGE_NAMES, *LABEL_NAMES, *SPLIT_NAMES}

    def worth(delimiter: str) -> tuple[bool, int, int]:
        names = next(csv.reader([header], delimiter=delimiter), [])
        found = tagged.column(names, IMAGE_NAMES) is not None
        return found, sum(tagged.plain(name) in known for name in names), len(names)

    return max(DELIMITERS, key=worth)


def _no_header(path: Path, header: Sequence[str]) -> UserError:
    found = ",".join(header)[:80] or "an empty file"
    return UserError(
        f"{path} must begin with a header such as image,labels, which names the column of images; "
        f"found: {found}"
    )


@dataclass
class _Table:
    """A table whose column of images is known."""

    path: Path
    header: Sequence[str]
    image: int
    split: int | None
    lines: list[_Line]
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def labelled(self, label: int) -> Tags:
        """Read a table with a column of labels."""
        self._tell_unused({label, self.image, self.split}, label)
        width, last = len(self.header), label == len(self.header) - 1
        cells: list[tuple[_Line, str, list[str]]] = []
        surplus: list[int] = []
        for line, row in self.lines:
            more = [cell for cell in row[width:] if cell.strip()]
            if len(row) <= max(label, self.image):
                why = "has no cell of labels; write an empty one if it shows none of the classes"
                self._refuse(line, row, why)
                continue
            if more and not last:
                self._refuse(line, row, "has more cells than the header; quote cells with commas")
                continue
            if more:
                surplus.append(line)
            cells.append(((line, row), row[label], more))
        if surplus:
            self.notes.append(
                f"{self.path.name}: {len(surplus)} rows have more cells than the header, such as "
                f"line {surplus[0]}; they are taken for further labels"
            )
        marks = [mark for mark in ";|" if any(mark in cell for _, cell, _ in cells)]
        if not marks and any("," in cell for _, cell, _ in cells):
            marks = [","]
        if marks:
            self.notes.append(f"{self.path.name}: labels are parted by {' and '.join(marks)}")
        rows = []
        for (line, row), cell, more in cells:
            names = [name for part in (cell, *more) for name in _names(part, marks)]
            rows.append(self._tagged(line, row, tagged.distinct(names)))
        return self._tags(rows)

    def one_hot(self) -> Tags:
        """Read a table with a column a class."""
        taken = {self.image, self.split}
        width = len(self.header)
        places = [
            place
            for place, name in enumerate(self.header)
            if name and place not in taken and not _no_class(name) and self._is_class(place)
        ]
        if not places and self.lines:
            raise UserError(
                f"{self.path} has neither a column of labels, such as `labels`, nor columns of 0 "
                f"and 1, one a class; found: {','.join(self.header)[:80]}"
            )
        self._tell_unused({*places, *taken})
        self._tell_marks(places)
        names = ", ".join(self.header[place] for place in places)
        self.notes.append(f"{self.path.name}: a column a class ({_short(names)})")
        rows = []
        for line, row in self.lines:
            if len(row) != width:
                self._refuse(line, row, f"has {len(row)} cells, the header {width}")
                continue
            for place in places:
                if not _fits(row[place]):
                    why = f"column '{_short(self.header[place])}': '{_short(row[place].strip())}'"
                    self._refuse(line, row, f"{why} is neither 0 nor 1; mend it or drop the column")
            chosen = [self.header[p] for p in places if row[p].strip().lower() in _YES]
            rows.append(self._tagged(line, row, tagged.distinct(chosen)))
        return self._tags(rows)

    def _tell_marks(self, places: Sequence[int]) -> None:
        """Tell of columns of one name, and of -1 beside 0, which may mean that it is not known."""
        names = Counter(tagged.class_name(self.header[place]) for place in places)
        for name, count in names.items():
            if count > 1:
                what = f"{self.path.name} has {count} columns '{_short(name)}'; rename one"
                self.problems.append(Problem("columns of one name", what, str(self.path)))
        cells = Counter(
            row[place].strip() for _, row in self.lines for place in places if place < len(row)
        )
        if cells["-1"] and cells["0"]:
            what = (
                f"{self.path.name}: {cells['-1']} cells are -1 beside 0; both are taken for no; "
                "where -1 means that it is not known, take these images out of the table"
            )
            self.problems.append(Problem("cells of -1 beside 0", what, error=False))

    def _is_class(self, place: int) -> bool:
        """Tell whether at least half of a column's cells that are not empty are 0 or 1.

        To leave out the class for one odd cell would make negatives of its images.
        """
        cells = [row[place] for _, row in self.lines if place < len(row) and row[place].strip()]
        return bool(cells) and 2 * sum(map(_fits, cells)) >= len(cells)

    def _tags(self, rows: list[Tagged]) -> Tags:
        return Tags(tuple(rows), tuple(self.problems), tuple(self.notes))

    def _tagged(self, line: int, row: list[str], labels: tuple[str, ...]) -> Tagged:
        where = f"{self.path.name} line {line}"
        # Blanks may be of the file's name.
        name = row[self.image]
        if not name.strip():
            name = ""
            self._refuse(line, row, "names no image")
        told = row[self.split] if self.split is not None and self.split < len(row) else ""
        return Tagged(name, labels, where, tagged.split_of(told, where, self.problems))

    def _refuse(self, line: int, row: list[str], why: str) -> None:
        where = f"{self.path.name} line {line}"
        what = f"{where} {why}; found: {_short(','.join(row))}"
        self.problems.append(Problem("unusable row", what, str(self.path)))

    def _tell_unused(self, used: set[int | None], label: int | None = None) -> None:
        for place, name in enumerate(self.header):
            if place in used or not name:
                continue
            kind, why = _UNUSED, ""
            if label is not None and tagged.plain(name) in LABEL_NAMES:
                kind = "second column of labels"
                why = f": the labels are those of '{self.header[label]}'"
            elif label is None and _no_class(name) and self._is_class(place):
                why = ": its name is not that of a class; rename it if it is one"
            what = f"{self.path.name}: column '{_short(name)}' is not used{why}"
            self.problems.append(Problem(kind, what, str(self.path), error=False))


def _fits(cell: str) -> bool:
    return cell.strip().lower() in _YES | _NO


def _no_class(name: str) -> bool:
    return tagged.plain(name).replace("_", "") in _NO_CLASSES


def _names(cell: str, marks: Sequence[str]) -> list[str]:
    """Part the labels of a cell; Python's and JSON's lists are understood, too."""
    text = cell.strip()
    if (text.startswith("[") and text.endswith("]")) or re.fullmatch(_QUOTED, text):
        return [_unquoted(name) for name in text[1:-1].split(",")]
    for mark in marks[1:]:
        text = text.replace(mark, marks[0])
    return [_unquoted(name) for name in (text.split(marks[0]) if marks else [text])]


def _unquoted(name: str) -> str:
    """Take off quotes that are left around a name."""
    text = name.strip()
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted and text[0] not in text[1:-1] else text


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."
