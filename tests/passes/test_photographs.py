"""Photographs of any size: what is worked on, what bands give, what tags and dCRF change."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import checkpoints

from isim.labels.crf import refine as crf
from isim.models import cam, segmenter
from isim.passes import features, photographs
from isim.passes.photographs import Answer, BySegmenter, ByTags


def photograph(*size):
    """Smooth colours with an edge, (*size, 3) uint8."""
    draws = torch.Generator().manual_seed(5)
    small = torch.rand(1, 3, 5, 7, generator=draws)
    image = F.interpolate(small, size, mode="bicubic")[0].clamp(0, 1)
    image[:, :, : size[1] // 2] *= 0.5
    return (255 * image).byte().permute(1, 2, 0).numpy().copy()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return checkpoints.save_all(tmp_path_factory.mktemp("models"))


@pytest.fixture
def predict(models, here):
    """A function that makes a segmenter's answers by name."""
    return lambda name, side=1024: BySegmenter(here, *segmenter.load(models[name]), side=side)


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [((4000, 6000), 1024, (683, 1024)), ((300, 200), 1024, (300, 200)), ((9, 5000), 100, (1, 100))],
)
def test_the_longer_side_is_bounded(size, side, expected):
    assert photographs.working_size(size, side) == expected


@pytest.mark.parametrize("size", [(5, 7), (40, 31), (13, 90)])
@pytest.mark.parametrize("band", [1, 200, 1 << 24])
def test_bands_are_what_interpolation_gives_at_once(size, band, monkeypatch):
    monkeypatch.setattr(photographs, "BAND", band)
    planes = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    found = torch.zeros(3, *size)
    for rows, part in photographs.grown(planes, size):
        found[:, rows] = part
    expected = F.interpolate(planes[None], size, mode="bilinear", align_corners=False)[0]
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", checkpoints.SEGMENTERS)
def test_a_large_photograph_is_predicted_as_its_small_one(name, predict):
    large = photograph(300, 400)
    answer = predict(name, side=96)(large)
    assert answer.planes.shape == (4, 72, 96) and answer.label().shape == (300, 400)
    assert np.allclose(answer.planes.sum(0), 1, atol=1e-4)
    small = answer.label()[2::4, 2::4][:72, :96]
    assert (small == answer.planes.argmax(0)).mean() > 0.95


def test_a_frozen_network_answers_with_the_mean_of_its_scales(models, here):
    image, ids = photograph(60, 80), np.array([1, 3])
    network, config = segmenter.load(models["frozen_segmenter"])
    tagged, about = cam.load(models["frozen"])
    assert len(config.feature_scales) == len(about.feature_scales) == 2

    def predicted(config):
        return BySegmenter(here, network, config, side=1024)(image).planes

    def raised(config):
        found = ByTags(here, tagged, config, side=1024, scales=(1.0,), flip=False)
        return found.cams(image, ids)

    for answer, given in ((predicted, config), (raised, about)):
        alone = [torch.from_numpy(answer(one)) for one in features.at_scales(given)]
        assert not torch.allclose(*alone, atol=1e-3)
        mean = (alone[0] + alone[1]) / 2 if answer is predicted else tagged.mean(alone, (60, 80))
        np.testing.assert_allclose(answer(given), mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", checkpoints.SEGMENTERS)
def test_known_classes_leave_no_other_one(name, predict):
    image, network = photograph(60, 80), predict(name)
    free = network(image)
    known = network(image, np.array([2]))
    assert set(np.unique(known.label())) <= {0, 2} and known.labels.tolist() == [0, 2]
    kept = free.planes[[0, 2]]
    assert np.allclose(known.planes, kept / kept.sum(0), atol=1e-4)
    none = network(image, np.zeros(0, np.int64))
    assert not none.label().any() and (none.planes == 1).all()
    assert (none.refined(SETTINGS).label() == 0).all()


SETTINGS = photographs.Crf(
    steps=3,
    gt_prob=0.7,
    gaussian_sxy=3,
    gaussian_compat=3,
    bilateral_sxy=30,
    bilateral_srgb=8,
    bilateral_compat=5,
)


def test_the_dcrf_is_that_of_label_maps_and_of_probabilities(predict):
    image = photograph(60, 80)
    answer = predict("deeplabv2")(image)
    expected = crf.refine_soft(image, answer.planes, SETTINGS)
    assert (answer.refined(SETTINGS).label() == expected).mean() > 0.999
    planes = np.stack([np.full((60, 80), 0.4), np.linspace(0, 1, 4800).reshape(60, 80)])
    given = planes.astype(np.float32), np.array([0, 3], np.uint8), image, (60, 80)
    hard = Answer(*given, are_probable=False)
    expected = crf.refine(image, hard.label(), np.array([3]), SETTINGS)
    assert (hard.refined(SETTINGS).label() == expected).mean() > 0.999
    assert hard.refined(SETTINGS).are_probable


def test_what_is_not_sure_is_ignored(predict):
    answer = predict("deeplabv2")(photograph(60, 80))
    label, sure = answer.label(), answer.planes.max(0)
    least = float(np.median(sure))
    found = answer.label(least)
    assert (found[sure < least] == 255).all() and (found == label)[sure >= least].all()


@pytest.mark.parametrize("name", checkpoints.CAMS)
def test_cams_are_of_the_classes_and_the_threshold_cuts_them(name, models, here):
    network, config = cam.load(models[name])
    by_tags = ByTags(here, network, config, side=64, scales=(1.0, 0.5), flip=True)
    image, ids = photograph(96, 128), np.array([1, 3])
    planes = by_tags.cams(image, ids)
    assert planes.shape == (2, 48, 64) and 0 <= planes.min() <= planes.max() <= 1
    answer = by_tags(image, ids, 0.5)
    assert answer.labels.tolist() == [0, 1, 3]
    expected = np.where(planes.max(0) > 0.5, np.array([1, 3])[planes.argmax(0)], 0)
    assert (answer.labels[answer.planes.argmax(0)] == expected).all()
    assert answer.label().shape == (96, 128)
    assert not by_tags(image, np.zeros(0, np.int64), 0.5).label().any()
