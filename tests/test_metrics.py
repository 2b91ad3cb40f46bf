"""Scores against slow, obvious versions of themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isim import metrics
from isim.labels.seeds.seeds import peak, seed

L = 4
SIDES = st.integers(1, 7)


def label_maps(shape, ignore):
    labels = [*range(L), *([255] if ignore else [])]
    return hnp.arrays(np.uint8, shape, elements=st.sampled_from(labels))


@st.composite
def pairs(draw):
    shape = (draw(SIDES), draw(SIDES))
    return draw(label_maps(shape, True)), draw(label_maps(shape, False))


def pixels_of(*several):
    """True and predicted label of each pixel that counts."""
    return [
        (t, p)
        for truth, prediction in several
        for t, p in zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True)
        if t != 255
    ]


def ratio(part, whole):
    return part / whole if whole else np.nan


def slow_iou(pixel_pairs, label):
    both = sum(t == p == label for t, p in pixel_pairs)
    return ratio(both, sum(label in pair for pair in pixel_pairs))


@given(pairs())
def test_confusion_counts_every_pixel_but_the_ignored(pair):
    confusion, pixels = metrics.confusion_matrix(*pair, L), pixels_of(pair)
    assert confusion.dtype == np.int64
    assert confusion.tolist() == [[pixels.count((t, p)) for p in range(L)] for t in range(L)]


@given(pairs(), pairs())
def test_figures_of_a_split_are_those_of_all_its_pixels(first, second):
    """One matrix a split: not the mean of the images' figures (spec 10)."""
    confusion = metrics.confusion_matrix(*first, L) + metrics.confusion_matrix(*second, L)
    pixels = pixels_of(first, second)
    expected = [slow_iou(pixels, label) for label in range(L)]
    assert metrics.iou(confusion) == pytest.approx(expected, nan_ok=True)
    present = [value for value in expected if not np.isnan(value)]
    hits = sum(t == p != 0 for t, p in pixels)
    wanted = [
        ratio(sum(present), len(present)),
        ratio(hits, sum(p != 0 for _, p in pixels)),
        ratio(hits, sum(t != 0 for t, _ in pixels)),
    ]
    found = [metrics.miou(confusion), *metrics.precision_recall(confusion)]
    assert found == pytest.approx(wanted, nan_ok=True)


def test_labels_and_counts_do_not_overflow():
    truth = np.full((3, 5), 254, np.uint8)
    confusion = metrics.confusion_matrix(truth, truth, 255)
    assert confusion[254, 254] == 15 and confusion.sum() == 15
    # COCO has more pixels than int32 counts.
    whole = confusion * 2**31
    assert metrics.miou(whole) == 1 and whole[254, 254] == 15 * 2**31


@pytest.mark.parametrize(
    ("truth", "prediction"),
    [([[0, L]], [[0, 0]]), ([[0, 0]], [[0, L]]), ([[0, 0]], [[0, 255]]), ([[0, 0]], [[0]])],
)
def test_wrong_labels_and_sizes_are_refused(truth, prediction):
    with pytest.raises(ValueError, match=r"a label above 3|truth is \(1, 2\), prediction is"):
        metrics.confusion_matrix(np.array(truth, np.uint8), np.array(prediction, np.uint8), L)


@st.composite
def cams(draw):
    """CAMs on a coarse grid of values, so that ties with the thresholds happen."""
    height, width = draw(SIDES), draw(SIDES)
    ids = np.array(sorted(draw(st.sets(st.integers(1, L - 1)))), np.int64)
    values = st.sampled_from(np.linspace(0, 1, 11).astype(np.float32))
    planes = draw(hnp.arrays(np.float32, (len(ids), height, width), elements=values))
    return draw(label_maps((height, width), True)), planes, ids


@settings(max_examples=200)
@given(cams())
def test_a_sweep_equals_a_seed_at_every_threshold(case):
    truth, planes, ids = case
    thresholds = np.array([0.1, 0.3, 0.5, 0.7], np.float32)
    best, height = peak(planes, ids)
    levels = np.searchsorted(thresholds, height)
    found = metrics.level_confusion(truth, best, levels, num_thresholds=4, num_labels=L)
    assert found.dtype == np.int64 and found.shape == (4, L, L)
    for threshold, confusion in zip(thresholds.tolist(), found, strict=True):
        expected = metrics.confusion_matrix(truth, seed(planes, ids, threshold), L)
        assert (confusion == expected).all()


