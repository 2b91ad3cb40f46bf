"""Stage 8: score CAMs and pseudo-labels on the masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from isim import metrics, stage
from isim.data import files, prepared
from isim.data.prepared import Item
from isim.errors import UserError
from isim.params import Evaluate
from isim.passes import counts, scores
from isim.passes.counts import Confusions
from isim.reporting import pictures, plots
from isim.runtime import atomic, progress
from isim.stage import Stage

Figures = dict[str, Any]
# Columns of tables that have no rows without masks.
SWEEP = ("split", "threshold", "cam_miou")
CONFUSION = ("source", "actual", "predicted", "pixels")


def run(params: Evaluate, root: Path) -> None:
    """Run the stage: CAMs and pseudo-labels against the ground truth, to reports/evaluate.

    A split that is part of a scored one (train of trainaug) is reported apart, too. Images without
    a ground truth are left out; where none has one, figures are null and tables have no rows.
    Raises UserError for no CAMs, no prepared data, a missing or unreadable file.
    """
    data = prepared.load(root)
    cams, labels = root / "data/cams", root / "data/pseudo_labels"
    splits = sorted(path.name for path in cams.glob("[!.]*") if path.is_dir())
    if not splits:
        raise UserError(f"{cams} holds no CAMs; run `isim export-cams` first")
    if params.threshold == "auto":
        params = params.model_copy(update={"threshold": files.read_threshold(cams)})
    scored = {split: [i for i in data.split(split) if i.mask is not None] for split in splits}
    known = {item.id: item for items in data.splits.values() for item in items}
    members, names = counts.members(data.splits), ("background", *data.classes)

    reads = {name: root / name for name in ("data/prepared", "data/cams", "data/pseudo_labels")}
    reads |= prepared.mask_folders(known.values())
    with stage.opened("evaluate", params, root, reads=reads) as here:
        done = _Scores(params)
        for split, parts in counts.parts(splits, members).items():
            items = scored[split]
            pictured = {item.id for item in pictures.choose(items, params.pictures)}
            swept, refined, bounds = scores.cams(
                here,
                items,
                cams / split,
                params,
                num_labels=len(names),
                parts=parts,
                pictured=pictured,
            )
            for part, ids in parts.items():
                images = sum(item.id in ids for item in items)
                figures = done.add_cams(part, images, swept[part], refined[part])
                figures |= bounds[part]
                here.log(part, figures)
                _tell(part, figures)
        rounds = (int(path.name.removeprefix("round_")) for path in labels.glob("round_*"))
        for number in sorted(rounds):
            name = f"round_{number:02d}"
            paths = (path.relative_to(labels / name) for path in (labels / name).rglob("*.png"))
            ids = frozenset(path.as_posix()[: -len(".png")] for path in paths) & known.keys()
            items, parts = [known[i] for i in sorted(ids)], {"": ids, **counts.inside(ids, members)}
            confusions = scores.labels(
                here, items, labels / name, num_labels=len(names), parts=parts
            )
            for part, confusion in confusions.items():
                here.log(part, done.add_round(name, part, confusion), step=number)
        here.report(partial(_report, done, names), partial(_show, scored, params))


def _tell(part: str, figures: Mapping[str, Any]) -> None:
    """Say which threshold is best on the masks that there are, and how sure that is."""
    if "oracle_threshold_low" in figures:
        bounds = (figures[f"oracle_threshold_{end}"] for end in ("low", "high"))
        progress.tell(
            f"evaluate: on {figures['images']} masks of {part} the best threshold before dCRF is "
            f"{figures['oracle_threshold']:.2f} (95 %: {' to '.join(f'{b:.2f}' for b in bounds)}), "
            f"mIoU {100 * figures['cam_miou_oracle']:.2f}; at {figures['threshold']:.2f} it is "
            f"{100 * figures['cam_miou']:.2f}"
        )


@dataclass
class _Scores:
    """Contents of the reports.

    `confusions` are (L, L) by what was scored, `figures` by split and by round; `sweep` has a row a
    threshold, `headline` the figures that runs are compared by.
    """

    params: Evaluate
    confusions: Confusions = field(default_factory=dict)
    figures: dict[str, Figures] = field(default_factory=dict)
    sweep: list[Figures] = field(default_factory=list)
    headline: dict[str, float] = field(default_factory=dict)

    def add_cams(self, name: str, images: int, swept: np.ndarray, refined: np.ndarray) -> Figures:
        """Add a split's (T, L, L) counts at the thresholds and (L, L) after dCRF."""
        thresholds, fixed = scores.thresholds(self.params)
        mious = [metrics.miou(confusion) for confusion in swept]
        oracle = int(np.nanargmax(mious)) if np.isfinite(mious).any() else fixed
        self.confusions |= {f"{name}_cam": swept[fixed], f"{name}_cam_crf": refined}
        figures = self.figures[name] = {
            "images": images,
            "threshold": round(float(thresholds[fixed]), 6),
            **metrics.segmentation_figures("cam_", swept[fixed]),
            "cam_miou_oracle": mious[oracle],
            "oracle_threshold": round(float(thresholds[oracle]), 6),
            **metrics.segmentation_figures("cam_crf_", refined),
        }
        self.sweep += [
            {"split": name, "threshold": f"{threshold:.3f}", "cam_miou": value}
            for threshold, value in zip(thresholds, mious, strict=True)
            if np.isfinite(value)
        ]
        self.headline |= {f"{name}_{k}": figures[k] for k in ("cam_miou", "cam_crf_miou")}
        return figures

    def add_round(self, name: str, part: str, confusion: np.ndarray) -> Figures:
        """Add (L, L) counts of a round's labels, or of a split that is part of them."""
        key = f"{name}_{part}" if part else name
        self.confusions[key] = confusion
        self.figures[key] = metrics.segmentation_figures("pseudo_label_", confusion)
        if not part:
            # Here too: train_cam may have come from DVC's run-cache, without an MLflow run.
            self.headline["pseudo_label_miou"] = self.figures[key]["pseudo_label_miou"]
        return self.figures[key]


