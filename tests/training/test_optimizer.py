"""The rates of a training's steps; `test_loop` follows them through one."""

import pytest

from isim.training.optimizer import poly_factor


def test_poly_schedule_by_hand_and_constant_after_the_horizon():
    expected = [1, 0.75**0.9, 0.5**0.9, 0.25**0.9, 0.25**0.9]
    assert [poly_factor(step, 4, 0.9) for step in (0, 1, 2, 3, 1000)] == pytest.approx(expected)
    assert poly_factor(3, 4, 0) == 1
