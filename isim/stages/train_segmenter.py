"""Train a segmenter on a label set and predict with it (paper 4.1.7; spec 7).

Resume rule: after every epoch the state (weights, optimizer, figures so far) is saved; the
predictions of a split keep a journal of finished images. The same command continues from there
as long as the parameters, the label set, the prepared data and the code are the same, and ends
as if never interrupted.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from isim import (
    atomic,
    batches,
    distributed,
    engine,
    metrics,
    pictures,
    segmenter_training,
    splits,
    tracking,
    viz,
)
from isim.data import files
from isim.data.dataset import CropDataset, Item, Prepared, load_prepared
from isim.errors import UserError
from isim.labels import seeds
from isim.models import norm, segmenter
from isim.params import TrainSegmenter, digest, home, label_set_path, resolve_path
from isim.prediction import Predicted, PredictionSettings, predict


def run(params: TrainSegmenter, name: str, root: Path) -> None:
    """Run the stage: a label set to models, data/predictions and reports, each in a folder of it.

    Images without a label map of the set are left out and counted. A split that is part of a
    tested one (train of trainaug) is reported apart, too.

    Args:
        params: Section `train_segmenter`.
        name: The label set, one of `label_sets`.
        root: Project folder.

    Raises:
        UserError: Unusable data, label maps, weights or parameters; a loss that is not finite.
    """
    prepared = load_prepared(root / "data/prepared", partial(resolve_path, root=root))
    everything = prepared.split(params.split)
    tested = {
        split: prepared.split(split, labelled=False)
        for split in params.eval_splits
        if not _lacks_test_images(split, prepared)
    }
    sources = _sources(name, params.split, everything, root)
    items = tuple(item for item in everything if item.id in sources)
    if params.method == "deeplabv3" and min(params.batch, len(items)) < 2:
        raise UserError(
            "train_segmenter.batch: the decoder's batch statistics need at least 2 images, with "
            f"label maps ({len(items)} of split '{params.split}' have one)"
        )
    device = engine.default_device()
    precision = engine.resolve_precision(params.precision, device)
    weights = resolve_path(params.weights, root)
    engine.seed_all(params.seed)
    mean, std = segmenter.normalization(params.encoder, params.input_norm)
    config = segmenter.SegmenterConfig(
        method=params.method,
        encoder=params.encoder,
        output_stride=params.output_stride,
        encoder_norm=params.encoder_norm,
        decoder_channels=params.decoder_channels,
        classes=prepared.classes,
        mean=mean,
        std=std,
    )
    network = segmenter.build(config)
    decoder_weights = segmenter.load_weights(
        network, params.encoder, params.weights, weights, params.allow_decoder_weights
    )
    engine.place(network, device)
    optimizer = segmenter_training.make_optimizer(network, params)

    used = [root / "data/prepared", *(sources[item.id] for item in items)]
    key = engine.run_digest(
        f"{digest(params)} {name}",
        [*used, *([weights] if weights.is_file() else [])],
        engine.code_files("train_segmenter"),
        device,
        precision,
    )
    # Only now: hosts with other networks would wait for each other.
    norm.synchronise(network)
    resume = engine.resume_folder(home(root) / ".isim/resume/train_segmenter" / name, key)
    state = resume / "state.safetensors"
    progress = engine.restore(resume, key, network, optimizer)
    rows = progress["epochs"]
    if rows:
        tqdm.write(f"train_segmenter {name}: continues after epoch {len(rows)}")

    labels = sources
    if name == "seeds":
        labels = _write_seeds(items, sources, params.threshold, resume / "seeds")
    dataset = CropDataset(
        items,
        params.crop,
        config.mean,
        config.std,
        params.seed,
        [labels.__getitem__],
        scales=(params.scale_min, params.scale_max),
    )
    dataset.use_labels(0)
    crops = batches.CropBatches(dataset, params, device)
    folder = str(label_set_path(name))
    inputs = {path: root / path for path in ("data/prepared", folder)} | {"weights": weights}
    with tracking.stage_run("train_segmenter", params, root, inputs, name) as tracked:
        tracked.tag("precision", precision)
        tracked.tag("device", str(device))
        if decoder_weights is not None:
            tracked.tag("decoder_weights", "pixel supervision from the weights file")
        with engine.keep_freed_memory():
            for epoch in range(1, params.epochs + 1):
                if epoch > len(rows):
                    row = segmenter_training.train_epoch(
                        network, optimizer, crops, params, epoch, precision, device
                    )
                    rows.append(distributed.broadcast({"epoch": epoch, **row}))
                    engine.save_state(state, network, optimizer, progress)
                    tqdm.write(f"epoch {epoch}/{params.epochs}: loss {row['loss']:.4f}")
                # Of a resumed run all rows again, as in train_cam.
                row = rows[epoch - 1]
                tracked.metrics({k: v for k, v in row.items() if k != "epoch"}, step=epoch)
        engine.save_tensors(
            resume / "model/model.safetensors", network.state_dict(), config.to_metadata()
        )
        crf = params.crf if params.crf_after else None
        settings = PredictionSettings(params.test_scales, params.test_flip, precision, crf)
        scores: dict[str, Predicted] = {}
        for split, parts in splits.parts(tested, splits.members(prepared.splits)).items():
            out = resume / "predictions" / split
            results = predict(
                network,
                config,
                tested[split],
                out,
                out.with_name(f"{split}_crf"),
                resume / f"{split}.jsonl",
                settings,
                device,
                parts,
            )
            for part, result in results.items():
                scores[part], figures = result, result.row()
                tracked.metrics({f"{part}_{k}": v for k, v in figures.items()})
                after = f", after dCRF {100 * figures['crf_miou']:.2f}" if crf else ""
                tqdm.write(f"{name} on {part}: mIoU {100 * figures['miou']:.2f}{after}")

        if not distributed.is_writer():
            # The rest is published once on every disk.
            engine.remove_resume_folder(resume)
            return
        atomic.copy_tree(resume / "model", root / "models/train_segmenter" / name)
        atomic.copy_tree(resume / "predictions", root / "data/predictions" / name)
        reports = root / "reports/train_segmenter" / name
        names = ("background", *prepared.classes)
        about = {
            "label_set": name,
            "method": params.method,
            "encoder": params.encoder,
            "weights_md5": tracking.md5(weights) if weights.is_file() else None,
            "decoder_weights": asdict(decoder_weights) if decoder_weights else None,
            "precision": precision,
            # Which round the last one was.
            "labels": sources[items[0].id].parent.name,
            "images": len(items),
            "images_without_labels": len(everything) - len(items),
        }
        per_class = _report(reports, about, rows, scores, names)
        shutil.rmtree(reports / "pictures", ignore_errors=True)
        for split, chosen in tested.items():
            for item in pictures.choose(chosen, params.pictures):
                found = _predictions(root / "data/predictions" / name, split, item, params)
                strip = pictures.prediction_strip(item, found, columns=4)
                viz.write_png(reports / f"pictures/{split}/{item.id}.png", strip)
                square = pictures.prediction_strip(item, found, columns=2)
                tracked.image(f"{split}/{item.id}", square, step=0)
        _draw(reports / "pictures", rows, scores, names)
        tracked.headline(
            {
                f"{split}_{figure}": value
                for split, found in scores.items()
                for figure, value in found.row().items()
                if figure in ("miou", "crf_miou")
            }
        )
        tracked.table("per_class", per_class)
        model = root / "models/train_segmenter" / name / "model.safetensors"
        tracked.register_model(f"segmenter_{name}", model)
    engine.remove_resume_folder(resume)


def _lacks_test_images(split: str, prepared: Prepared) -> bool:
    """Tell whether it is VOC's test set, whose images few have, and say that it is left out."""
    if split != "test" or split in prepared.splits:
        return False
    tqdm.write("train_segmenter: no images of split 'test' in the prepared data; left out")
    return True


