"""The Python interface: the documentation's examples, what is light, what is refused."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import checkpoints
from support.networks import CLASSES

import isim
from isim import api
from isim.errors import UserError
from isim.experiments import preset
from isim.labels.crf import refine as crf
from isim.params import Crf

PAGE = Path(__file__).parent.parent / "docs/python.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return checkpoints.save_all(tmp_path_factory.mktemp("models"))


@pytest.fixture
def image():
    draws = np.random.default_rng(0).integers(0, 255, (6, 8, 3))
    return draws.repeat(10, 0).repeat(10, 1).astype(np.uint8)


def test_importing_isim_alone_is_light():
    code = "import sys, isim; assert 'Segmenter' in dir(isim); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "cv2", "pydantic", "mlflow", "PIL"} & set(done.stdout.split())
    with pytest.raises(AttributeError, match="no attribute 'Segmenters'"):
        isim.Segmenters  # noqa: B018
    assert all(getattr(isim, name) is getattr(api, name) for name in isim.__all__)


def test_the_examples_of_the_documentation_run(finished_project, models, tmp_path, monkeypatch):
    root = tmp_path / "project"
    shutil.copytree(finished_project, root)
    places = {"train_segmenter/last_round": "deeplabv2", "train_cam": "deeplabcam"}
    for place, name in places.items():
        (root / "models" / place).mkdir(parents=True, exist_ok=True)
        shutil.copy(models[name], root / f"models/{place}/model.safetensors")
    photo = next((root / "data/prepared").rglob("*.jpg"))
    shutil.copy(photo, root / "photo.jpg")
    deep = np.random.default_rng(0).integers(0, 65536, (60, 80)).astype(np.uint16)
    Image.fromarray(deep).save(root / "scan_16bit.png")
    # As stage masks leaves it.
    shutil.copytree(root / "data/pseudo_labels/round_02", root / "data/masks")
    (root / "reports/masks").mkdir()
    (root / "reports/masks/figures.csv").write_text("split,figure,value\n,images,24\n")
    monkeypatch.chdir(root)
    names: dict = {}
    for example in EXAMPLES:
        assert len(example.strip().splitlines()) < 10
        exec(example, names)
    assert names["mask"].shape == names["first"].shape and names["cams"].shape[0] == 2
    assert set(names["project"].label_sets) == {
        *("ground_truth", "seeds", "last_round", "random_walk", "random_walk_crf"),
        *("round_01", "round_02"),
    }


@pytest.mark.parametrize("name", checkpoints.SEGMENTERS)
def test_a_segmenter_answers_for_arrays(name, models, image):
    segmenter = isim.Segmenter.load(models[name])
    found = segmenter.predict(image)
    assert found.classes == segmenter.classes == ("background", *CLASSES)
    assert (found.probabilities.argmax(0) == found.label).all()
    known = segmenter.predict(image, tags=["dog"])
    assert set(np.unique(known.label)) <= {0, 3} and not known.probabilities[1:3].any()


@pytest.mark.parametrize("name", checkpoints.CAMS)
def test_cams_are_in_the_order_of_the_tags(name, models, image):
    model = isim.CamModel.load(str(models[name]))
    both = model.cam(image, ["dog", "bird"])
    assert (both == model.cam(image, ["bird", "dog"])[::-1]).all()
    assert both.shape == (2, 60, 80) and model.cam(image, []).shape == (0, 60, 80)


def preset_of(shown):
    params = preset.parameters("tiny")
    prepare = params.prepare.model_copy(update={"sixteen_bit": shown})
    return params.model_copy(update={"prepare": prepare})


def test_sixteen_bits_are_read_by_a_range_that_is_given(
    models, image, finished_project, tmp_path, monkeypatch
):
    path, grey = tmp_path / "deep.png", image[..., :1].repeat(3, 2)
    Image.fromarray(grey[..., 0].astype(np.uint16) * 10).save(path)
    model = api.Segmenter.load(models["frozen_segmenter"])
    cam_model = api.CamModel.load(models["frozen"])
    labels = (grey[..., 0] > 100).astype(np.uint8)
    # The project's own range, as `isim predict` takes it.
    assert api.Project(finished_project).sixteen_bit is None
    monkeypatch.setattr(api, "load", lambda _: preset_of((0, 2550)))
    assert api.Project(finished_project).sixteen_bit == (0, 2550)

    def answers(given, **shown):
        return (
            model.predict(given, **shown).label,
            cam_model.cam(given, ["cat"], **shown),
            api.dense_crf(given, labels, **shown),
        )

    for deep, plain in zip(answers(path, sixteen_bit=(0, 2550)), answers(grey), strict=True):
        assert (deep == plain).all()
    with pytest.raises(UserError, match="more than 8 bits"):
        model.predict(path)
    with pytest.raises(UserError, match=r"sixteen_bit: .* is no range"):
        model.predict(path, sixteen_bit=(2550, 0))


def test_the_dense_crf_is_the_package_s(image):
    label = np.where(np.arange(80) < 33, 7, 0)[None].repeat(60, 0).astype(np.uint8)
    settings = Crf.model_validate(api.USUAL | {"steps": 3})
    expected = crf.refine(image, label, np.array([7]), settings)
    assert (isim.dense_crf(image, label, steps=3) == expected).mean() > 0.999
    planes = np.stack([label == 0, label == 7]).astype(np.float32) * 0.6 + 0.2
    soft = isim.dense_crf(image, planes, steps=3)
    assert (soft == crf.refine_soft(image, planes, settings)).mean() > 0.999
    odds = isim.dense_crf(image, label, steps=3, probabilities=True)
    assert odds.shape == (2, 60, 80) and np.allclose(odds.sum(0), 1, atol=1e-3)
    label[20:40] = 255
    assert set(np.unique(isim.dense_crf(image, label))) == {0, 7}, "what is not known is decided"
    assert (isim.dense_crf(image, np.full((60, 80), 5)) == 5).all()


def test_the_model_of_a_project_is_found_or_missed(finished_project, tmp_path):
    expected = finished_project / "models/train_cam/model.safetensors"
    assert api.trained(finished_project, by_cam=True) == expected
    for root in (finished_project, tmp_path):
        with pytest.raises(UserError, match=r"is missing; .*--model PATH"):
            api.trained(root)


def test_mistakes_are_one_line(models, image, tmp_path, finished_project):
    segmenter = isim.Segmenter.load(models["deeplabv2"])
    calls = {
        "no 'lion'": lambda: segmenter.predict(image, tags=["lion"]),
        r"list of tags, such as \['cat'\]": lambda: segmenter.predict(image, tags="cat"),
        "uint8 RGB, not float64": lambda: segmenter.predict(image / 255),
        "does not exist": lambda: segmenter.predict(tmp_path / "no.jpg"),
        "not a checkpoint of train_cam": lambda: isim.CamModel.load(models["deeplabv2"]),
        "no setting 'srgb'": lambda: isim.dense_crf(image, image[..., 0], srgb=3),
        "of its size": lambda: isim.dense_crf(image, image[:3, :, 0]),
        "run `isim prepare` first": lambda: isim.Project(tmp_path),
        "has no mask": lambda: isim.Project(finished_project).label("train_00000"),
    }
    for words, call in calls.items():
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
