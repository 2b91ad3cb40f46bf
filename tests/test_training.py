"""One epoch: what is trained when, on which images, and what stops it."""

import os
import signal
from functools import partial

import numpy as np
import pytest
import torch

from isim import batches, engine, metrics, training
from isim.data.dataset import CropDataset, Item, epoch_order, load_prepared
from isim.data.files import read_image, write_label_map
from isim.errors import UserError
from isim.models import cam
from isim.models.inference import normalize

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prepared(prepared_project):
    return load_prepared(prepared_project / "data/prepared", None)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("ISIM_WORKERS", "0")
    with engine.intra_op_threads(1):
        yield


def config_of(params, prepared):
    return cam.configure(params, prepared.classes)


@pytest.fixture
def labels(prepared, tmp_path):
    """Pseudo-labels: a square of the image's first class, but none in the first image."""
    paths = {}
    for number, item in enumerate(prepared.split("train")):
        label = np.zeros((64, 64), np.uint8)
        if number:
            label[16:48, 16:48] = np.flatnonzero(item.image_label)[0] + 1
        paths[item.id] = tmp_path / f"{item.id}.png"
        write_label_map(paths[item.id], label)
    return paths


class Trainer:
    """A network with its optimizer and data, to train single epochs with."""

    def __init__(self, params, prepared, labels=None, items=None):
        torch.manual_seed(0)
        self.params = params
        self.network = cam.build(config_of(params, prepared))
        self.optimizer = training.make_optimizer(self.network, params)
        config = config_of(params, prepared)
        items = items or prepared.split("train")
        dataset = CropDataset(
            items, params.crop, config.mean, config.std, 0, [labels.__getitem__] if labels else []
        )
        if labels:
            dataset.use_labels(0)
        self.crops = batches.CropBatches(dataset, params, CPU)

    def epoch(self, number, precision="fp32"):
        return training.train_epoch(
            self.network, self.optimizer, self.crops, self.params, number, precision, CPU
        )

    def weights(self, part):
        return {n: v.clone() for n, v in getattr(self.network, part).state_dict().items()}


def changed(before, after):
    return any(not torch.equal(before[name], after[name]) for name in before)


def test_the_warm_up_leaves_the_decoder_alone(tiny, prepared, labels):
    trainer = Trainer(tiny.train_cam, prepared, labels)
    parts = ("encoder", "classifier", "decoder", "head")
    start = {part: trainer.weights(part) for part in parts}
    row = trainer.epoch(1)
    after = {part: trainer.weights(part) for part in parts}
    assert [changed(start[p], after[p]) for p in parts] == [True, True, False, False]
    assert row["segmentation_loss"] == 0 and row["without_foreground"] == 0
    row = trainer.epoch(2)
    assert [changed(after[p], trainer.weights(p)) for p in parts] == [True] * 4
    assert row["segmentation_loss"] > 0 and 1 / 16 <= row["without_foreground"] < 1


def test_the_baseline_never_segments(tiny, prepared):
    params = tiny.train_cam.model_copy(update={"method": "cam"})
    trainer = Trainer(params, prepared)
    assert trainer.network.decoder is None and len(trainer.optimizer.param_groups) == 2
    row = trainer.epoch(2)
    assert row["segmentation_loss"] == 0 and row["classification_loss"] > 0


def test_without_any_foreground_the_decoder_only_decays(tiny, prepared, labels):
    """Eq. 3 for every crop: the loss is 0, so only weight decay moves the decoder."""
    optimizer = tiny.train_cam.optimizer.model_copy(update={"weight_decay": 0.0})
    params = tiny.train_cam.model_copy(update={"optimizer": optimizer})
    for path in labels.values():
        write_label_map(path, np.zeros((64, 64), np.uint8))
    trainer = Trainer(params, prepared, labels)
    before = [p.clone() for p in trainer.network.decoder.parameters()]
    row = trainer.epoch(2)
    assert row["segmentation_loss"] == 0 and row["without_foreground"] == 1
    assert all(map(torch.equal, before, trainer.network.decoder.parameters()))


def test_rates_follow_the_schedule(tiny, prepared):
    trainer = Trainer(tiny.train_cam, prepared)
    trainer.epoch(2)
    # Two steps an epoch, three epochs; the last step of epoch 2 is the fourth.
    factor = (1 - 3 / 6) ** 0.9
    found = [group["lr"] for group in trainer.optimizer.param_groups]
    assert found == pytest.approx([0.05 * factor, 0.5 * factor, 0.05 * factor, 0.05 * factor])
    short = tiny.train_cam.optimizer.model_copy(update={"poly_epochs": 1})
    trainer = Trainer(tiny.train_cam.model_copy(update={"optimizer": short}), prepared)
    trainer.epoch(3)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.5**0.9)


@pytest.mark.parametrize(
    ("count", "batch", "steps"), [(16, 8, 2), (17, 8, 2), (7, 8, 1), (1, 8, 1)]
)
def test_only_full_batches_but_at_least_one(count, batch, steps):
    assert batches.steps_per_epoch(count, batch) == steps


