"""A caller's floating-point mode changes no bit."""

import numpy as np
import pytest

from tests.fuzz import modes


def test_a_mode_of_the_caller_changes_no_bit(campaign):
    campaign("modes")


@pytest.mark.parametrize("rounding", modes.ROUNDING)
def test_the_modes_are_set(rounding):
    """In the arithmetic of this very thread; NumPy's is done in it."""
    third, tiny = np.array([1.0, -1.0], np.float32), np.array([1e-39], np.float32)
    with modes.mode(rounding, True):
        thirds, flushed = third / np.float32(3), tiny * np.float32(1)
    near = np.array([1, -1], np.float64) / 3
    wanted = {"nearest": [1, 1], "up": [1, 1], "down": [-1, -1], "to zero": [-1, 1]}[rounding]
    assert flushed[0] == 0
    assert tiny[0] * np.float32(1) != 0
    if rounding != "nearest":
        assert np.array_equal(np.sign(thirds - near), wanted)
