"""Choice of the images whose masks would tell most, and where to put the masks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isim.data import prepared
from isim.data.prepared import Item
from isim.errors import UserError, cut
from isim.params import Prepare, load
from isim.reporting.page import content
from isim.runtime import atomic
from isim.runtime.paths import resolve_path

OUT = "reports/masks_wanted.csv"
# Share of the images by their doubt: the usual one, of which a mask tells how good masks are.
USUAL = 0.5
Row = dict[str, Any]


def choose(images: Sequence[Mapping[str, str]], count: int) -> list[Row]:
    """Choose images of reports/report/images.csv whose masks would tell most.

    Each comes from the class of which the fewest are chosen so far: in turn its most doubtful
    image, where a mask mends most, and the one in the middle, where it tells most of all the
    others. The choice hangs on the rows alone.
    """
    free = {row["id"]: row for row in images if row["labels"] and row["doubt"] and not row["iou"]}
    by_class: dict[str, list[str]] = {}
    for id_, row in sorted(free.items(), key=lambda entry: (-float(entry[1]["doubt"]), entry[0])):
        for name in row["labels"].split(";"):
            by_class.setdefault(name, []).append(id_)
    usual = {name: ids[int(USUAL * len(ids))] for name, ids in by_class.items()}
    chosen: list[Row] = []
    taken: Counter[str] = Counter()
    turns: Counter[str] = Counter()
    while free and len(chosen) < count:
        left = {name: [id_ for id_ in ids if id_ in free] for name, ids in by_class.items()}
        name = min((n for n, ids in left.items() if ids), key=lambda n: (taken[n], turns[n], n))
        ids, doubtful = left[name], turns[name] % 2 == 0
        place = 0 if doubtful else ids.index(usual[name]) if usual[name] in ids else len(ids) // 2
        row = free.pop(ids[place])
        turns[name] += 1
        taken.update(row["labels"].split(";"))
        why = f"{'doubtful' if doubtful else 'usual'} {name}"
        chosen.append({name: row[name] for name in ("id", "splits", "labels")} | {"why": why})
    return chosen


def write(root: Path, count: int, split: str | None) -> str:
    """Choose images, write reports/masks_wanted.csv, and return the list as text.

    Raises:
        UserError: There is no report of the images, no image of the split is without a mask, or
            the file cannot be written.
    """
    path = root / "reports/report/images.csv"
    if not path.is_file():
        raise UserError(f"cannot read {path}: it does not exist; run `isim report` first")
    images = content.rows(path)
    if split is not None:
        known_splits = sorted({name for row in images for name in row["splits"].split(";")})
        if split not in known_splits:
            raise UserError(f"no split '{cut(split, 60)}'; use one of {', '.join(known_splits)}")
        images = [row for row in images if split in row["splits"].split(";")]
    rows = choose(images, count)
    if not rows:
        of = f" of split {split}" if split else ""
        raise UserError(f"{path}: every image{of} that has tags has a mask; there is none to draw")
    data = prepared.load(root)
    known = {item.id: item for items in data.splits.values() for item in items}
    section = load(root / "params.yaml").prepare
    rows = [row | _files(known[row["id"]], section, root) for row in rows]
    atomic.write_csv(root / OUT, rows)
    width = max(len(row["id"]) for row in rows)
    listed = [f"{row['id']:<{width}}  {row['labels']}  ({row['why']})" for row in rows]
    values = ", ".join(f"{label} {name}" for label, name in enumerate(data.classes, start=1))
    return "\n".join(
        [
            f"Masks of these {len(rows)} images would tell most:",
            *(f"  {line}" for line in listed),
            f"Draw each as an 8-bit PNG as large as its image: 0 background, {values}, 255 unsure;",
            f"save it as {rows[0]['mask']}, and the others alike, then run `dvc repro`.",
            "train_segmenter.trust_masks: true trains on them. "
            f"The list, with the files to draw, is in {OUT}.",
        ]
    )


def _files(item: Item, params: Prepare, root: Path) -> Row:
    """Name the image and the file that its mask belongs in."""
    folder = resolve_path(params.root, root) / "masks"
    if params.source == "voc" or item.image.parent.name == "JPEGImages":
        folder = item.image.parent.parent / "SegmentationClass"
    return {"image": str(item.image), "mask": str(folder / f"{item.id}.png")}
