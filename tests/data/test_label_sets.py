"""Label sets: the file of each image's label map, or one line that tells how to get them."""

from pathlib import Path

import pytest

from isim.data import label_sets, prepared
from isim.data.prepared import Item
from isim.errors import UserError

ITEMS = [Item(name, Path("i"), Path(f"{name}.png"), None) for name in "cab"]


def put(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


@pytest.mark.parametrize(
    ("name", "folder", "stage"),
    [
        ("seeds", "data/cams/train", "export-cams"),
        ("random_walk", "data/random_walk/train", "random-walk"),
        ("random_walk_crf", "data/random_walk/train_crf", "random-walk"),
        ("round_02", "data/pseudo_labels/round_02", "train-cam"),
        ("last_round", "data/pseudo_labels/round_01", "train-cam"),
    ],
)
def test_files_in_order_of_the_items_or_the_stage_to_run(tmp_path, name, folder, stage):
    suffix = ".npz" if name == "seeds" else ".png"
    remedy = f"run `isim {stage}` first, for split 'train'"
    remedy += ", with crf_after: true" if name.endswith("_crf") else ""
    none = "none of the 3 images of split 'train' has a label map"
    for told in (f"{tmp_path / folder} is missing", none):
        with pytest.raises(UserError) as caught:
            label_sets.sources(name, "train", ITEMS, tmp_path)
        assert str(caught.value) == f"label set '{name}': {told}; {remedy}"
        put(tmp_path / folder, f"other{suffix}", f".b{suffix}", "b.txt")
    put(tmp_path / folder, f"a{suffix}", f"c{suffix}")
    found = label_sets.sources(name, "train", ITEMS, tmp_path)
    assert list(found.items()) == [(id_, tmp_path / folder / f"{id_}{suffix}") for id_ in "ca"]


def test_ground_truth_is_the_masks_that_there_are(tmp_path):
    items = [*ITEMS, Item("d", Path("i"), None, None)]
    found = label_sets.sources("ground_truth", "train", items, tmp_path)
    assert found == {name: Path(f"{name}.png") for name in "cab"}
    with pytest.raises(UserError, match=r"none of the 1 images of split 'val' .*give the images"):
        label_sets.sources("ground_truth", "val", items[-1:], tmp_path)


def test_ids_may_have_folders(tmp_path):
    items = [Item(name, Path("i"), None, None) for name in ("s/t/a", "s/b", "a")]
    for folder in ("s/t", "s/.ipynb_checkpoints", "x"):
        put(tmp_path / "data/random_walk/train" / folder, "a.png", "b.png")
    found = label_sets.sources("random_walk", "train", items, tmp_path)
    assert found == {"s/t/a": tmp_path / "data/random_walk/train/s/t/a.png"}


def test_the_last_round_is_the_one_of_the_highest_number(tmp_path):
    for name in ("round_02", "round_99", "round_100", "round_x", "rounds"):
        put(tmp_path / "data/pseudo_labels" / name, "a.png")
    found = label_sets.sources("last_round", "train", ITEMS, tmp_path)
    assert found == {"a": tmp_path / "data/pseudo_labels/round_100/a.png"}


def test_maps_to_start_from_are_there_for_all_or_the_first_that_is_not_is_named(tmp_path):
    put(tmp_path, "a.png", "b.png", "c.png")
    label_sets.require_maps(tmp_path, ITEMS)
    (tmp_path / "a.png").unlink()
    words = rf"^train_cam\.start: {tmp_path} has no label map of 1 of 3 images, such as a\.png; "
    with pytest.raises(UserError, match=words):
        label_sets.require_maps(tmp_path, ITEMS)


def test_a_label_set_is_looked_for_in_all_splits(finished_project):
    splits = prepared.load(finished_project).splits
    found = label_sets.available("last_round", splits, finished_project)
    assert found.keys() == {item.id for item in splits["train"]}
    every = label_sets.available("ground_truth", splits, finished_project)
    assert every.keys() == {item.id for items in splits.values() for item in items}
    with pytest.raises(UserError, match="label set 'round_09'"):
        label_sets.available("round_09", splits, finished_project)
