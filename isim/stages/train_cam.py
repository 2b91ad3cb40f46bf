"""Train with the ISIM loop (paper Algorithm 1): warm-up, then rounds of pseudo-labels.

Resume rule: after every epoch the state (weights, optimizer, figures so far) is saved; a round
keeps a journal of finished images, and each finished measurement is a file. The same command
continues from there as long as the parameters, the prepared data and the code are the same, and
ends as if never interrupted.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from isim import (
    atomic,
    batches,
    distributed,
    engine,
    metrics,
    pictures,
    rounds,
    tracking,
    training,
    viz,
)
from isim.data import files
from isim.data.dataset import CropDataset, Item, Prepared, load_prepared
from isim.errors import UserError
from isim.models import cam, norm
from isim.params import TrainCam, digest, home, resolve_path
from isim.regeneration import CamSettings, Scores, regenerate, score_seeds

MIOUS = ("cam_miou", "pseudo_label_miou")


def run(params: TrainCam, root: Path) -> None:
    """Run the stage: data/prepared to models/train_cam, data/pseudo_labels and reports.

    Args:
        params: Section `train_cam`.
        root: Project folder.

    Raises:
        UserError: Unusable data, weights or parameters; a loss that is not finite.
    """
    prepared = load_prepared(root / "data/prepared", partial(resolve_path, root=root))
    items = prepared.split(params.split)
    held_out = () if params.eval_split == "none" else prepared.split(params.eval_split)
    if params.method != "cam" and min(params.batch, len(items)) < 2:
        raise UserError("train_cam.batch: the decoder's batch statistics need at least 2 images")
    device = engine.default_device()
    precision = engine.resolve_precision(params.precision, device)
    weights = resolve_path(params.weights, root)
    engine.seed_all(params.seed)
    config = cam.configure(params, prepared.classes)
    network = cam.build(config)
    cam.load_encoder_weights(network, params.encoder, params.weights, weights)
    engine.place(network, device)
    norm.synchronise(network)
    optimizer = training.make_optimizer(network, params)

    key = engine.run_digest(
        digest(params),
        [root / "data/prepared", *([weights] if weights.is_file() else [])],
        engine.code_files("train_cam"),
        device,
        precision,
    )
    resume = engine.resume_folder(home(root) / ".isim/resume/train_cam", key)
    state = resume / "state.safetensors"
    progress = engine.restore(resume, key, network, optimizer)
    if progress["epochs"]:
        tqdm.write(f"train_cam: continues after epoch {len(progress['epochs'])}")

    shown = pictures.choose(items, params.pictures)
    settings = CamSettings(params.scales, params.flip, precision)
    # One set for every round that there can be: loader processes know them from the start.
    label_sets = [
        partial(_label_path, resume / "pseudo_labels", number)
        for number in range(1, params.epochs + 1)
    ]
    dataset = CropDataset(items, params.crop, config.mean, config.std, params.seed, label_sets)
    crops = batches.CropBatches(dataset, params, device)
    inputs = {"data/prepared": root / "data/prepared", "weights": weights}
    with (
        engine.keep_freed_memory(),
        tracking.stage_run("train_cam", params, root, inputs) as tracked,
    ):
        tracked.tag("precision", precision)
        tracked.tag("device", str(device))

        def finish_round(number: int, epoch: int) -> dict[str, Any]:
            """Make the round's labels (or the rest of them), train on them; return its row."""
            name = f"round_{number:02d}"
            labels = resume / "pseudo_labels" / name

            def make() -> dict[str, Any]:
                engine.save_tensors(
                    resume / "models" / f"{name}.safetensors",
                    network.state_dict(),
                    config.to_metadata(),
                )
                scores = regenerate(
                    network,
                    config,
                    items,
                    labels,
                    resume / name,
                    settings,
                    params.threshold,
                    params.crf,
                    {item.id for item in shown},
                    device,
                )
                row = {"round": number, "epoch": epoch, **scores.row()}
                tqdm.write(
                    f"{name} after epoch {epoch}: CAM mIoU {100 * row['cam_miou']:.2f}, "
                    f"pseudo-label mIoU {100 * row['pseudo_label_miou']:.2f}, "
                    f"{row['images_per_second']:.1f} images/s"
                )
                return {"row": row, "per_class": _per_class(number, prepared, scores)}

            row = distributed.once(resume / f"{name}.json", make)["row"]
            tracked.metrics(
                {k: v for k, v in row.items() if k not in ("round", "epoch")}, step=number
            )
            for item in shown:
                # Two rows of two: MLflow's thumbnails are square.
                cells = _strip(item, resume, name, columns=2)
                tracked.image(f"pictures/{item.id}", cells, step=number)
            if params.method != "cam":
                dataset.use_labels(number - 1)
            return row

        def measure(epoch: int) -> dict[str, Any]:
            """Score the CAMs as they are after `epoch`, or read what was found before."""

            def make() -> dict[str, Any]:
                miou = score_seeds(network, config, items, settings, params.threshold, device)
                tqdm.write(f"after epoch {epoch}: CAM mIoU {100 * miou:.2f}")
                return {"epoch": epoch, "cam_miou": miou}

            return distributed.once(resume / f"measured_{epoch:04d}.json", make)

        def classify_finally() -> dict[str, float]:
            """Classify the training images as the held-out ones are, or read what was found.

            Whole images and the final weights: the figures of the epochs are of random crops,
            while the weights change.
            """
            found = distributed.once(
                resume / "final.json",
                lambda: training.classify(network, config, items, params.crop, precision, device),
            )
            return {f"final_train_{name}": value for name, value in found.items()}

        rows = progress["epochs"]
        round_ends: list[int] = []
        mious: list[dict[str, Any]] = []
        for epoch in range(1, params.epochs + 1):
            if epoch > len(rows):
                row = training.train_epoch(
                    network, optimizer, crops, params, epoch, precision, device
                )
                figures = training.classify(
                    network, config, held_out, params.crop, precision, device
                )
                row = {"epoch": epoch, **row, **{f"val_{k}": v for k, v in figures.items()}}
                # Of the processes' clocks rank 0's.
                row = distributed.broadcast(row)
                rows.append(row)
                engine.save_state(state, network, optimizer, progress)
                tqdm.write(
                    f"epoch {epoch}/{params.epochs}: classification "
                    f"{row['classification_loss']:.4f}, segmentation "
                    f"{row['segmentation_loss']:.4f}, train mAP {row['train_class_map']:.3f}, "
                    f"val mAP {row.get('val_class_map', float('nan')):.3f}"
                )
            # Of a resumed run all rows again: it may have a new MLflow run, and one that goes on
            # drops the steps that it holds.
            row = rows[epoch - 1]
            tracked.metrics({k: v for k, v in row.items() if k != "epoch"}, step=epoch)
            if rounds.due(params, rows[:epoch], round_ends):
                round_ends.append(epoch)
                mious.append(finish_round(len(round_ends), epoch))
            elif rounds.measured(params, epoch):
                mious.append(measure(epoch))
            else:
                continue
            # Beside the rounds' figures, whose steps are rounds.
            by_epoch = {f"{k}_by_epoch": mious[-1][k] for k in MIOUS if k in mious[-1]}
            tracked.metrics(by_epoch, step=epoch)

        engine.save_tensors(
            resume / "models/model.safetensors", network.state_dict(), config.to_metadata()
        )
        final = classify_finally()
        tracked.metrics(final)
        if not distributed.is_writer():
            # The rest is published once on every disk.
            engine.remove_resume_folder(resume)
            return
        finished = [
            json.loads((resume / f"round_{number:02d}.json").read_text())
            for number in range(1, len(round_ends) + 1)
        ]
        _publish(root, resume, finished, rows, shown)
        weights_md5 = tracking.md5(weights) if weights.is_file() else None
        _report(params, root, finished, rows, mious, final, precision, items, weights_md5)
        last = finished[-1]["row"]
        tracked.headline({k: last[k] for k in MIOUS})
        tracked.table("per_class", [row for entry in finished for row in entry["per_class"]])
        tracked.artifact_file(root / "reports/train_cam/rounds.csv")
        tracked.register_model("cam", root / "models/train_cam/model.safetensors")
    engine.remove_resume_folder(resume)


