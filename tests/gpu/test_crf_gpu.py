"""The dCRF in PyTorch, on the CPU: equal to pydensecrf, whatever is in a batch."""

from pathlib import Path

import numpy as np
import pydensecrf.densecrf as densecrf
import pytest
import torch

from isim.data import files
from isim.errors import UserError
from isim.gpu import crf as gpu
from isim.gpu.crf import marginals, refine_batch, refine_soft_batch
from isim.labels.crf import refine, refine_soft
from isim.params import Crf, resolve_path

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
# Spec 5, set `segmenter`: keys of the lattice of places are large at a width of one pixel.
SEGMENTER = PAPER.model_copy(
    update={"gaussian_sxy": 1.0, "bilateral_sxy": 67.0, "bilateral_srgb": 3.0}
    | {"bilateral_compat": 4.0}
)
SAMPLE = resolve_path("$ISIM_SHARED/data/voc_sample", Path(__file__).parents[2])
SAMPLE /= "VOCdevkit/VOC2012"
# Odd sizes, portrait, and each remainder of pixels that four do not divide.
SIZES = [(40, 60), (41, 63), (58, 33), (25, 37), (39, 66)]


def photo(size, seed=0):
    """(H, W, 3): a few smooth regions with noise, as photographs are."""
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[:height, :width] / 20
    planes = [np.sin(x * rng.uniform(0.3, 2) + y * rng.uniform(0.3, 2)) for _ in range(3)]
    image = 120 + 60 * np.sign(planes[0])[..., None] + 30 * np.stack(planes, -1)
    image += rng.normal(0, 4, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def coarse(size, count, seed=0):
    """(H, W): labels below `count` in blocks of about 8 pixels."""
    blocks = np.random.default_rng(seed).integers(0, count, [-(-side // 8) for side in size])
    return np.kron(blocks, np.ones((8, 8), int))[: size[0], : size[1]]


def energies(labels, count, seed=0):
    """(n, H * W): as of `refine`, with a little noise."""
    probabilities = np.full((count, labels.size), 0.3 / (count - 1), np.float32)
    probabilities[labels.ravel(), np.arange(labels.size)] = 0.7
    noise = np.random.default_rng(seed).normal(0, 0.05, probabilities.shape)
    return (noise - np.log(probabilities)).astype(np.float32)


def expected(image, unary, settings):
    """(n, H, W) of pydensecrf."""
    height, width = image.shape[:2]
    field = densecrf.DenseCRF2D(width, height, len(unary))
    field.setUnaryEnergy(unary)
    field.addPairwiseGaussian(sxy=settings.gaussian_sxy, compat=settings.gaussian_compat)
    field.addPairwiseBilateral(
        sxy=settings.bilateral_sxy,
        srgb=settings.bilateral_srgb,
        rgbim=image,
        compat=settings.bilateral_compat,
    )
    return np.array(field.inference(settings.steps)).reshape(-1, height, width)


def tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1)


def assert_equal(found, wanted):
    """The criteria of an exact backend: of the worst pixel, of the worst image and of all."""
    agreements = []
    for one, two in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32 and one.shape == two.shape
        assert np.abs(one.numpy() - two).max() < 1e-3
        agreements.append((one.numpy().argmax(0) == two.argmax(0)).mean())
    assert min(agreements) >= 0.999 and np.mean(agreements) >= 0.9999


@pytest.mark.parametrize("settings", [PAPER, SEGMENTER], ids=["labels", "segmenter"])
def test_equals_pydensecrf_in_a_batch_of_all_sizes_and_label_counts(settings):
    counts = [2, 3, 4, 6, 21]
    images = [photo(size, seed) for seed, size in enumerate(SIZES) for _ in counts]
    labels = [(coarse(size, n, n), n) for size in SIZES for n in counts]
    unaries = [energies(label, n, n) for label, n in labels]
    found = marginals([tensor(i) for i in images], [torch.from_numpy(u) for u in unaries], settings)
    wanted = [expected(i, u, settings) for i, u in zip(images, unaries, strict=True)]
    assert_equal(found, wanted)
    # The images decide, or the kernels have hardly been tested.
    changed = [(w.argmax(0) != la).mean() for w, (la, _) in zip(wanted, labels, strict=True)]
    assert np.mean(changed) > 0.05


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no VOC sample below $ISIM_SHARED")
@pytest.mark.parametrize("settings", [PAPER, SEGMENTER], ids=["labels", "segmenter"])
def test_equals_pydensecrf_on_photographs(settings):
    names = (SAMPLE / "ImageSets/Segmentation/train.txt").read_text().split()
    images = [files.read_image(SAMPLE / f"JPEGImages/{name}.jpg") for name in names[:6]]
    # One as it is, the others' corners in two counts of labels.
    images = [np.array(images[0])] + [np.array(image[:151, :98]) for image in images[1:]]
    counts = [2, 2, 3, 4, 6, 21]
    unaries = [
        energies(coarse(image.shape[:2], n, n), n) for image, n in zip(images, counts, strict=True)
    ]
    found = marginals([tensor(i) for i in images], [torch.from_numpy(u) for u in unaries], settings)
    assert_equal(found, [expected(i, u, settings) for i, u in zip(images, unaries, strict=True)])


def test_a_batch_is_its_images_alone():
    images = [tensor(photo(size, seed)) for seed, size in enumerate(SIZES)] * 2
    unaries = [
        torch.from_numpy(energies(coarse(tuple(image.shape[1:]), n, n), n))
        for image, n in zip(images, [3, 2, 3, 4, 2, 3, 3, 2, 2, 4], strict=True)
    ]
    together = marginals(images, unaries, PAPER)
    for image, unary, found in zip(images, unaries, together, strict=True):
        torch.testing.assert_close(marginals([image], [unary], PAPER)[0], found, atol=1e-5, rtol=0)


def test_runs_give_the_same_bits():
    images = [tensor(photo(size)) for size in SIZES]
    unaries = [torch.from_numpy(energies(coarse(size, 3), 3)) for size in SIZES]
    first = marginals(images, unaries, PAPER)
    assert all(map(torch.equal, first, marginals(images, unaries, PAPER)))


def test_big_batches_are_split(monkeypatch):
    images = [tensor(photo(size, seed)) for seed, size in enumerate(SIZES)]
    seeds = [torch.from_numpy(coarse(size, 2).astype(np.uint8) * 7) for size in SIZES]
    ids = [np.array([7])] * len(SIZES)
    whole = refine_batch(images, seeds, ids, PAPER)
    sizes = []
    infer = gpu._infer

    def spy(batch, *arguments):
        sizes.append(len(batch))
        return infer(batch, *arguments)

    monkeypatch.setattr(gpu, "_infer", spy)
    monkeypatch.setattr(gpu, "BUDGET", 5000 * (gpu.BYTES_OF_PIXEL + gpu.BYTES_OF_CHANNEL))
    parts = refine_batch(images, seeds, ids, PAPER)
    # 2400, 2583, 1914, 925 and 2574 pixels.
    assert sizes == [2, 2, 1]
    assert all(map(torch.equal, whole, parts))
    monkeypatch.setattr(gpu, "BUDGET", 1)
    sizes.clear()
    assert all(map(torch.equal, whole, refine_batch(images, seeds, ids, PAPER)))
    assert sizes == [1] * 5


def test_a_dark_image_whose_pixels_four_does_not_divide():
    """Black pixels that pydensecrf fills the last four up with add lattice points."""
    image = np.random.default_rng(0).integers(0, 60, (25, 37, 3), np.uint8)
    unary = energies(coarse((25, 37), 3), 3)
    found = marginals([tensor(image)], [torch.from_numpy(unary)], PAPER)
    assert_equal(found, [expected(image, unary, PAPER)])


def test_a_plain_image_and_a_single_pixel():
    """Few lattice points of many pixels, which are summed in runs; one without neighbours."""
    for image in (np.full((50, 70, 3), 255, np.uint8), np.full((1, 1, 3), 9, np.uint8)):
        unary = energies(coarse(image.shape[:2], 3), 3)
        found = marginals([tensor(image)], [torch.from_numpy(unary)], PAPER)
        assert_equal(found, [expected(image, unary, PAPER)])


def test_narrow_kernels_fit_into_the_keys_or_are_refused():
    narrow = PAPER.model_copy(update={"bilateral_srgb": 0.2})
    image = photo((41, 63))
    unary = energies(coarse((41, 63), 2), 2)
    arguments = [tensor(image)] * 3, [torch.from_numpy(unary)] * 3
    assert_equal(marginals(*arguments, narrow), [expected(image, unary, narrow)] * 3)
    for name in ("bilateral_srgb", "gaussian_sxy"):
        with pytest.raises(UserError, match="too narrow for a GPU") as caught:
            marginals(*arguments, PAPER.model_copy(update={name: 1e-9}))
        assert "1e-09" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("steps", [0, 1, 10])
def test_seeds_become_the_labels_of_the_cpu(steps):
    settings = PAPER.model_copy(update={"steps": steps})
    class_ids = [np.array(ids, np.int64) for ids in ([9, 4], [20], [], [1, 2, 3, 5, 8], [20, 4])]
    images = [photo(size, seed) for seed, size in enumerate(SIZES)]
    seeds = [
        np.append(0, ids)[coarse(size, 1 + len(ids))].astype(np.uint8)
        for size, ids in zip(SIZES, class_ids, strict=True)
    ]
    found = refine_batch(
        [tensor(image) for image in images],
        [torch.from_numpy(s) for s in seeds],
        class_ids,
        settings,
    )
    for image, seed, ids, label in zip(images, seeds, class_ids, found, strict=True):
        assert label.dtype == torch.uint8 and label.shape == seed.shape
        assert (label.numpy() == refine(image, seed, ids, settings)).mean() >= 0.999
        assert set(label.unique().tolist()) <= {0, *ids}
    assert (found[0].numpy() != seeds[0]).any() == (steps > 0)


@pytest.mark.parametrize("steps", [0, 10])
def test_probabilities_become_the_labels_of_the_cpu(steps):
    settings = SEGMENTER.model_copy(update={"steps": steps})
    counts = [5, 21, 1, 5, 2]
    images = [photo(size, seed) for seed, size in enumerate(SIZES)]
    probabilities = []
    for size, count in zip(SIZES, counts, strict=True):
        scores = np.random.default_rng(count).normal(0, 2, (count, *size))
        # Certain here and there: log(0) must not reach the energies.
        scores[0, :3] += 200
        exponentials = np.exp(scores - scores.max(0))
        probabilities.append((exponentials / exponentials.sum(0)).astype(np.float32))
    planes = [torch.from_numpy(p.copy()) for p in probabilities]
    found = refine_soft_batch([tensor(image) for image in images], planes, settings)
    for image, before, after, label in zip(images, probabilities, planes, found, strict=True):
        assert (after.numpy() == before).all(), "changed in place"
        assert label.dtype == torch.uint8 and label.shape == image.shape[:2]
        assert (label.numpy() == refine_soft(image, before, settings)).mean() >= 0.999


def test_an_empty_batch_is_nothing():
    assert refine_batch([], [], [], PAPER) == marginals([], [], PAPER) == []
