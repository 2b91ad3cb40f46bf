"""Train AffinityNet on pairs of pixels that the CAMs are sure of (paper 4.1.6; spec 6).

Resume rule: a journal is kept of the images whose labels are finished, and the state (weights,
optimizer, figures so far) after every epoch. The same command continues from there as long as the
parameters, the data, the CAMs and the code are the same, and ends as if never interrupted.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from isim import atomic, distributed, engine, metrics, pictures, tracking, viz
from isim.affinity_workers import LabelTask, make_label
from isim.batches import CropBatches, step_batches, steps_per_epoch
from isim.data import files
from isim.data.dataset import CropDataset, Item, load_prepared
from isim.errors import UserError, renamed
from isim.journal import Journal
from isim.labels import crf
from isim.labels.affinity_pairs import reduce_label
from isim.meter import Meter
from isim.models import affinity, cam, norm
from isim.models.affinity import AffinityConfig, AffinityNet, affinity_loss, pair_affinity
from isim.params import TrainAffinity, digest, home, resolve_path
from isim.stream import in_workers
from isim.workers import dense


class AffinityCrops(CropDataset):
    """Crops whose labels are at the stride of AffinityNet's map.

    Args:
        items: Images to crop.
        params: Gives the crop's side, the stride and the seed.
        config: Gives the normalisation.
        label: An item's id to the path of its affinity labels.
    """

    def __init__(
        self,
        items: Sequence[Item],
        params: TrainAffinity,
        config: AffinityConfig,
        label: Callable[[str], Path],
    ) -> None:
        """Describe the crops; nothing is read yet."""
        super().__init__(items, params.crop, config.mean, config.std, params.seed, [label])
        self.use_labels(0)
        self._stride = params.stride

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Draw the crop of one item, with labels (h, w) instead of (crop, crop)."""
        drawn = super().__getitem__(index)
        label = reduce_label(drawn["label"].numpy(), self._stride)
        return drawn | {"label": torch.from_numpy(label)}


