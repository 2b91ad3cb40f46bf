"""Stage 5: walk the CAMs; write data/random_walk.

They are walked along AffinityNet's affinities: the final pseudo-labels (paper 4.1.6; spec 6).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from isim import metrics, stage
from isim.data import files, prepared
from isim.data.prepared import Item
from isim.models import affinity
from isim.params import RandomWalk
from isim.passes import counts, walks
from isim.passes.counts import Confusions
from isim.runtime import atomic, devices
from isim.stage import Stage

CAPTIONS = {"walk": "random walk", "walk_crf": "walk + dCRF"}


def run(params: RandomWalk, root: Path) -> None:
    """Run the stage: data/cams and models/train_affinity to data/random_walk and reports.

    The label maps of a split are in its folder, those after dCRF in `<split>_crf`. A split that
    is part of it (train of trainaug) is reported apart, too. Raises UserError for no checkpoint,
    no CAMs of a split, an unreadable file, a failed write.
    """
    data = prepared.load(root)
    chosen = {split: data.split(split) for split in params.splits}
    for split in chosen:
        files.require_cams(root / "data/cams" / split)
    network, config = affinity.load(root / "models/train_affinity/model.safetensors")
    names = ("background", *data.classes)

    reads = {path: root / path for path in ("data/prepared", "data/cams", "models/train_affinity")}
    with stage.opened("random_walk", params, root, reads=reads) as here:
        devices.place(network, here.device)
        figures: dict[str, dict[str, float]] = {}
        confusions: dict[str, Confusions] = {}
        for split, parts in counts.parts(chosen, counts.members(data.splits)).items():
            done = walks.walk(
                here,
                network,
                config,
                chosen[split],
                params=params,
                cams=root / "data/cams" / split,
                num_labels=len(names),
            )
            square = (len(names), len(names))
            found = {
                name: counts.totals(done.lines, name, square, parts)
                for name in walks.folders(Path(), split, params)
            }
            for part, ids in parts.items():
                confusions[part] = {name: totals[part] for name, totals in found.items()}
                # The speed is that of the pass, hence not of a part of it.
                figures[part] = {"images": len(ids), **(done.speed if part == split else {})}
                for name, confusion in confusions[part].items():
                    figures[part] |= metrics.segmentation_figures(f"{name}_", confusion)
                _tell(here, part, figures[part])
        here.publish({"labels": "data/random_walk"})
        about = {"precision": here.precision, "map_stride": config.map_stride, **figures}
        here.report(partial(_report, about, confusions, names), partial(_show, chosen, params))


def _tell(here: Stage, part: str, figures: Mapping[str, float]) -> None:
    here.log(part, figures)
    mious = (
        f"{name.removesuffix('_miou')} mIoU {100 * value:.2f}"
        for name, value in figures.items()
        if name.endswith("_miou")
    )
    tqdm.write(f"random_walk: {figures['images']} label maps of {part}, {', '.join(mious)}")


def _report(
    about: Mapping[str, Any],
    confusions: Mapping[str, Confusions],
    names: Sequence[str],
    here: Stage,
) -> None:
    per_class: list[dict[str, Any]] = []
    mious: dict[str, float] = {}
    for part, found in confusions.items():
        columns = {f"{name}_iou": confusion for name, confusion in found.items()}
        per_class += [{"split": part, **row} for row in metrics.iou_table(names, columns)]
        mious |= {f"{part}_{name}_miou": about[part][f"{name}_miou"] for name in found}
    atomic.write_json(here.reports / "metrics.json", about)
    here.table("per_class", per_class)
    here.tracked.headline(mious)


def _show(chosen: Mapping[str, Sequence[Item]], params: RandomWalk, here: Stage) -> None:
    def results(split: str, item: Item) -> dict[str, Path]:
        folders = walks.folders(here.resume / "labels", split, params)
        labels = {CAPTIONS[name]: path / f"{item.id}.png" for name, path in folders.items()}
        return {"CAM": here.root / "data/cams" / split / f"{item.id}.npz", **labels}

    here.show(chosen, params.pictures, results)
