"""Outs of a finished stage: links where there can be such, and marks that tell the truth."""

import json
import os

import pytest

from isim.runtime import finished, identity
from isim.runtime.finished import Finished


@pytest.fixture
def state(tmp_path):
    """A state with a folder and a file, its folder, and the project of it."""
    folder, root = tmp_path / ".isim/resume/masks/key", tmp_path / "project"
    (folder / "maps/deep").mkdir(parents=True)
    (folder / "maps/deep/a.png").write_bytes(b"map")
    (folder / "maps/deep/a.png").chmod(0o640)
    (folder / "table.csv").write_bytes(b"a\n1\n")
    root.mkdir()
    outs = {"data/masks": "maps", "reports/masks/table.csv": "table.csv"}
    return Finished(str(root), outs, ["reports/masks/pictures"], []), folder, root


def no_links(*_):
    raise OSError(18, "Invalid cross-device link")


@pytest.mark.parametrize("linked", [True, False])
def test_outs_are_links_or_else_copies_with_the_same_contents_and_modes(state, monkeypatch, linked):
    made, folder, root = state
    (root / "reports/masks/pictures").mkdir(parents=True)
    if not linked:
        monkeypatch.setattr(os, "link", no_links)
    made.publish(folder)
    pairs = {"data/masks/deep/a.png": "maps/deep/a.png", "reports/masks/table.csv": "table.csv"}
    for out, source in pairs.items():
        one, other = (root / out).stat(), (folder / source).stat()
        assert (one.st_ino == other.st_ino) == linked and one.st_mode == other.st_mode
        assert (root / out).read_bytes() == (folder / source).read_bytes()
    assert {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} == pairs.keys()
    assert not (root / "reports/masks/pictures").exists()


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"root": 1, "more": 2}', "\x00"])
def test_a_damaged_mark_is_none(state, text):
    made, folder, _ = state
    assert Finished.read(folder) is None
    made.write(folder)
    assert Finished.read(folder) == made
    if text is not None:
        (folder / "finished.json").write_text(text)
        assert Finished.read(folder) is None and list(finished.states(folder.parents[1])) == []


def test_states_of_stages_and_label_sets_are_found(tmp_path):
    whole = ("masks/key", "train_segmenter/last_round/key")
    for name in (*whole, "masks/.removing-key", "masks/key/maps/deep/deeper"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        Finished("", {}, [], []).write(folder)
    found = [folder.relative_to(tmp_path).as_posix() for folder, _ in finished.states(tmp_path)]
    assert found == list(whole)


def lock(root, outs, **more):
    found = [{"path": path, "md5": md5} for path, md5 in outs.items()]
    (root / "dvc.lock").write_text(json.dumps({"stages": {"masks": {"outs": found, **more}}}))


def other_outs(root, outs):
    lock(root, outs | {"data/masks": "0.dir"})


def nothing(root, outs):
    pass


def damaged(root, outs):
    (root / "dvc.lock").write_text("stages: [")


def equal(root, outs):
    lock(root, outs)


def equal_and_more(root, outs):
    lock(root, outs | {"not/of/isim": "1"}, cmd="python -m isim masks")


@pytest.mark.parametrize(
    ("record", "recorded"),
    [
        (nothing, False),
        (damaged, False),
        (other_outs, False),
        (equal, True),
        (equal_and_more, True),
    ],
)
@pytest.mark.parametrize("address", ["masks", "deeper/dvc.yaml:masks"])
def test_outs_are_recorded_when_dvc_lock_has_come_to_hold_them(
    state, monkeypatch, address, record, recorded
):
    made, folder, root = state
    monkeypatch.setenv("DVC_STAGE", address)
    made.publish(folder)
    made.settle(folder)
    digests = {out: identity.md5(root / out) for out in made.outs}
    assert not made.is_recorded()
    record(root, digests)
    assert Finished.read(folder).is_recorded() == recorded
    # What DVC knew before the stage ran is no record of it.
    made.settle(folder)
    assert not made.is_recorded()


def test_what_is_held_goes_with_the_state(state, tmp_path):
    made, folder, root = state
    pinned = tmp_path / "began"
    pinned.touch()
    made.held = [str(pinned), str(tmp_path / "gone")]
    made.write(folder)
    finished.drop_others(folder.parent, root, "other")
    assert pinned.exists() and folder.exists(), "not settled: a run goes on there"
    made.settled = True
    made.write(folder)
    finished.drop_others(folder.parent, root, "key")
    finished.drop_others(folder.parent, tmp_path / "a copy of the project", "other")
    assert pinned.exists() and folder.exists()
    finished.drop_others(folder.parent, root, "other")
    assert not pinned.exists() and not folder.exists()


def test_what_a_killed_run_made_is_published_once(state):
    """What a later run of other parameters has put there stays."""
    made, folder, root = state
    base = folder.parents[1]
    made.write(folder)
    finished.look_after(base, root, lambda _: True)
    out = root / "data/masks/deep/a.png"
    assert out.read_bytes() == b"map" and (folder / "maps/deep/a.png").exists()
    out.unlink()
    out.write_bytes(b"newer")
    finished.look_after(base, root, lambda _: True)
    assert out.read_bytes() == b"newer"


@pytest.mark.parametrize("settled", [True, False])
def test_states_of_copies_of_the_project_go_with_them(state, tmp_path, settled):
    made, folder, root = state
    copy = tmp_path / "copy"
    made.root, made.settled = str(copy), settled
    made.write(folder)
    copy.mkdir()
    finished.look_after(folder.parents[1], root, lambda _: True)
    assert list(finished.states(folder.parents[1])), "it may still run"
    copy.rmdir()
    finished.look_after(folder.parents[1], root, lambda _: True)
    assert not list(finished.states(folder.parents[1])) and folder.exists() != settled
    assert not (root / "data").exists()
