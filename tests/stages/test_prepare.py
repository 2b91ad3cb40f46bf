"""The stage prepare: what it writes loads again, and a failure leaves nothing half-written."""

import csv
import importlib
import json
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from isim.data import shapes, voc
from isim.data.dataset import load_prepared
from isim.data.files import file_md5, read_image, read_label_map
from isim.errors import UserError
from isim.params import Prepare, Shapes, resolve_path
from isim.stages import prepare

SPLITS = {"train": ["a", "b"], "val": ["c"], "test": ["t"]}


class Recorder:
    def __init__(self):
        self.figures, self.tables = {}, {}

    def metrics(self, values, step=None):
        self.figures |= values

    def table(self, name, rows):
        self.tables[name] = rows


@pytest.fixture
def tracked(monkeypatch):
    """MLflow has its own tests; here its place is taken by a recorder."""
    recorder = Recorder()

    @contextmanager
    def stage_run(stage, params, root, inputs):
        yield recorder

    monkeypatch.setattr(prepare, "stage_run", stage_run)
    return recorder


@pytest.fixture
def project(tmp_path, tracked, monkeypatch):
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("ISIM_DATA", str(tmp_path / "raw"))
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


def params(source, **changes):
    values = {"source": source, "root": "$ISIM_DATA", "download": False, "sbd": False}
    values |= {"val_fraction": 0.5, "seed": 0, "shapes": Shapes(train=3, val=2, size=64)}
    return Prepare(**(values | changes))


def load(project):
    return load_prepared(project / "data/prepared", partial(resolve_path, root=project))


def rows(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_voc(project, tracked, make_devkit, capsys):
    devkit = make_devkit(project.parent / "raw/VOCdevkit/VOC2012", SPLITS)
    (devkit / "SegmentationClass/b.png").unlink()
    prepare.run(params("voc"), project)
    prepared = load(project)
    assert prepared.classes == voc.CLASSES
    assert {name: [i.id for i in items] for name, items in prepared.splits.items()} == SPLITS
    a, b = prepared.split("train")
    assert a.image == devkit / "JPEGImages/a.jpg"
    assert a.mask == devkit / "SegmentationClass/a.png"
    assert b.mask is None
    assert [voc.CLASSES[k] for k in np.flatnonzero(a.image_label)] == ["cat", "person"]
    (test,) = prepared.split("test", labelled=False)
    assert test.image_label is None and test.mask is None
    # Images stay where they are, and the lists hold on another machine.
    assert json.loads((project / "data/prepared/dataset.json").read_text())["root"] == "$ISIM_DATA"
    written = contents(project / "data/prepared")
    assert not any(str(project.parent).encode() in data for data in written.values())
    manifest = {row["path"]: row for row in rows(project / "data/prepared/manifest.csv")}
    assert len(manifest) == 4 + 2
    row = manifest["VOCdevkit/VOC2012/JPEGImages/a.jpg"]
    assert row["md5"] == file_md5(a.image)
    assert int(row["bytes"]) == a.image.stat().st_size

    figures = json.loads((project / "reports/prepare/metrics.json").read_text())
    assert figures == tracked.figures
    assert (figures["classes"], figures["images"]) == (20, 4)
    assert (figures["train.images"], figures["train.masks"], figures["test.masks"]) == (2, 1, 0)
    assert figures["val.labels_per_image"] == 2
    counts = {(r["split"], r["class"]): r for r in rows(project / "reports/prepare/counts.csv")}
    assert len(counts) == 3 * 20
    assert counts["train", "cat"] == {
        "split": "train", "class": "cat", "images": "2", "masks": "1", "pixels": "32",
    }  # fmt: skip
    assert counts["test", "cat"]["images"] == "0"
    assert len(tracked.tables["counts"]) == 60
    assert "test.labels_per_image" not in figures
    out = capsys.readouterr().out
    assert "train: 2 images, 1 masks, 2.00 labels an image" in out
    assert "test: 1 images, 0 masks, labels unknown" in out


def test_disagreement_of_labels_and_masks_is_a_counted_warning(project, make_devkit, caplog):
    devkit = make_devkit(project.parent / "raw", SPLITS)
    text = (devkit / "Annotations/a.xml").read_text()
    (devkit / "Annotations/a.xml").write_text(text.replace("cat", "cow"))
    prepare.run(params("voc"), project)
    figures = json.loads((project / "reports/prepare/metrics.json").read_text())
    assert figures["train.labels_without_pixels"] == figures["train.pixels_without_label"] == 1
    assert figures["val.labels_without_pixels"] == 0
    assert [record.getMessage() for record in caplog.records] == [
        "train: 1 image labels have no pixel in the mask, 1 classes in masks have no image label"
    ]


def test_a_test_set_without_its_images_is_left_out_with_a_note(project, make_devkit, caplog):
    devkit = make_devkit(project.parent / "raw", SPLITS)
    (devkit / "JPEGImages/t.jpg").unlink()
    prepare.run(params("voc"), project)
    assert list(load(project).splits) == ["train", "val"]
    assert not (project / "data/prepared/test.csv").exists()
    (record,) = caplog.records
    assert record.getMessage().startswith("test: 1 of its 1 images are not in")


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("train_cam", {"split": "test"}),
        ("train_cam", {"eval_split": "test"}),
        ("export_cams", {"splits": ("train", "test")}),
        ("train_affinity", {"split": "test"}),
        ("random_walk", {"splits": ("test",)}),
        ("train_segmenter", {"split": "test"}),
    ],
)
def test_stages_that_need_image_labels_refuse_the_test_set(
    stage, change, project, make_devkit, tiny
):
    make_devkit(project.parent / "raw", SPLITS)
    prepare.run(params("voc"), project)
    split = {"split": "train"} if "eval_split" in change else {}
    section = getattr(tiny, stage).model_copy(update=split | change)
    arguments = ("ground_truth",) if stage == "train_segmenter" else ()
    # Not train_segmenter's test set: that one needs no labels.
    with pytest.raises(UserError, match="image labels of split 'test' are unknown") as caught:
        importlib.import_module(f"isim.stages.{stage}").run(section, *arguments, project)
    assert "\n" not in str(caught.value)
    assert not (project / "models").exists()


