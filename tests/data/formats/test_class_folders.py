"""Folders of classes, and of splits above them."""

from isim.data.formats import class_folders


def test_the_first_folder_is_the_class_and_the_rest_has_none():
    found = class_folders.read(["cat/1", "cat/old/2", "None/3", "4"])
    assert {row.image: row.labels for row in found.rows} == {
        "cat/1": ("cat",),
        "cat/old/2": ("cat",),
        "None/3": (),
    }


def test_files_of_one_name_and_content_are_one_image(tmp_path):
    images = {}
    for id_, text in {"a/1": "x", "b/1": "x", "c/1": "y", "b/2": "x", "c/2": "x"}.items():
        images[id_] = tmp_path / f"{id_}.jpg"
        images[id_].parent.mkdir(exist_ok=True)
        images[id_].write_text(text)
    assert class_folders.copies(images) == {"b/1": "a/1", "c/2": "b/2"}


def test_splits_are_so_only_if_all_folders_are():
    found = class_folders.read(["Train/cat/1", "val/dog/2", "val/3"])
    assert [(row.image, row.labels, row.split) for row in found.rows] == [
        ("Train/cat/1", ("cat",), "train"),
        ("val/dog/2", ("dog",), "val"),
    ]
    assert found.notes == ("the folders Train, val are splits",)
    found = class_folders.read(["train/1", "bus/2"])
    assert [row.labels for row in found.rows] == [("train",), ("bus",)]


def test_splits_beside_other_folders_are_no_classes():
    (problem,) = class_folders.read(["train/cat/1", "Val/cat/2", "new/3"]).problems
    assert problem.error
    assert problem.what.startswith("the folders Val, train are splits only if there are no others")
    assert class_folders.read(["train/1", "bus/2", "training/3"]).problems == ()
    (first,) = class_folders.read(["train/cat/1", "train/dog/2", "new/3"]).problems
    assert first.error and first.what.startswith("the folder train is a split only if there are no")


def test_a_class_that_is_called_as_a_split_may_have_folders_as_others_have():
    for ids in (["bus/day/1", "train/day/2", "car/night/3"], ["train/old/1", "bus/day/2", "car/3"]):
        found = class_folders.read(ids)
        assert [row.labels for row in found.rows] == [(id_.split("/")[0],) for id_ in ids]
        (problem,) = found.problems
        assert problem.kind == "folders in those of classes" and not problem.error
    # Its folders are classes where others have their names.
    (problem,) = class_folders.read(["train/cat/1", "cat/day/2", "dog/3"]).problems
    assert problem.kind == "splits beside other folders" and problem.error


def test_folders_in_those_of_classes_are_told():
    (problem,) = class_folders.read(["a/cat/1", "a/dog/2", "b/3"]).problems
    assert not problem.error and problem.what.startswith("2 images lie in further folders, such as")
    assert class_folders.read(["train/cat/1", "val/dog/2"]).problems == ()


def test_background_is_no_class():
    (problem,) = class_folders.read(["cat/1", "background/2"]).problems
    assert problem.error and "`background` is no class; call it `none` if" in problem.what