def _sources(name: str, split: str, items: Sequence[Item], root: Path) -> dict[str, Path]:
    """Where each image's label map comes from: a PNG or, for `seeds`, a CAM file.

    Raises:
        UserError: The label set is not there, or has nothing for any of the items.
    """
    if name == "ground_truth":
        sources = {item.id: item.mask for item in items if item.mask is not None}
        remedy = "give the images masks, or train on another label set"
    else:
        folder = _folder(name, split, root)
        stages = {"data/cams": "export-cams", "data/random_walk": "random-walk"}
        stage = stages.get(str(label_set_path(name)), "train-cam")
        remedy = f"run `isim {stage}` first, for split '{split}'"
        if name.endswith("_crf"):
            remedy += ", with crf_after: true"
        if not folder.is_dir():
            raise UserError(f"label set '{name}': {folder} is missing; {remedy}")
        suffix = ".npz" if name == "seeds" else ".png"
        paths = {path.stem: path for path in folder.glob(f"[!.]*{suffix}")}
        sources = {item.id: paths[item.id] for item in items if item.id in paths}
    if not sources:
        raise UserError(
            f"label set '{name}': none of the {len(items)} images of split '{split}' has a label "
            f"map; {remedy}"
        )
    return sources


def _folder(name: str, split: str, root: Path) -> Path:
    """Folder of a label set's files, whether it is there or not."""
    base = root / str(label_set_path(name))
    # A round is of one split, the others have a folder a split.
    if name.startswith("round_"):
        return base
    if name == "last_round":
        # By number: as text, round_100 comes before round_99.
        numbers = [int(path.name[6:]) for path in base.glob("round_*") if path.name[6:].isdigit()]
        return base / f"round_{max(numbers, default=1):02d}"
    return base / (f"{split}_crf" if name.endswith("_crf") else split)


