"""The walk's kernel: planes that walk together, and a machine without a compiler."""

import numpy as np
import pytest
from support.kernels import without_compiler

from isim.labels.walk.walk import transition, walk

RNG = np.random.default_rng(0)
PLANES = RNG.random((7, 6, 7), np.float32)
MOVES = transition(RNG.random((34, 6, 7), np.float32), 5, 8)


def test_planes_that_share_a_step_are_as_if_alone():
    """Four, two and one: the same bits."""
    together = walk(PLANES, MOVES, 6)
    for plane, expected in zip(PLANES, together, strict=True):
        assert (walk(plane[None], MOVES, 6)[0] == expected).all()


def test_without_a_compiler_numpy_walks(monkeypatch):
    expected = walk(PLANES, MOVES, 8)
    without_compiler(monkeypatch)
    with pytest.warns(UserWarning, match="by numpy, slowly: no compiler for walk"):
        found = walk(PLANES, MOVES, 8)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
