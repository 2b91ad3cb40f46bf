"""Stage 6: train on a label set; write data/predictions.

A segmenter is trained, and predicts (paper 4.1.7; spec 7).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from isim import stage
from isim.data import label_sets, prepared
from isim.data.prepared import Item, Prepared
from isim.errors import UserError
from isim.models import common, encoder, segmenter
from isim.models.segmenter import Segmenter, SegmenterConfig
from isim.params import TrainSegmenter, label_set_path
from isim.passes import counts, features, predictions, seeds
from isim.passes.features import Features
from isim.passes.kept import Kept
from isim.passes.predictions import Predicted
from isim.reporting import plots
from isim.runtime import atomic, devices, identity, processes, progress
from isim.runtime.paths import resolve_path
from isim.stage import Stage
from isim.training import batches, heads, loop
from isim.training.loop import Row
from isim.training.steps import SegmenterStep

# A patch has the label of more than half of it.
HALF = 0.5
_MODEL = "model/model.safetensors"
# Parameters that no prediction of a trained network depends on.
_ASIDE = {"eval_splits", "pictures"}


def run(params: TrainSegmenter, name: str, root: Path) -> None:
    """Run the stage: a label set to models, data/predictions and reports, each in a folder of it.

    `name` is one of `label_sets`. Images without a label map of it are left out and counted. A
    split that is part of a tested one (train of trainaug) is reported apart, too. Raises UserError
    for unusable data, label maps, weights or parameters, and a loss that is not finite.
    """
    data = prepared.load(root)
    everything, tested = data.split(params.split), _tested(params, data)
    stored = label_sets.sources(name, params.split, everything, root)
    items = tuple(item for item in everything if item.id in stored)
    if params.method == "deeplabv3" and min(params.batch, len(items)) < 2:
        raise UserError(
            "train_segmenter.batch: the decoder's batch statistics need at least 2 images, with "
            f"label maps ({len(items)} of split '{params.split}' have one)"
        )
    weights = resolve_path(params.weights, root)
    devices.seed_all(params.seed)
    config = segmenter.configure(params, data.classes)
    network = segmenter.build(config)
    decoder_weights = segmenter.load_weights(
        network, config, params.weights, weights, allow_decoder_weights=params.allow_decoder_weights
    )

    folder = str(label_set_path(name))
    reads = {path: root / path for path in ("data/prepared", folder)} | {"weights": weights}
    reads |= prepared.mask_folders(everything)
    with stage.opened("train_segmenter", params, root, reads=reads, label_set=name) as here:
        devices.place(network, here.device)
        if decoder_weights is not None:
            here.tracked.tag("decoder_weights", "pixel supervision from the weights file")
        is_cam = name == "seeds"
        labels = seeds.write(here, items, stored, params.threshold) if is_cam else stored
        trusted = _trusted(params, name, items)
        labels = {**labels, **trusted}
        asked = [item for split in tested.values() for item in split]
        source = features.ready(here, network, config, asked, others=items)
        if isinstance(source, Features):
            epochs = _frozen(source, here, config, params, items=items, labels=labels)
        else:
            epochs = _trained(source, here, config, params, items=items, labels=labels)
        common.save(here.resume / _MODEL, network, config)
        processes.barrier()
        known = counts.members(data.splits)
        found = _predicted(here, source, config, tested, params=params, name=name, known=known)
        names = ("background", *data.classes)
        _card(here, params, name, found, names=names)
        here.publish(
            {"model": f"models/train_segmenter/{name}", "predictions": f"data/predictions/{name}"}
        )
        about = {
            "label_set": name,
            "method": params.method,
            "encoder": params.encoder,
            "supervision": encoder.supervision(params.encoder, params.weights),
            "weights_md5": here.hashes.get("weights"),
            "decoder_weights": _told(decoder_weights),
            "precision": here.precision,
            # Which round the last one was.
            "labels": stored[items[0].id].parent.name,
            "images": len(items),
            "images_without_labels": len(everything) - len(items),
            "trusted_masks": len(trusted),
        }
        here.tracked.tag("supervision", str(about["supervision"]))
        here.report(
            partial(_report, about, epochs, found, names=names), partial(_show, tested, params)
        )


def _card(
    here: Stage,
    params: TrainSegmenter,
    name: str,
    found: Mapping[str, Predicted],
    *,
    names: Sequence[str],
) -> None:
    """Tell in the folder of the predictions which network made them."""
    rows = {split: result.row() for split, result in found.items()}
    network = {Path(_MODEL).name: identity.md5(here.resume / _MODEL)}
    here.card("predictions", params, names, rows, label_set=name, network=network)


def _told(loaded: Mapping[str, Sequence[str]] | None) -> str | None:
    """Put into words which weights of the decoder the file lacked or had besides."""
    if loaded is None:
        return None
    return "; ".join(f"{kind}: {', '.join(names) or 'none'}" for kind, names in loaded.items())


def _trusted(params: TrainSegmenter, name: str, items: Sequence[Item]) -> dict[str, Path]:
    """Find the masks that take the place of label maps, by id, and tell how many there are."""
    if not params.trust_masks or name == "ground_truth":
        return {}
    found = {item.id: item.mask for item in items if item.mask is not None}
    progress.tell(
        f"train_segmenter: {len(found)} of {len(items)} images are trained on with their masks "
        f"instead of label set {name} (trust_masks)"
    )
    return found


def _trained(
    network: Segmenter,
    here: Stage,
    config: SegmenterConfig,
    params: TrainSegmenter,
    *,
    items: Sequence[Item],
    labels: Mapping[str, Path],
) -> list[Row]:
    """Train encoder and head on crops; returns a row an epoch."""
    label, scales = labels.__getitem__, (params.scale_min, params.scale_max)
    crops = batches.of_crops(items, config, params, here.device, labels=[label], scales=scales)
    crops.dataset.use_labels(0)
    epochs: list[Row] = []
    for epochs in loop.epochs(here, network, crops, SegmenterStep(here, network, params)):
        here.log_epoch(epochs)
    return epochs


def _frozen(
    cached: Features,
    here: Stage,
    config: SegmenterConfig,
    params: TrainSegmenter,
    *,
    items: Sequence[Item],
    labels: Mapping[str, Path],
) -> list[Row]:
    """Train the head on cached features; returns one row."""
    network, patches = cached.network, heads.Patches(items, cached.of, here.device)
    path = here.resume / "head/model.safetensors"

    def train() -> Row:
        heads.fit(network, patches)
        reduced = heads.label_grids(items, labels.__getitem__, patches.sizes, share=HALF)
        given = (here, network, patches, reduced)
        loss = heads.train_head(*given, params=params.head, seed=(params.seed,))
        common.save(path, network, config)
        return {"loss": loss}

    row = {"epoch": 1, **here.once("trained", train)}
    heads.load(here, network, path, segmenter.load)
    here.log_epoch([row])
    return [row]


def _tested(params: TrainSegmenter, data: Prepared) -> dict[str, tuple[Item, ...]]:
    """Items of the splits to predict; VOC's test set, whose images few have, may be missing."""
    splits = list(params.eval_splits)
    if "test" in splits and "test" not in data.splits:
        splits.remove("test")
        progress.tell("train_segmenter: no images of split 'test' in the prepared data; left out")
    return {split: data.split(split, labelled=False) for split in splits}


