"""The archive for VOC's server holds exactly what the server takes, and nothing else is packed."""

import io
import json
import signal
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from isim import cli, engine, preset, server
from isim.data.files import read_label_map, voc_palette, write_label_map
from isim.errors import UserError
from isim.stages import prepare, train_segmenter

SPLITS = {"train": ["a", "b"], "val": ["c"], "test": ["2008_000006", "2008_000001"]}
PREFIX = "results/VOC2012/Segmentation/comp6_test_cls/"


@pytest.fixture
def project(tmp_path, make_devkit, recorder, tiny):
    """A prepared project on a devkit with a test set, with predictions of it."""
    make_devkit(tmp_path / "raw", SPLITS)
    root = tmp_path / "project"
    root.mkdir()
    source = {"source": "voc", "root": str(tmp_path / "raw"), "sbd": False, "download": False}
    prepare.run(tiny.prepare.model_copy(update=source), root)
    for folder, label in (("test", 20), ("test_crf", 1)):
        for name in SPLITS["test"]:
            pixels = np.zeros((24, 32), np.uint8)
            pixels[3:9, 5:12] = label
            write_label_map(root / f"data/predictions/last_round/{folder}/{name}.png", pixels)
    return root


def members(path):
    with tarfile.open(path, "r:gz") as tar:
        return {member.name: (member, tar.extractfile(member).read()) for member in tar}


@pytest.mark.parametrize(("crf", "name"), [(False, "test"), (True, "test_crf")])
def test_the_archive_holds_the_predictions_as_they_are(project, crf, name):
    path, count = server.write(project, "last_round", "test", crf, None)
    assert (path, count) == (project / f"reports/server/last_round_{name}.tgz", 2)
    found = members(path)
    assert list(found) == [f"{PREFIX}2008_000001.png", f"{PREFIX}2008_000006.png"]
    for full, (member, data) in found.items():
        source = project / f"data/predictions/last_round/{name}" / full.removeprefix(PREFIX)
        assert data == source.read_bytes()
        assert member.isfile() and (member.mtime, member.uid, member.gid) == (0, 0, 0)
        assert (member.uname, member.gname, member.mode) == ("", "", 0o644)
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.mode, image.size) == ("PNG", "P", (32, 24))
        assert image.getpalette() == voc_palette().ravel().tolist()


def test_the_same_predictions_give_the_same_bytes(project, monkeypatch):
    first = server.write(project, "last_round", "test", False, None)[0].read_bytes()
    # Another moment, other files of the same contents, another name.
    for path in (project / "data/predictions/last_round/test").iterdir():
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    monkeypatch.setattr("time.time", lambda: 2e9)
    other = project / "elsewhere/archive.tar.gz"
    assert server.write(project, "last_round", "test", False, other) == (other, 2)
    assert other.read_bytes() == first


def prediction(root):
    return root / "data/predictions/last_round/test/2008_000001.png"


def save(root, **changes):
    image = Image.fromarray(np.zeros((24, 32), np.uint8))
    image.putpalette(changes.pop("palette", voc_palette()).tobytes())
    image.save(prediction(root), format=changes.pop("format", "PNG"), **changes)


def other_classes(root):
    path = root / "data/prepared/dataset.json"
    about = json.loads(path.read_text())
    about["classes"].reverse()
    path.write_text(json.dumps(about))


def label(value, size=(24, 32)):
    return lambda root: write_label_map(prediction(root), np.full(size, value, np.uint8))


