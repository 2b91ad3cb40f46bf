"""Val is drawn so that growing data moves no image, and every class stays in train."""

from hypothesis import given
from hypothesis import strategies as st

from isim.data.sources import splits

LABELS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=6), st.sets(st.sampled_from("xyz")), max_size=40
)


@given(LABELS, st.floats(0.01, 0.99), st.integers(0, 9), st.data())
def test_val_is_drawn_and_leaves_every_class_in_train(labels, fraction, seed, data):
    masked = data.draw(st.sets(st.sampled_from(sorted(labels)))) if labels else set()
    val = splits.draw(labels, masked, fraction, seed)
    assert val == splits.draw(dict(reversed(labels.items())), masked, fraction, seed)
    assert val <= labels.keys()
    assert len(val) < len(labels) or not labels
    for name in "xyz":
        having = {id_ for id_, names in labels.items() if name in names}
        assert not having or having - val


@given(LABELS, LABELS, st.data())
def test_further_images_take_none_out_of_val(labels, more, data):
    masked = data.draw(st.sets(st.sampled_from(sorted(labels)))) if labels else set()
    before = splits.draw(labels, masked, 0.3, 0)

    def is_drawn(id_):
        """Not the one that val has where none has a low hash and can be spared."""
        place = splits._place(id_, 0), id_
        above = [
            names for other, names in labels.items() if (splits._place(other, 0), other) > place
        ]
        return place[0] < 0.3 and set().union(*above) >= labels[id_]

    stay = {id_ for id_ in before if is_drawn(id_)}
    more = labels | {f"new {id_}": names for id_, names in more.items()}
    after = splits.draw(more, masked, 0.3, 0)
    assert stay <= after
    assert sum(splits._place(id_, 0) >= 0.3 for id_ in after) <= 1


def test_val_is_drawn_among_the_images_with_masks_if_there_are_any():
    labels = {f"{number:03d}": {"x"} for number in range(400)}
    before = splits.draw(labels, (), 0.3, 1)
    masked = set(sorted(labels)[:100])
    assert splits.draw(labels, masked, 0.3, 1) == before & masked
    first = min(labels.keys() - before, key=lambda id_: splits._place(id_, 1))
    assert splits.draw(labels, {first}, 0.3, 1) == {first}


def test_further_images_move_none():
    many = {f"{number:03d}": {"x"} for number in range(400)}
    before = splits.draw(dict(list(many.items())[:200]), (), 0.3, 1)
    after = splits.draw(many, (), 0.3, 1)
    assert before == {id_ for id_ in after if id_ < "200"}
    assert 80 < len(after) < 160
    assert after != splits.draw(many, (), 0.3, 2)
    assert splits.draw(many, (), 0, 1) == set()


def test_the_last_images_of_a_class_are_not_held_out():
    rare = {"one": {"rare", "x"}} | {f"{number}": {"x"} for number in range(20)}
    assert all("one" not in splits.draw(rare, (), 0.9, seed) for seed in range(20))
