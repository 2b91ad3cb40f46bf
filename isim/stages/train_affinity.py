"""Stage 4: train AffinityNet on the CAMs.

It learns from pairs of pixels that the CAMs are sure of (paper 4.1.6; spec 6).
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from isim import stage
from isim.data import files, prepared
from isim.data.prepared import Item
from isim.models import affinity, common, encoder
from isim.params import TrainAffinity
from isim.passes import affinity_labels
from isim.reporting import plots
from isim.runtime import atomic, devices, progress
from isim.runtime.paths import resolve_path
from isim.stage import Stage
from isim.training import batches, loop
from isim.training.loop import Row
from isim.training.steps import AffinityStep


def run(params: TrainAffinity, root: Path) -> None:
    """Run the stage: data/cams to data/affinity_labels, models/train_affinity and reports.

    Nothing is read or trained where the random walk takes another affinity than net: the outs are
    there, without a checkpoint and labels. Raises UserError for unusable data, CAMs, weights or
    parameters, and a loss that is not finite.
    """
    if params.affinity != "net":
        _skip(params, root)
        return
    data = prepared.load(root)
    items = data.split(params.split)
    cams = root / "data/cams" / params.split
    files.require_cams(cams)
    devices.seed_all(params.seed)
    config = affinity.configure(params)
    network = affinity.build(config)
    reads = {path: root / path for path in ("data/prepared", "data/cams")}
    if params.weights == "train_cam":
        reads["models/train_cam"] = root / "models/train_cam"
        affinity.copy_encoder(network, config, reads["models/train_cam"] / "model.safetensors")
    else:
        reads["weights"] = resolve_path(params.weights, root)
        encoder.load(network, config, params.weights, reads["weights"])

    with stage.opened("train_affinity", params, root, reads=reads) as here:
        devices.place(network, here.device)
        figures = affinity_labels.make(here, items, cams, params, num_labels=len(data.classes) + 1)
        here.tracked.metrics(figures)
        right = figures["sure_accuracy"]
        progress.tell(
            f"train_affinity: {100 * figures['sure_share']:.1f} % of the pixels are labelled"
            + (f", {100 * right:.1f} % of them right" if math.isfinite(right) else "")
        )
        label = partial(_label, here)
        crops = batches.of_crops(items, config, params, here.device, labels=[label])
        crops.dataset.use_labels(0)
        epochs: list[Row] = []
        for epochs in loop.epochs(here, network, crops, AffinityStep(here, network, params)):
            here.log_epoch(epochs)
        common.save(here.resume / "models/model.safetensors", network, config)
        here.publish({"models": "models/train_affinity", "labels": "data/affinity_labels"})
        supervision = _supervision(params)
        here.tracked.tag("supervision", supervision)
        about = {
            "encoder": params.encoder,
            "supervision": supervision,
            "weights_md5": here.hashes.get("weights"),
            "precision": here.precision,
            "images": len(items),
            **figures,
        }
        here.report(partial(_report, about, epochs), partial(_show, items, params))


def _supervision(params: TrainAffinity) -> str:
    """Name what the encoder's first weights have learned from, besides images."""
    if params.weights == "train_cam":
        return "as train_cam"
    return encoder.supervision(params.encoder, params.weights)


def _skip(params: TrainAffinity, root: Path) -> None:
    """Leave outs that say why there is nothing in them; DVC wants all of them."""
    why = f"random_walk.affinity is {params.affinity}, which needs no AffinityNet"
    with stage.opened("train_affinity", params, root, reads={}) as here:
        here.once("models/skipped", lambda: {"skipped": why})
        atomic.make_directory(here.resume / "labels")
        here.publish({"models": "models/train_affinity", "labels": "data/affinity_labels"})
        here.report(partial(_report_skipped, why))
    progress.tell(f"train_affinity: skipped, as {why}")


def _report_skipped(why: str, here: Stage) -> None:
    atomic.make_directory(here.reports / "pictures")
    atomic.write_text(here.reports / "epochs.csv", "epoch\n")
    here.figures({"skipped": why}, {})


def _report(about: Row, epochs: Sequence[Row], here: Stage) -> None:
    last = {k: v for k, v in epochs[-1].items() if k.endswith("loss")}
    atomic.write_csv(here.reports / "epochs.csv", epochs)
    here.figures(about | last, {})
    here.tracked.headline({"loss": last["loss"], "sure_accuracy": about["sure_accuracy"]})
    here.tracked.artifact_file(here.reports / "epochs.csv")
    here.register("affinity", "models/train_affinity/model.safetensors")
    terms = ("background", "foreground", "negative")
    losses = {"loss": "total"} | {f"{term}_loss": term for term in terms}
    with here.drawing("losses.png") as path:
        plots.curves(epochs, "epoch", losses, "loss", path=path)


def _show(items: Sequence[Item], params: TrainAffinity, here: Stage) -> None:
    def results(_: str, item: Item) -> dict[str, Path]:
        cam = here.root / f"data/cams/{params.split}/{item.id}.npz"
        return {"CAM": cam, "affinity label": _label(here, item.id)}

    here.show({"": items}, params.pictures, results)


def _label(here: Stage, id_: str) -> Path:
    return here.resume / f"labels/{id_}.png"
