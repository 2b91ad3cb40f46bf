"""Stage 2: run the ISIM loop; write data/pseudo_labels.

Paper Algorithm 1: warm-up, then rounds of pseudo-labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import nan
from pathlib import Path

import numpy as np

from isim import stage
from isim.data import label_sets, prepared
from isim.data.prepared import Item
from isim.errors import UserError
from isim.models import cam, common, encoder
from isim.models.cam import CamConfig, CamNetwork
from isim.models.frozen import FrozenNetwork
from isim.params import TrainCam
from isim.passes import cams, classification, pseudo_labels, seeds
from isim.passes.features import Features
from isim.reporting import pictures, plots, words
from isim.runtime import atomic, devices, identity, progress
from isim.runtime.paths import home, resolve_path
from isim.stage import Stage
from isim.training import batches, heads, loop, rounds
from isim.training.frozen import FrozenRounds, Planes
from isim.training.loop import Row
from isim.training.previous import LastNetwork, Started
from isim.training.rounds import Rounds
from isim.training.steps import CamStep

MIOUS = ("cam_miou", "pseudo_label_miou")
HEADLINE = ("rounds", *MIOUS, "val_class_map")
TAGS = ("id", "class", "tagged", "probability", "usual")


def run(params: TrainCam, root: Path) -> None:
    """Run the stage: data/prepared to models/train_cam, data/pseudo_labels and reports.

    Raises UserError for unusable data, weights or parameters, and a loss that is not finite.
    """
    data = prepared.load(root)
    items = data.split(params.split)
    held_out = () if params.eval_split == "none" else data.split(params.eval_split)
    if params.method not in ("cam", "frozen") and min(params.batch, len(items)) < 2:
        raise UserError("train_cam.batch: the decoder's batch statistics need at least 2 images")
    weights = resolve_path(params.weights, root)
    devices.seed_all(params.seed)
    config = cam.configure(params, data.classes)
    network = cam.build(config)
    encoder.load(network, config, params.weights, weights)

    reads = {"data/prepared": root / "data/prepared", "weights": weights}
    if params.starts_from_labels:
        reads["start"] = resolve_path(params.start, root)
        label_sets.require_maps(reads["start"], items)
    last = LastNetwork(home(root) / ".isim", params, root / prepared.FOLDER)
    started = _started(last, params, network, config)
    if started is not None:
        reads["previous"] = started.path
    if params.method == "frozen" and params.threshold not in ("auto", 0.5):
        progress.tell(
            f"train_cam: threshold {params.threshold}, though CAMs of a head are probabilities: at "
            "0.5 class and background are equally likely"
        )
    with stage.opened("train_cam", params, root, reads=reads) as here:
        devices.place(network, here.device)
        shown = pictures.choose(items, params.pictures)
        given = {"items": items, "held_out": held_out}
        made: Rounds | FrozenRounds
        if isinstance(network, FrozenNetwork):
            made, final, disputed = _frozen(here, network, config, params, **given, started=started)
        else:
            made, final, disputed = _trained(here, network, config, params, **given)
        config = replace(made.config, threshold=made.rows[-1]["threshold"])
        common.save(here.resume / "models/model.safetensors", network, config)
        here.log("final_train", final)
        _cards(here, made, params, data.classes)
        here.publish({"models": "models/train_cam", "pseudo_labels": "data/pseudo_labels"})
        own = encoder.supervision(params.encoder, params.weights)
        supervision = own if started is None else started.supervision
        here.tracked.tag("supervision", supervision)
        about = {
            "method": params.method,
            **_origin(here, params, started),
            "optimizer_profile": params.optimizer.profile,
            "weights_md5": here.hashes.get("weights"),
            "supervision": supervision,
            "precision": here.precision,
            "images": len(items),
            "scored_images": sum(item.mask is not None for item in items),
            "rounds": len(made.rows),
            "threshold": config.threshold,
            **{name: made.rows[-1][name] for name in (*MIOUS, "masked_share", "coverage")},
            # `train_` is of the last epoch's crops, `final_train_` and `val_` of whole images.
            **{k: v for k, v in made.epochs[-1].items() if k.startswith(("train_", "val_"))},
            **{f"final_train_{name}": value for name, value in final.items()},
        }
        here.report(partial(_report, about, made, disputed), partial(_show, shown, len(made.rows)))
        _tell(about)
        last.keep(here.resume / "models/model.safetensors", network, config, about=about)
        here.held += last.held


def _started(
    last: LastNetwork, params: TrainCam, network: CamNetwork | FrozenNetwork, config: CamConfig
) -> Started | None:
    """Begin with the previous network, if that is asked for and there is one that can be used."""
    started = last.begin(network, config) if params.start == "previous" else None
    if started is None or not isinstance(started.network, FrozenNetwork):
        return started
    if started.network.head is None:
        progress.tell("train_cam: the previous network has no head; starts as with start: none")
        return None
    return started


def _origin(here: Stage, params: TrainCam, started: Started | None) -> Row:
    """Record the network that the run started from, where one was asked for."""
    if params.start != "previous":
        return {}
    found = "none" if started is None else started.identity
    here.tracked.tag("started_from", found)
    return {"started_from": found, "started_from_round": 0 if started is None else started.rounds}


def _cards(
    here: Stage, made: Rounds | FrozenRounds, params: TrainCam, classes: Sequence[str]
) -> None:
    """Tell in the folder of each round which network made its label maps."""
    for row in made.rows:
        name = rounds.name(row["round"])
        model = here.resume / "models" / f"{name}.safetensors"
        if not model.exists():
            # Method frozen without rounds of a head.
            model = model.with_name("classifier.safetensors")
        figures = {key: value for key, value in row.items() if key != "round"}
        about = {"round": row["round"], "network": {model.name: identity.md5(model)}}
        here.card(f"pseudo_labels/{name}", params, ("background", *classes), figures, **about)


def _trained(
    here: Stage,
    network: CamNetwork,
    config: CamConfig,
    params: TrainCam,
    *,
    items: Sequence[Item],
    held_out: Sequence[Item],
) -> tuple[Rounds, Row, list[Row]]:
    """Run the paper's loop; returns it, the figures of whole images and the disputed tags."""
    given, shown = (here, network), pictures.choose(items, params.pictures)

    def at(config: CamConfig) -> TrainCam:
        threshold = params.threshold
        if threshold == "auto":
            threshold = seeds.choose_threshold(*given, config, items, params=params)
        return params.model_copy(update={"threshold": threshold})

    def regenerate(config: CamConfig, name: str) -> pseudo_labels.Scores:
        return pseudo_labels.regenerate(*given, config, items, params=at(config), name=name)

    def measure(config: CamConfig) -> float:
        return seeds.score(*given, config, items, params=at(config))

    made = Rounds(
        here,
        network,
        config,
        params,
        regenerate,
        measure,
    )
    # One set for every round that there can be: loader processes know them from the start.
    folders = [_labels(here, number) for number in range(1, params.epochs + 1)]
    if params.starts_from_labels:
        folders.append(resolve_path(params.start, here.root))
    labels = [partial(_file, folder) for folder in folders]
    crops = batches.of_crops(items, config, params, here.device, labels=labels)
    step = CamStep(here, network, params, crops.size)
    classify = partial(classification.classify, here, network, config, longer_side=params.crop)

    def also() -> Row:
        return {f"val_{name}": value for name, value in classify(held_out).items()}

    if params.starts_from_labels:
        crops.dataset.use_labels(len(labels) - 1)
    for epochs in loop.epochs(here, network, crops, step, also=also):
        here.log_epoch(epochs)
        if row := made.after_epoch(epochs):
            _log(here, row, shown)
        if made.rows and params.method != "cam":
            crops.dataset.use_labels(len(made.rows) - 1)
    # The figures of the epochs are of random crops, while the weights change.
    logits = partial(classification.logits, here, network, config, longer_side=params.crop)
    return made, *_judged(here, logits, config, items, held_out=held_out)