def _write_seeds(
    items: Sequence[Item], cams: dict[str, Path], threshold: float, folder: Path
) -> dict[str, Path]:
    """Make the label maps of the stored CAMs that are not in `folder` yet (spec 5).

    Each process of a run makes its share of them.
    """
    labels = {item.id: folder / f"{item.id}.png" for item in items}
    done = set(distributed.broadcast([path.stem for path in folder.glob("*.png")]))
    missing = distributed.mine([item for item in items if item.id not in done])
    for item in tqdm(missing, "seeds", leave=False, disable=None):
        ids = item.class_ids
        planes, size = files.read_cam_of(cams[item.id], item.image, ids)
        seed = seeds.seed(seeds.grow(planes, size), ids, threshold)
        files.write_label_map(labels[item.id], seed)
    distributed.share(folder, "*.png")
    return labels


def _predictions(folder: Path, split: str, item: Item, params: TrainSegmenter) -> dict[str, Path]:
    found = {"prediction": folder / split / f"{item.id}.png"}
    if params.crf_after:
        found["after dCRF"] = folder / f"{split}_crf" / f"{item.id}.png"
    return found


def _ious(scores: dict[str, Predicted]) -> dict[str, list[float]]:
    """IoU of every class, by split and, after dCRF, `<split>_crf`."""
    ious = {}
    for split, found in scores.items():
        ious[split] = metrics.iou(found.confusion).tolist()
        if found.refined_confusion is not None:
            ious[f"{split}_crf"] = metrics.iou(found.refined_confusion).tolist()
    return ious


def _report(
    reports: Path,
    about: dict[str, Any],
    epochs: list[dict[str, Any]],
    scores: dict[str, Predicted],
    names: tuple[str, ...],
) -> list[dict[str, Any]]:
    """Write a row an epoch and a class, and the headline; return the rows of the classes."""
    per_class = [
        {"source": source, "class": name, "iou": value}
        for source, values in _ious(scores).items()
        for name, value in zip(names, values, strict=True)
    ]
    atomic.write_csv(reports / "epochs.csv", epochs)
    atomic.write_csv(reports / "per_class.csv", per_class)
    splits = {split: found.row() for split, found in scores.items()}
    atomic.write_json(
        reports / "metrics.json", {**about, "loss": epochs[-1]["loss"], "splits": splits}
    )
    return per_class


def _draw(
    folder: Path,
    epochs: list[dict[str, Any]],
    scores: dict[str, Predicted],
    names: tuple[str, ...],
) -> None:
    viz.curves(epochs, "epoch", {"loss": "cross-entropy"}, "loss", folder / "loss.png")
    viz.class_bars(names, _ious(scores), "IoU", folder / "per_class.png")
    for split, found in scores.items():
        viz.confusion_heatmap(found.confusion, names, folder / f"confusion_{split}.png")
