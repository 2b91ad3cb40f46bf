"""Results that are kept: found again by content, the same to the byte, never a damaged one."""

import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from isim.errors import UserError
from isim.passes import kept
from isim.passes.kept import Kept
from isim.runtime.here import Here

EVERY = [f"0{number}" for number in range(7)]


@pytest.fixture
def keep(items, tmp_path, capsys):
    """A function that runs a pass: the ids that were computed, its lines, and all files.

    Each is a run of its own, which finds nothing but what is kept.
    """
    runs = iter(range(100))

    def keep(items=items, depends="a", own=None):
        here = Here(tmp_path / f".isim/resume/{next(runs)}", "fp32")
        outs, computed = {here.resume / name: ".png" for name in ("one", "two")}, []

        def finish(item):
            computed.append(item.id)
            for folder in outs:
                (folder / f"{item.id}.png").write_bytes(folder.name.encode() + b"\n" + bytes(9))
            return {"counts": [(0, 3)], "mean": 0.1, "nan": float("nan")}

        passed = Kept(here, depends, {}, own).image(items, finish, name="train", outs=outs)
        assert passed.computed == len(computed)
        files = {(f.name, i.id): (f / f"{i.id}.png").read_bytes() for f in outs for i in items}
        # JSON knows no tuples.
        lines = str(passed.lines).translate(str.maketrans("()", "[]"))
        again, count = re.findall(r"(\d+) of (\d+) label maps", capsys.readouterr().out)[-1]
        assert (int(again), int(count)) == (len(items) - len(computed), len(items))
        return sorted(computed), lines, files

    return keep


def results(tmp_path):
    return sorted(path for path in (tmp_path / ".isim/results").rglob("*") if path.is_file())


def test_new_images_alone_are_computed_and_all_is_the_same(keep, items, tmp_path):
    assert keep(items[:5])[0] == EVERY[:5]
    computed, *grown = keep()
    assert computed == EVERY[5:] and len(results(tmp_path)) == 7
    shutil.rmtree(tmp_path / ".isim/results")
    computed, *anew = keep()
    assert computed == EVERY and anew == grown


def test_an_image_is_known_by_its_content(keep, items, tmp_path):
    keep(items)
    copy = replace(items[1], id="copy", image=tmp_path / "renamed.png")
    shutil.copy(items[1].image, copy.image)
    assert keep([*items, copy])[0] == []
    shutil.copy(items[4].image, copy.image)
    assert keep([copy])[0] == ["copy"]


@pytest.mark.parametrize(
    "changes", [{"mask": None}, {"image_label": None}, {"image_label": np.zeros(3, np.float32)}]
)
def test_its_mask_and_tags_belong_to_it(changes, keep, items):
    keep(items)
    assert keep([replace(items[0], **changes), *items[1:]])[0] == EVERY[:1]


def test_what_results_depend_on_keeps_them_apart(keep):
    keep()
    assert keep(depends="b")[0] == keep(own=lambda item: item.id)[0] == EVERY
    assert keep()[0] == keep(depends="b")[0] == []


def test_damaged_ones_are_told_and_computed_again(keep, tmp_path, monkeypatch):
    _, *expected = keep()
    told = []
    monkeypatch.setattr(
        kept.progress, "tell", lambda line, tell=kept.progress.tell: told.append(line) or tell(line)
    )
    first, *others = results(tmp_path)
    whole = first.read_bytes()
    for content in (b"", whole[:-1], whole[:70], whole + b"\n", others[0].read_bytes(), b"\xff"):
        first.write_bytes(content)
        told.clear()
        computed, *found = keep()
        assert len(computed) == 1 and found == expected
        assert told[0] == "isim: 1 damaged results are computed again"
        assert first.read_bytes() == whole
    first.unlink()
    assert len(keep()[0]) == 1 and len(told) == 3


def test_those_used_least_recently_are_deleted(keep, items, tmp_path, monkeypatch):
    keep()
    for path in results(tmp_path):
        os.utime(path, (1, 1))
    keep(items[:3])
    size = max(path.stat().st_size for path in results(tmp_path))
    monkeypatch.setattr(kept, "LIMIT", 4 * size)
    keep(items[:3])
    assert 3 <= len(results(tmp_path)) <= 4
    assert keep(items[:3])[0] == []


def test_what_cannot_be_kept_is_told_and_the_results_are_there(keep, monkeypatch, tmp_path):
    told, write = [], kept.atomic.write_bytes

    def full(path, content):
        if "results" in path.parts:
            raise UserError("no space left")
        write(path, content)

    monkeypatch.setattr(kept.atomic, "write_bytes", full)
    monkeypatch.setattr(
        kept.progress, "tell", lambda line, tell=kept.progress.tell: told.append(line) or tell(line)
    )
    assert keep()[0] == EVERY and results(tmp_path) == []
    assert told[-1] == "isim: 7 are not kept: no space left"


def test_a_result_that_vanishes_meanwhile_ends_the_run_with_a_line(keep, items, monkeypatch):
    keep()
    read, found = Kept._read, []

    def once(self, item, count):
        found.append(item.id)
        if found.count(item.id) > 1:
            raise ValueError("changed")
        return read(self, item, count)

    monkeypatch.setattr(Kept, "_read", once)
    with pytest.raises(UserError, match="was deleted or changed meanwhile; run the same command"):
        keep(items[:1])


def test_parameters_code_and_inputs_count(here, tiny, monkeypatch):
    def depends(params=tiny.masks, here=here, **given):
        return Kept.on(here, params, {"pictures"}, digests={}, **given).depends

    first = depends(network="a")
    assert first == depends(tiny.masks.model_copy(update={"pictures": 77}), network="a")
    different = [
        depends(network="b"),
        depends(tiny.masks.model_copy(update={"least_area": 0.5}), network="a"),
        depends(here=Here(here.resume, "bf16"), network="a"),
    ]
    monkeypatch.setattr(kept, "version", lambda name: "9")
    different.append(depends(network="a"))
    monkeypatch.undo()
    monkeypatch.setenv("ISIM_CRF", "pydensecrf")
    different.append(depends(network="a"))
    monkeypatch.undo()
    monkeypatch.setattr(kept.identity, "of_code", lambda stage: "other")
    different.append(depends(network="a"))
    assert len({first, *different}) == 7
