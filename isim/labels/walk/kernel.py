"""Steps of the random walk in C++ (`kernel.cpp`), without the GIL."""

import ctypes
import functools
from collections.abc import Callable

import numpy as np

from isim.runtime import kernels

# Values that the kernel may read behind a map: eight vectors of eight.
BEHIND = 64


@functools.cache
def steps() -> Callable[..., None]:
    """Load the function that multiplies padded planes (M, length) by a transition, in place.

    It takes weights, scale and distances of a `walk.Transition`; P, length, the places of its
    pixels, the number of steps and M; the planes; and (4, length) float64 to work in.

    Raises:
        Unavailable: There is no compiler.
    """
    function = kernels.library("walk").walk
    floats, doubles, distances = (
        np.ctypeslib.ndpointer(kind, flags="C_CONTIGUOUS")
        for kind in (np.float32, np.float64, np.int64)
    )
    function.argtypes = [floats, doubles, distances, *6 * [ctypes.c_int64], doubles, doubles]
    function.restype = None
    return function
