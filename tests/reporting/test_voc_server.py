"""Archive for VOC's server holds exactly what the server takes, and nothing else is packed."""

import json
import signal
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from support.projects import read_report

from isim import cli
from isim.data.files import voc_palette, write_label_map
from isim.errors import UserError
from isim.experiments import preset
from isim.reporting import voc_server
from isim.runtime import devices
from isim.stages import prepare, train_segmenter

SPLITS = {"train": ["a", "b"], "val": ["c"], "test": ["2008_000006", "2008_000001"]}
PREFIX = "results/VOC2012/Segmentation/comp6_test_cls/"
MADE = "data/predictions/last_round"


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
            write_label_map(root / MADE / folder / f"{name}.png", pixels)
    return root


def write(root, labels="last_round", split="test", *, crf=False, out=None):
    return voc_server.write(root, labels, split, crf=crf, out=out)


def members(path):
    with tarfile.open(path, "r:gz") as tar:
        return {member.name: (member, tar.extractfile(member).read()) for member in tar}


@pytest.mark.parametrize(("crf", "name"), [(False, "test"), (True, "test_crf")])
def test_the_archive_holds_the_predictions_as_they_are(project, crf, name):
    path, count = write(project, crf=crf)
    assert (path, count) == (project / f"reports/server/last_round_{name}.tgz", 2)
    found = members(path)
    assert list(found) == [f"{PREFIX}2008_000001.png", f"{PREFIX}2008_000006.png"]
    for full, (member, data) in found.items():
        assert data == (project / MADE / name / full.removeprefix(PREFIX)).read_bytes()
        assert member.isfile() and (member.mtime, member.uid, member.gid) == (0, 0, 0)
        assert (member.uname, member.gname, member.mode) == ("", "", 0o644)


def test_the_same_predictions_give_the_same_bytes(project, monkeypatch):
    first = write(project)[0].read_bytes()
    # Another moment, other files of the same contents, another name.
    for path in (project / MADE / "test").iterdir():
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    monkeypatch.setattr("time.time", lambda: 2e9)
    other = project / "elsewhere/archive.tar.gz"
    assert write(project, out=other) == (other, 2)
    assert other.read_bytes() == first


def other_classes(root, _):
    path = root / "data/prepared/dataset.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"classes": about["classes"][::-1]}))


def label(value, size=(24, 32)):
    return lambda _, path: write_label_map(path, np.full(size, value, np.uint8))


def image(mode, palette=None, format="PNG", **options):
    def save(_, path):
        image = Image.new(mode, (32, 24))
        if palette is not None:
            image.putpalette(palette.tobytes())
        image.save(path, format=format, **options)

    return save


NO_PALETTE = "2008_000001.png is no 8-bit PNG with VOC's palette"
GREY = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
# What is done to the project, or to a prediction.
BAD = {
    "missing": (lambda _, path: path.unlink(), "lacks 1 of 2 .* 2008_000001.png"),
    "extra": (lambda _, path: label(0)(_, path.with_name("c.png")), "beyond the split 1 .* c.png"),
    "another palette": (image("P", GREY), NO_PALETTE),
    "4 bits": (image("P", voc_palette()[:16], bits=4), NO_PALETTE),
    "grey": (image("L"), NO_PALETTE),
    "colours": (image("RGB"), "holds RGB colours"),
    "no PNG": (image("P", voc_palette(), "GIF"), NO_PALETTE),
    "truncated": (lambda _, path: path.write_bytes(path.read_bytes()[:-30]), "1.png is unreadable"),
    "another size": (label(1, (32, 24)), "is 24x32 pixels, its image 32x24"),
    "label 21": (label(21), r"holds label 21 of 0\.\.20"),
    "void": (label(255), r"holds label 255 of 0\.\.20"),
    "other classes": (other_classes, "VOC's 20 classes in VOC's order .* 'tvmonitor'"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_what_the_server_would_not_take_is_refused(spoil, message, project):
    spoil(project, project / MADE / "test/2008_000001.png")
    with pytest.raises(UserError, match=rf"\A.*{message}.*\Z"):
        write(project)
    assert not (project / "reports/server").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("round_06",), "'round_06', but of last_round; run `isim train-segmenter"),
        (("../predictions/last_round",), "no predictions of label set"),
        (("last_round", "testing"), "no split 'testing'"),
        (("last_round", "val"), "add val to train_segmenter.eval_splits and set train_segmenter"),
    ],
)
def test_predictions_that_were_not_made(arguments, message, project):
    with pytest.raises(UserError, match=message):
        write(project, *arguments, crf=arguments[-1] == "val")


def test_the_command(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    preset.write("demo", project / "params.yaml")
    # The entry point installs a handler for SIGTERM, which pytest must not keep.
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["isim", "server-archive", "last_round", "test", *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, *capsys.readouterr()

    code, out, err = run("--crf", "--out", "here.tgz")
    assert (code, err) == (0, "") and out.startswith("here.tgz: 2 predictions")
    assert len(members(project / "here.tgz")) == 2
    code, out, err = run("--out", "data")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("isim: error: cannot write data: it is a folder; choose")
    # It lists last_round no more, whose predictions stay where they are.
    preset.write("voc-deeplabcam-resnet50", project / "params.yaml")
    told = "no label set 'last_round' in params.yaml; label_sets has random_walk_crf"
    assert run("--out", "old.tgz") == (2, "", f"isim: error: {told}\n")
    assert not (project / "old.tgz").exists()


def test_from_a_devkit_with_a_test_set_to_the_archive(project, tiny):
    """Without masks and labels: predicted, not scored, packed."""
    section = tiny.train_segmenter.model_copy(
        update={"split": "train", "eval_splits": ("val", "test"), "epochs": 1, "batch": 2}
    )
    with devices.intra_op_threads(1):
        train_segmenter.run(section, "ground_truth", project)
    figures = read_report(project, "train_segmenter/ground_truth")
    assert (figures["test"]["images"], figures["test"]["scored_images"]) == (2, 0)
    assert figures["test"]["miou"] is None and figures["test"]["crf_miou"] is None
    assert figures["val"]["miou"] is not None
    for crf in (False, True):
        assert len(members(write(project, "ground_truth", crf=crf)[0])) == 2
