"""Batch renormalisation beside other options of a training forward."""

import numpy as np
import pytest

import cubn


def drawn(*shape):
    return np.random.default_rng(5).standard_normal(shape, dtype=np.float32)


def test_ghost_batches_are_not_renormalised():
    state = cubn.BatchNormState(3)
    with pytest.raises(ValueError, match=r"^forward_train: renorm must be None beside groups; got \(3, 5\)"):
        cubn.forward_train(drawn(8, 3), state, groups=2, renorm=(3, 5))
    assert not state.tracked.any()


def test_one_value_is_normalised_by_running_statistics_and_not_renormalised():
    x, plain, state = drawn(1, 3), cubn.BatchNormState(3), cubn.BatchNormState(3)
    for one in (plain, state):
        cubn.forward_train(drawn(8, 3) * 3, one)
    expected, before = cubn.forward_train(x, plain, on_single="running")
    y, saved = cubn.forward_train(x, state, on_single="running", renorm=(3, 5))
    assert (y == expected).all() and saved.r is None and state.skipped.tolist() == [1, 1, 1]
    assert (cubn.backward(y, saved).dgamma == cubn.backward(y, before).dgamma).all()