def _frozen(
    here: Stage,
    network: FrozenNetwork,
    config: CamConfig,
    params: TrainCam,
    *,
    items: Sequence[Item],
    held_out: Sequence[Item],
    started: Started | None,
) -> tuple[FrozenRounds, Row, list[Row]]:
    """Run the loop on cached features; returns it, the images' figures and the disputed tags."""
    shown = pictures.choose(items, params.pictures)
    cached = Features(here, network, config)
    cached.prepare(items, others=[*items, *held_out])
    given = (here, cached)

    def at(threshold: str | float) -> TrainCam:
        return params.model_copy(update={"threshold": threshold})

    def regenerate(
        config: CamConfig, name: str, threshold: str | float, refined: bool
    ) -> pseudo_labels.Scores:
        if threshold == "auto":
            threshold = seeds.choose_threshold(*given, config, items, params=params)
        return pseudo_labels.regenerate(
            *given,
            config,
            items,
            params=at(threshold),
            name=name,
            refined=refined,
        )

    def measure(config: CamConfig, threshold: float) -> float:
        return seeds.score(*given, config, items, params=at(threshold))

    def validate() -> Row:
        found = classification.frozen(cached, held_out)
        return {f"val_{name}": value for name, value in found.items()}

    made = FrozenRounds(
        here,
        network,
        config,
        params,
        heads.Patches(items, cached.of, here.device),
        grids=lambda config: cams.grids(*given, config, items),
        regenerate=regenerate,
        measure=measure,
        validate=validate,
        earlier=None if started is None else _earlier(here, started, config, items),
    )
    made.run()
    for number in range(1, len(made.epochs) + 1):
        here.log_epoch(made.epochs[:number])
    for row in made.rows:
        _log(here, row, shown)
    logits = partial(classification.frozen_logits, cached)
    return made, *_judged(here, logits, config, items, held_out=held_out)


