"""The dCRF: label sets, degenerate inputs, and what it is for."""

import numpy as np
import pydensecrf.densecrf as densecrf
import pytest

from isim.labels.crf import refine, refine_soft
from isim.params import Crf

PAPER = Crf(
    steps=10,
    backend="pydensecrf",
    gt_prob=0.7,
    gaussian_sxy=3,
    gaussian_compat=3,
    bilateral_sxy=50,
    bilateral_srgb=5,
    bilateral_compat=10,
)

# Spec 5, set `segmenter`.
SEGMENTER = Crf(
    steps=10,
    backend="pydensecrf",
    gt_prob=0.7,
    gaussian_sxy=1,
    gaussian_compat=3,
    bilateral_sxy=67,
    bilateral_srgb=3,
    bilateral_compat=4,
)


@pytest.fixture(params=["pydensecrf", "compiled"])
def paper(request):
    return PAPER.model_copy(update={"backend": request.param})


@pytest.fixture(params=["pydensecrf", "compiled"])
def segmenter(request):
    return SEGMENTER.model_copy(update={"backend": request.param})


def noise(height=20, width=31):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    return image, rng.choice(np.array([0, 4, 9], np.uint8), (height, width))


def test_equals_pydensecrf_with_a_unary_written_by_hand(paper):
    image, seed = noise()
    compact = np.searchsorted([0, 4, 9], seed).ravel()
    # 0.7 for the label of the seed, the rest shared by the others (zero_unsure False).
    probability = np.full((3, seed.size), 0.3 / 2, np.float32)
    probability[compact, np.arange(seed.size)] = 0.7
    field = densecrf.DenseCRF2D(seed.shape[1], seed.shape[0], 3)
    field.setUnaryEnergy(-np.log(probability))
    field.addPairwiseGaussian(sxy=3, compat=3)
    field.addPairwiseBilateral(sxy=50, srgb=5, rgbim=image, compat=10)
    marginals = np.array(field.inference(10)).reshape(3, *seed.shape)
    found = refine(image, seed, np.array([4, 9]), paper)
    assert found.dtype == np.uint8
    assert (found == np.array([0, 4, 9])[marginals.argmax(0)]).all()
    assert (found != seed).any()


def test_the_order_of_the_classes_does_not_matter(paper):
    image, seed = noise()
    first = refine(image, seed, np.array([4, 9]), paper)
    assert (first == refine(image, seed, np.array([9, 4]), paper)).all()


def test_zero_steps_keep_the_seed(paper):
    image, seed = noise()
    settings = paper.model_copy(update={"steps": 0})
    assert (refine(image, seed, np.array([4, 9]), settings) == seed).all()


@pytest.mark.filterwarnings("error")
def test_an_image_without_classes_stays_background(paper):
    image, _ = noise()
    label = refine(image, np.zeros(image.shape[:2], np.uint8), np.zeros(0, np.int64), paper)
    assert label.dtype == np.uint8 and not label.any()


@pytest.mark.filterwarnings("error")
def test_a_seed_of_one_label_stays_as_it_is(paper):
    image, _ = noise()
    for value in (0, 9):
        seed = np.full(image.shape[:2], value, np.uint8)
        assert (refine(image, seed, np.array([4, 9]), paper) == value).all()


def test_an_image_that_is_no_contiguous_array_is_refined_too(paper):
    image, seed = noise()
    mirrored = refine(image[:, ::-1], seed[:, ::-1], np.array([4, 9]), paper)
    assert (
        mirrored
        == refine(np.ascontiguousarray(image[:, ::-1]), seed[:, ::-1], np.array([4, 9]), paper)
    ).all()


def test_a_coarse_seed_is_drawn_to_the_edges_of_the_image(paper):
    """A red object on blue ground; the seed misses its border by 3 pixels all around."""
    truth = np.zeros((40, 60), np.uint8)
    truth[10:30, 15:45] = 6
    image = np.where(truth[..., None] > 0, np.uint8([200, 30, 30]), np.uint8([30, 30, 200]))
    seed = np.zeros_like(truth)
    seed[13:27, 18:42] = 6
    assert (seed != truth).mean() > 0.1
    refined = refine(image, seed, np.array([6]), paper)
    assert set(np.unique(refined)) == {0, 6}
    assert (refined != truth).mean() < 0.005


def soft(labels=5, height=20, width=31, seed=1):
    """A softmax (labels, height, width), at some pixels certain."""
    scores = np.random.default_rng(seed).normal(0, 2, (labels, height, width))
    scores[0, :3] += 200
    exponentials = np.exp(scores - scores.max(0))
    return (exponentials / exponentials.sum(0)).astype(np.float32)


def test_soft_equals_pydensecrf_with_a_unary_written_by_hand(segmenter):
    image, _ = noise()
    probabilities = soft()
    assert probabilities.min() == 0, "log(0) must not reach the energies"
    energies = -np.log(np.maximum(probabilities, 1e-5)).reshape(5, -1)
    field = densecrf.DenseCRF2D(31, 20, 5)
    field.setUnaryEnergy(energies)
    field.addPairwiseGaussian(sxy=1, compat=3)
    field.addPairwiseBilateral(sxy=67, srgb=3, rgbim=image, compat=4)
    marginals = np.array(field.inference(10)).reshape(5, 20, 31)
    found = refine_soft(image, probabilities, segmenter)
    assert found.dtype == np.uint8 and found.shape == (20, 31)
    assert (found == marginals.argmax(0)).all()
    assert (found != probabilities.argmax(0)).any()


def test_soft_without_steps_is_the_argmax(segmenter):
    image, _ = noise()
    settings = segmenter.model_copy(update={"steps": 0})
    assert (refine_soft(image, soft(), settings) == soft().argmax(0)).all()


def test_soft_takes_views_and_does_not_change_them(segmenter):
    image, _ = noise()
    probabilities = soft()
    before = probabilities.copy()
    mirrored = refine_soft(image[:, ::-1], probabilities[..., ::-1], segmenter)
    copies = (np.ascontiguousarray(a) for a in (image[:, ::-1], probabilities[..., ::-1]))
    assert (mirrored == refine_soft(*copies, segmenter)).all()
    assert (probabilities == before).all()


@pytest.mark.filterwarnings("error")
def test_soft_of_one_label_is_that_label(segmenter):
    image, _ = noise()
    found = refine_soft(image, np.ones((1, 20, 31), np.float32), segmenter)
    assert found.dtype == np.uint8 and found.shape == (20, 31) and not found.any()


def test_soft_draws_blurred_probabilities_to_the_edges_of_the_image(segmenter):
    truth = np.zeros((40, 60), np.uint8)
    truth[10:30, 15:45] = 1
    image = np.where(truth[..., None] > 0, np.uint8([200, 30, 30]), np.uint8([30, 30, 200]))
    object_ = np.full((40, 60), 0.4, np.float32)
    object_[13:27, 18:42] = 0.7
    planes = np.stack([0.95 - object_, object_, np.full_like(object_, 0.05)])
    assert (planes.argmax(0) != truth).mean() > 0.1
    assert (refine_soft(image, planes, segmenter) != truth).mean() < 0.005
