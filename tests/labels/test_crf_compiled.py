"""The C++ dCRF against pydensecrf: any size, any number of labels, any kernel."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from isim import compiled
from isim.data import files
from isim.errors import UserError
from isim.labels import crf, crf_compiled
from isim.params import Crf, resolve_path

SAMPLE = resolve_path("$ISIM_SHARED/data/voc_sample", Path.cwd()) / "VOCdevkit/VOC2012"
SETTINGS = Crf(
    steps=10,
    backend="compiled",
    gt_prob=0.7,
    gaussian_sxy=3,
    gaussian_compat=3,
    bilateral_sxy=50,
    bilateral_srgb=5,
    bilateral_compat=10,
)


def changed(**values):
    return SETTINGS.model_copy(update=values)


def picture(height, width, seed=0):
    """Smooth colours with a photograph's noise."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (6, 8, 3)).astype(np.float32)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    return (image + rng.normal(0, 5, image.shape)).clip(0, 255).astype(np.uint8)


def energies(height, width, count, seed=0):
    """(count, H * W) energies, smooth over the image, with some that are certain."""
    rng = np.random.default_rng(seed)
    planes = rng.normal(0, 3, (count, 5, 7)).astype(np.float32)
    planes = np.stack([cv2.resize(p, (width, height)) for p in planes])
    planes -= planes.max(0)
    logs = planes - np.log(np.exp(planes).sum(0))
    return -np.maximum(logs, np.log(1e-5)).reshape(count, -1).astype(np.float32)


def differences(image, unary, settings):
    """Share of pixels whose label differs from pydensecrf's, and the largest difference of Q."""
    found = crf.marginals(image, unary, settings)
    expected = crf.marginals(image, unary, settings.model_copy(update={"backend": "pydensecrf"}))
    assert found.shape == expected.shape == unary.shape
    assert np.allclose(found.sum(0), 1, atol=1e-5)
    return (found.argmax(0) != expected.argmax(0)).mean(), np.abs(found - expected).max()


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 9, 13, 17, 21, 30, 40])
def test_equals_pydensecrf_for_any_number_of_labels(count):
    wrong, difference = differences(picture(61, 83), energies(61, 83, count), SETTINGS)
    assert wrong <= 1e-4 and difference < 1e-3


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (7, 5), (97, 33), (64, 64)])
@pytest.mark.parametrize("count", [2, 3, 21])
def test_equals_pydensecrf_for_any_size(size, count):
    wrong, difference = differences(picture(*size), energies(*size, count), SETTINGS)
    assert wrong <= 1e-4 and difference < 1e-3


@pytest.mark.parametrize(
    "values",
    [
        {"gaussian_sxy": 1, "bilateral_sxy": 67, "bilateral_srgb": 3, "bilateral_compat": 4},
        {"gaussian_sxy": 7.5, "gaussian_compat": 0.5},
        {"bilateral_compat": 0},
        {"gaussian_compat": 0},
        # More bits than a word has beside a vertex's number.
        {"bilateral_srgb": 0.3, "bilateral_sxy": 2},
        {"steps": 0},
        {"steps": 1},
    ],
)
@pytest.mark.parametrize("count", [2, 4])
def test_equals_pydensecrf_for_any_kernel(values, count):
    wrong, difference = differences(picture(50, 90), energies(50, 90, count), changed(**values))
    assert wrong <= 1e-3 and difference < 1e-3


def test_the_lattice_that_is_kept_is_that_of_the_size_and_the_kernel():
    """One thread, one after the other: what is kept from one image must not serve the next."""
    for size in ((40, 50), (50, 40), (40, 50)):
        for values in ({}, {"gaussian_sxy": 1}, {"gaussian_compat": 1}):
            image, unary = picture(*size), energies(*size, 3)
            assert differences(image, unary, changed(**values))[1] < 1e-3


def test_threads_do_not_disturb_each_other():
    sizes = [(40 + 3 * n, 60 - 2 * n) for n in range(8)] * 3
    work = [(picture(*size), energies(*size, 2 + n % 4)) for n, size in enumerate(sizes)]
    one_by_one = [crf.marginals(image, unary, SETTINGS) for image, unary in work]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda pair: crf.marginals(*pair, SETTINGS), work))
    assert all(map(np.array_equal, one_by_one, together))


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"no VOC sample at {SAMPLE}")
@pytest.mark.parametrize("count", [2, 3, 4, 6, 21])
def test_equals_pydensecrf_on_real_images(count):
    names = (SAMPLE / "ImageSets/Segmentation/train.txt").read_text().split()
    paths = [SAMPLE / f"JPEGImages/{name}.jpg" for name in names]
    portrait = next(p for p in paths if np.greater(*files.image_size(p)))
    wrong, worst = [], 0.0
    for number, path in enumerate((paths[count], portrait)):
        image = files.read_image(path)[: 251 + 50 * number, :301]
        settings = changed(gaussian_sxy=1) if number else SETTINGS
        unary = energies(*image.shape[:2], count, number)
        share, difference = differences(image, unary, settings)
        wrong.append(share)
        worst = max(worst, difference)
    assert np.mean(wrong) <= 1e-4 and max(wrong) <= 1e-3
    assert worst < 1e-3


@pytest.mark.parametrize("width", [1e-4, 1e-30])
def test_kernels_that_are_too_narrow_are_named(width):
    image, unary = picture(40, 50), energies(40, 50, 2)
    for name in ("gaussian_sxy", "bilateral_sxy", "bilateral_srgb"):
        with pytest.raises(UserError, match="too narrow for an image of 50x40 pixels; raise"):
            crf.marginals(image, unary, changed(**{name: width}))


def test_arrays_that_do_not_go_together_are_refused():
    image, seed = picture(20, 30), np.zeros((20, 30), np.uint8)
    with pytest.raises(ValueError, match="30x20 pixels goes with 600 values, not 551"):
        crf_compiled.best(image, seed[1:, :29], 2, 1.0, SETTINGS)
    with pytest.raises(ValueError, match="1200 values"):
        crf_compiled.best_of(image, energies(20, 29, 2), SETTINGS)
    with pytest.raises(ValueError, match="label 2, of 0 .. 1"):
        crf_compiled.best(image, seed + np.uint8(2), 2, 1.0, SETTINGS)
    with pytest.raises(ValueError, match="RGB"):
        crf_compiled.best(image[..., 0], seed, 2, 1.0, SETTINGS)


def test_more_labels_than_a_label_map_can_hold_are_refused():
    with pytest.raises(ValueError, match="2 to 256 labels, not 257"):
        crf.marginals(picture(4, 5), energies(4, 5, 257), SETTINGS)


def test_without_a_compiler_auto_falls_back_and_compiled_is_refused(monkeypatch):
    def unavailable(name):
        raise compiled.Unavailable(f"no compiler for {name}")

    monkeypatch.setattr(compiled, "library", unavailable)
    crf_compiled.obstacle.cache_clear()
    try:
        image, seed = picture(20, 30), np.zeros((20, 30), np.uint8)
        with pytest.raises(UserError, match="backend compiled: no compiler for crf; or use pyd"):
            crf.refine(image, seed, np.array([3]), SETTINGS)
        with pytest.warns(UserWarning, match="pydensecrf, slower: no compiler for crf"):
            assert not crf.refine(image, seed, np.array([3]), changed(backend="auto")).any()
    finally:
        crf_compiled.obstacle.cache_clear()
