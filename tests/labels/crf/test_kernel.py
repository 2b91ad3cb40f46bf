"""The C++ dCRF: what its speed must not cost."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.crf import LABELS, changed, energies, expected, photo
from support.kernels import without_compiler

from isim.errors import UserError
from isim.labels.crf import kernel, refine


def marginals(image, unary, settings):
    return kernel.infer(image, settings, np.empty(unary.shape, np.float32), unary=unary)


def test_the_lattice_that_is_kept_is_that_of_the_size_and_the_kernel():
    """One thread, one after the other: what is kept from one image must not serve the next."""
    for size in ((40, 50), (50, 40), (40, 50)):
        for values in ({}, {"gaussian_sxy": 1}, {"gaussian_compat": 1}):
            case = photo(size), energies(size, 3), changed(**values)
            assert np.abs(marginals(*case) - expected(*case)).max() < 1e-3


def test_threads_do_not_disturb_each_other():
    sizes = [(40 + 3 * n, 60 - 2 * n) for n in range(8)] * 3
    work = [(photo(size), energies(size, 2 + n % 4)) for n, size in enumerate(sizes)]
    one_by_one = [marginals(*pair, LABELS) for pair in work]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda pair: marginals(*pair, LABELS), work))
    assert all(map(np.array_equal, one_by_one, together))


@pytest.mark.parametrize("width", [1e-4, 1e-30])
def test_kernels_that_are_too_narrow_are_named(width):
    for name in ("gaussian_sxy", "bilateral_sxy", "bilateral_srgb"):
        with pytest.raises(UserError, match="too narrow for an image of 50x40 pixels; raise"):
            marginals(photo((40, 50)), energies((40, 50), 2), changed(**{name: width}))


SEED = np.zeros((20, 30), np.uint8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": SEED[1:, :29]}, "30x20 pixels goes with 600 values, not 551"),
        ({"seed": None, "unary": energies((20, 29), 2)}, "1200 values"),
        ({"seed": SEED + np.uint8(2)}, r"label 2, of 0 .. 1"),
        ({"image": photo((20, 30))[..., 0]}, "RGB"),
        ({"seed": None, "unary": energies((20, 30), 257)}, "2 to 256 labels, not 257"),
    ],
)
def test_arrays_that_do_not_go_together_are_refused(changes, words):
    given = {"image": photo((20, 30)), "seed": SEED, "count": 2, "own": 1.0} | changes
    with pytest.raises(ValueError, match=words):
        kernel.infer(settings=LABELS, found=np.empty((20, 30), np.uint8), **given)


def test_a_label_beside_those_of_the_image_is_refused(monkeypatch):
    monkeypatch.setenv("ISIM_CRF", "compiled")
    with pytest.raises(ValueError, match=r"label 255, of 0 .. 1"):
        refine.refine(photo((20, 30)), SEED + np.uint8(9), np.array([4]), LABELS)


def test_without_a_compiler_auto_falls_back_and_compiled_is_refused(monkeypatch):
    without_compiler(monkeypatch)
    kernel._kernel.cache_clear()
    case = photo((20, 30)), SEED, np.array([3]), LABELS
    monkeypatch.setenv("ISIM_CRF", "compiled")
    with pytest.raises(UserError, match="=compiled: no compiler for crf; or set ISIM_CRF=auto"):
        refine.refine(*case)
    for choice in ("auto", "torch"):
        monkeypatch.setenv("ISIM_CRF", choice)
        with pytest.warns(UserWarning, match="by pydensecrf, slowly: no compiler for crf"):
            assert not refine.refine(*case).any()
