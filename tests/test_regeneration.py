"""Regeneration: bounded, resumable, and the same for every number of helpers."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from isim import engine, metrics, regeneration, stream
from isim.data.dataset import Item, load_prepared
from isim.data.files import read_cam, read_image, read_label_map
from isim.errors import UserError
from isim.labels import crf, seeds
from isim.models import cam
from isim.models.inference import multi_scale_cam
from isim.regeneration import CamSettings, cams, regenerate, score_seeds
from isim.stream import ahead, delivered, in_workers
from isim.workers import RefineTask, dense, refine_image, sparse

CPU = torch.device("cpu")
SETTINGS = CamSettings((1.0, 0.5), True, "fp32")
# Holds the GIL, so that processes help.
REFERENCE = TINY.train_cam.crf.model_copy(update={"backend": "pydensecrf"})


@pytest.fixture(scope="module")
def items(prepared_project):
    return load_prepared(prepared_project / "data/prepared", None).split("train")


@pytest.fixture(scope="module")
def model():
    config = cam.CamConfig(
        method="cam",
        encoder="resnet10t",
        output_stride=16,
        encoder_norm="batch",
        atrous_rates=(),
        decoder_channels=16,
        classes=tuple("abcde"),
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
    )
    torch.manual_seed(0)
    network = cam.build(config).eval()
    torch.nn.init.normal_(network.classifier.weight)
    return network, config


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("ISIM_WORKERS", "0")
    with engine.intra_op_threads(1):
        yield


def make(model, items, folder, tiny, pictured=(), device=CPU, **crf):
    return regenerate(
        *model,
        items,
        folder / "labels",
        folder / "scratch",
        SETTINGS,
        0.3,
        tiny.train_cam.crf.model_copy(update=crf),
        pictured,
        device,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same_scores(first, second):
    return (
        (first.seed_confusion == second.seed_confusion).all()
        and (first.label_confusion == second.label_confusion).all()
        and (first.sweep_confusion == second.sweep_confusion).all()
        and (first.scored, first.masked_share) == (second.scored, second.masked_share)
    )


@pytest.fixture(scope="module")
def reference(model, items, tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch, engine.intra_op_threads(1):
        patch.setenv("ISIM_WORKERS", "0")
        return folder, make(model, items, folder, tiny, {items[3].id})


def test_labels_and_scores_are_those_of_the_definition(reference, model, items, tiny):
    folder, scores = reference
    before, after, empty = np.zeros((6, 6), int), np.zeros((6, 6), int), 0
    for item in items:
        image, truth = read_image(item.image), read_label_map(item.mask)
        ids = np.flatnonzero(item.image_label) + 1
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        planes = multi_scale_cam(*model, pixels, torch.from_numpy(ids), (1.0, 0.5), True).numpy()
        seed = seeds.seed(planes, ids, 0.3)
        label = crf.refine(image, seed, ids, tiny.train_cam.crf)
        assert (read_label_map(folder / f"labels/{item.id}.png") == label).all()
        before += metrics.confusion_matrix(truth, seed, 6)
        after += metrics.confusion_matrix(truth, label, 6)
        empty += not label.any()
    assert (scores.seed_confusion == before).all() and (scores.label_confusion == after).all()
    assert (before != after).any()
    assert scores.masked_share == empty / 16 and scores.scored == scores.computed == 16
    row = scores.row()
    assert row["cam_miou"] == metrics.miou(before)
    assert row["pseudo_label_miou"] == metrics.miou(after)


def test_seeds_are_scored_as_in_a_round_and_nothing_is_written(reference, model, items, tmp_path):
    miou = reference[1].row()["cam_miou"]
    before = {name: value.clone() for name, value in model[0].state_dict().items()}
    assert score_seeds(*model, items, SETTINGS, 0.3, CPU) == miou
    assert score_seeds(*model, items, SETTINGS, 0.5, CPU) != miou
    assert all(torch.equal(value, before[name]) for name, value in model[0].state_dict().items())
    # An image without a mask costs nothing, not even that it is read.
    gone = Item("gone", tmp_path / "gone.jpg", None, items[0].image_label)
    assert score_seeds(*model, [*items, gone], SETTINGS, 0.3, CPU) == miou
    assert np.isnan(score_seeds(*model, [gone], SETTINGS, 0.3, CPU))


def test_cams_of_the_pictured_images_are_kept_at_full_size(reference, items):
    scratch = reference[0] / "scratch"
    assert sorted(path.name for path in scratch.glob("*.npz")) == [f"{items[3].id}.npz"]
    planes, ids, size = read_cam(scratch / f"{items[3].id}.npz")
    assert planes.shape == (len(ids), 64, 64) and size == (64, 64)
    assert (ids == items[3].class_ids).all()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("in_threads", [True, False])
def test_helpers_change_nothing(
    workers, in_threads, reference, model, items, tmp_path, tiny, monkeypatch
):
    """Threads take whole images, with processes for a dCRF that holds the GIL."""
    monkeypatch.setenv("ISIM_WORKERS", str(workers))
    torch.set_num_threads(2)
    # The same backend: only where it runs differs.
    choice = SimpleNamespace(in_threads=lambda _: in_threads)
    monkeypatch.setattr("isim.regeneration.cpu_crf", choice)
    scores = make(model, items, tmp_path, tiny, {items[3].id})
    assert torch.get_num_threads() == 2
    assert same_scores(scores, reference[1])
    assert contents(tmp_path / "labels") == contents(reference[0] / "labels")


def test_only_what_is_missing_is_computed(reference, model, items, tmp_path, tiny, monkeypatch):
    shutil.copytree(reference[0], tmp_path, dirs_exist_ok=True)
    gone = {items[0].id, items[9].id}
    for name in gone:
        (tmp_path / f"labels/{name}.png").unlink()
    # Written, but killed before it was noted; and half a file of a killed write.
    journal = tmp_path / "scratch/progress.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]) + lines[-1][:20])
    (tmp_path / "labels/.tmp-abc.png").write_bytes(b"half")
    computed = []
    network = model[0]
    original = network.cam
    monkeypatch.setattr(network, "cam", lambda *a: computed.append(1) or original(*a))
    with monkeypatch.context() as patch:
        patch.setattr("isim.models.folding.for_inference", lambda network, *_: network)
        scores = make(model, items, tmp_path, tiny, {items[3].id})
    assert scores.computed == 3 and len(computed) == 3 * len(SETTINGS.scales)
    assert same_scores(scores, reference[1])
    assert contents(tmp_path / "labels") == contents(reference[0] / "labels")


def without_mask(item):
    return Item(item.id, item.image, None, item.image_label)


def test_images_without_mask_or_class_are_labelled_and_not_scored(model, items, tmp_path, tiny):
    bare = Item("bare", items[1].image, items[1].mask, np.zeros(5, np.float32))
    mixed = [without_mask(items[0]), bare, *items[2:4]]
    scores = make(model, mixed, tmp_path, tiny)
    assert scores.scored == 3 and scores.seed_confusion.sum() == sum(
        (read_label_map(item.mask) != 255).sum() for item in mixed[1:]
    )
    assert len(contents(tmp_path / "labels")) == 4
    assert not read_label_map(tmp_path / "labels/bare.png").any()
    none = make(model, [without_mask(item) for item in items[:2]], tmp_path / "none", tiny)
    row = none.row()
    assert none.scored == 0 and np.isnan(row["cam_miou"]) and np.isnan(row["pseudo_label_miou"])


@pytest.mark.parametrize("count", [20, 200])
def test_a_stream_is_read_only_a_little_ahead(count):
    """Memory does not grow with the data set: what is in flight does not."""
    taken = 0

    def source():
        nonlocal taken
        for number in range(count):
            taken += 1
            yield number

    with ThreadPoolExecutor(3) as pool:
        for consumed, (number, result) in enumerate(ahead(pool, lambda n: n**2, source(), 4)):
            assert (number, result) == (consumed, consumed**2)
            assert taken <= consumed + 1 + 4
    assert taken == count


def test_images_are_decoded_only_a_little_ahead(model, items, monkeypatch):
    read = []
    monkeypatch.setattr("isim.data.files.read_image", lambda p: read.append(p) or read_image(p))
    many = list(items) * 3
    for done, (item, planes) in enumerate(cams(*model, many, SETTINGS, CPU)):
        assert item is many[done] and planes.shape[0] == len(item.class_ids)
        assert len(read) <= done + 1 + 4
    assert len(read) == 48


class Deadly:
    """A task whose arrival kills the worker."""

    def __reduce__(self):
        return os._exit, (1,)


def task_of(item, tiny, **changes):
    fields = {
        "id": item.id,
        "image": item.image,
        "seed": np.zeros((64, 64), np.uint8),
        "class_ids": item.class_ids,
        "settings": tiny.train_cam.crf,
        "mask": item.mask,
        "out": None,
        "num_labels": 6,
    }
    return RefineTask(**(fields | changes))


def test_tasks_in_flight_are_bounded_and_errors_and_deaths_are_one_line(items, tiny, monkeypatch):
    """One pool for each of three ends, since a pool takes a second to start."""
    monkeypatch.setenv("ISIM_WORKERS", "1")
    made = 0

    def tasks(*last):
        nonlocal made
        for item in items[:12]:
            made += 1
            yield task_of(item, tiny)
        yield from last

    broken = task_of(items[0], tiny, image=items[0].image.with_name("gone.jpg"))
    finished = []
    with pytest.raises(UserError, match=r"gone\.jpg does not exist") as caught:
        for result in in_workers(refine_image, tasks(broken), in_threads=False):
            finished.append(result.id)
            assert made <= len(finished) + 2
    assert finished == [item.id for item in items[:12]], "in order, and none is lost"
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="worker process died.*ISIM_WORKERS than 1") as caught:
        list(in_workers(refine_image, [task_of(items[0], tiny), Deadly()], in_threads=False))
    assert "\n" not in str(caught.value)


def test_an_error_of_the_stream_ends_the_helpers(items, tiny, monkeypatch):
    monkeypatch.setenv("ISIM_WORKERS", "1")

    def tasks():
        yield task_of(items[0], tiny)
        raise UserError("the stream broke")

    with pytest.raises(UserError, match="the stream broke"):
        list(in_workers(refine_image, tasks(), in_threads=False))
    # concurrent.futures keeps a thread a pool; none is left.
    assert not [t for t in threading.enumerate() if "ExecutorManager" in type(t).__name__]


def test_counts_of_a_journal_line_come_back():
    confusion = np.random.default_rng(0).integers(0, 3, (6, 6)) * 10**12
    counts = sparse(confusion)
    assert len(counts) == (confusion > 0).sum()
    assert all(type(value) is int for entry in counts for value in entry), "JSON knows no int64"
    assert (dense(counts, 6) == confusion).all()


def test_a_gpu_gets_batches_of_one_size_and_bounded_pixels(tmp_path, monkeypatch):
    """On CPU tensors: what a GPU would be given, in order, decoded a little ahead."""
    sizes = [(20, 30)] * 5 + [(30, 20)] * 3 + [(10, 10)]
    chosen = []
    for number, (height, width) in enumerate(sizes):
        pixels = np.full((height, width, 3), number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        chosen.append(Item(str(number), tmp_path / f"{number}.png", None, None))
    read = []
    monkeypatch.setattr("isim.data.files.read_image", lambda p: read.append(p) or read_image(p))
    monkeypatch.setattr(stream, "DECODED_AHEAD", 2)
    monkeypatch.setattr(stream, "FILLING_PIXELS", 2 * 20 * 30)
    batches = []

    def means(batch, images):
        assert len(read) <= sum(len(images) for images in batches) + len(batch) + 2 + 1
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert (images.shape[0] * images.shape[2] * images.shape[3]) <= 1200
        batches.append(images)
        return [int(image.float().mean()) for image in images]

    found = list(stream._computed_in_batches(means, chosen, CPU))
    assert [(item.id, value) for item, value in found] == [(str(n), n) for n in range(9)]
    assert [len(images) for images in batches] == [2, 2, 1, 2, 1, 1]
    assert {images.shape[1:] for images in batches} == {(3, *size) for size in sizes}


def test_results_leave_a_gpu_in_order_a_group_behind():
    """The next group's work is launched before the last one's results are waited for."""
    assert stream.group_size(CPU) == 1 < stream.group_size(torch.device("cuda"))
    done = []

    def launch(group):
        done.append(("launched", tuple(group)))
        return [partial(finish, value) for value in group]

    def finish(value):
        done.append(("finished", value))
        return value

    assert list(delivered(range(5), launch, 3)) == [0, 1, 2, 3, 4]
    assert done[:3] == [("launched", (0, 1, 2)), ("launched", (3, 4)), ("finished", 0)]
    done.clear()
    assert list(delivered(range(2), launch, 1)) == [0, 1]
    assert done[:2] == [("launched", (0,)), ("finished", 0)], "nothing waits for a group of one"


@pytest.mark.parametrize("workers", [0, 2])
def test_the_gpu_s_batches_make_the_same_labels(
    workers, reference, model, items, tmp_path, tiny, monkeypatch
):
    """The path of a GPU on CPU tensors, its dCRF played by that of the CPU."""
    monkeypatch.setenv("ISIM_WORKERS", str(workers))
    groups = []

    def refine_batch(images, seeds_, ids, settings):
        groups.append(len(images))
        return [
            torch.from_numpy(
                crf.refine(np.ascontiguousarray(i.permute(1, 2, 0)), s.numpy(), k, settings)
            )
            for i, s, k in zip(images, seeds_, ids, strict=True)
        ]

    monkeypatch.setattr("isim.gpu.crf.refine_batch", refine_batch)
    monkeypatch.setattr(regeneration, "refines_on_gpu", lambda *_: True)
    monkeypatch.setattr(regeneration, "group_size", lambda _: 5)
    monkeypatch.setattr(regeneration, "computed", lambda *a: stream._computed_in_batches(*a))
    monkeypatch.setattr("isim.workers.crf", None)
    scores = make(model, items, tmp_path, tiny, {items[3].id})
    assert groups == [5, 5, 5, 1]
    assert same_scores(scores, reference[1])
    assert contents(tmp_path / "labels") == contents(reference[0] / "labels")


def test_the_gpu_s_share_of_memory_bounds_a_batch(monkeypatch):
    assert stream.batch_pixels(CPU) == stream.FILLING_PIXELS
    for memory, expected in ((8e9, 488_281), (141e9, stream.FILLING_PIXELS)):
        properties = SimpleNamespace(total_memory=int(memory))
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda _, p=properties: p)
        assert stream.batch_pixels(torch.device("cuda")) == expected
