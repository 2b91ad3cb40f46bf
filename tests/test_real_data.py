"""The whole pipeline on a few real images of VOC 2012, with real ImageNet weights."""

import json
from pathlib import Path

import pytest

from isim.experiments import preset
from isim.runtime.paths import resolve_path
from isim.stages import evaluate, export_cams, prepare, train_cam

ROOT = Path(__file__).parent.parent
PRESET = preset.parameters("voc-sample-mobilenetv2")
DEVKIT = resolve_path(PRESET.prepare.root, ROOT) / "VOCdevkit/VOC2012"


@pytest.mark.skipif(not DEVKIT.is_dir(), reason="no VOC sample below $ISIM_SHARED")
def test_the_sample_preset_runs_on_real_images(tmp_path, recorder, monkeypatch):
    monkeypatch.setenv("ISIM_SHARED", str(DEVKIT.parents[3]))
    devkit = tmp_path / "raw/VOCdevkit/VOC2012"
    lists = devkit / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for folder in ("JPEGImages", "Annotations", "SegmentationClass"):
        (devkit / folder).symlink_to(DEVKIT / folder)
    for split, count in (("train", 24), ("val", 6)):
        names = (DEVKIT / f"ImageSets/Segmentation/{split}.txt").read_text().split()
        (lists / f"{split}.txt").write_text("\n".join(names[:count]))
    source = PRESET.prepare.model_copy(update={"root": str(tmp_path / "raw")})
    change = {"epochs": 3, "warmup_epochs": 1, "round_every": 1, "batch": 8, "pictures": 1}
    prepare.run(source, tmp_path)
    train_cam.run(PRESET.train_cam.model_copy(update=change), tmp_path)
    export_cams.run(PRESET.export_cams.model_copy(update={"scales": (1.0,)}), tmp_path)
    evaluate.run(PRESET.evaluate.model_copy(update={"pictures": 1}), tmp_path)

    figures = json.loads((tmp_path / "reports/evaluate/metrics.json").read_text())
    # ImageNet features, hardly trained, already find objects: noise or a broken CAM does not.
    assert figures["train"]["images"] == 24 and figures["val"]["images"] == 6
    assert figures["train"]["cam_miou"] > 0.1
    assert figures["train"]["cam_miou_oracle"] >= figures["train"]["cam_miou"]
    assert len(list((tmp_path / "data/pseudo_labels/round_02").glob("*.png"))) == 24
