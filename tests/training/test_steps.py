"""The three losses: what is trained when, at which rate, and the figures of an epoch."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.networks import copied

from isim import metrics
from isim.labels.walk.affinity_labels import reduce_label
from isim.models.affinity import affinity_loss
from isim.models.losses import modified_cross_entropy, pixel_cross_entropy
from isim.training import loop, optimizer
from isim.training.steps import CamStep

RATES = {"encoder": 0.05, "classifier": 0.5, "decoder": 0.25, "head": 0.25}


def epoch(given, number):
    """Train for an epoch: its row."""
    sgd = optimizer.sgd(given.step.schedule.groups, 0.9, 0.0)
    parts = (given.here, given.network, given.crops, given.step)
    return loop.train_epoch(*parts, optimizer=sgd, epoch=number)


@torch.no_grad()
def loss_of(given, epoch=1):
    """First batch of an epoch, its loss and terms as numbers."""
    given.step.begin(epoch)
    batch = next(given.crops.epoch(epoch))
    total, terms = given.step.loss(batch)
    return batch, float(total), {name: float(value) for name, value in terms.items()}


@pytest.mark.parametrize(
    ("name", "changes", "rates"),
    [
        ("unetcam_learnable", {"decoder_rate": 0.25}, RATES),
        ("cam", {"method": "cam"}, {"encoder": 0.05, "classifier": 0.5}),
        ("deeplabv3", {"rate": 0.01}, {"encoder": 0.01, "head": 0.1}),
        ("affinity", {"rate": 0.02, "head_factor": 10}, {"encoder": 0.02, "head": 0.2}),
    ],
)
def test_each_part_has_its_rate(name, changes, rates, make):
    given = make(name, **changes)
    names = {module: name for name, module in given.network.named_children()}
    assert {names[module]: rate for module, rate in given.step.schedule.groups} == rates


def test_the_warm_up_leaves_the_decoder_alone(make):
    given, rows = make(), []
    for number, parts in ((1, {"encoder", "classifier"}), (2, set(RATES))):
        before = copied(given.network)
        rows.append(epoch(given, number))
        pairs = given.network.state_dict().items()
        learned = {name for name, value in pairs if not torch.equal(value, before[name])}
        assert {name.split(".")[0] for name in learned} == parts
    assert rows[0]["segmentation_loss"] == rows[0]["without_foreground"] == 0
    # One of the eight images is of no class.
    assert rows[1]["segmentation_loss"] > 0 and 1 / 8 <= rows[1]["without_foreground"] < 1


def test_losses_of_the_loop_are_those_of_the_definition(make):
    given = make(segmentation_weight=0.5)
    given.network.eval()
    batch, total, terms = loss_of(given, 2)
    # Half of a batch that another process has the rest of.
    half = CamStep(given.here, given.network, given.params, 8)
    with torch.no_grad():
        logits, maps = given.network(batch["image"], True)
        part = half.loss(batch).total
    classes = float(F.multilabel_soft_margin_loss(logits, batch["image_label"]))
    pixels, left_out = map(float, modified_cross_entropy(maps, batch["label"]))
    assert total == pytest.approx(classes + 0.5 * pixels) and part == pytest.approx(classes / 2)
    expected = {"classification_loss": classes, "segmentation_loss": pixels}
    assert terms == pytest.approx(expected | {"without_foreground": left_out / 4})


def test_figures_of_the_loop_are_those_of_the_epoch_s_crops(make):
    given, labels, logits = make(), [], []
    loss, forward = given.step.loss, given.step._forward

    def follow(images, segment):
        logits.append(forward(images, segment)[0])
        return logits[-1], None

    given.step.loss = lambda batch: labels.append(batch["image_label"]) or loss(batch)
    given.step._forward = follow
    row = epoch(given, 1)
    seen = torch.cat(labels).numpy(), torch.cat(logits).numpy(force=True)
    expected = metrics.classification_figures(*seen)
    assert {k: row[f"train_{k}"] for k in expected} == expected and len(labels) == 2


def test_a_compiled_epoch_trains_the_same(make, monkeypatch):
    """Traced as for inductor, which has a test of its own, but computed as without."""
    calls, found = [], []
    compile_ = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda *a, **k: calls.append(a) or compile_(*a, **k))
    for wanted in (False, True):
        given = make(compile=wanted)
        for module in given.network.modules():
            # A compiled one may draw in another order.
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        row = epoch(given, 2)
        found += [row["classification_loss"], row["segmentation_loss"]]
    assert len(calls) == 1 and found[:2] == pytest.approx(found[2:], rel=1e-3)


def test_the_loss_of_a_segmenter_is_that_of_the_definition(make):
    given = make("deeplabv2", rate=0.01)
    batch, total, terms = loss_of(given)
    with torch.no_grad():
        expected = pixel_cross_entropy(given.network(batch["image"]), batch["label"], 16)
    assert total == pytest.approx(float(expected)) and terms == {"loss": total}
    # The last step of epoch 2 is the fourth of six.
    assert epoch(given, 2)["rate"] == pytest.approx(0.01 * (1 - 3 / 6) ** 0.9)


@pytest.mark.parametrize("crop", [32, 44])
def test_the_loss_of_affinities_is_that_of_the_map_s_labels(crop, make):
    """Each pixel of the map has the label at its centre; a crop need not be a multiple."""
    given = make("affinity", crop=crop)
    batch, total, terms = loss_of(given)
    labels = torch.from_numpy(reduce_label(batch["label"].numpy(), 8))
    assert labels.shape == (4, -(-crop // 8), -(-crop // 8))
    with torch.no_grad():
        expected = affinity_loss(given.network(batch["image"]), labels, 5)
    names = ["loss", "background_loss", "foreground_loss", "negative_loss"]
    loss, background, foreground, negative = (terms[name] for name in names)
    assert list(terms) == names and total == pytest.approx(float(expected.total))
    assert loss == total == pytest.approx(background / 4 + foreground / 4 + negative / 2)
