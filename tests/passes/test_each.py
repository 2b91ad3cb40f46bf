"""The map over images: once each, whatever is killed, fails, or works beside it."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.images import opened
from support.squares import IDS, ITEMS, LINES, noted, square

from isim.passes import each
from isim.passes.journal import Journal
from isim.runtime.processes import LOST


@pytest.fixture(scope="module")
def run(nursery):
    """A function that squares numbers in processes of their own: their exit codes."""
    return lambda *given, **dies: [r["code"] for r in nursery(*given, function="square", **dies)]


@pytest.mark.parametrize(
    ("moment", "count", "least"),
    [
        ("when a number is renamed", 6, 0),
        ("after a line of a journal", 6, 6),
        ("within a line of a journal", 1, 5),
    ],
)
def test_a_killed_process_loses_only_what_was_in_flight(moment, count, least, run, tmp_path):
    assert run(tmp_path, 1, moment=moment, count=count, victim=0) == [-signal.SIGKILL]
    done = noted(tmp_path)
    assert least <= len(done) <= 6
    assert len(list((tmp_path / "out").iterdir())) <= len(done) + 1 + 2 * 2, "few are in flight"
    assert square(tmp_path)[:2] == (LINES, 12 - len(done))
    assert sorted(noted(tmp_path)) == IDS, "each was finished once"
    assert square(tmp_path)[:2] == (LINES, 0)


def test_several_processes_share_the_images_and_another_number_goes_on(run, tmp_path):
    two, broken = tmp_path / "two", tmp_path / "broken"
    assert run(two, 2) == [0, 0]
    for rank, journal in enumerate(("squares.jsonl", "squares.jsonl.1")):
        assert json.loads((two / f"result{rank}").read_text()) == [LINES, 12]
        assert noted(two, journal) == IDS[rank::2]
    # The second one of three dies: the others, which need it, leave.
    dies = {"moment": "after a line of a journal", "count": 2, "victim": 1}
    assert run(broken, 3, **dies) == [LOST, -signal.SIGKILL, LOST]
    done = len(noted(broken))
    assert done >= 2 and run(broken, 2) == [0, 0]
    assert json.loads((broken / "result1").read_text()) == [LINES, 12 - done]
    assert sorted(noted(broken)) == IDS


def test_ids_may_have_folders(here):
    folder = here.resume / "maps"
    items = [replace(item, id=f"{item.id[-1]}/ä, {item.id}") for item in ITEMS[:4]]

    def finish(item):
        (folder / f"{item.id}.png").parent.mkdir(exist_ok=True)
        (folder / f"{item.id}.png").write_bytes(b"map")
        return {}

    def computed():
        return each.image(here, items, finish, name="nested", outs={folder: ".png"}).computed

    assert (computed(), computed()) == (4, 0)
    (folder / f"{items[2].id}.png").unlink()
    assert computed() == 1


def test_what_is_gone_or_half_there_is_made_again(here):
    outs = {here.resume / "maps": ".png", here.resume / "cams": ".npz"}

    def finish(item):
        for folder, suffix in outs.items():
            (folder / f"{item.id}{suffix}").write_bytes(b"map")
        return {}

    def computed(items=ITEMS[:5]):
        return each.image(here, items, finish, name="a/b", outs=outs).computed

    assert (computed(), computed()) == (5, 0)
    (here.resume / "maps/00.png").unlink()
    (here.resume / "cams/03.npz").rename(here.resume / "cams/.tmp-03.npz")
    assert (computed(), computed()) == (2, 0)
    # A file without a line: killed in between.
    journal = here.resume / "a/b.jsonl"
    journal.write_text(journal.read_text().replace('{"id": "02"}\n', ""))
    assert (computed(), computed(ITEMS[3:7])) == (1, 2)


def test_without_a_name_nothing_is_kept(here):
    passed = each.image(here, ITEMS, lambda item: {"square": int(item.id) ** 2}, name=None)
    assert passed[:2] == (LINES, 12) and not here.resume.exists()
    assert each.Passed([], 6, 2.0).speed == {"seconds": 2.0, "images_per_second": 3.0}


def test_few_images_are_in_flight(here, monkeypatch, items, read_ids):
    monkeypatch.setenv("ISIM_WORKERS", "3")
    torch.set_num_threads(2)
    ahead = []
    monkeypatch.setattr(Journal, "add", lambda *_: ahead.append(len(read_ids) - len(ahead)))
    many = [replace(item, id=f"{number} {item.id}") for number in range(8) for item in items]
    given = {"name": "means", "compute": lambda _, images: [(image[0],) for image in images]}
    lines = each.image(here, many, lambda *_: {}, **given).lines
    # Twice as many as threads wait for the network's results, and as helpers for their files.
    assert max(ahead) <= 1 + 2 * 2 + 2 * 3
    assert [line["id"] for line in lines] == [item.id for item in many]


def test_tensors_arrive_as_arrays_and_a_gpu_computes_on_groups(on_gpu, here, items):
    events = []

    def compute(_, images):
        return [(image[0], None) for image in images]

    def on_group(group, found):
        events.append(len(group))
        return [(red.flip(-1), red) for red, _ in found]

    def finish(item, plane, other):
        events.append(item.id)
        red = opened(item)[0][..., 0]
        assert np.array_equal(plane, red[:, ::-1] if on_gpu else red)
        assert np.array_equal(other, red) if on_gpu else other is None
        return {}

    each.image(here, items, finish, name=None, compute=compute, on_group=on_group)
    # The next group's work is given before the last one's results are waited for.
    ahead = [3, 3, "00", "03", "05", 1, "02", "01", "06", "04"]
    assert events == [event for event in ahead if on_gpu or event not in (1, 3)]
