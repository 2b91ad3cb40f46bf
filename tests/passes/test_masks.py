"""Passes of the final masks: an interrupted one goes on, whatever computes the label maps."""

import numpy as np
import pytest

from isim.data import files
from isim.errors import UserError
from isim.passes import masks
from isim.passes.journal import Journal
from isim.passes.kept import Kept
from isim.passes.masks import Writer
from isim.passes.photographs import BySegmenter, ByTags


@pytest.fixture
def passes(items, stored, models, tiny, here):
    """The three passes by name: each takes a writer."""
    side = {"side": 48, "scales": (1.0,), "flip": True}
    by_tags, by_segmenter = (
        kind(here, *models[name], **side)
        for kind, name in ((ByTags, "cam"), (BySegmenter, "deeplabv2"))
    )
    labels = {item.id: stored / f"{item.id}.png" for item in items}
    kept = Kept(here, "masks", {})
    return {
        "copied": lambda write: masks.copied(kept, items, labels, write),
        "by_tags": lambda write: masks.by_tags(kept, items, by_tags, write),
        "by_segmenter": lambda write: masks.by_segmenter(kept, items, by_segmenter, write),
    }


@pytest.fixture
def writer(tiny, tmp_path):
    return Writer(tiny.masks, 4, tmp_path / "masks")


@pytest.mark.parametrize("name", ["copied", "by_tags", "by_segmenter"])
def test_a_pass_goes_on_and_its_lines_count_what_lies_there(
    name, passes, writer, items, monkeypatch
):
    add, added = Journal.add, []

    def add_three(journal, line, most=3):
        if len(added) == most:
            raise UserError("cannot write")
        added.append(line["id"])
        add(journal, line)

    monkeypatch.setattr(Journal, "add", add_three)
    with pytest.raises(UserError, match="cannot write"):
        passes[name](writer)
    monkeypatch.setattr(Journal, "add", lambda *given: add_three(*given, most=99))
    lines = passes[name](writer)
    assert sorted(added) == sorted(item.id for item in items), "each was finished once"
    assert [line["id"] for line in lines] == [item.id for item in items]
    for item, line in zip(items, lines, strict=True):
        label = files.read_label_map(writer.folder / f"{item.id}.png")
        assert label.shape == files.image_size(item.image) and line["empty"] == (not label.any())
        allowed = {0, *item.class_ids.tolist()} if name == "by_tags" else set(range(4))
        assert set(np.unique(label)) <= allowed
        assert line["parts_after"] <= line["parts_before"]
