import pytest

from isim.data.prepared import Item, Prepared
from isim.reporting.page import sources
from isim.reporting.page.sources import Places


@pytest.fixture
def places(tmp_path):
    """A function that makes files below the project, and returns its places."""

    def make(*names, splits=("train", "val")):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return Places(tmp_path, splits)

    return make


ITEM = Item("a/b", "a/b.jpg", None, None)


def below(path, root):
    return None if path is None else path.relative_to(root / "data").as_posix()


def test_the_final_mask_is_that_of_data_masks_or_what_comes_nearest(places, tmp_path):
    assert places("masks/other.png", "cams/train/a/b.npz").mask(ITEM) is None
    for name in (
        "predictions/x/val",
        "random_walk/train",
        "random_walk/train_crf",
        "pseudo_labels/round_09",
        "pseudo_labels/round_10",
        "masks",
    ):
        assert below(places(f"{name}/a/b.png").mask(ITEM), tmp_path) == f"{name}/a/b.png"
    assert below(Places(tmp_path, ["val"]).pseudo_label(ITEM), tmp_path).startswith("pseudo_labels")


def test_a_segmenter_of_true_masks_comes_last_and_after_the_dcrf_first(places, tmp_path):
    names = ("ground_truth/val", "last_round/val", "last_round/val_crf")
    found = places(*(f"predictions/{name}/a/b.png" for name in names)).segmenter(ITEM)
    assert below(found, tmp_path) == "predictions/last_round/val_crf/a/b.png"


def test_steps_are_in_order_and_only_those_that_are_there(places):
    files = ["masks/a/b.png", "random_walk/train/a/b.png", "pseudo_labels/round_02/a/b.png"]
    assert list(places(*files).steps(ITEM)) == ["last round", "random walk", "mask"]
    assert places(*files).cam(ITEM) is None and places("cams/val/a/b.npz").cam(ITEM) is not None


def test_an_image_of_two_splits_is_listed_once():
    a, b = (Item(name, f"{name}.jpg", None, None) for name in "ab")
    data = Prepared(("cat",), {"train": (a,), "trainaug": (b, a)})
    found = sources.images(data)
    assert {id_: splits for id_, (_, splits) in found.items()} == {
        "a": ["train", "trainaug"],
        "b": ["trainaug"],
    }
