"""Bad input of every stage: one line that says what to do, and outs as they were.

Errors of networks and their weights are tested in tests/models, those of files in tests/data.
"""

import json
import shutil

import numpy as np
import pytest
from support.projects import items_of, read_rows

from isim.data.files import write_label_map
from isim.errors import UserError
from isim.params import Params

TRAININGS = ("train_cam", "train_affinity", "train_segmenter")
STAGES = (*TRAININGS, "export_cams", "random_walk", "masks", "evaluate")


def without(name):
    def remove(root):
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def cut_an_image(root):
    items_of(root)[3].image.write_bytes(b"\xff\xd8 nothing")


def swap_cams(root):
    """Put a CAM of the same size, but other classes, in the place of the first one."""
    items, folder = items_of(root), root / "data/cams/train"
    other = next(i for i in items if (i.image_label != items[0].image_label).any())
    shutil.copy(folder / f"{other.id}.npz", folder / f"{items[0].id}.npz")


def labels(root):
    return sorted((root / "data/pseudo_labels/round_02").glob("*.png"))


def keep_one_label(root):
    for path in labels(root)[1:]:
        path.unlink()


def put_other_classes(root):
    write_label_map(labels(root)[3], np.full((64, 64), 6, np.uint8))


def add_unlabelled_split(root):
    """Make an image that has no labels the split `test`."""
    folder = root / "data/prepared"
    about = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(about | {"splits": {"train": 16, "test": 1}}))
    image = read_rows(folder / "val.csv")[0]["image"]
    (folder / "test.csv").write_text(f"id,image,mask\nnew,{image},\n")
    with (folder / "labels.csv").open("a") as file:
        file.write("new,,0\n")


# Those of splits whose image labels are needed; train_segmenter tests others, too.
SPLITS = [
    (stage, name, ("train", "test") if name == "splits" else "test")
    for stage, field in Params.model_fields.items()
    for name in ("split", "eval_split", "splits")
    if name in getattr(field.annotation, "model_fields", ())
]
# Stage, what is done to the project, other parameters, words of the error.
BAD_INPUT = [
    *((stage, without("data/prepared"), {}, "run `isim prepare` first") for stage in STAGES),
    *((stage, None, {"weights": "gone"}, f"{stage}.weights: no file ") for stage in TRAININGS),
    *(
        (stage, add_unlabelled_split, {name: value}, "image labels of split 'test' are unknown")
        for stage, name, value in SPLITS
    ),
    *(
        (stage, cut_an_image, {}, " is unreadable")
        for stage in (*TRAININGS, "random_walk", "masks")
    ),
    *((stage, swap_cams, {}, "other classes than") for stage in ("train_affinity", "evaluate")),
    ("train_cam", None, {"batch": 1}, "train_cam.batch: the decoder's batch statistics"),
    ("train_cam", add_unlabelled_split, {}, "no split 'val'"),
    ("export_cams", without("models/train_cam"), {}, "run `isim train-cam` first"),
    ("train_affinity", without("data/cams/train"), {}, "add train to export_cams.splits"),
    ("train_affinity", without("models"), {"weights": "train_cam"}, "run `isim train-cam` first"),
    ("random_walk", without("data/cams/train"), {}, "add train to export_cams.splits"),
    ("random_walk", without("models"), {}, "run `isim train-affinity` first"),
    ("train_segmenter", without("data/pseudo_labels"), {}, "run `isim train-cam` first"),
    (
        "train_segmenter",
        keep_one_label,
        {},
        "train_segmenter.batch: the decoder's batch statistics",
    ),
    ("train_segmenter", put_other_classes, {}, "holds label 6 of 0..5"),
    ("masks", without("data/pseudo_labels"), {}, "run `isim train-cam` first"),
    ("masks", without("models/train_cam"), {}, "run `isim train-cam` first"),
    ("masks", put_other_classes, {"labels": "round_02"}, "holds label 6 of 0..5"),
    ("evaluate", without("data/cams"), {}, "holds no CAMs; run `isim export-cams` first"),
    ("evaluate", without("data/cams/val/val_00003.npz"), {}, "val_00003.npz is missing"),
    ("evaluate", lambda root: (root / "data/cams/old").mkdir(), {}, "no split 'old'"),
]


@pytest.mark.parametrize(("name", "spoil", "changes", "words"), BAD_INPUT)
def test_bad_input_is_one_line_and_changes_no_out(name, spoil, changes, words, finished, run):
    def outs():
        files = (path for path in finished.rglob("*") if ".isim" not in path.parts)
        return {path: path.stat().st_mtime_ns for path in files}

    if spoil:
        spoil(finished)
    before = outs()
    label_set = ["round_02"] if name == "train_segmenter" else []
    with pytest.raises(UserError) as caught:
        run(name, finished, *label_set, **changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert outs() == before