def run(params: TrainAffinity, root: Path) -> None:
    """Run the stage: data/cams to data/affinity_labels, models/train_affinity and reports.

    Args:
        params: Section `train_affinity`.
        root: Project folder.

    Raises:
        UserError: Unusable data, CAMs, weights or parameters; a loss that is not finite.
    """
    prepared = load_prepared(root / "data/prepared", partial(resolve_path, root=root))
    items = prepared.split(params.split)
    cams = root / "data/cams" / params.split
    files.require_cams(cams)
    device = engine.default_device()
    precision = engine.resolve_precision(params.precision, device)
    weights = resolve_path(params.weights, root)
    trained = root / "models/train_cam/model.safetensors"
    engine.seed_all(params.seed)
    # The same code as train_cam's reads the encoder's name and weights.
    with renamed("train_cam", "train_affinity", "encoder", "weights"):
        mean, std = cam.normalization(params.encoder, params.input_norm)
        config = AffinityConfig(
            params.encoder, params.output_stride, params.stride, params.radius, mean, std
        )
        network = affinity.build(config)
        if params.weights != "train_cam":
            cam.load_encoder_weights(network, params.encoder, params.weights, weights)
    if params.weights == "train_cam":
        _copy_encoder(trained, network, config)
    engine.place(network, device)
    groups = [(network.encoder, params.rate), (network.head, params.head_factor * params.rate)]
    optimizer = engine.sgd(groups, params.momentum, params.weight_decay)

    key = engine.run_digest(
        digest(params),
        [root / "data/prepared", cams, *(path for path in (weights, trained) if path.is_file())],
        engine.code_files("train_affinity"),
        device,
        precision,
    )
    # Only now: hosts with other networks would wait for each other.
    norm.synchronise(network)
    resume = engine.resume_folder(home(root) / ".isim/resume/train_affinity", key)
    state = resume / "state.safetensors"
    labels = resume / "labels"
    atomic.make_directory(labels)
    progress = engine.latest_progress(resume, key) or {"digest": key, "epochs": []}
    if progress["epochs"]:
        engine.load_state(state, network, optimizer)
        tqdm.write(f"train_affinity: continues after epoch {len(progress['epochs'])}")

    shown = pictures.choose(items, params.pictures)
    crops = CropBatches(
        AffinityCrops(items, params, config, partial(_label_path, labels)), params, device
    )
    inputs = {"data/prepared": root / "data/prepared", "data/cams": root / "data/cams"}
    inputs["weights"] = weights
    with (
        engine.keep_freed_memory(),
        tracking.stage_run("train_affinity", params, root, inputs) as tracked,
    ):
        tracked.tag("precision", precision)
        tracked.tag("device", str(device))
        figures = _make_labels(items, cams, labels, params, len(prepared.classes) + 1)
        tracked.metrics(figures)
        tqdm.write(
            f"train_affinity: {100 * figures['sure_share']:.1f} % of the pixels are labelled, "
            f"{100 * figures['sure_accuracy']:.1f} % of them right"
        )
        for item in shown:
            square = _strip(item, cams, labels, columns=2)
            tracked.image(f"pictures/{item.id}", square, step=0)
        rows = progress["epochs"]
        for epoch in range(1, params.epochs + 1):
            if epoch > len(rows):
                row = train_epoch(network, optimizer, crops, params, epoch, precision, device)
                rows.append(distributed.broadcast({"epoch": epoch, **row}))
                engine.save_state(state, network, optimizer, progress)
                tqdm.write(
                    f"epoch {epoch}/{params.epochs}: loss {row['loss']:.4f} (background "
                    f"{row['background_loss']:.4f}, foreground {row['foreground_loss']:.4f}, "
                    f"negative {row['negative_loss']:.4f})"
                )
            # Of a resumed run all rows again: it may have a new MLflow run.
            row = rows[epoch - 1]
            tracked.metrics({k: v for k, v in row.items() if k != "epoch"}, step=epoch)

        engine.save_tensors(
            resume / "models/model.safetensors", network.state_dict(), config.to_metadata()
        )
        if not distributed.is_writer():
            # The rest is published once on every disk.
            engine.remove_resume_folder(resume)
            return
        atomic.copy_tree(resume / "models", root / "models/train_affinity")
        atomic.copy_tree(labels, root / "data/affinity_labels")
        reports = root / "reports/train_affinity"
        shutil.rmtree(reports / "pictures", ignore_errors=True)
        for item in shown:
            viz.write_png(
                reports / f"pictures/{item.id}.png", _strip(item, cams, labels, columns=4)
            )
        terms = ("background", "foreground", "negative")
        curves = {"loss": "total"} | {f"{term}_loss": term for term in terms}
        viz.curves(rows, "epoch", curves, "loss", reports / "pictures/losses.png")
        atomic.write_csv(reports / "epochs.csv", rows)
        last = {k: v for k, v in rows[-1].items() if k.endswith("loss")}
        atomic.write_json(
            reports / "metrics.json",
            {
                "encoder": params.encoder,
                "weights_md5": tracking.md5(weights) if weights.is_file() else None,
                "precision": precision,
                "images": len(items),
                **figures,
                **last,
            },
        )
        tracked.headline({"loss": last["loss"], "sure_accuracy": figures["sure_accuracy"]})
        tracked.artifact_file(reports / "epochs.csv")
        tracked.register_model("affinity", root / "models/train_affinity/model.safetensors")
    engine.remove_resume_folder(resume)


