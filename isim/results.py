"""The result table that `isim results` prints from the reports."""

import csv
import json
import math
from pathlib import Path
from typing import Any

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
    """The mIoU of every round, the final figures and the segmenters', in percent, as plain text.

    Args:
        root: The project folder, which holds `params.yaml` and `reports/`.

    Raises:
        UserError: A report is missing or not what the stages write. A segmenter that has not
            been trained yet is left out.
    """
    # Not the folders that are there: those of a label set that was taken from the list stay.
    names = [labels.name for labels in load(root / "params.yaml").label_sets]
    rounds_path = root / "reports/train_cam/rounds.csv"
    walk_path = root / "reports/random_walk/metrics.json"
    final_path = root / "reports/evaluate/metrics.json"
    try:
        with rounds_path.open(newline="") as file:
            rounds = list(csv.DictReader(file))
        final = json.loads(final_path.read_text())
        # The stages of the CAMs alone make results, too.
        walks = json.loads(walk_path.read_text()) if walk_path.exists() else {}
        paths = [root / f"reports/train_segmenter/{name}/metrics.json" for name in names]
        trained = [json.loads(path.read_text()) for path in paths if path.exists()]
        parts = [_rounds(rounds), _final(final)]
        if walks:
            parts.append(_walks(walks))
        if trained:
            parts.append(_segmenters(trained))
        return "\n\n".join((*parts, LINKS))
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; run `dvc repro` first"
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{rounds_path}, {walk_path}, {final_path} or a metrics.json of "
            f"reports/train_segmenter is damaged ({error}); run `dvc repro` again"
        ) from error


def _rounds(rows: list[dict[str, str]]) -> str:
    lines = [
        "mIoU on the training images, % (-: no masks to compare with)",
        "round  epoch     CAM  pseudo-label  seconds",
    ]
    for row in rows:
        cam, label = (_percent(row[key]) for key in ("cam_miou", "pseudo_label_miou"))
        seconds = float(row["seconds"])
        lines.append(
            f"{row['round']:>5}  {row['epoch']:>5}  {cam:>6}  {label:>12}  {seconds:>7.1f}"
        )
    return "\n".join(lines)


def _final(metrics: dict[str, dict[str, float | None]]) -> str:
    columns = ("cam_miou", "cam_miou_oracle", "cam_crf_miou")
    lines = [
        "mIoU of the final network, %",
        "split          CAM  CAM, best threshold  CAM + CRF",
    ]
    for split, figures in metrics.items():
        if split.startswith("round_"):
            continue
        cam, oracle, refined = (_percent(figures[column]) for column in columns)
        lines.append(f"{split:<12} {cam:>5}  {oracle:>19}  {refined:>9}")
    lines.append("(the best threshold is chosen on the masks: an upper bound, not a result)")
    return "\n".join(lines)


def _segmenters(reports: list[dict[str, Any]]) -> str:
    names = ("trained on", *(report["label_set"] for report in reports))
    width = max(map(len, names))
    lines = [
        "mIoU of the segmenters, %",
        f"{names[0]:<{width}}  split      mIoU  after CRF",
    ]
    for report in reports:
        for split, figures in report["splits"].items():
            plain, refined = _percent(figures["miou"]), _percent(figures.get("crf_miou"))
            lines.append(f"{report['label_set']:<{width}}  {split:<9} {plain:>5}  {refined:>9}")
    return "\n".join(lines)


def _walks(metrics: dict[str, Any]) -> str:
    lines = ["mIoU of the random walk, %", "split        walk  walk + CRF"]
    for split, figures in metrics.items():
        if isinstance(figures, dict):
            # Without the dCRF there is no second figure.
            walk, refined = _percent(figures["walk_miou"]), _percent(figures.get("walk_crf_miou"))
            lines.append(f"{split:<12} {walk:>4}  {refined:>10}")
    return "\n".join(lines)


def _percent(value: str | float | None) -> str:
    number = float("nan") if value is None else float(value)
    return "-" if math.isnan(number) else f"{100 * number:.1f}"
