"""Result table that `isim results` prints from the reports."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

from isim.errors import UserError
from isim.params import load

LINKS = """Where to look next
  reports/                  every figure: metrics.json, CSV tables, pictures
  data/pseudo_labels/       the label maps of every round, data/cams/ the CAMs
  data/random_walk/         the label maps of the random walk
  data/predictions/         what the segmenters make of the images
  dvc plots show            mIoU over the rounds, losses, classes: dvc_plots/index.html
  make ui                   every run in MLflow
  isim preset --list        other data sets and methods; then `dvc repro`"""


def table(root: Path) -> str:
    """Write the mIoU of every round, of the final network and the segmenters in percent, as text.

    Raises:
        UserError: A report below `root` is missing or not what the stages write. The walk and the
            segmenters that have none yet are left out.
    """
    rounds = root / "reports/train_cam/rounds.csv"
    final, walk = (root / f"reports/{name}/metrics.json" for name in ("evaluate", "random_walk"))
    # Not the folders that are there: those of a label set that was taken from the list stay.
    names = [labels.name for labels in load(root / "params.yaml").label_sets]
    segmenters = [root / f"reports/train_segmenter/{name}/metrics.json" for name in names]
    try:
        parts = [_rounds(rounds), _final(final)]
        # The stages of the CAMs alone make results, too.
        parts += [_walks(walk)] if walk.exists() else []
        trained = [path for path in segmenters if path.exists()]
        parts += [_segmenters(trained)] if trained else []
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; run `dvc repro` first"
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{rounds}, {walk}, {final} or a metrics.json of reports/train_segmenter is damaged "
            f"({error}); run `dvc repro` again"
        ) from error
    return "\n\n".join((*parts, LINKS))


def _rounds(path: Path) -> str:
    rows = [("round", "epoch", "CAM", "pseudo-label", "seconds")]
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            mious = _percent(row["cam_miou"]), _percent(row["pseudo_label_miou"])
            rows.append((row["round"], row["epoch"], *mious, f"{float(row['seconds']):.1f}"))
    return _aligned("mIoU on the training images, % (-: no masks to compare with)", rows, words=0)


def _final(path: Path) -> str:
    rows = [("split", "CAM", "CAM, best threshold", "CAM + CRF")]
    for split, figures in json.loads(path.read_text(encoding="utf-8")).items():
        if not split.startswith("round_"):
            mious = (figures[name] for name in ("cam_miou", "cam_miou_oracle", "cam_crf_miou"))
            rows.append((split, *map(_percent, mious)))
    note = "(the best threshold is chosen on the masks: an upper bound, not a result)"
    return f"{_aligned('mIoU of the final network, %', rows)}\n{note}"


def _walks(path: Path) -> str:
    rows = [("split", "walk", "walk + CRF")]
    for split, figures in json.loads(path.read_text(encoding="utf-8")).items():
        if isinstance(figures, dict):
            # Without the dCRF there is no second figure.
            mious = figures["walk_miou"], figures.get("walk_crf_miou")
            rows.append((split, *map(_percent, mious)))
    return _aligned("mIoU of the random walk, %", rows)


def _segmenters(paths: Sequence[Path]) -> str:
    rows = [("trained on", "split", "mIoU", "after CRF")]
    for path in paths:
        report = json.loads(path.read_text(encoding="utf-8"))
        for split, figures in report["splits"].items():
            mious = figures["miou"], figures.get("crf_miou")
            rows.append((report["label_set"], split, *map(_percent, mious)))
    return _aligned("mIoU of the segmenters, %", rows, words=2)


def _percent(value: str | float | None) -> str:
    number = float("nan") if value is None else float(value)
    return "-" if math.isnan(number) else f"{100 * number:.1f}"


def _aligned(title: str, rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Write a table whose first `words` columns are flush left, the others, figures, right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.ljust] * words + [str.rjust] * (len(widths) - words)
    lines = [title]
    for row in rows:
        cells = (pad(cell, w) for pad, cell, w in zip(pads, row, widths, strict=True))
        lines.append("  ".join(cells))
    return "\n".join(lines)