def _earlier(
    here: Stage, started: Started, config: CamConfig, items: Sequence[Item]
) -> Callable[..., Planes]:
    """Return what gives images with the CAMs of the previous network's head."""
    network = started.network.eval()
    assert isinstance(network, FrozenNetwork)
    devices.place(network, here.device)
    # The encoder is the same, and so are the features.
    cached = Features(here, network, config)
    return lambda config: cams.grids(here, cached, config, items)


def _judged(
    here: Stage,
    logits: Callable[[Sequence[Item]], np.ndarray],
    config: CamConfig,
    items: Sequence[Item],
    *,
    held_out: Sequence[Item],
) -> tuple[Row, list[Row]]:
    """Return the final network's figures of the images, and the tags that it disputes anywhere."""
    known = {item.id for item in items}
    others = [item for item in held_out if item.id not in known]

    def judge() -> Row:
        seen, unseen = logits(items), logits(others)
        pairs = ((items, seen), (others, unseen))
        rows = [row for pair in pairs for row in classification.disputed(*pair, config.classes)]
        return {"figures": classification.figures(items, seen), "disputed": rows}

    found = here.once("final", judge)
    return found["figures"], found["disputed"]


def _tell(about: Row) -> None:
    """Say how well the tags are learnt, which needs no masks."""
    for name, where in (("val_class_map", "val"), ("final_train_class_map", "its own images")):
        if np.isfinite(learnt := about.get(name, np.nan)):
            progress.tell(f"train_cam: {words.tags_learnt(learnt)} on {where}")
            return


def _log(here: Stage, row: Row, shown: Sequence[Item]) -> None:
    """Log a round or a measurement."""
    # Beside the rounds' figures, whose steps are rounds.
    by_epoch = {f"{name}_by_epoch": row[name] for name in MIOUS if name in row}
    here.tracked.metrics(by_epoch, step=row["epoch"])
    if "round" in row:
        number = row["round"]
        figures = {k: v for k, v in row.items() if k not in ("round", "epoch")}
        here.tracked.metrics(figures, step=number)
        for item in shown:
            with here.drawing(f"{item.id}.png"):
                square = pictures.strip(item, _results(here, number, item), columns=2)
                # MLflow's slider stands at step 0 when it is opened.
                here.tracked.image(f"pictures/{item.id}", square, step=number - 1)


def _report(about: Row, made: Rounds | FrozenRounds, disputed: Sequence[Row], here: Stage) -> None:
    """Write a row a round, an epoch, a measurement, a class and a disputed tag; headline; plots."""
    columns = ("epoch", "round", *MIOUS)
    mious = [
        {column: row.get(column, "") for column in columns}
        for row in made.mious
        if np.isfinite(row["cam_miou"])
    ]
    for name, rows in (("rounds", made.rows), ("epochs", made.epochs)):
        atomic.write_csv(here.reports / f"{name}.csv", rows)
    atomic.write_csv(here.reports / "miou.csv", mious, columns)
    atomic.write_csv(here.reports / "tags.csv", disputed, TAGS)
    here.figures(about, {name: about.get(name, nan) for name in HEADLINE})
    here.table("per_class", made.per_class, ("round", "class"))
    here.tracked.headline({name: about[name] for name in MIOUS})
    here.tracked.artifact_file(here.reports / "rounds.csv")
    here.register("cam", "models/train_cam/model.safetensors")
    names = {"cam_miou": "CAM (before dCRF)", "pseudo_label_miou": "pseudo-label (after dCRF)"}
    with here.drawing("miou.png") as path:
        plots.curves(made.rows, "round", names, "mIoU (%)", path=path, scale=100)
    losses = {"classification_loss": "classification", "segmentation_loss": "segmentation"}
    with here.drawing("losses.png") as path:
        plots.curves(made.epochs, "epoch", losses, "loss", path=path)


def _show(shown: Sequence[Item], count: int, here: Stage) -> None:
    """Write the strips of all rounds, one below the other, and a grid of the pseudo-labels."""
    numbers = range(1, count + 1)
    for item in shown:
        with here.drawing(f"{item.id}.png") as path:
            strips = [pictures.strip(item, _results(here, number, item)) for number in numbers]
            pictures.write_png(path, np.concatenate(strips))
    if shown:
        labels = [_labels(here, number) for number in numbers]
        with here.drawing("rounds.png") as path:
            pictures.write_png(path, pictures.rounds_grid(shown, labels))


def _results(here: Stage, number: int, item: Item) -> dict[str, Path]:
    cam_file = here.resume / rounds.name(number) / f"{item.id}.npz"
    return {"CAM": cam_file, "pseudo-label": _file(_labels(here, number), item.id)}


def _labels(here: Stage, number: int) -> Path:
    return here.resume / "pseudo_labels" / rounds.name(number)


def _file(folder: Path, id_: str) -> Path:
    return folder / f"{id_}.png"
