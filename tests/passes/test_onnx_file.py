"""ONNX files by onnxruntime: the labels of torch, images of any size, names in the metadata."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image
from support import checkpoints
from support.networks import CLASSES

from isim.errors import UserError
from isim.models import segmenter
from isim.passes import export, onnx_file
from isim.passes.photographs import BySegmenter
from isim.runtime.here import Here


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of three sizes."""
    folder, paths = tmp_path_factory.mktemp("photos"), []
    for number, size in enumerate([(80, 60), (75, 101), (80, 60), (33, 47)]):
        small = np.random.default_rng(number).integers(0, 255, (5, 7, 3), np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: checkpoints.save(name, folder / name) for name in checkpoints.SEGMENTERS}


@pytest.mark.parametrize("name", checkpoints.SEGMENTERS)
def test_a_file_gives_the_labels_of_torch(name, models, photos, tmp_path, monkeypatch):
    # So that an image is worked on at another size than its own, too.
    monkeypatch.setattr(onnx_file, "SIDE", 90)
    path = tmp_path / "segmenter.onnx"
    told = onnx_file.write(path, models[name], photos)
    assert "opset 18" in told and "of 4 images are those of torch" in told
    model = onnx.load(path)
    # An export takes the place of its own files alone.
    export._require_own("onnx", path)
    other = onnx.helper.make_model(model.graph, producer_name="pytorch")
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(UserError, match="was not written by this command"):
        export._require_own("onnx", tmp_path / "other.onnx")
    onnx.checker.check_model(model, full_check=True)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(about["classes"]) == ["background", *CLASSES]
    assert model.opset_import[0].version == int(about["opset"]) == 18
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    answers = BySegmenter(Here(tmp_path, "fp32"), *segmenter.load(models[name]), side=90)
    for photo in photos:
        image = np.array(Image.open(photo))
        label, probabilities = session.run(None, {"image": image})
        answer = answers(image)
        assert label.dtype == np.uint8 and label.shape == image.shape[:2]
        assert probabilities.shape == (4, *label.shape)
        assert (label == answer.label()).mean() > 0.995
        if max(label.shape) <= 90:
            assert np.abs(probabilities - answer.planes).mean() < 0.01


def test_other_labels_than_torch_s_are_refused(models, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "_equality", lambda *_: 0.98)
    with pytest.raises(UserError, match=r"only 98\.00 % of the labels of 4 images.*no file"):
        onnx_file.write(tmp_path / "a.onnx", models["deeplabv2"], photos)
    assert not (tmp_path / "a.onnx").exists()


def test_the_extra_and_images_are_wanted(models, photos, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no images to compare"):
        onnx_file.write(tmp_path / "a.onnx", models["deeplabv2"], [])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'isim\[onnx\]'"):
        onnx_file.write(tmp_path / "a.onnx", models["deeplabv2"], photos)


def test_images_of_many_sizes_are_compared(photos):
    assert onnx_file._chosen(photos) == [photos[0], photos[1], photos[3], photos[2]]