def test_an_incomplete_batch_is_dropped_and_others_the_next_time(tiny, prepared, monkeypatch):
    params = tiny.train_cam.model_copy(update={"method": "cam", "batch": 5})
    trainer = Trainer(params, prepared)
    read = CropDataset.__getitem__
    seen = []
    monkeypatch.setattr(CropDataset, "__getitem__", lambda s, i: seen.append(i) or read(s, i))
    sets = []
    for number in (1, 2):
        seen.clear()
        trainer.epoch(number)
        assert seen == epoch_order(16, params.seed, number)[:15].tolist()
        sets.append(set(seen))
    assert sets[0] != sets[1]


def test_a_split_smaller_than_a_batch_is_one_batch(tiny, prepared):
    params = tiny.train_cam.model_copy(update={"method": "cam"})
    trainer = Trainer(params, prepared, items=prepared.split("train")[:3])
    row = trainer.epoch(1)
    assert row["images_per_second"] * row["seconds"] == pytest.approx(3)


def test_an_epoch_depends_on_its_number_and_not_on_helpers(tiny, prepared, labels, monkeypatch):
    rows = []
    for workers in ("0", "1"):
        monkeypatch.setenv("ISIM_WORKERS", workers)
        trainer = Trainer(tiny.train_cam, prepared, labels)
        torch.rand(1)
        row = trainer.epoch(2)
        assert 0 <= row.pop("waiting_share") <= 1
        del row["seconds"], row["images_per_second"]
        rows.append((row, trainer.weights("encoder")))
    assert rows[0][0] == rows[1][0] and not changed(rows[0][1], rows[1][1])


def test_a_compiled_epoch_trains_the_same(tiny, prepared, labels, monkeypatch):
    """Traced as for inductor, which has a test of its own, but computed as without."""
    calls = []
    compile_ = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda *a, **k: calls.append(a) or compile_(*a, **k))
    found = []
    for wanted in (False, True):
        params = tiny.train_cam.model_copy(update={"compile": wanted})
        trainer = Trainer(params, prepared, labels)
        for module in trainer.network.modules():
            # A compiled one may draw in another order.
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        row = trainer.epoch(2)
        found.append((row["classification_loss"], row["segmentation_loss"]))
        names = list(trainer.network.state_dict())
    assert len(calls) == 1
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert names == list(Trainer(tiny.train_cam, prepared).network.state_dict())


def test_a_loss_that_is_not_finite_names_the_step_and_the_cause(tiny, prepared):
    trainer = Trainer(tiny.train_cam, prepared)
    trainer.network.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"nan at epoch 1, step 1 of 2.*encoder_rate") as caught:
        trainer.epoch(1)
    assert "\n" not in str(caught.value)


def test_a_rate_that_is_too_high_is_found(tiny, prepared):
    wild = tiny.train_cam.optimizer.model_copy(update={"encoder_rate": 1e30})
    trainer = Trainer(tiny.train_cam.model_copy(update={"optimizer": wild}), prepared)
    with pytest.raises(UserError, match=r"epoch 1, step 2 of 2.*momentum 0\.9"):
        trainer.epoch(1)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_image_is_one_line_from_helpers_too(
    workers, tiny, prepared, tmp_path, monkeypatch
):
    monkeypatch.setenv("ISIM_WORKERS", workers)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    items = [
        Item(item.id, tmp_path / "broken.jpg", None, item.image_label)
        for item in prepared.split("train")
    ]
    trainer = Trainer(tiny.train_cam, prepared, items=items)
    with pytest.raises(UserError, match=r"^image .*broken\.jpg is unreadable") as caught:
        trainer.epoch(1)
    assert "\n" not in str(caught.value)


def test_a_helper_that_dies_is_one_line(tiny, prepared, monkeypatch):
    monkeypatch.setenv("ISIM_WORKERS", "1")
    trainer = Trainer(tiny.train_cam, prepared)
    monkeypatch.setattr(CropDataset, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="data loader process died.*ISIM_WORKERS than 1") as caught:
        trainer.epoch(1)
    assert "\n" not in str(caught.value)


def test_classification_figures_of_whole_images(tiny, prepared):
    trainer = Trainer(tiny.train_cam, prepared)
    config = config_of(tiny.train_cam, prepared)
    trainer.epoch(1)
    items = prepared.split("val")
    found = training.classify(trainer.network, config, items, 64, "fp32", CPU)
    assert not trainer.network.training
    rows = []
    for item in items:
        image = torch.from_numpy(read_image(item.image)).permute(2, 0, 1)[None]
        with torch.no_grad():
            rows.append(trainer.network(normalize(image, config.mean, config.std), False)[0][0])
    expected = metrics.classification_figures(
        np.stack([item.image_label for item in items]), torch.stack(rows).numpy()
    )
    assert found == pytest.approx(expected)
