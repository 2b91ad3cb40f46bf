"""Stage 5: walk the CAMs; write data/random_walk.

They are walked along AffinityNet's affinities, the final pseudo-labels (paper 4.1.6; spec 6), or
along affinities of all patches that `train_cam`'s encoder gives without training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from isim import metrics, stage
from isim.data import files, prepared
from isim.data.prepared import Item
from isim.models import affinity, cam, common
from isim.models.cam import CamConfig
from isim.params import RandomWalk
from isim.passes import counts, features, walks
from isim.passes.counts import Confusions
from isim.passes.each import Passed
from isim.passes.walks import Stored
from isim.reporting import words
from isim.runtime import devices, identity, progress
from isim.stage import Stage

CAPTIONS = {"walk": "random walk", "walk_crf": "walk + dCRF"}
# Function of `passes.walks`: each takes networks of its own kind.
_Walk = Callable[..., Passed]


def run(params: RandomWalk, root: Path) -> None:
    """Run the stage: data/cams and a network of affinities to data/random_walk and reports.

    It is models/train_affinity for affinity net, models/train_cam for others. The label maps of a
    split are in its folder, those after dCRF in `<split>_crf`. A split that is part of it (train of
    trainaug) is reported apart, too. Raises UserError for no checkpoint, no CAMs of a split, an
    encoder without attention if that is wanted, an unreadable file, a failed write.
    """
    data = prepared.load(root)
    chosen = {split: data.split(split) for split in params.splits}
    for split in chosen:
        files.require_cams(root / "data/cams" / split)
    source, walk, (network, config) = _along(params, root)
    probable = _are_probable(params, root)
    names = ("background", *data.classes)

    reads = {path: root / path for path in ("data/prepared", "data/cams", source)}
    with stage.opened("random_walk", params, root, reads=reads) as here:
        devices.place(network, here.device)
        if params.affinity != "net":
            every = [item for items in chosen.values() for item in items]
            walking = replace(config, affinity=params.affinity)
            network = features.ready(here, network, walking, (), others=every)
        figures: dict[str, dict[str, float]] = {}
        confusions: dict[str, Confusions] = {}
        for split, parts in counts.parts(chosen, counts.members(data.splits)).items():
            cams = Stored(root / "data/cams" / split, probable)
            given = {"params": params, "cams": cams, "num_labels": len(names)}
            done = walk(here, network, config, chosen[split], **given)
            square = (len(names), len(names))
            found = {
                name: counts.totals(done.lines, name, square, parts)
                for name in walks.folders(Path(), split, params)
            }
            for part, ids in parts.items():
                confusions[part] = {name: totals[part] for name, totals in found.items()}
                # The speed is that of the pass, hence not of a part of it.
                figures[part] = {"images": len(ids), **(done.speed if part == split else {})}
                lines = [line for line in done.lines if line["id"] in ids]
                for name, confusion in confusions[part].items():
                    figures[part] |= {
                        **metrics.segmentation_figures(f"{name}_", confusion),
                        **counts.interval(f"{name}_", lines, name, len(names)),
                        f"{name}_coverage": counts.coverage(lines, name),
                    }
                _tell(here, part, figures[part])
        model = root / source / "model.safetensors"
        network_md5 = {f"{source}/{model.name}": identity.md5(model)}
        here.card("labels", params, names, figures, network=network_md5)
        here.publish({"labels": "data/random_walk"})
        stride = {"map_stride": config.map_stride} if params.affinity == "net" else {}
        about = {"affinity": params.affinity, "precision": here.precision, **stride, **figures}
        here.report(partial(_report, about, confusions, names), partial(_show, chosen, params))


def _along(params: RandomWalk, root: Path) -> tuple[str, _Walk, tuple[Any, Any]]:
    """Choose the walk: where its network is from, the pass, and network and configuration."""
    if params.affinity == "net":
        source = "models/train_affinity"
        return source, walks.walk, affinity.load(root / source / "model.safetensors")
    source = "models/train_cam"
    network, config = cam.load(root / source / "model.safetensors")
    walks.require_attention(network, config, params)
    return source, walks.walk_dense, (network, config)


def _are_probable(params: RandomWalk, root: Path) -> bool:
    """Tell whether CAMs are probabilities, where that matters: for a constant threshold.

    A head or a decoder makes such (`FrozenNetwork.planes`, `inference.multi_scale_cams`).
    """
    path = root / "models/train_cam/model.safetensors"
    # AffinityNet walks CAMs of any origin.
    if params.background == "power" or not path.exists():
        return False
    config = common.read_config(path, CamConfig)
    return config.head_kind != "none" or config.decoder_labels


def _tell(here: Stage, part: str, figures: Mapping[str, float]) -> None:
    here.log(part, figures)
    mious = (
        words.miou(name, figures[f"{name}_miou"], figures[f"{name}_coverage"])
        for name in CAPTIONS
        if f"{name}_miou" in figures
    )
    progress.tell(f"random_walk: {figures['images']} label maps of {part}, {', '.join(mious)}")


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
        if counts.counted(found):
            per_class += [{"split": part, **row} for row in metrics.iou_table(names, columns)]
        mious |= {f"{part}_{name}_miou": about[part][f"{name}_miou"] for name in found}
    final = "walk_crf" if any("walk_crf" in found for found in confusions.values()) else "walk"
    here.figures(about, {"walk": {part: about[part][f"{final}_miou"] for part in confusions}})
    here.table("per_class", per_class, ("split", "class"))
    here.tracked.headline(mious)


def _show(chosen: Mapping[str, Sequence[Item]], params: RandomWalk, here: Stage) -> None:
    def results(split: str, item: Item) -> dict[str, Path]:
        folders = walks.folders(here.resume / "labels", split, params)
        labels = {CAPTIONS[name]: path / f"{item.id}.png" for name, path in folders.items()}
        return {"CAM": here.root / "data/cams" / split / f"{item.id}.npz", **labels}

    here.show(chosen, params.pictures, results)
