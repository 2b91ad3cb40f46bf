"""What comes after `isim init` is used, or told with what to set."""

import shutil

import pytest
from support.photos import put

from isim.experiments import overlay, preset
from isim.project import choices, growth
from isim.project.choices import Wishes

pytestmark = pytest.mark.usefixtures("bare_machine")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return put(tmp_path_factory.mktemp("photos") / "made", 12, masks=True)


def told(params, root):
    return growth.lines(params, growth.of_source(choices.look(params.prepare, root)))


def chosen(photos, tmp_path, *settings, without=()):
    """Parameters that init chooses for a copy of the photographs without some folders or images."""
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    for path in [path for pattern in without for path in root.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    there = {"image", *(path.name for path in (root / "images").iterdir())}
    rows = (root / "labels.csv").read_text().splitlines(keepends=True)
    (root / "labels.csv").write_text("".join(r for r in rows if r.partition(",")[0] in there))
    made = choices.make(Wishes(root, settings=settings), tmp_path / "project")
    assert told(made.params, tmp_path) == []
    return made.params, root


def again(root, photos):
    shutil.rmtree(root)
    shutil.copytree(photos, root)


def test_masks_that_came_later(photos, tmp_path):
    params, root = chosen(photos, tmp_path, without=["masks"])
    again(root, photos)
    (line,) = told(params, tmp_path)
    assert "images of train have a mask" in line and "ground_truth, path: data/prepared" in line
    trusting = params.train_segmenter.model_copy(update={"trust_masks": True})
    sets = preset.parameters("tiny").label_sets
    for change in ({"train_segmenter": trusting}, {"label_sets": sets}):
        assert told(params.model_copy(update=change), tmp_path) == []


def test_a_first_image_of_val(photos, tmp_path):
    few = [f"*/photo_{number:02d}.*" for number in range(4, 12)]
    params, root = chosen(photos, tmp_path, without=["masks", *few])
    assert params.prepare.val_fraction == 0
    again(root, photos)
    shutil.rmtree(root / "masks")
    (line,) = told(params, tmp_path)
    assert "none of 12 images is held out" in line and "prepare.val_fraction" in line
    (root / "val.txt").write_text("photo_01\n")
    lines = told(params, tmp_path)
    assert [line.partition(";")[2].strip() for line in lines] == [
        "set it to val", "add it to export_cams.splits", "add it to train_segmenter.eval_splits"
    ]  # fmt: skip


def test_a_first_image_of_unknown_tags(photos, tmp_path):
    params, root = chosen(photos, tmp_path)
    shutil.copy(root / "images/photo_00.jpg", root / "images/new.jpg")
    (line,) = told(params, tmp_path)
    assert line.startswith("unlabelled has 1 images, which are not predicted")


def test_what_has_gone(photos, tmp_path):
    params, root = chosen(photos, tmp_path)
    shutil.rmtree(root / "masks")
    (root / "val.txt").write_text("")
    lines = told(params, tmp_path)
    assert [line.partition(",")[0] for line in lines] == [
        "train_cam.eval_split is val",
        "export_cams.splits names val",
        "train_segmenter.eval_splits names val",
        "label_sets names ground_truth",
    ]


def test_a_label_file_beside_the_images(photos, tmp_path):
    params, root = chosen(photos, tmp_path)
    assert growth.unseen_labels(params, tmp_path) == []
    beside = tmp_path / "photos.csv"
    (root / "labels.csv").rename(beside)
    (line,) = growth.unseen_labels(params, tmp_path)
    assert f"set prepare.labels: {beside}, then run `isim upgrade`" in line
    given = params.prepare.model_copy(update={"labels": str(beside)})
    assert growth.unseen_labels(params.model_copy(update={"prepare": given}), tmp_path) == []


def test_other_sources_have_nothing_to_be_told():
    params = preset.parameters("tiny")
    assert growth.lines(params, {"val": [True], "train": [True]}) == []
    assert growth.unseen_labels(params, overlay.FOLDER) == []