def _predicted(
    here: Stage,
    source: Segmenter | Features,
    config: SegmenterConfig,
    tested: Mapping[str, Sequence[Item]],
    *,
    params: TrainSegmenter,
    name: str,
    known: counts.Parts,
) -> dict[str, Predicted]:
    """Predict the tested splits; returns the scores of each and of the `known` ones inside them."""
    found: dict[str, Predicted] = {}
    network = identity.md5(here.resume / _MODEL)
    kept = Kept.on(here, params, _ASIDE, digests=prepared.digests(here.root), network=network)
    for split, parts in counts.parts(tested, known).items():
        new = predictions.predict(
            here, source, config, tested[split], params=params, parts=parts, kept=kept
        )
        found |= new
        for part, result in new.items():
            here.log(part, result.row())
            progress.tell(f"{name} on {part}: {result}")
    return found


def _report(
    about: Row,
    epochs: Sequence[Row],
    found: Mapping[str, Predicted],
    here: Stage,
    *,
    names: Sequence[str],
) -> None:
    """Write a row an epoch and a class, the headline, and plots."""
    splits = {split: result.row() for split, result in found.items()}
    confusions = predictions.confusions(found)
    last = {"loss": epochs[-1]["loss"], **splits}
    atomic.write_csv(here.reports / "epochs.csv", epochs)
    mious = {split: row["miou"] for split, row in splits.items()}
    here.figures(about | last, {about["label_set"]: mious})
    here.table("per_class", counts.per_class(confusions, names), counts.PER_CLASS)
    here.tracked.headline(
        {f"{s}_{k}": v for s, row in splits.items() for k, v in row.items() if k.endswith("miou")}
    )
    model = f"models/train_segmenter/{about['label_set']}/model.safetensors"
    here.register(f"segmenter_{about['label_set']}", model)

    with here.drawing("loss.png") as path:
        plots.curves(epochs, "epoch", {"loss": "cross-entropy"}, "loss", path=path)
    with here.drawing("per_class.png") as path:
        plots.class_ious(names, counts.counted(confusions), path)
    for split, result in found.items():
        with here.drawing(f"confusion_{split}.png") as path:
            plots.confusion_heatmap(result.confusion, names, path)


def _show(tested: Mapping[str, Sequence[Item]], params: TrainSegmenter, here: Stage) -> None:
    def results(split: str, item: Item) -> dict[str, Path]:
        folder, name = here.resume / "predictions", f"{item.id}.png"
        refined = {"after dCRF": folder / f"{split}_crf" / name} if params.crf_after else {}
        return {"prediction": folder / split / name, **refined}

    here.show(tested, params.pictures, results)
