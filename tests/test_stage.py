"""What every stage does first and last: lock, identity, resume folder, outs, reports."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from support.projects import read_rows
from support.sections import changed

from isim import stage
from isim.data.prepared import Item
from isim.errors import UserError
from isim.reporting import pictures
from isim.runtime import identity, launcher, processes


@pytest.fixture
def opened(tmp_path, recorder, monkeypatch, tiny):
    """A function that opens a stage, one without networks, in a project of the test's own."""
    monkeypatch.setattr(identity, "of_code", lambda word: f"code of {word}")

    @contextmanager
    def open_(params=None, *, word="evaluate", reads=None, label_set=""):
        params, name = params or tiny.evaluate, "-".join(filter(None, (word, label_set)))
        with (
            stage.alone(name, tmp_path / ".isim"),
            stage.opened(word, params, tmp_path, reads=reads or {}, label_set=label_set) as here,
        ):
            yield here

    return open_


@pytest.fixture
def second_process(monkeypatch):
    """Makes this process another than the first."""
    monkeypatch.setattr(processes, "_group", processes._Group(rank=1, world=2))
    monkeypatch.setattr(processes, "gather", lambda value: [value, value])
    monkeypatch.setattr(processes, "broadcast", lambda value: value)


def test_a_stage_waits_for_another_run_of_it_and_says_so(opened, tmp_path, capsys):
    """Both would use one resume folder: `dvc exp run --temp` beside `dvc repro`."""
    path, entered = tmp_path / ".isim/evaluate-seeds.lock", threading.Event()
    path.parent.mkdir()

    def wait():
        with opened(label_set="seeds"):
            entered.set()

    waiting = threading.Thread(target=wait)
    # That of another label set is another lock.
    with FileLock(path), opened(label_set="round_02"):
        waiting.start()
        assert not entered.wait(0.5)
    waiting.join(timeout=60)
    assert entered.is_set()
    told = f"isim: waiting for another run of evaluate-seeds to end ({path})\n"
    assert capsys.readouterr().err == told
    with opened(label_set="seeds"), pytest.raises(TimeoutError):
        FileLock(path).acquire(timeout=0)


def test_the_resume_folder_is_removed_at_the_end_and_kept_after_a_failure(opened, tmp_path):
    folder = tmp_path / ".isim/resume/evaluate"

    def run(fail):
        with opened() as here:
            left = sorted(path.name for path in here.resume.iterdir())
            (here.resume / f"half{len(left)}").touch()
            assert list(folder.iterdir()) == [here.resume]
            if fail:
                raise KeyboardInterrupt
        return left

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(fail=True)
    assert run(fail=False) == ["half0", "half1"]
    assert not folder.exists()


def test_a_result_depends_on_all_that_it_is_made_of_and_by(opened, tmp_path, tiny, monkeypatch):
    reads = {"data": tmp_path / "data", "weights": tmp_path / "none"}
    reads["data"].write_text("a")

    def key(params=None, **what):
        with opened(params, reads=reads, **what) as here:
            assert here.hashes == {"data": identity.md5(reads["data"])}
            return here.resume.name

    first = key()
    monkeypatch.setenv("ISIM_WORKERS", "3")
    assert key() == first
    keys = [first, key(word="prepare"), key(label_set="seeds")]
    keys.append(key(changed(tiny.evaluate, threshold=0.25)))
    networks = [changed(tiny.export_cams, precision=precision) for precision in ("fp32", "bf16")]
    keys += map(key, networks)
    monkeypatch.setattr("isim.runtime.devices.kind", lambda device: "another device")
    keys.append(key(networks[0]))
    reads["data"].write_text("b")
    keys.append(key())
    monkeypatch.setattr(identity, "of_code", lambda word: "other code")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_hosts_that_differ_are_refused(opened, second_process, monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda value: [value, f"{value}, other"])
    with pytest.raises(UserError, match="hosts of this run differ in parameters"), opened():
        pass


def test_outs_replace_what_was_there_and_reports_are_written_once(opened, tmp_path):
    old = [tmp_path / name for name in ("data/cams/old.npz", "reports/evaluate/pictures/old.png")]
    for path in old:
        path.parent.mkdir(parents=True)
        path.touch()
    calls = []
    with opened() as here:
        (here.resume / "cams").mkdir()
        (here.resume / "cams/a.npz").touch()
        here.publish({"cams": "data/cams"})
        here.report(calls.append, calls.append)
    assert calls == [here, here] and here.reports == tmp_path / "reports/evaluate"
    assert not any(path.exists() for path in old)
    assert (tmp_path / "data/cams/a.npz").exists()


