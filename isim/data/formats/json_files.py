"""Labels as JSON: an object a line, a list of objects, or a mapping of names to labels."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isim import errors
from isim.data.formats import tagged
from isim.data.formats.tagged import IMAGE_NAMES, LABEL_NAMES, SPLIT_NAMES, Tagged, Tags
from isim.data.problems import Problem
from isim.errors import UserError, cut

LINES = {".jsonl", ".ndjson"}
# COCO's and LVIS's largest files have less.
_MOST_BYTES = 2 << 30


def load(path: Path) -> Any:  # noqa: ANN401 - any JSON value
    """Read a JSON file, or one of JSON lines as a list. Raises UserError when it is none."""
    number = 0

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            # Python takes the last of them without a word.
            name = next(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
            place = f" line {number}" if number else ""
            raise UserError(f"{path}{place} has the key '{cut(name, 60)}' twice; write it once")
        return found

    try:
        text = tagged.text_of(path, _MOST_BYTES)
        if path.suffix.lower() not in LINES:
            return json.loads(text, object_pairs_hook=once)
        values = []
        for part in text.split("\n"):
            number += 1
            if part.strip():
                values.append(json.loads(part, object_pairs_hook=once))
        return values
    except (OSError, ValueError, RecursionError) as error:
        place = f" line {number}" if number else ""
        raise UserError(
            f"{path}{place} is no readable JSON ({errors.reason(error)}); write it in UTF-8"
        ) from error


def read(path: Path, content: object) -> Tags:
    """Read the tags of a file whose `content` is as `load` gives it.

    An object names an image (`image`, `file_name`, ...), its labels (`labels`, `tags`, ...: a list
    or one name; null: unknown) and maybe its split.

    Raises:
        UserError: It is of another form.
    """
    problems: list[Problem] = []
    rows = []
    for where, entry in _entries(path, content):
        row = _row(where, entry, problems, path)
        if row is not None:
            rows.append(row)
    return Tags(tuple(rows), tuple(problems))


def _entries(path: Path, content: object) -> Iterator[tuple[str, object]]:
    if isinstance(content, list):
        for number, entry in enumerate(content, start=1):
            yield f"{path.name} entry {number}", entry
    elif isinstance(content, dict):
        for name, labels in content.items():
            yield f"{path.name}, {name[:60]}", {"image": name, "labels": labels}
    else:
        raise UserError(
            f"{path} holds neither a list of objects with `image` and `labels`, nor a mapping of "
            "names to labels; write one of them"
        )


def _row(where: str, entry: object, problems: list[Problem], path: Path) -> Tagged | None:
    def refuse(why: str) -> None:
        what = f"{where} {why}; found: {json.dumps(entry)[:80]}"
        problems.append(Problem("unusable row", what, str(path)))

    if not isinstance(entry, dict):
        refuse("is no object with `image` and `labels`")
        return None
    keys = list(entry)
    image, label = (tagged.column(keys, names) for names in (IMAGE_NAMES, LABEL_NAMES))
    split = tagged.column(keys, SPLIT_NAMES)
    if image is None or label is None:
        refuse("has no `image` or no `labels`")
        return None
    name, labels = entry[keys[image]], entry[keys[label]]
    labels = [labels] if _is_name(labels) else labels
    usable = labels is None or (isinstance(labels, list) and all(map(_is_name, labels)))
    if not _is_name(name) or not str(name).strip() or not usable:
        refuse("must name an image, and its labels as a list of names")
        return None
    found = None if labels is None else tagged.distinct(map(str, labels))
    given = None if split is None else entry[keys[split]]
    told = "" if given is None else str(given)
    return Tagged(str(name), found, where, tagged.split_of(told, where, problems))


def _is_name(value: object) -> bool:
    """Tell whether a value can be a name: a text, or a number; `true` is none."""
    return isinstance(value, str | int) and not isinstance(value, bool)