def test_voc_with_sbd(project, make_devkit, capsys):
    root = project.parent / "raw"
    make_devkit(root / "VOCdevkit/VOC2012", SPLITS)
    mask = np.zeros((24, 32), np.uint8)
    mask[3:9, 3:9] = 10
    for folder in ("cls", "img"):
        (root / "benchmark_RELEASE/dataset" / folder).mkdir(parents=True)
    for name in ("b", "c", "s"):
        savemat(
            root / f"benchmark_RELEASE/dataset/cls/{name}.mat", {"GTcls": {"Segmentation": mask}}
        )
    Image.new("RGB", (32, 24)).save(root / "benchmark_RELEASE/dataset/img/s.jpg")
    prepare.run(params("voc", sbd=True), project)
    items = {item.id: item for item in load(project).split("trainaug")}
    assert list(items) == ["a", "b", "s"]
    assert items["s"].mask == project / "data/prepared/masks/s.png"
    assert np.array_equal(read_label_map(items["s"].mask), mask)
    assert items["s"].image == root / "benchmark_RELEASE/dataset/img/s.jpg"
    assert [voc.CLASSES[k] for k in np.flatnonzero(items["s"].image_label)] == ["cow"]
    figures = json.loads((project / "reports/prepare/metrics.json").read_text())
    assert (figures["trainaug.images"], figures["trainaug.official"]) == (3, 0)
    assert "not the official list of 10,582" in capsys.readouterr().out


def test_shapes_lie_in_the_prepared_folder(project):
    prepare.run(params("shapes", root="$UNSET_VARIABLE"), project)
    prepared = load(project)
    assert prepared.classes == shapes.CLASSES
    assert (len(prepared.split("train")), len(prepared.split("val"))) == (3, 2)
    for item in prepared.split("train"):
        assert item.image.is_relative_to(project / "data/prepared")
        assert read_image(item.image).shape == (64, 64, 3)
        ids = set(np.unique(read_label_map(item.mask)).tolist()) - {0, 255}
        assert ids == set((np.flatnonzero(item.image_label) + 1).tolist())


def test_folder(project):
    root = project.parent / "raw"
    (root / "images").mkdir(parents=True)
    for name in "abcd":
        Image.new("RGB", (9, 7)).save(root / "images" / f"{name}.png")
    listing = "".join(f"{name}.png,x;y, z\n" for name in "abcd")
    (root / "labels.csv").write_text("image,labels,more\n" + listing)
    prepare.run(params("folder"), project)
    prepared = load(project)
    assert prepared.classes == ("x", "y")
    assert {name: len(items) for name, items in prepared.splits.items()} == {"train": 2, "val": 2}
    assert prepared.split("val")[0].image.parent == root / "images"


def test_the_same_data_gives_the_same_bytes(project):
    prepare.run(params("shapes"), project)
    first = contents(project)
    prepare.run(params("shapes"), project)
    assert contents(project) == first
    prepare.run(params("shapes", seed=1), project)
    assert contents(project) != first


def test_failure_leaves_everything_as_it_was(project, make_devkit):
    devkit = make_devkit(project.parent / "raw", SPLITS)
    prepare.run(params("voc"), project)
    before = contents(project)
    (devkit / "JPEGImages/a.jpg").unlink()
    (devkit / "JPEGImages/c.jpg").write_bytes((devkit / "JPEGImages/b.jpg").read_bytes()[:500])
    with pytest.raises(UserError) as caught:
        prepare.run(params("voc"), project)
    assert str(caught.value).startswith("the data has 2 problems")
    assert contents(project) == before
    assert [path.name for path in (project / "data").iterdir()] == ["prepared"]


def test_remains_of_a_killed_run_are_cleared(project, make_devkit):
    make_devkit(project.parent / "raw", SPLITS)
    (project / "data/.prepared.part/old").mkdir(parents=True)
    prepare.run(params("voc"), project)
    assert [path.name for path in (project / "data").iterdir()] == ["prepared"]
    assert not (project / "data/prepared/old").exists()


def test_unwritable_project_and_full_disk(project, make_devkit, monkeypatch):
    make_devkit(project.parent / "raw", SPLITS)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "_write_lists", full)
    with pytest.raises(UserError, match="cannot write .*prepared: No space left on device"):
        prepare.run(params("voc"), project)
    assert list((project / "data").iterdir()) == []
    (project / "data").rmdir()
    (project / "data").write_text("")
    with pytest.raises(UserError, match="cannot write .*prepared"):
        prepare.run(params("voc"), project)


def test_unreadable_source(project, make_devkit, monkeypatch):
    make_devkit(project.parent / "raw", SPLITS)

    def denied(*arguments):
        raise PermissionError(13, "Permission denied", "lists")

    monkeypatch.setattr(voc, "read_devkit", denied)
    with pytest.raises(UserError, match="cannot read lists: Permission denied; fix"):
        prepare.run(params("voc"), project)


def test_no_source(project):
    with pytest.raises(UserError, match="prepare.download: true"):
        prepare.run(params("voc"), project)
    with pytest.raises(UserError, match="images does not exist"):
        prepare.run(params("folder"), project)
