"""Stage train_cam through the command: what it writes, and every kind of bad input."""

import csv
import errno
import json
import math
import shutil
import signal
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from isim import cli, engine, results, training, viz
from isim.data import files
from isim.data.dataset import load_prepared
from isim.data.files import read_label_map
from isim.models import cam

OUTS = ("models", "data/pseudo_labels", "data/cams", "reports/train_cam", "reports/export_cams")
# Figures of an epoch that differ from run to run.
SPEED = {"seconds", "images_per_second", "waiting_share"}


@pytest.fixture
def command(project, monkeypatch, capsys):
    """A function that runs `isim COMMAND` in the project: exit code and error output."""
    monkeypatch.chdir(project)
    # The entry point installs a handler for SIGTERM, which pytest must not keep.
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(name="train-cam"):
        monkeypatch.setattr(sys, "argv", ["isim", name])
        code = 0
        with engine.intra_op_threads(1):
            try:
                cli.main()
            except SystemExit as stop:
                code = stop.code or 0
        return code, capsys.readouterr().err

    return run


def set_parameters(root, **changes):
    path = root / "params.yaml"
    text = path.read_text()
    section, rest = text.split("\nexport_cams:")
    for name, value in changes.items():
        lines = [line for line in section.splitlines() if line.strip().startswith(f"{name}:")]
        assert lines, name
        # The last one: train_cam comes after prepare, which has a seed too.
        section = section.replace(lines[-1], f"{lines[-1].split(':')[0]}: {value}")
    path.write_text(f"{section}\nexport_cams:{rest}")


def published(root):
    return [name for name in OUTS if (root / name).exists()]


def leftovers(root):
    """Temporary files and folders outside of the resume state."""
    found = [p for p in root.rglob("*") if p.name.startswith(".tmp-") or p.suffix == ".part"]
    return [path for path in found if ".isim" not in path.parts]


