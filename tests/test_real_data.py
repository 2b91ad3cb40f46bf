"""The whole pipeline on a few real images of VOC 2012, with real ImageNet weights."""

from pathlib import Path

import pytest
from support.projects import read_report

from isim.experiments import preset
from isim.models import affinity, cam, encoder, segmenter
from isim.runtime.paths import resolve_path
from isim.stages import evaluate, export_cams, prepare, train_cam, train_segmenter

ROOT = Path(__file__).parent.parent
PRESET = preset.parameters("voc-sample-mobilenetv2")
DEVKIT = resolve_path(PRESET.prepare.root, ROOT) / "VOCdevkit/VOC2012"


@pytest.fixture
def few(tmp_path, recorder, monkeypatch):
    """A project of 24 train and 6 val images of the sample, prepared."""
    if not DEVKIT.is_dir():
        pytest.skip("no VOC sample below $ISIM_SHARED")
    monkeypatch.setenv("ISIM_SHARED", str(DEVKIT.parents[3]))
    devkit = tmp_path / "raw/VOCdevkit/VOC2012"
    lists = devkit / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for folder in ("JPEGImages", "Annotations", "SegmentationClass"):
        (devkit / folder).symlink_to(DEVKIT / folder)
    for split, count in (("train", 24), ("val", 6)):
        names = (DEVKIT / f"ImageSets/Segmentation/{split}.txt").read_text().split()
        (lists / f"{split}.txt").write_text("\n".join(names[:count]))
    prepare.run(PRESET.prepare.model_copy(update={"root": str(tmp_path / "raw")}), tmp_path)
    return tmp_path


def test_the_sample_preset_runs_on_real_images(few):
    change = {"epochs": 3, "warmup_epochs": 1, "round_every": 1, "batch": 8, "pictures": 1}
    train_cam.run(PRESET.train_cam.model_copy(update=change), few)
    export_cams.run(PRESET.export_cams.model_copy(update={"scales": (1.0,)}), few)
    evaluate.run(PRESET.evaluate.model_copy(update={"pictures": 1}), few)

    figures = read_report(few, "evaluate")
    # ImageNet features, hardly trained, already find objects: noise or a broken CAM does not.
    assert figures["train"]["images"] == 24 and figures["val"]["images"] == 6
    assert figures["train"]["cam_miou"] > 0.1
    assert figures["train"]["cam_miou_oracle"] >= figures["train"]["cam_miou"]
    assert len(list((few / "data/pseudo_labels/round_02").glob("*.png"))) == 24


def test_the_frozen_preset_runs_on_them_too(few):
    params = preset.parameters("voc-sample-fast")
    head = params.train_segmenter.head.model_copy(update={"steps": 30, "batch": 2048})
    loop = params.train_cam.frozen.model_copy(update={"head": head, "rounds": 2})
    train_cam.run(params.train_cam.model_copy(update={"frozen": loop, "pictures": 1}), few)
    export_cams.run(params.export_cams, few)
    change = {"head": head, "pictures": 0, "crf_after": False}
    train_segmenter.run(params.train_segmenter.model_copy(update=change), "last_round", few)

    report = read_report(few, "train_cam")
    assert report["supervision"] == "ImageNet labels" and report["rounds"] == 2
    # 24 images of many classes are few to learn from; noise or broken features stay below 0.1.
    assert report["pseudo_label_miou"] > 0.3
    assert len(list((few / "data/pseudo_labels/round_02").glob("*.png"))) == 24
    assert len(list((few / "data/predictions/last_round/val").glob("*.png"))) == 6


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite2"])
def test_the_weights_at_hand_go_into_every_method(name, few):
    path = resolve_path(f"$ISIM_SHARED/weights/{name}.in1k.safetensors", ROOT)
    own = {"encoder": name}
    for method in ("frozen", *cam.METHODS):
        section = PRESET.train_cam.model_copy(update=own | {"method": method})
        config = cam.configure(section, ("a", "b"))
        encoder.load(cam.build(config), config, str(path), path)
        assert config.mean == (0.5, 0.5, 0.5) == config.std
    for method in ("frozen", "deeplabv2", "deeplabv3"):
        section = PRESET.train_segmenter.model_copy(update=own | {"method": method})
        config = segmenter.configure(section, ("a", "b"))
        encoder.load(segmenter.build(config), config, str(path), path)
    config = affinity.configure(PRESET.train_affinity.model_copy(update=own))
    encoder.load(affinity.build(config), config, str(path), path)