def test_classification_figures_by_hand():
    labels = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    scores = np.array([[2, 1, -1], [3, 1, -2]], np.float32)
    figures = metrics.classification_figures(labels, scores)
    # Image 1 ranks its class first (1), image 2 second (1/2).
    assert figures["sample_average_precision"] == pytest.approx(0.75)
    # Wrong: class 2 of image 1 and class 1 of image 2.
    assert figures["element_accuracy"] == pytest.approx(4 / 6)
    # Class 1 ranks image 1 second (1/2); class 2 is a tie of both (1/2); class 3 never occurs.
    assert figures["class_map"] == pytest.approx(0.5)


@given(st.data())
def test_sample_average_precision_is_the_mean_over_images(data):
    """Also with a single class, where scikit-learn's average over samples is another figure."""
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    labels = data.draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([0.0, 1.0])))
    scores = data.draw(hnp.arrays(np.float32, shape, elements=st.integers(-2, 2).map(float)))
    expected = []
    for label, score in zip(labels.astype(bool), scores, strict=True):
        precisions = [label[score >= s].mean() for s in score[label]]
        if precisions:
            expected.append(np.mean(precisions))
    found = metrics.classification_figures(labels, scores)["sample_average_precision"]
    assert found == pytest.approx(np.mean(expected) if expected else np.nan, nan_ok=True)


@pytest.mark.filterwarnings("error")
def test_images_without_a_class_do_not_spoil_the_figures():
    """Only pictures without any object in a batch: nothing to rank, yet no crash."""
    labels = np.array([[1, 0], [0, 0]], np.float32)
    scores = np.array([[1, -1], [-1, -1]], np.float32)
    figures = metrics.classification_figures(labels, scores)
    assert figures == {"sample_average_precision": 1, "element_accuracy": 1, "class_map": 1}
    empty = metrics.classification_figures(np.zeros((2, 2), np.float32), scores)
    assert np.isnan(empty["sample_average_precision"]) and np.isnan(empty["class_map"])
    assert empty["element_accuracy"] == pytest.approx(0.75)


def test_agreement_is_the_mean_iou_of_the_foreground_that_either_has():
    confusion = np.array([[50, 5, 0], [5, 20, 0], [0, 0, 0]])
    assert metrics.agreement(confusion) == pytest.approx(20 / 30)
    assert metrics.agreement(np.diag([9, 0, 0])) == 1, "both have none"
    assert metrics.agreement(np.array([[9, 1], [0, 0]])) == 0


def test_the_interval_of_a_miou_holds_it_and_narrows_with_more_images():
    random = np.random.default_rng(0)

    def images(count):
        return [np.array([[80, 10], [random.integers(0, 30), 30]]) for _ in range(count)]

    few, many = images(8), images(200)
    for found in (few, many):
        low, high = metrics.miou_interval(found)
        assert low <= metrics.miou(np.sum(found, 0)) <= high
        assert metrics.miou_interval(iter(found)) == (low, high), "the seed is fixed"
    spans = [np.subtract(*metrics.miou_interval(found)) for found in (many, few)]
    assert spans[0] > 3 * spans[1]
    # Images that nothing is counted of are none; equal ones leave no doubt.
    nothing = np.zeros((2, 2), int)
    assert np.isnan(metrics.miou_interval([few[0], nothing])).all()
    same = metrics.miou_interval([few[0]] * 3 + [nothing])
    assert same == pytest.approx([metrics.miou(few[0])] * 2)


def test_a_label_that_a_draw_has_no_image_of_is_left_out_of_it():
    one, other = np.diag([5, 5, 0]), np.diag([5, 0, 5])
    other[2, 0] = 5
    low, high = metrics.miou_interval([one, other])
    assert (low, high) == pytest.approx([metrics.miou(other), 1])


def test_the_best_threshold_is_bounded_by_draws_of_images():
    random = np.random.default_rng(0)
    # Three thresholds: the second is best for most images, the third for some, the first for none.
    good, fair, bad = (np.array([[80, a], [a, 30]]) for a in (2, 8, 30))
    kinds = {"second": [bad, good, fair], "third": [bad, fair, good]}
    images = [np.stack(kinds["third" if random.random() < 0.2 else "second"]) for _ in range(40)]
    assert metrics.best_interval(images) == (1, 1)
    mixed = [np.stack(kinds[name]) for name in ("second", "third", "second", "third")]
    low, high = metrics.best_interval(mixed)
    assert (low, high) == (1, 2) and metrics.best_interval(mixed[:1]) is None
    assert metrics.best_interval([np.zeros((3, 2, 2), int)] * 2) is None
