"""What every stage does first and last: lock, identity, resume folder, outs, reports."""

import os
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path
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
    assert calls == [here, here]
    assert not any(path.exists() for path in old)
    assert (tmp_path / "data/cams/a.npz").exists()


def files(folder):
    """Contents of all files below a folder, by name."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items()}


def project_of(root):
    """Contents of all files of a project but for its own state."""
    return {name: data for name, data in files(root).items() if not name.startswith(".isim")}


@pytest.fixture
def make(opened):
    """A function that runs a stage with outs, reports and a picture; it counts its runs."""
    ran = []

    def run(content="new", **given):
        with opened(**given) as here:
            ran.append(content)
            for name in ("cams/a/b", "model", "scratch"):
                path = here.resume / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{content} {name}")
            here.publish({"cams": "data/cams", "model": "models/model"})
            with here.drawing("curve.png") as path:
                path.write_text(content)
            here.table("rows", [{"a": content}])
        return here

    run.ran = ran
    return run


OUTS = {
    "data/cams/a/b": b"new cams/a/b",
    "models/model": b"new model",
    "reports/evaluate/pictures/curve.png": b"new",
    "reports/evaluate/rows.csv": b"a\nnew\n",
}


@pytest.mark.parametrize("moment", range(8))
@pytest.mark.parametrize("stands", [False, True])
def test_a_kill_between_two_renames_is_finished_by_the_next_start_of_any_stage(
    make, opened, tmp_path, monkeypatch, moment, stands
):
    """Old and new outs never stay mixed, also where another run, or none of it, comes next."""
    if stands:
        make("old")
    old, renames = project_of(tmp_path), []

    def dying(self, target, replace=Path.replace):
        if ".isim" not in self.parts:
            renames.append(target)
            if len(renames) > moment:
                os._exit(9)
        return replace(self, target)

    if (child := os.fork()) == 0:
        try:
            monkeypatch.setattr(Path, "replace", dying)
            make()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (0 if moment >= len(OUTS) * (1 + stands) else 9)
    monkeypatch.undo()
    stage._look_after(tmp_path / ".isim", tmp_path, ("masks",))
    assert project_of(tmp_path) == OUTS != old


def test_a_failure_between_two_renames_leaves_what_stood(make, tmp_path, monkeypatch):
    make("old")
    old = project_of(tmp_path)

    def full(self, target, replace=Path.replace):
        if self.name == ".tmp-model":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*models/model: No space left"):
        make()
    assert project_of(tmp_path) == old
    monkeypatch.undo()
    stage._look_after(tmp_path / ".isim", tmp_path, ("masks",))
    assert project_of(tmp_path) == old


@pytest.fixture
def dvc(tmp_path, monkeypatch):
    """Lets stages run under DVC; a function that records outs as DVC does."""
    monkeypatch.setenv("DVC_STAGE", "evaluate")

    def record(*, params="a"):
        outs = ["data/cams", "models/model", "reports/evaluate/rows.csv"]
        rows = "".join(f"    - path: {o}\n      md5: {identity.md5(tmp_path / o)}\n" for o in outs)
        text = f"stages:\n  evaluate:\n    params:\n      p: {params}\n    outs:\n{rows}"
        (tmp_path / "dvc.lock").write_text(text)

    return record


def test_what_dvc_has_not_recorded_is_published_again(make, dvc, tmp_path):
    """DVC deletes outs before it runs a stage."""
    make()
    (folder,) = (tmp_path / ".isim/resume/evaluate").iterdir()
    assert not (folder / "scratch").exists()
    for _ in range(2):
        for name in ("data", "models", "reports"):
            shutil.rmtree(tmp_path / name)
        stage._look_after(tmp_path / ".isim", tmp_path, ("evaluate",))
        with pytest.raises(stage.Published):
            make()
        assert project_of(tmp_path) == OUTS and make.ran == ["new"]
    # By hand, too; and DVC may still come.
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DVC_STAGE")
        with pytest.raises(stage.Published):
            make()
    dvc()
    stage._look_after(tmp_path / ".isim", tmp_path, ("masks",))
    assert not (tmp_path / ".isim/resume/evaluate").exists()
    make()
    assert make.ran == ["new", "new"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("evaluate: {steps: 2}\nreport: 0", r"evaluate\.steps in params\.yaml changed while"),
        ("report: 0", r"evaluate\.steps in params\.yaml changed while"),
        (None, r"/labels changed while"),
        ("evaluate: {steps: 1}\nreport: 1", ""),
    ],
)
@pytest.mark.parametrize("by_dvc", [True, False])
def test_dvc_records_nothing_that_the_stage_has_not_read(
    opened, dvc, tmp_path, monkeypatch, changed, words, by_dvc
):
    """It looks at parameters and inputs when the stage has ended, maybe hours later."""
    if not by_dvc:
        monkeypatch.delenv("DVC_STAGE")
    params, labels, out = tmp_path / "params.yaml", tmp_path / "labels", tmp_path / "out"
    (tmp_path / "dvc.yaml").write_text(
        "stages: {evaluate: {params: [evaluate.steps], deps: [labels]}}"
    )
    before = "evaluate: {steps: 1}\nreport: 0"
    (masks := tmp_path / "masks").mkdir()
    ran = []

    def run(*edits):
        with opened(reads={"labels": labels, "masks 1": masks}) as here:
            ran.append(here.resume)
            here.publish({"out": "out"})
            (here.resume / "out").write_text("figures")
            # As publishing of another stage does.
            os.link(labels, tmp_path / f"link{len(ran)}")
            for path, text in edits:
                path.write_text(text)

    params.write_text(before)
    labels.write_text("old")
    edit = (labels, "new") if changed is None else (params, changed)
    if words and by_dvc:
        with pytest.raises(UserError, match=words) as told:
            run(edit)
        assert len(str(told.value)) < 300 and not out.exists()
        # Nothing is lost.
        params.write_text(before)
        labels.write_text("old")
        run()
        assert ran[0] == ran[1]
    else:
        # Of these DVC records nothing.
        run(edit, (masks / "new", "drawn"))
    assert out.read_text() == "figures"


def test_equal_outs_of_an_earlier_record_are_no_record_of_this_run(make, dvc, tmp_path):
    """Other code or parameters gave the same files."""
    make()
    dvc()
    stage._look_after(tmp_path / ".isim", tmp_path, ("masks",))
    make()
    stage._look_after(tmp_path / ".isim", tmp_path, ("evaluate",))
    with pytest.raises(stage.Published):
        make()
    dvc(params="b")
    stage._look_after(tmp_path / ".isim", tmp_path, ("masks",))
    assert not (tmp_path / ".isim/resume/evaluate").exists()


def test_another_run_and_a_changed_copy_are_not_published_again(make, dvc, tiny, tmp_path):
    make()
    make("other", params=changed(tiny.evaluate, threshold=0.25))
    assert len(list((tmp_path / ".isim/resume/evaluate").iterdir())) == 1
    make()
    # An out that somebody wrote into: the file is the same.
    (tmp_path / "data/cams/a/b").write_text("mine")
    make()
    assert make.ran == ["new", "other", "new", "new"]
    with pytest.raises(stage.Published):
        make()
    assert project_of(tmp_path) == OUTS


def test_a_run_that_is_under_way_is_left_alone(make, dvc, tmp_path):
    make()
    dvc()
    with FileLock(tmp_path / ".isim/evaluate.lock"):
        stage._look_after(tmp_path / ".isim", tmp_path, ("masks",))
        assert (tmp_path / ".isim/resume/evaluate").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), MemoryError(), ValueError("odd\nname")]
)
def test_a_picture_that_cannot_be_drawn_costs_nothing_else(opened, tmp_path, caplog, error):
    with opened() as here:
        for name in ("a.png", "b.png"):
            with here.drawing(name) as path:
                path.write_text("picture")
                if name == "a.png":
                    path.unlink()
                    raise error
        here.table("rows", [{"a": 1}])
    found = {path.name for path in (tmp_path / "reports/evaluate").rglob("*")}
    assert found == {"pictures", "b.png", "rows.csv"}
    (line,) = caplog.messages
    assert line.startswith("evaluate: picture a.png is left out: ") and "\n" not in line


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


def test_mlflow_is_told_the_device_figures_and_tables(opened, recorder, tmp_path, tiny):
    rows, told = [{"class": "a", "iou": 0.5}, {"class": "b", "iou": 1.0}], []
    recorder.table = recorder.tag = lambda *given: told.append(given)
    with opened() as here:
        assert here.tracked is recorder and here.name == "evaluate"
        here.log("val", {"miou": 0.5})
        here.log("", {"miou": 0.25}, step=2)
        here.log_epoch([{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5}])
        here.table("per_class", rows)
    written = read_rows(tmp_path / "reports/evaluate/per_class.csv")
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
    folder = tmp_path / "reports/evaluate/pictures"
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