def _copy_encoder(checkpoint: Path, network: AffinityNet, config: AffinityConfig) -> None:
    """Start from the encoder of train_cam, which has seen image-level labels only."""
    trained, source = cam.load(checkpoint)
    if source.encoder != config.encoder:
        raise UserError(
            f"train_affinity.weights: {checkpoint} has the encoder {source.encoder}, not "
            f"{config.encoder}; set train_affinity.encoder to it, or weights to imagenet"
        )
    if (source.mean, source.std) != (config.mean, config.std):
        raise UserError(
            f"train_affinity.input_norm: {checkpoint} was trained on images normalised "
            "otherwise; set it to what train_cam.input_norm is, or weights to imagenet"
        )
    network.encoder.load_state_dict(trained.encoder.state_dict())


def _label_path(folder: Path, id_: str) -> Path:
    return folder / f"{id_}.png"


def _make_labels(
    items: Sequence[Item], cams: Path, labels: Path, params: TrainAffinity, num_labels: int
) -> dict[str, float]:
    """Make the affinity labels that are missing; shares of sure pixels and of right ones."""
    with Journal(labels.with_suffix(".jsonl")) as journal:
        journal.keep(path.stem for path in labels.glob("*.png"))
        missing, _ = journal.share_out(items)

        def tasks() -> Iterator[LabelTask]:
            for item in missing:
                yield LabelTask(
                    item.id,
                    item.image,
                    cams / f"{item.id}.npz",
                    item.class_ids,
                    params,
                    item.mask,
                    _label_path(labels, item.id),
                    num_labels,
                )

        results = in_workers(make_label, tasks(), crf.in_threads(params.crf))
        for result in tqdm(results, "labels", len(missing), leave=False, disable=None):
            journal.add(asdict(result))
        lines = journal.collect(items)
    distributed.share(labels, "*.png")
    confusion = np.zeros((num_labels, num_labels), np.int64)
    for line in lines:
        confusion += dense(line["counts"], num_labels)
    total = int(confusion.sum())
    return {
        "sure_share": sum(line["sure"] for line in lines) / sum(line["pixels"] for line in lines),
        # Without any mask there is nothing to compare with.
        "sure_accuracy": float(np.trace(confusion)) / total if total else float("nan"),
        "sure_miou": metrics.miou(confusion),
    }


def train_epoch(
    network: AffinityNet,
    optimizer: torch.optim.Optimizer,
    crops: CropBatches,
    params: TrainAffinity,
    epoch: int,
    precision: str,
    device: torch.device,
) -> dict[str, Any]:
    """Train for one epoch.

    Args:
        network: Updated in place.
        optimizer: Its rates follow the poly schedule each step.
        crops: Of `AffinityCrops`.
        params: The stage's section.
        epoch: 1-based; seeds the order, the augmentation and the dropout.
        precision: Resolved: fp32 or bf16.
        device: Where the network is.

    Returns:
        Means of the loss and of its three terms, and the figures of `Meter.speed`.

    Raises:
        UserError: A loss that is not finite: the step and the likely cause.
    """
    steps = steps_per_epoch(len(crops.dataset), params.batch)
    batches = step_batches(
        network, optimizer, crops, params, epoch, steps * params.epochs, params.poly_power
    )
    rates = "train_affinity.rate or head_factor"
    meter = Meter(device, epoch, steps, params.momentum, rates)
    # Not the pairs, whose 34 unrolled planes would take minutes to compile.
    features = engine.compiled(network.features, params.compile)
    for batch in meter.watch(batches):
        with engine.autocast(precision, device):
            affinities = pair_affinity(features(batch["image"]), params.radius)
            loss = affinity_loss(affinities, batch["label"], params.radius)
        terms = {f"{name}_loss": value for name, value in loss._asdict().items()}
        meter.add(loss.total, {"loss": terms.pop("total_loss"), **terms})
        optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        optimizer.step()
    return meter.means() | meter.speed()


def _strip(item: Item, cams: Path, labels: Path, columns: int) -> np.ndarray:
    label = _label_path(labels, item.id)
    return pictures.strip(item, cams / f"{item.id}.npz", label, columns, "affinity label")
