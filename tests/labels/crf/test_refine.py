"""The dCRF's contract, which reference, kernel and tensors fulfil alike."""

from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.crf import LABELS, SEGMENTER, changed, energies, expected, marginals, photo, softmax
from support.devices import DEVICES, tensor

from isim.data import files
from isim.labels.crf import batched, refine
from isim.runtime.paths import resolve_path

SAMPLE = resolve_path("$ISIM_SHARED/data/voc_sample", Path.cwd()) / "VOCdevkit/VOC2012"
SIZE = (20, 31)
IDS = np.array([4, 9])


def batches_of_one(device):
    """The functions of `batched.py` as those of `refine.py`."""

    def alone(function, image, start, *others):
        given = tensor(start, device)
        (found,) = function([tensor(image, device).permute(2, 0, 1)], [given], *others)
        assert (given.cpu().numpy() == start).all(), "changed in place"
        return found.cpu().numpy()

    return SimpleNamespace(
        refine=lambda image, seed, ids, settings: alone(
            batched.refine_batch, image, seed, [ids], settings
        ),
        refine_soft=partial(alone, batched.refine_soft_batch),
        marginals=lambda *given: (found := alone(marginals, *given)).reshape(len(found), -1),
    )


@pytest.fixture(params=["pydensecrf", "compiled", *DEVICES])
def crf(request, monkeypatch):
    if request.param in DEVICES:
        return batches_of_one(request.param)
    monkeypatch.setenv("ISIM_CRF", request.param)
    return refine


def noise():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*SIZE, 3), np.uint8)
    return image, rng.choice(np.array([0, 4, 9], np.uint8), SIZE)


# Each remainder of pixels that four do not divide: pydensecrf fills the last four up with black.
SIZES = [(1, 1), (1, 40), (40, 1), (7, 5), (97, 33), (39, 66), (64, 64)]
KERNELS = [
    SEGMENTER.model_dump(),
    {"gaussian_sxy": 7.5, "gaussian_compat": 0.5},
    {"bilateral_compat": 0},
    {"gaussian_compat": 0},
    # More bits than a word of the kernel has beside a vertex's number.
    {"bilateral_srgb": 0.3, "bilateral_sxy": 2},
    {"steps": 0},
    {"steps": 1},
]
COUNTS = [2, 3, 4, 5, 6, 9, 13, 17, 21, 30, 40]


def cases():
    """Name, image, number of labels, settings, share of the pixels whose labels may differ."""
    for count in COUNTS:
        yield "labels", photo((61, 83)), count, {}, 1e-4
    for size, count in product(SIZES, (2, 3, 21)):
        yield "size", photo(size), count, {}, 1e-4
    for values, count in product(KERNELS, (2, 4)):
        yield "kernel", photo((50, 90)), count, values, 1e-3
    # Few lattice points of many pixels; and black ones that pydensecrf's filling touches.
    dark = np.random.default_rng(0).integers(0, 60, (25, 37, 3), np.uint8)
    for image in (np.zeros_like(dark), np.full_like(dark, 255), dark):
        yield "plain or dark", image, 3, {}, 1e-3
    if SAMPLE.is_dir():
        names = (SAMPLE / "ImageSets/Segmentation/train.txt").read_text().split()
        paths = [SAMPLE / f"JPEGImages/{name}.jpg" for name in names]
        portrait = next(path for path in paths if np.greater(*files.image_size(path)))
        for count in (2, 3, 4, 6, 21):
            for path, values in ((paths[count], {}), (portrait, SEGMENTER.model_dump())):
                image = np.ascontiguousarray(files.read_image(path)[:201, :251])
                yield "photograph", image, count, values, 1e-3


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: f"{case[0]} {case[2]}")
def test_equals_pydensecrf(crf, case):
    _, image, count, values, pixels = case
    unary, settings = energies(image.shape[:2], count), changed(**values)
    found, wanted = crf.marginals(image, unary, settings), expected(image, unary, settings)
    assert found.dtype == np.float32 and found.shape == wanted.shape
    assert np.allclose(found.sum(0), 1, atol=1e-5)
    assert np.abs(found - wanted).max() < 1e-3
    assert (found.argmax(0) != wanted.argmax(0)).mean() <= pixels


@pytest.mark.parametrize("count", COUNTS)
def test_the_image_decides_or_the_kernels_have_hardly_been_tested(count):
    unary = energies((61, 83), count)
    labels = expected(photo((61, 83)), unary, LABELS).argmax(0)
    assert (labels != unary.argmin(0)).mean() > 0.02


def test_a_seed_has_energies_of_its_probability(crf):
    image, seed = noise()
    # 0.7 for the label of the seed, the rest shared by the others (zero_unsure False).
    probability = np.full((3, seed.size), 0.3 / 2, np.float32)
    probability[np.searchsorted([0, 4, 9], seed).ravel(), np.arange(seed.size)] = 0.7
    wanted = expected(image, -np.log(probability), LABELS).argmax(0).reshape(SIZE)
    found = crf.refine(image, seed, IDS, LABELS)
    assert found.dtype == np.uint8
    assert (found == np.array([0, 4, 9])[wanted]).all()
    assert (found != seed).any()
    assert (crf.refine(image, seed, IDS[::-1], LABELS) == found).all(), "the order of the classes"