GREY = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
BAD = {
    "missing": (lambda r: prediction(r).unlink(), "lacks 1 of 2 .* 2008_000001.png"),
    "extra": (
        lambda r: write_label_map(prediction(r).with_name("c.png"), np.zeros((24, 32), np.uint8)),
        "has beyond the split 1 .* c.png",
    ),
    "another palette": (lambda r: save(r, palette=GREY), "no 8-bit PNG with VOC's palette"),
    "4 bits": (lambda r: save(r, palette=voc_palette()[:16], bits=4), "no 8-bit PNG"),
    "grey": (
        lambda r: Image.new("L", (32, 24)).save(prediction(r)),
        "2008_000001.png is no 8-bit PNG with VOC's palette",
    ),
    "colours": (lambda r: Image.new("RGB", (32, 24)).save(prediction(r)), "holds RGB colours"),
    "no PNG": (lambda r: save(r, format="GIF"), "2008_000001.png is no 8-bit PNG"),
    "truncated": (
        lambda r: prediction(r).write_bytes(prediction(r).read_bytes()[:-30]),
        "2008_000001.png is unreadable",
    ),
    "another size": (label(1, (32, 24)), "is 24x32 pixels, its image 32x24"),
    "label 21": (label(21), r"holds label 21 of 0\.\.20"),
    "void": (label(255), r"holds label 255 of 0\.\.20"),
    "other classes": (other_classes, "VOC's 20 classes in VOC's order .* 'tvmonitor'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_the_server_would_not_take_is_refused(kind, project):
    spoil, message = BAD[kind]
    spoil(project)
    with pytest.raises(UserError, match=message) as caught:
        server.write(project, "last_round", "test", False, None)
    assert "\n" not in str(caught.value)
    assert not (project / "reports/server").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("round_06", "test", False), "'round_06', but of last_round; run `isim train-segmenter"),
        (("../predictions/last_round", "test", False), "no predictions of label set"),
        (("last_round", "testing", False), "no split 'testing'"),
        (("last_round", "val", False), "add val to train_segmenter.eval_splits, then"),
        (("last_round", "val", True), "train_segmenter.crf_after: true"),
    ],
)
def test_predictions_that_were_not_made(arguments, message, project):
    with pytest.raises(UserError, match=message):
        server.write(project, *arguments, None)


def test_the_command(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    preset.write("demo", project / "params.yaml")
    # The entry point installs a handler for SIGTERM, which pytest must not keep.
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["isim", "server-archive", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, *capsys.readouterr()

    code, out, err = run("last_round", "test", "--crf", "--out", "here.tgz")
    assert (code, err) == (0, "") and out.startswith("here.tgz: 2 predictions")
    assert len(members(project / "here.tgz")) == 2
    (project / "folder").mkdir()
    for arguments, words in (
        (("last_round", "val"), "eval_splits"),
        (("last_round", "test", "--out", "folder"), "cannot write folder: it is a folder; choose"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("isim: error: ") and err.count("\n") == 1 and words in err
    # It lists last_round no more, whose predictions stay where they are.
    preset.write("voc-deeplabcam-resnet50", project / "params.yaml")
    assert run("last_round", "test", "--out", "old.tgz") == (
        2,
        "",
        "isim: error: no label set 'last_round' in params.yaml; label_sets has random_walk_crf\n",
    )
    assert not (project / "old.tgz").exists()


def test_from_a_devkit_with_a_test_set_to_the_archive(project, tiny):
    """Without masks and labels: predicted, not scored, packed."""
    section = tiny.train_segmenter.model_copy(
        update={"split": "train", "eval_splits": ("val", "test"), "epochs": 1, "batch": 2}
    )
    with engine.intra_op_threads(1):
        train_segmenter.run(section, "ground_truth", project)
    figures = json.loads(
        (project / "reports/train_segmenter/ground_truth/metrics.json").read_text()
    )["splits"]
    assert (figures["test"]["images"], figures["test"]["scored_images"]) == (2, 0)
    assert figures["test"]["miou"] is None and figures["test"]["crf_miou"] is None
    assert figures["val"]["miou"] is not None
    for crf in (False, True):
        path, count = server.write(project, "ground_truth", "test", crf, None)
        assert count == 2
        for name in members(path):
            id_ = name.removeprefix(PREFIX).removesuffix(".png")
            folder = project / f"data/predictions/ground_truth/test{'_crf' * crf}"
            assert read_label_map(folder / f"{id_}.png").shape == (24, 32)
