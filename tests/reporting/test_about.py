"""Names and descriptions of runs."""

import pytest

from isim.experiments import preset
from isim.reporting import about

PARAMS = preset.parameters("tiny").model_dump(mode="json")


def test_a_name_says_what_matters():
    cam = {"method": "deeplabcam", "encoder": "mobilenetv2_100.ra_in1k", "seed": 1}
    assert about.name({"train_cam": cam}) == "deeplabcam mobilenetv2_100 seed 1"


def test_differences_are_named_with_their_section():
    before = about.texts(PARAMS)
    changed = {**PARAMS, "train_cam": {**PARAMS["train_cam"], "threshold": 0.9}}
    changed["crf"] = {**PARAMS["crf"], "steps": 7}
    assert set(about.differences(changed, before)) == {"threshold 0.9", "crf.steps 7"}
    assert about.differences(PARAMS, before) == []


@pytest.mark.parametrize("text", ["\udcff", "a\0b", "http://u:hidd3n@h", "狐"])
def test_texts_are_what_every_store_takes(text):
    shown = about.clean(text)
    assert shown.encode() and "\0" not in shown and "hidd3n" not in shown


def test_a_description_begins_with_method_figures_and_pictures():
    figures = {"masks.val_miou": 0.5, "train_cam.cam_miou": 0.25, "train_cam.loss": 3.0}
    text = about.description(PARAMS, "a|b", figures, pictures={"masks": "get-artifact?path=x"})
    lines = [line for line in text.splitlines() if line]
    assert lines[0].startswith("**deeplabcam**") and lines[0].endswith("a\\|b")
    assert lines[1] == "masks.val\\_miou **0.5**, train\\_cam.cam\\_miou **0.25**"
    assert lines[3] == "![masks](get-artifact?path=x)" and "loss" not in text
