"""Preset files: the base, what they may hold, and values laid over a commented tree."""

import pytest
from ruamel.yaml import YAML

from isim import params
from isim.experiments import overlay
from isim.params import flatten


def commented(text):
    return YAML(typ="rt").load(text)


def test_the_base_is_complete_and_written_as_it_stands():
    text = (overlay.FOLDER / "base.yaml").read_text()
    params.validate(overlay.plain(text), "base.yaml")
    assert overlay.dump(commented(text)) == text


@pytest.mark.parametrize("name", overlay.names())
def test_a_preset_file_holds_what_differs_from_the_base_alone(name):
    base, own = (
        flatten(overlay.plain((overlay.FOLDER / f"{file}.yaml").read_text()))
        for file in ("base", name)
    )
    assert [key for key in own if base[key] == own[key]] == []
    assert flatten(overlay.plain(overlay.dump(overlay.tree(name)))) == base | own


BEFORE = """\
# first
plain: 1  # beside
rates: [6]
# after a list
next:
  inner: 2
  other: 3

# last: what follows a list of mappings is lost
sets:
  - name: a
  - name: b
"""
# What lines of it become; `new` is added.
CHANGES = {
    "plain: 1": "plain: 2",
    "rates: [6]": "rates:\n  - 1\n  - 2",
    "inner: 2": "inner: x",
    "  - name: a\n  - name: b": "  - name: c\nnew:\n  - 0.5",
}


def test_values_are_laid_over_a_tree_and_its_comments_stay():
    tree = commented(BEFORE)
    values = {"plain": 2, "rates": [1, 2], "next": {"inner": "x"}, "sets": [{"name": "c"}]}
    overlay.merge(tree, values | {"new": [0.5]})
    after = BEFORE
    for old, new in CHANGES.items():
        after = after.replace(old, new)
    assert overlay.dump(tree) == after
