"""Stage random_walk: a folder of label maps and figures for each split, before and after dCRF."""

import shutil
from dataclasses import replace

import pytest
from PIL import Image
from support import projects
from support.networks import config_of, network_of
from support.sections import changed

from isim.errors import UserError
from isim.models import affinity, cam, common
from isim.passes import walks
from isim.passes.walks import Stored
from isim.reporting import pictures, results
from isim.runtime.here import Here


def test_figures_are_those_of_the_label_maps_and_a_split_inside_is_reported_apart(
    run, finished, recorder
):
    """As train of trainaug; its own CAMs are not needed, and val is no part of train."""
    projects.put_inner_split(finished, 5)
    report = run("random_walk", finished)
    counts = {part: found["images"] for part, found in report.items() if isinstance(found, dict)}
    assert counts == {"train": 16, "inner": 5}
    assert (
        projects.names_in(finished / "data/random_walk") == {"train", "train_crf"} | projects.CARDS
    )
    speed = projects.read_rows(finished / "reports/random_walk/seconds.csv")
    assert [row["split"] for row in speed] == ["", "train"]
    assert all(float(row["seconds"]) >= 0 for row in speed)
    per_class = projects.read_rows(finished / "reports/random_walk/per_class.csv")
    for name, folder in (("walk", "train"), ("walk_crf", "train_crf")):
        for part in counts:
            total = projects.confusion_of(
                projects.items_of(finished, part), finished / "data/random_walk" / folder
            )
            ious = [row[f"{name}_iou"] for row in per_class if row["split"] == part]
            projects.assert_figures(f"{name}_", total, report[part], ious)
    for part in counts:
        told = {name: recorder.figures[f"{part}_{name}", None] for name in report[part]}
        assert told == pytest.approx(report[part], nan_ok=True)
    # Image, ground truth, CAM, walk, walk + dCRF.
    strips = list((finished / "reports/random_walk/pictures/train").iterdir())
    width = 5 * (pictures.MIN_CELL + pictures.GAP) + pictures.GAP
    assert {Image.open(path).size[0] for path in strips} == {width} and len(strips) == 2


def assert_walked(root, folder, params, probable):
    """The stage's label maps are those of the pass."""
    walk, room, stage = walks.walk_dense, cam, "train_cam"
    if params.affinity == "net":
        walk, room, stage = walks.walk, affinity, "train_affinity"
    network = room.load(root / f"models/{stage}/model.safetensors")
    options = {"cams": Stored(root / "data/cams/train", probable), "num_labels": 6}
    walk(Here(folder), *network, projects.items_of(root), params=params, **options)
    made = sorted((folder / "labels").glob("*/*.png"))
    assert len(made) == (32 if params.crf_after else 16)
    for path in made:
        found = root / "data/random_walk" / path.relative_to(folder / "labels")
        assert found.read_bytes() == path.read_bytes()


def test_an_affinity_without_training_needs_train_cam_alone(run, finished, tiny, tmp_path):
    shutil.rmtree(finished / "models/train_affinity")
    report = run("random_walk", finished, affinity="cosine")
    assert report["affinity"] == "cosine" and "map_stride" not in report
    assert report["train"]["images"] == 16 and report["train"]["walk_miou"] > 0
    assert_walked(finished, tmp_path, changed(tiny.random_walk, affinity="cosine"), False)
    assert "mIoU of the random walk" in results.table(finished)


def test_probabilities_of_a_frozen_network_walk_along_its_cached_features(
    run, finished, tiny, tmp_path, capsys
):
    classes = tuple("abcde")
    frozen = {"classes": classes, "head_kind": "linear", "head_width": 1, "output_stride": 8}
    path = finished / "models/train_cam/model.safetensors"
    common.save(path, network_of("frozen", **frozen), config_of("frozen", **frozen))
    changes = {"affinity": "class_distribution", "background": "constant", "threshold": 0.5}
    for computed in (16, 0):
        run("random_walk", finished, **changes)
        assert f"features of 16 images ({computed} computed now)" in capsys.readouterr().out
    assert len(list(finished.glob(".isim/features/*/*.npy"))) == 16
    assert_walked(finished, tmp_path, changed(tiny.random_walk, **changes), True)


@pytest.mark.parametrize("kind", ["decoder's labels", "CAMs", "of any origin"])
def test_affinity_net_tells_probabilities_from_cams(kind, run, finished, tiny, tmp_path):
    """Only a constant threshold means another thing to them."""
    path = finished / "models/train_cam/model.safetensors"
    if kind == "decoder's labels":
        network, config = cam.load(path)
        common.save(path, network, replace(config, decoder_labels=True))
    elif kind == "of any origin":
        path.unlink()
    changes = {"background": "constant", "threshold": 0.5, "crf_after": False}
    run("random_walk", finished, **changes)
    params = changed(tiny.random_walk, **changes)
    assert_walked(finished, tmp_path, params, kind == "decoder's labels")


def test_a_skipped_train_affinity_is_told_where_it_is_needed(run, finished):
    run("train_affinity", finished, affinity="cosine")
    with pytest.raises(UserError, match=r"run `isim train-affinity` first$") as caught:
        run("random_walk", finished)
    assert "\n" not in str(caught.value)


def test_attention_of_an_encoder_without_it_is_refused_before_anything_is_made(run, finished):
    with pytest.raises(UserError, match="needs a plain vision transformer, not resnet10t"):
        run("random_walk", finished, affinity="attention")
    assert not any((finished / ".isim/resume").iterdir())
