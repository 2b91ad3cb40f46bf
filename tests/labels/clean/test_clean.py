"""Cleaning of label maps: specks, holes, and what must stay."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from isim.labels.clean.clean import clean, count_parts

MAPS = arrays.arrays(
    np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.sampled_from([0, 1, 2])
)
SHARES = st.sampled_from([0.0, 0.02, 0.1, 0.5])


def drawn(*rows):
    """A label map from rows of characters; a dot is background, # is ignored."""
    ids = {".": 0, "#": 255, "1": 1, "2": 2}
    return np.array([[ids[sign] for sign in row] for row in rows], np.uint8)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # A speck in the background; one inside another class; the last part of a class stays.
        (["111..", "111..", "....1"], ["111..", "111..", "....."]),
        (["11211", "11111", "22222"], ["11111", "11111", "22222"]),
        (["11111", "11211", "11111"], ["11111", "11211", "11111"]),
        # Parts that touch at a corner are one.
        (["11...", "11...", "..1.."], ["11...", "11...", "..1.."]),
        # A hole is filled; what is open to the border is none, and a corner is no way out.
        (["11111", "1.111", "11111"], ["11111", "11111", "11111"]),
        (["11.11", "11.11", "11111"], ["11.11", "11.11", "11111"]),
        (["11.11", "1.111", "11111"], ["11.11", "11111", "11111"]),
        # Ignored pixels stay and give no label.
        (["#####", "##1##", "11###"], ["#####", "##1##", "11###"]),
        (["#####", "#1###", "###11"], ["#####", "#1###", "###11"]),
    ],
)
def test_what_is_removed_and_filled(before, after):
    given_ = drawn(*before)
    # Parts of one pixel of 15 are below, two pixels are not.
    assert clean(given_, 1.5 / 15, 1 / 15).tolist() == drawn(*after).tolist()
    assert given_.tolist() == drawn(*before).tolist(), "the argument is as it was"


@given(MAPS, SHARES, SHARES)
def test_no_class_is_lost_or_made_and_a_second_time_changes_nothing(label, least, holes):
    cleaned = clean(label, least, holes)
    assert set(np.unique(label)) - {0} == set(np.unique(cleaned)) - {0}
    assert count_parts(cleaned) <= count_parts(label)
    assert (clean(cleaned, least, holes) == cleaned).all()


@given(MAPS)
def test_with_zeros_nothing_changes(label):
    assert (clean(label, 0, 0) == label).all()


@given(MAPS, SHARES)
def test_parts_that_stay_are_large_or_the_last_of_their_class(label, least):
    cleaned = clean(label, least, 0)
    for value in set(np.unique(cleaned)) - {0}:
        alone = np.where(cleaned == value, cleaned, 0)
        if count_parts(alone) > 1:
            assert (clean(alone, least, 0) == alone).all()