def assert_one_line(code, err, *words):
    assert code == 2, err
    assert err.startswith("isim: error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_report(root, stage):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    text = (root / f"reports/{stage}/metrics.json").read_text()
    return json.loads(text, parse_constant=refuse)


class TestFinished:
    def test_a_checkpoint_a_round_and_the_final_one(self, finished_project):
        folder = finished_project / "models/train_cam"
        names = ["model.safetensors", "round_01.safetensors", "round_02.safetensors"]
        assert sorted(path.name for path in folder.iterdir()) == names
        networks = [cam.load(folder / name)[0].state_dict() for name in names]
        weights = [network["classifier.weight"] for network in networks]
        assert not any(torch.equal(weights[i], weights[i - 1]) for i in range(3))

    def test_a_snapshot_a_round_with_labelled_classes_only(self, finished_project):
        items = load_prepared(finished_project / "data/prepared", None).split("train")
        for number in (1, 2):
            folder = finished_project / f"data/pseudo_labels/round_{number:02d}"
            assert sorted(p.stem for p in folder.iterdir()) == sorted(item.id for item in items)
            for item in items:
                allowed = {0, *(item.image_label.nonzero()[0] + 1).tolist()}
                assert set(read_label_map(folder / f"{item.id}.png").flat) <= allowed

    def test_tables_have_a_row_a_round_an_epoch_and_a_class(self, finished_project):
        reports = finished_project / "reports/train_cam"
        rounds, epochs = read_rows(reports / "rounds.csv"), read_rows(reports / "epochs.csv")
        assert [(row["round"], row["epoch"]) for row in rounds] == [("1", "1"), ("2", "2")]
        assert {"cam_miou", "pseudo_label_miou", "masked_share", "seconds"} <= rounds[0].keys()
        assert [row["epoch"] for row in epochs] == ["1", "2", "3"]
        figures = ("sample_average_precision", "element_accuracy", "class_map")
        assert {f"{split}_{f}" for split in ("train", "val") for f in figures} <= epochs[0].keys()
        classes = read_rows(reports / "per_class.csv")
        assert len(classes) == 2 * 6
        for row in rounds:
            ious = [float(c["cam_iou"]) for c in classes if c["round"] == row["round"]]
            present = [value for value in ious if not math.isnan(value)]
            assert float(row["cam_miou"]) == pytest.approx(sum(present) / len(present))

    def test_the_miou_has_a_row_a_round_and_a_measurement(self, finished_project):
        reports = finished_project / "reports/train_cam"
        rows, rounds = read_rows(reports / "miou.csv"), read_rows(reports / "rounds.csv")
        assert [(row["epoch"], row["round"]) for row in rows] == [("1", "1"), ("2", "2"), ("3", "")]
        for column in ("cam_miou", "pseudo_label_miou"):
            assert [row[column] for row in rows[:2]] == [row[column] for row in rounds]
        assert 0 < float(rows[2]["cam_miou"]) < 1 and rows[2]["pseudo_label_miou"] == ""

    def test_the_headline_is_the_last_round(self, finished_project):
        report = read_report(finished_project, "train_cam")
        last = read_rows(finished_project / "reports/train_cam/rounds.csv")[-1]
        assert report["cam_miou"] == float(last["cam_miou"])
        assert report["optimizer_profile"] == "custom" and report["images"] == 16

    def test_the_training_images_are_classified_by_the_final_weights(self, finished_project, tiny):
        report = read_report(finished_project, "train_cam")
        network, config = cam.load(finished_project / "models/train_cam/model.safetensors")
        for split, prefix in (("train", "final_train"), ("val", "val")):
            items = load_prepared(finished_project / "data/prepared", None).split(split)
            with engine.intra_op_threads(1):
                found = training.classify(
                    network,
                    config,
                    items,
                    tiny.train_cam.crop,
                    report["precision"],
                    torch.device("cpu"),
                )
            assert len(found) == 3
            for name, value in found.items():
                assert report[f"{prefix}_{name}"] == pytest.approx(value, abs=1e-3), name
        # The running figures of the last epoch's crops stay, under their names.
        last = read_rows(finished_project / "reports/train_cam/epochs.csv")[-1]
        name = "train_sample_average_precision"
        assert report[name] == float(last[name]) != report[f"final_{name}"]

    def test_pictures_show_the_fixed_set_and_all_rounds(self, finished_project):
        folder = finished_project / "reports/train_cam/pictures"
        names = {path.name for path in folder.iterdir()}
        assert {"rounds.png", "miou.png", "losses.png"} < names and len(names) == 3 + 2


def spoil(split, index):
    def change(root):
        item = load_prepared(root / "data/prepared", None).split(split)[index]
        item.image.write_bytes(item.image.read_bytes()[:200])
        return item.image.name

    return change


def other_weights(root):
    save_file(timm.create_model("mobilenetv2_100").state_dict(), root / "w.safetensors")
    set_parameters(root, weights="w.safetensors")
    return "another architecture than resnet10t"


def empty_split(root):
    path = root / "data/prepared/val.csv"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    return "split 'val' is empty"


def no_val_split(root):
    path = root / "data/prepared/dataset.json"
    about = json.loads(path.read_text())
    del about["splits"]["val"]
    path.write_text(json.dumps(about))
    return "no split 'val'"


def parameters(expected, **changes):
    return lambda root: set_parameters(root, **changes) or expected


BAD_INPUT = {
    "missing weights": parameters("train_cam.weights: no file", weights="gone.safetensors"),
    "weights of another architecture": other_weights,
    "unknown encoder": parameters("timm has no encoder 'resnet11'", encoder="resnet11"),
    "unknown split": parameters("no split 'trainaug'", split="trainaug"),
    "no val split": no_val_split,
    "empty split": empty_split,
    "nothing prepared": lambda root: shutil.rmtree(root / "data/prepared") or "isim prepare",
    "corrupt training image": spoil("train", 3),
    "corrupt held-out image": spoil("val", 2),
    "rates too high": parameters("the loss is", encoder_rate="1.0e+30"),
    "one image a batch": parameters("train_cam.batch", batch=1),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_no_outs(kind, project, command):
    expected = BAD_INPUT[kind](project)
    code, err = command()
    assert_one_line(code, err, expected)
    assert published(project) == [] and leftovers(project) == []


@pytest.mark.parametrize(
    "blocked", [".isim/resume", "models", "data/pseudo_labels", "reports/train_cam"]
)
def test_a_folder_that_cannot_be_written_is_one_line(blocked, project, command, monkeypatch):
    """A file in the folder's place: permissions do not stop the superuser."""
    set_parameters(project, epochs=2)
    (project / blocked).parent.mkdir(exist_ok=True, parents=True)
    (project / blocked).touch()
    code, err = command()
    assert_one_line(code, err, "cannot write", blocked)
    assert leftovers(project) == []
    if blocked != ".isim/resume":
        (project / blocked).unlink()
        again = []
        for name in ("train_epoch", "classify"):
            monkeypatch.setattr(f"isim.training.{name}", lambda *_: again.append(1))
        assert command() == (0, "")
        assert again == [], "nothing is trained or classified again"


def full_disk(monkeypatch, owner, name, count):
    """Make the `count`-th call of `owner.name` write a little and fail."""
    function = getattr(owner, name)
    calls = []

    def wrapped(*arguments, **options):
        calls.append(1)
        if len(calls) == count:
            for path in arguments[:1]:
                if isinstance(path, Path) and path.is_file():
                    path.write_text("ha")
            raise OSError(errno.ENOSPC, "No space left on device", str(arguments[0]))
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        (Path, "write_bytes", 1),  # the state after an epoch
        (files.Image.Image, "save", 5),  # a pseudo-label
        (Path, "replace", 2),  # a round's checkpoint, written but not yet named
        (shutil, "copytree", 2),  # the pseudo-labels' way to their place
        (viz.Figure, "savefig", 1),  # a plot
    ],
)
def test_a_full_disk_is_one_line_and_can_be_gone_on_from(
    owner, name, count, project, command, monkeypatch, finished_project
):
    with monkeypatch.context() as patch:
        full_disk(patch, owner, name, count)
        code, err = command()
    assert_one_line(code, err, "o space left on")
    assert leftovers(project) == []
    assert command() == (0, "")
    for folder in ("models/train_cam", "data/pseudo_labels/round_02"):
        for path in (finished_project / folder).iterdir():
            assert (project / folder / path.name).read_bytes() == path.read_bytes()