def test_probabilities_have_energies_that_are_finite(crf):
    image, _ = noise()
    probabilities = softmax(SIZE, 5)
    assert probabilities.min() == 0, "log(0) must not reach the energies"
    found = crf.refine_soft(image, probabilities, SEGMENTER)
    assert found.dtype == np.uint8 and found.shape == SIZE
    wanted = expected(image, energies(SIZE, 5), SEGMENTER).argmax(0)
    assert (found.ravel() == wanted).all()
    assert (found != probabilities.argmax(0)).any()


def test_without_steps_nothing_changes(crf):
    (image, seed), settings = noise(), changed(steps=0)
    assert (crf.refine(image, seed, IDS, settings) == seed).all()
    assert (crf.refine_soft(image, softmax(SIZE, 5), settings) == softmax(SIZE, 5).argmax(0)).all()
    found = crf.marginals(image, energies(SIZE, 5), settings)
    likely = np.maximum(softmax(SIZE, 5), 1e-5).reshape(5, -1)
    np.testing.assert_allclose(found, likely / likely.sum(0), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_where_nothing_is_to_be_decided_nothing_is(crf):
    image, _ = noise()
    label = crf.refine(image, np.zeros(SIZE, np.uint8), np.zeros(0, np.int64), LABELS)
    soft = crf.refine_soft(image, np.ones((1, *SIZE), np.float32), SEGMENTER)
    for found in (label, soft):
        assert found.dtype == np.uint8 and found.shape == SIZE and not found.any()
    for value in (0, 9):
        seed = np.full(SIZE, value, np.uint8)
        assert (crf.refine(image, seed, IDS, LABELS) == value).all()


def test_views_are_taken_and_nothing_is_changed(crf):
    image, seed = noise()
    probabilities = softmax(SIZE, 5)
    arrays = image, seed, probabilities
    before = [array.copy() for array in arrays]
    views = image[:, ::-1], seed[:, ::-1], probabilities[..., ::-1]
    copies = [np.ascontiguousarray(view) for view in views]
    found = [
        (crf.refine(a, b, IDS, LABELS), crf.refine_soft(a, c, LABELS))
        for a, b, c in (views, copies)
    ]
    assert np.array_equal(*found)
    assert all(map(np.array_equal, arrays, before))


def test_a_coarse_seed_is_drawn_to_the_edges_of_the_image(crf):
    """A red object on blue ground; the seed misses its border by 3 pixels all around."""
    truth = np.zeros((40, 60), np.uint8)
    truth[10:30, 15:45] = 6
    image = np.where(truth[..., None] > 0, np.uint8([200, 30, 30]), np.uint8([30, 30, 200]))
    seed = np.zeros_like(truth)
    seed[13:27, 18:42] = 6
    assert (seed != truth).mean() > 0.1
    refined = crf.refine(image, seed, np.array([6]), LABELS)
    assert set(np.unique(refined)) == {0, 6}
    assert (refined != truth).mean() < 0.005

    blurred = np.where(seed > 0, np.float32(0.7), np.float32(0.4))
    planes = np.stack([0.95 - blurred, blurred, np.full_like(blurred, 0.05)])
    assert ((planes.argmax(0) > 0) != (truth > 0)).mean() > 0.1
    refined = crf.refine_soft(image, planes, SEGMENTER)
    assert (refined != (truth > 0)).mean() < 0.005


def test_energies_of_labels_are_those_of_the_seed():
    label = np.array([[0, 1, 2], [2, 255, 0]], np.uint8)
    found = np.exp(-refine.label_energies(label, 3, 0.7))
    assert np.allclose(found[:, 0, 1], [0.15, 0.7, 0.15])
    # Where a label is not known no one is more likely.
    assert len(set(found[:, 1, 1].tolist())) == 1
    assert refine.label_energies(label, 1, 0.7).shape == (1, 2, 3)


def test_a_large_image_is_refined_at_a_smaller_size(crf, monkeypatch):
    """Both halves of a picture get the label that most of their seed has, at full size."""
    image = np.zeros((60, 80, 3), np.uint8)
    image[:, 37:] = 255
    seed = np.where(image[..., 0] > 0, IDS[0], 0).astype(np.uint8)
    seed[10:20, 30:45] = IDS[1]
    whole = crf.refine(image, seed, IDS, LABELS)
    monkeypatch.setattr(refine, "LARGEST", 60 * 80 / 4)
    assert refine.working_size(60, 80) == (30, 40)
    small = crf.refine(image, seed, IDS, LABELS)
    assert small.shape == (60, 80) and (small == whole).mean() > 0.97
    planes = np.stack([seed != label for label in (4, 0)]).astype(np.float32) * 0.8 + 0.1
    soft = crf.refine_soft(image, planes / planes.sum(0), SEGMENTER)
    assert soft.shape == (60, 80) and (soft == (image[..., 0] > 0)).mean() > 0.9
