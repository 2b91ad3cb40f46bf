"""Dense CRF in C++ (`isim/cpp/crf.cpp`): as exact as pydensecrf, faster, and without the GIL."""

import ctypes
import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from isim import compiled
from isim.errors import UserError
from isim.params import Crf

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


@functools.cache
def obstacle() -> str | None:
    """Why the kernel cannot be had here; None: it can, and has been compiled if need be."""
    try:
        _kernel()
    except compiled.Unavailable as error:
        return str(error)
    return None


def best(
    image: NDArray[np.uint8], seed: NDArray[np.uint8], count: int, own: float, settings: Crf
) -> NDArray[np.uint8]:
    """Find the most probable labels, starting from a hard label map.

    Args:
        image: (H, W, 3) RGB.
        seed: (H, W) in 0 .. count - 1.
        count: Labels, 2 .. 256.
        own: By how much the energy of the seed's label is below those of the others.
        settings: Kernels and steps.

    Returns:
        (H, W) in 0 .. count - 1.

    Raises:
        UserError: No compiler; or kernels too narrow for an image of this size.
        ValueError: Shapes that do not go together, or labels beyond `count`.
    """
    if seed.max(initial=0) >= count:
        raise ValueError(f"the seed holds label {seed.max()}, of 0 .. {count - 1}")
    found = np.empty(seed.shape, np.uint8)
    _infer(image, count, settings, seed=seed, own=own, best=found)
    return found


def best_of(
    image: NDArray[np.uint8], unary: NDArray[np.float32], settings: Crf
) -> NDArray[np.uint8]:
    """Find the most probable labels, starting from energies.

    Args:
        image: (H, W, 3) RGB.
        unary: (L, H * W) energies, L in 2 .. 256.
        settings: Kernels and steps.

    Returns:
        (H, W) in 0 .. L - 1.

    Raises:
        UserError: As `best`.
    """
    found = np.empty(image.shape[:2], np.uint8)
    _infer(image, len(unary), settings, unary=unary, best=found)
    return found


def marginals(
    image: NDArray[np.uint8], unary: NDArray[np.float32], settings: Crf
) -> NDArray[np.float32]:
    """Compute the (L, H * W) probabilities that mean-field inference ends with; as `best_of`."""
    found = np.empty(unary.shape, np.float32)
    _infer(image, len(unary), settings, unary=unary, marginals=found)
    return found


@functools.cache
def _kernel() -> Callable[..., int]:
    function = compiled.library("crf").isim_crf
    function.restype = _INT
    function.argtypes = [
        *(_INT, _INT, _INT, _INT, _POINTER, _POINTER, _FLOAT, _POINTER),
        *(_FLOAT, _FLOAT, _FLOAT, _FLOAT, _FLOAT, _POINTER, _POINTER),
    ]
    return function


def _infer(
    image: NDArray[np.uint8],
    count: int,
    settings: Crf,
    *,
    seed: NDArray[np.uint8] | None = None,
    own: float = 0.0,
    unary: NDArray[np.float32] | None = None,
    best: NDArray[np.uint8] | None = None,
    marginals: NDArray[np.float32] | None = None,
) -> None:
    """Call the kernel; the arrays that are given must be of the shapes it reads."""
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
    except compiled.Unavailable as error:
        raise UserError(f"crf.backend compiled: {error}; or use pydensecrf or auto") from error
    code = kernel(
        *(height, width, count, settings.steps),
        *(_address(image), _address(seed), own, _address(unary)),
        *(settings.gaussian_sxy, settings.gaussian_compat, settings.bilateral_sxy),
        *(settings.bilateral_srgb, settings.bilateral_compat, _address(best), _address(marginals)),
    )
    if code == 1:
        raise UserError(
            f"crf: the kernels are too narrow for an image of {width}x{height} pixels; raise "
            "gaussian_sxy, bilateral_sxy or bilateral_srgb"
        )
    if code:
        raise MemoryError(f"dCRF of {count} labels on an image of {width}x{height} pixels")


def _address(array: NDArray[np.generic] | None) -> int | None:
    return None if array is None else array.ctypes.data