def test_a_full_disk_in_the_journal_is_one_line(project, command, monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            pass

    from isim.journal import Journal

    start = Journal.__init__

    def begin(self, path):
        start(self, path)
        self._file = Full()

    monkeypatch.setattr(Journal, "__init__", begin)
    code, err = command()
    assert_one_line(code, err, "o space left on")
    assert published(project) == []


def test_data_without_any_mask_runs_through_and_says_so(project, command, recorder):
    for split in ("train", "val"):
        path = project / f"data/prepared/{split}.csv"
        head, *rows = path.read_text().splitlines()
        path.write_text("\n".join([head, *(row.rpartition(",")[0] + "," for row in rows)]) + "\n")
    for name in ("train-cam", "export-cams", "evaluate"):
        assert command(name) == (0, "")
    trained = read_report(project, "train_cam")
    assert trained["scored_images"] == 0 and trained["images"] == 16
    assert trained["cam_miou"] is None and trained["pseudo_label_miou"] is None
    assert {row["cam_miou"] for row in read_rows(project / "reports/train_cam/rounds.csv")} == {
        "nan"
    }
    assert "cam_miou_full_size" not in read_report(project, "export_cams")["train"]
    scored = read_report(project, "evaluate")
    assert scored["val"]["images"] == 0 and scored["val"]["cam_miou_oracle"] is None
    assert scored["round_01"] == dict.fromkeys(scored["round_01"])
    assert len(list((project / "data/pseudo_labels/round_02").iterdir())) == 16
    table = results.table(project)
    assert "nan" not in table and "None" not in table
    assert {step for _, step in recorder.pictures} == {1, 2}, "pictures need no mask"


def test_the_baseline_makes_rounds_but_does_not_train_on_them(project, command):
    set_parameters(project, method="cam", epochs=2)
    assert command() == (0, "")
    assert (project / "data/pseudo_labels/round_01").is_dir()
    state = cam.load(project / "models/train_cam/model.safetensors")[0].state_dict()
    assert not [name for name in state if name.startswith(("decoder", "head"))]
    epochs = read_rows(project / "reports/train_cam/epochs.csv")
    assert {float(row["segmentation_loss"]) for row in epochs} == {0}


def test_measurements_change_nothing_else(project, command, recorder):
    changes = {"epochs": 5, "round_every": 3}
    trained = {}
    for every in (0, 1):
        set_parameters(project, score_every=every, **changes)
        assert command() == (0, "")
        paths = [p for o in ("models", "data/pseudo_labels") for p in (project / o).rglob("*.*")]
        losses = [
            {
                k: v
                for k, v in row.items()
                if k not in ("seconds", "images_per_second", "waiting_share")
            }
            for row in read_rows(project / "reports/train_cam/epochs.csv")
        ]
        trained[every] = losses, {p.relative_to(project): p.read_bytes() for p in paths}
        rows = read_rows(project / "reports/train_cam/miou.csv")
        seen = [(row["epoch"], row["round"]) for row in rows]
        if every == 0:
            assert seen == [("1", "1"), ("4", "2")]
            assert {step for name, step in recorder.figures if "by_epoch" in name} == {1, 4}
    assert trained[0] == trained[1] and len(trained[0][1]) == 3 + 2 * 16
    assert seen == [("1", "1"), ("2", ""), ("3", ""), ("4", "2"), ("5", "")]
    found = [recorder.figures["cam_miou_by_epoch", epoch] for epoch in range(1, 6)]
    assert found == [float(row["cam_miou"]) for row in rows]
    assert ("pseudo_label_miou_by_epoch", 3) not in recorder.figures


def test_rounds_by_convergence(project, command):
    # A cap of one epoch: a round after every one, the first after the warm-up.
    set_parameters(project, round_rule="convergence", epochs=4, cap=1)
    code, err = command()
    assert code == 0, err
    rounds = read_rows(project / "reports/train_cam/rounds.csv")
    assert [row["epoch"] for row in rounds] == ["1", "2", "3"]
    assert len(list((project / "data/pseudo_labels").glob("round_*"))) == 3
    # No cap within reach, and losses that cannot improve by 99 %: after patience + 1 epochs.
    set_parameters(project, cap=50, patience=1, tolerance=0.99)
    assert command()[0] == 0
    rounds = read_rows(project / "reports/train_cam/rounds.csv")
    assert [row["epoch"] for row in rounds] == ["1", "3"]