def test_other_processes_publish_and_report_nothing(opened, second_process, tmp_path):
    with opened() as here:
        here.publish({"cams": "data/cams"})
        here.report(pytest.fail)
    assert not (tmp_path / "data").exists() and not (tmp_path / "reports").exists()


@pytest.mark.parametrize(
    "blocked", [".isim", ".isim/evaluate.lock", ".isim/resume", "data/cams", "reports/evaluate"]
)
def test_a_place_that_cannot_be_written_is_named_and_what_is_done_stays(blocked, opened, tmp_path):
    def run():
        with opened() as here:
            made = here.resume / "cams"
            was_there = made.exists()
            made.mkdir(exist_ok=True)
            here.publish({"cams": "data/cams"})
            here.report(lambda here: here.table("rows", [{"a": 1}]))
        return was_there

    path = tmp_path / blocked
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if path.suffix == ".lock" else path.touch()
    with pytest.raises(UserError, match=f"cannot write .*{blocked}"):
        run()
    assert not list(tmp_path.rglob(".tmp-*"))
    path.rmdir() if path.is_dir() else path.unlink()
    assert run() == (path.parent.name != ".isim" and blocked != ".isim")


def test_mlflow_is_told_the_device_figures_and_tables(opened, recorder, tiny):
    rows, told = [{"class": "a", "iou": 0.5}, {"class": "b", "iou": 1.0}], []
    recorder.table = recorder.tag = lambda *given: told.append(given)
    with opened() as here:
        assert here.tracked is recorder and here.name == "evaluate"
        here.log("val", {"miou": 0.5})
        here.log("", {"miou": 0.25}, step=2)
        here.log_epoch([{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5}])
        here.table("per_class", rows)
    written = read_rows(here.reports / "per_class.csv")
    assert written == [{"class": "a", "iou": "0.5"}, {"class": "b", "iou": "1.0"}]
    assert recorder.figures == {("val_miou", None): 0.5, ("miou", 2): 0.25, ("loss", 2): 0.5}
    with opened(changed(tiny.export_cams, precision="bf16"), label_set="seeds") as here:
        assert here.name == "evaluate seeds"
    assert told == [("per_class", rows), ("precision", "bf16"), ("device", "cpu")]


def test_some_images_are_shown_as_strips_and_squares(opened, recorder, tmp_path):
    items = [Item(name, tmp_path / f"{name}.png", None, None) for name in "abc"]
    for name in (*"abc", "mask"):
        Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path / f"{name}.png")
    squares = []
    recorder.image = lambda key, image, step: squares.append((key, image.shape, step))

    def results(split, item):
        return {f"{split} {item.id}": tmp_path / "mask.png"}

    with opened() as here:
        here.show({"val": items, "": items[:1]}, 2, results)
    folder = here.reports / "pictures"
    strips = {p.relative_to(folder).as_posix(): Image.open(p).size for p in folder.rglob("*.png")}
    # Image, ground truth and the result: in one row, or in two rows of two.
    height, width, _ = pictures.strip(items[0], results("", items[0])).shape
    square = pictures.strip(items[0], results("", items[0]), columns=2).shape
    assert strips == dict.fromkeys(["a.png", "val/a.png", "val/c.png"], (width, height))
    assert squares == [(key, square, 0) for key in ("val/a", "val/c", "pictures/a")]


@pytest.fixture
def ran(monkeypatch):
    """Stages with the sections and arguments that they were run with."""
    calls = []

    def load(name):
        return SimpleNamespace(run=lambda *arguments: calls.append((name, *arguments)))

    monkeypatch.setattr(stage, "importlib", SimpleNamespace(import_module=load))
    return calls


def test_a_stage_is_started_in_as_many_processes_as_wanted(project, ran, tiny, monkeypatch):
    def launch(options, command):
        raise SystemExit(f"{options[-1]} {command}")

    monkeypatch.setattr(launcher, "launch", launch)
    stage.start("train_segmenter", project, "last_round")
    monkeypatch.setenv("ISIM_PROCESSES", "2")
    with pytest.raises(SystemExit, match=r"^2 \['train-segmenter', 'last_round'\]"):
        stage.start("train_segmenter", project, "last_round")
    # All but this one.
    stage.start("prepare", project)
    assert ran == [
        ("isim.stages.train_segmenter", tiny.train_segmenter, "last_round", project),
        ("isim.stages.prepare", tiny.prepare, project),
    ]


def test_mistakes_are_told_before_a_stage_is_imported(project, ran):
    words = "no label set 'seeds' in params.yaml; label_sets has last_round, random"
    with pytest.raises(UserError, match=words):
        stage.start("train_segmenter", project, "seeds")
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("crop: 64", "crop: -1", 1))
    with pytest.raises(UserError, match=r"train_cam\.crop"):
        stage.start("train_segmenter", project, "last_round")
    assert ran == []
