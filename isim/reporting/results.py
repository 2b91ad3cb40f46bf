"""Result tables that `isim results` prints, and the page shows, from the reports that there are."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from isim import errors
from isim.errors import UserError
from isim.params import load
from isim.reporting import words
from isim.runtime import atomic, figures

LINKS = """Where to look next
  reports/index.html        every image with its mask, the worst first; open it in a browser
  reports/                  every figure: figures.csv, other tables, pictures
  data/masks/               the final label map of every image
  data/pseudo_labels/       the label maps of every round, data/cams/ the CAMs
  data/random_walk/         the label maps of the random walk
  data/predictions/         what the segmenters make of the images
  dvc plots show            mIoU over the rounds, losses, classes: dvc_plots/index.html
  {ui}
  isim plan                 how long the next `dvc repro` takes"""
# The clone of isim has a Makefile, a project of one's own has none.
_UI = {
    True: "make ui                   every run in MLflow",
    False: "isim ui                   every run in MLflow",
}


class Table(NamedTuple):
    """Table: its head is the first row, the first `words` columns are words, the others figures.

    `mious` are the columns that need masks.
    """

    title: str
    rows: Sequence[tuple[str, ...]]
    mious: tuple[int, ...]
    words: int = 1
    note: str = ""


def table(root: Path) -> str:
    """Write what the stages have reported so far, as text: in percent, or in words without masks.

    Raises:
        UserError: There is no report below `root`, or one is not what the stages write.
    """
    parts = [_aligned(found) for found in tables(root)]
    if said := judged(root):
        parts.append("\n".join(["How far to trust the masks", *(f"  {line}" for line in said)]))
    if not parts:
        remedy = "run `dvc repro` first, or `dvc pull` in a clone"
        raise UserError(f"{root / 'reports'} holds no results yet; {remedy}")
    links = LINKS.format(ui=_UI[(root / "Makefile").exists()])
    return "\n\n".join((*parts, links))


def tables(root: Path) -> list[Table]:
    """List the tables of mIoUs; one that would hold none is left out. Errors as of `table`."""
    rounds = root / "reports/train_cam/rounds.csv"
    final, walk = (root / f"reports/{name}" for name in ("evaluate", "random_walk"))
    params = root / "params.yaml"
    if params.exists():
        # Not the folders that are there: those of a label set that was taken from the list stay.
        names = [labels.name for labels in load(params).label_sets]
        segmenters = [root / f"reports/train_segmenter/{name}" for name in names]
    else:
        # The dry run of a plan has stages alone.
        segmenters = sorted(root.glob("reports/train_segmenter/*"))
    makers: list[tuple[Path, Callable[[Path], Table]]] = [
        (rounds, _rounds),
        (final, _final),
        (walk, _walks),
    ]
    found = [_read(path, make) for path, make in makers if _is_there(path)]
    if trained := [path for path in segmenters if _is_there(path)]:
        every = [_read(path, _segmenter) for path in trained]
        rows = [every[0].rows[0], *(row for one in every for row in one.rows[1:])]
        found.append(every[0]._replace(rows=rows))
    return [_without_blanks(one) for one in found if _tells(one)]


def judged(root: Path) -> list[str]:
    """Say how far to trust the masks where none can be compared; errors as of `table`."""
    cam, page = (root / f"reports/{name}" for name in ("train_cam", "report"))
    said: list[str] = []
    for path, make in ((cam, _learnt), (page, _seen)):
        if _is_there(path):
            said += _read(path, make)
    return said


def _is_there(path: Path) -> bool:
    """Tell whether there is a table, or a folder with figures of a stage."""
    return path.is_file() or any((path / name).exists() for name in (figures.FILE, figures.OLD))


def _learnt(path: Path) -> list[str]:
    report = figures.read(path)
    for split in ("val", "train"):
        if (found := report.get(f"{split}_class_map")) is not None:
            return [f"{words.tags_learnt(found)} on {split}"]
    return []


def _seen(path: Path) -> list[str]:
    report = figures.read(path)
    said = []
    if "compared" in report:
        first, _, second = report["compared"].partition(" and ")
        said.append(words.agree(first, second, report["agreement"]))
    if "stable" in report:
        said.append(f"seeds are stable to {report['stable']:.2f} (IoU around the threshold)")
    if "coverage" in report:
        said += [
            f"masks cover {100 * report['coverage']:.0f} % of the pixels",
            f"an image's mask has {report['parts_median']:g} parts (median)",
            f"{report['empty']} of {report['with_mask']} masks are empty in spite of tags, "
            f"{report['covering']} cover everything",
        ]
    if report.get("scored_images"):
        bounds = words.interval(report)
        text = f"mIoU of the masks {100 * report['miou']:.1f} % on {report['scored_images']} images"
        said.append(f"{text}, 95 % interval {bounds}" if bounds else text)
    return said


def _read(path: Path, make: Callable[[Path], Any]) -> Any:  # noqa: ANN401 - what `make` makes
    with errors.reading(path, "run `dvc repro` again", "is damaged"):
        return make(path)


def _rounds(path: Path) -> Table:
    found = atomic.read_csv(path)
    scored = [name for name in ("cam_miou", "pseudo_label_miou") if any(_known(found, name))]
    shares = [*scored, *(["coverage"] if any(_known(found, "coverage")) else [])]
    names = {"cam_miou": "CAM", "pseudo_label_miou": "pseudo-label", "coverage": "covers"}
    rows = [("round", "epoch", *(names[name] for name in shares), "seconds")]
    for row in found:
        cells = (_percent(row[name]) for name in shares)
        rows.append((row["round"], row["epoch"], *cells, f"{float(row['seconds']):.1f}"))
    title = "mIoU on the training images, % (covers: labelled pixels, %)"
    if not scored:
        title = "Rounds on the training images (covers: labelled pixels, %)"
    return Table(title, rows, tuple(range(2, 2 + len(shares))), 0)


def _known(rows: Sequence[Mapping[str, str]], name: str) -> list[bool]:
    """Tell of each row whether it has a figure."""
    return [row.get(name) not in (None, "", "nan") for row in rows]


def _final(path: Path) -> Table:
    rows: list[tuple[str, ...]] = [
        ("split", "CAM", "CAM, best threshold", "CAM + CRF", "95 % interval")
    ]
    for split, row in _splits(figures.read(path)):
        if not split.startswith("round_"):
            mious = (row.get(name) for name in ("cam_miou", "cam_miou_oracle", "cam_crf_miou"))
            rows.append((split, *map(_percent, mious), _interval(row, "cam_crf_miou")))
    note = "(the best threshold is chosen on the masks: an upper bound, not a result)"
    return Table("mIoU of the final network, %", rows, (1, 2, 3), note=note)


def _walks(path: Path) -> Table:
    rows: list[tuple[str, ...]] = [("split", "walk", "walk + CRF")]
    for split, row in _splits(figures.read(path)):
        # Without the dCRF there is no second figure.
        mious = row.get("walk_miou"), row.get("walk_crf_miou")
        rows.append((split, *map(_percent, mious)))
    return Table("mIoU of the random walk, %", rows, (1, 2))


def _segmenter(path: Path) -> Table:
    rows = [("trained on", "split", "mIoU", "95 % interval", "after CRF")]
    report = figures.read(path)
    for split, row in _splits(report):
        miou, refined = row.get("miou"), row.get("crf_miou")
        cells = _percent(miou), _interval(row, "miou"), _percent(refined)
        rows.append((path.name, split, *cells))
    return Table("mIoU of the segmenters, %", rows, (2, 4), 2)


def _splits(found: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(split, row) for split, row in found.items() if isinstance(row, dict)]


def _tells(found: Table) -> bool:
    """Tell whether any row has one of the figures that the table is about."""
    return any(row[place] != "-" for row in found.rows[1:] for place in found.mious)


def _without_blanks(found: Table) -> Table:
    """Leave out the columns that hold nothing, as those of a dCRF that was not asked for."""
    columns = [column for column in zip(*found.rows, strict=True) if set(column[1:]) != {"-"}]
    return found._replace(rows=list(zip(*columns, strict=True)))


def _interval(row: Mapping[str, Any], name: str) -> str:
    return words.interval(row, name) or "-"


def _percent(value: str | float | None) -> str:
    return "-" if value in (None, "", "nan") else f"{100 * float(value or 0):.1f}"


def _aligned(found: Table) -> str:
    """Write a table: its words are flush left, its figures right."""
    widths = [max(map(len, column)) for column in zip(*found.rows, strict=True)]
    pads = [str.ljust] * found.words + [str.rjust] * (len(widths) - found.words)
    lines = [found.title]
    for row in found.rows:
        cells = (pad(cell, w) for pad, cell, w in zip(pads, row, widths, strict=True))
        lines.append("  ".join(cells))
    return "\n".join([*lines, *([found.note] if found.note else [])])