def _label_path(folder: Path, number: int, id_: str) -> Path:
    return folder / f"round_{number:02d}" / f"{id_}.png"


def _per_class(number: int, prepared: Prepared, scores: Scores) -> list[dict[str, Any]]:
    before, after = metrics.iou(scores.seed_confusion), metrics.iou(scores.label_confusion)
    names = ("background", *prepared.classes)
    return [
        {"round": number, "class": name, "cam_iou": float(b), "pseudo_label_iou": float(a)}
        for name, b, a in zip(names, before, after, strict=True)
    ]


def _strip(item: Item, resume: Path, name: str, columns: int) -> np.ndarray:
    label = resume / "pseudo_labels" / name / f"{item.id}.png"
    return pictures.strip(item, resume / name / f"{item.id}.npz", label, columns)


def _publish(
    root: Path,
    resume: Path,
    entries: list[dict[str, Any]],
    epochs: list[dict[str, Any]],
    shown: list[Item],
) -> None:
    """Write outs and plots from the resume folder, which stays until all are written."""
    atomic.copy_tree(resume / "models", root / "models/train_cam")
    atomic.copy_tree(resume / "pseudo_labels", root / "data/pseudo_labels")
    names = [f"round_{entry['row']['round']:02d}" for entry in entries]
    folder = root / "reports/train_cam/pictures"
    shutil.rmtree(folder, ignore_errors=True)
    for item in shown:
        strips = [_strip(item, resume, name, columns=4) for name in names]
        viz.write_png(folder / f"{item.id}.png", np.concatenate(strips))
    if shown:
        labels = [
            [files.read_label_map(resume / f"pseudo_labels/{name}/{item.id}.png") for name in names]
            for item in shown
        ]
        images = [files.read_image(item.image) for item in shown]
        viz.write_png(folder / "rounds.png", viz.rounds_grid(images, labels))
    mious = {"cam_miou": "CAM (before dCRF)", "pseudo_label_miou": "pseudo-label (after dCRF)"}
    viz.curves([e["row"] for e in entries], "round", mious, "mIoU (%)", folder / "miou.png", 100)
    losses = {"classification_loss": "classification", "segmentation_loss": "segmentation"}
    viz.curves(epochs, "epoch", losses, "loss", folder / "losses.png")