def _report(done: _Scores, names: Sequence[str], here: Stage) -> None:
    """Write tables and plots."""
    counted = counts.counted(done.confusions)
    if not counted:
        progress.tell("evaluate: no masks to score; `isim report` judges the label maps without")
    pixels = [
        {"source": source, "actual": actual, "predicted": predicted, "pixels": int(count)}
        for source, confusion in counted.items()
        for actual, row in zip(names, confusion, strict=True)
        for predicted, count in zip(names, row, strict=True)
    ]
    atomic.write_csv(here.reports / "sweep.csv", done.sweep, SWEEP)
    atomic.write_csv(here.reports / "confusion.csv", pixels, CONFUSION)
    cams = {"cam": "cam_miou", "crf": "cam_crf_miou"}
    splits = {split: row for split, row in done.figures.items() if "cam_miou" in row}
    here.figures(
        done.figures,
        {key: {split: row[name] for split, row in splits.items()} for key, name in cams.items()},
    )
    here.tracked.headline(done.headline)
    here.table("per_class", counts.per_class(counted, names), counts.PER_CLASS)
    with here.drawing("per_class.png") as path:
        plots.class_ious(names, counted, path)
    for source, found in counted.items():
        with here.drawing(f"confusion_{source}.png") as path:
            plots.confusion_heatmap(found, names, path)


def _show(scored: Mapping[str, Sequence[Item]], params: Evaluate, here: Stage) -> None:
    def results(split: str, item: Item) -> dict[str, Path]:
        label = here.resume / "labels" / split / f"{item.id}.png"
        return {"CAM": here.root / f"data/cams/{split}/{item.id}.npz", "pseudo-label": label}

    here.show(scored, params.pictures, results)
