"""Dense CRF in C++ (`kernel.cpp`): as exact as pydensecrf, faster, and without the GIL."""

import ctypes
import functools
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from isim.errors import UserError
from isim.params import Crf
from isim.runtime import kernels

Found = TypeVar("Found", NDArray[np.uint8], NDArray[np.float32])

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


@functools.cache
def _kernel() -> Callable[..., int]:
    function = kernels.library("crf").isim_crf
    function.restype = _INT
    function.argtypes = [
        *(_INT, _INT, _INT, _INT, _POINTER, _POINTER, _FLOAT, _POINTER),
        *(_FLOAT, _FLOAT, _FLOAT, _FLOAT, _FLOAT, _POINTER, _POINTER),
    ]
    return function


def infer(
    image: NDArray[np.uint8],
    settings: Crf,
    found: Found,
    *,
    unary: NDArray[np.float32] | None = None,
    seed: NDArray[np.uint8] | None = None,
    count: int = 0,
    own: float = 0.0,
) -> Found:
    """Fill `found` by mean-field inference, which starts from energies or from a hard label map.

    Args:
        image: (H, W, 3) RGB.
        settings: Kernels and steps.
        found: (H, W) uint8 for the most probable labels, or (L, H * W) float32 for probabilities.
        unary: (L, H * W) energies, or
        seed: (H, W) labels in 0 .. count - 1.
        count: Number L of labels beside a seed, 2 .. 256.
        own: By how much the energy of the seed's label is below those of the others.

    Raises:
        UserError: No compiler; or kernels too narrow for an image of this size.
        ValueError: Shapes that do not go together, or labels beyond `count`.
    """
    count = count if unary is None else len(unary)
    if seed is not None and seed.max(initial=0) >= count:
        raise ValueError(f"the seed holds label {seed.max()}, of 0 .. {count - 1}")
    height, width = image.shape[:2]
    if not 2 <= count <= 256:
        raise ValueError(f"the dCRF takes 2 to 256 labels, not {count}")
    for given, size in ((seed, height * width), (unary, count * height * width)):
        if given is not None and given.size != size:
            raise ValueError(
                f"an image of {width}x{height} pixels goes with {size} values, not {given.size}"
            )
    if height * width == 0 or image.shape[2:] != (3,):
        raise ValueError(f"the dCRF takes RGB images, not an array of shape {image.shape}")
    image = np.ascontiguousarray(image, np.uint8)
    seed = None if seed is None else np.ascontiguousarray(seed, np.uint8)
    unary = None if unary is None else np.ascontiguousarray(unary, np.float32)
    try:
        kernel = _kernel()
    except kernels.Unavailable as error:
        raise UserError(f"ISIM_CRF=compiled: {error}; or set ISIM_CRF=auto") from error
    labels, marginals = (found, None) if found.dtype == np.uint8 else (None, found)
    code = kernel(
        *(height, width, count, settings.steps),
        *(_address(image), _address(seed), own, _address(unary)),
        *(settings.gaussian_sxy, settings.gaussian_compat),
        *(settings.bilateral_sxy, settings.bilateral_srgb, settings.bilateral_compat),
        *(_address(labels), _address(marginals)),
    )
    if code == 1:
        raise UserError(
            f"the dCRF's kernels are too narrow for an image of {width}x{height} pixels; raise "
            "gaussian_sxy, bilateral_sxy or bilateral_srgb of the stage's crf"
        )
    if code:
        raise MemoryError(f"dCRF of {count} labels on an image of {width}x{height} pixels")
    return found


def _address(array: NDArray[np.generic] | None) -> int | None:
    return None if array is None else array.ctypes.data