def _report(
    params: TrainCam,
    root: Path,
    entries: list[dict[str, Any]],
    epochs: list[dict[str, Any]],
    mious: list[dict[str, Any]],
    final: dict[str, float],
    precision: str,
    items: tuple[Item, ...],
    weights_md5: str | None,
) -> None:
    """Write reports/train_cam: a row a round, an epoch, a measurement, a class; the headline."""
    reports = root / "reports/train_cam"
    atomic.write_csv(reports / "rounds.csv", [entry["row"] for entry in entries])
    atomic.write_csv(reports / "epochs.csv", epochs)
    columns = ("epoch", "round", *MIOUS)
    atomic.write_csv(reports / "miou.csv", [{c: row.get(c, "") for c in columns} for row in mious])
    per_class = [row for entry in entries for row in entry["per_class"]]
    atomic.write_csv(reports / "per_class.csv", per_class)
    last = entries[-1]["row"]
    atomic.write_json(
        reports / "metrics.json",
        {
            "method": params.method,
            "optimizer_profile": params.optimizer.profile,
            "weights_md5": weights_md5,
            "precision": precision,
            "images": len(items),
            "scored_images": sum(item.mask is not None for item in items),
            "rounds": len(entries),
            "cam_miou": last["cam_miou"],
            "pseudo_label_miou": last["pseudo_label_miou"],
            "masked_share": last["masked_share"],
            # `train_` is of the last epoch's crops, `final_train_` and `val_` of whole images.
            **{k: v for k, v in epochs[-1].items() if k.startswith(("train_", "val_"))},
            **final,
        },
    )
