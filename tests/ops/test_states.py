"""What backends do with a state besides training: 16-bit statistics, beginning anew, counters that go on."""

import numpy as np
import pytest

import cubn
from tests.ops import arrays

C = 19


def drawn(dtype):
    """gamma, beta, running_mean and running_var of a dtype, bfloat16 as bits."""
    rng = np.random.default_rng(0)
    names = ("gamma", "beta", "running_mean", "running_var")
    return {name: arrays.normal(rng, C, dtype, centre=3.0 * (name == "running_var"), scale=0.5) for name in names}


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("data", ["float16", "bfloat16", "float32"])
def test_statistics_in_16_bits_are_read(backend, data, dtype, library):
    """As if they had been widened."""
    pytest.importorskip("ml_dtypes")
    held = {name: arrays.carry(store, library) for name, store in drawn(dtype).items()}
    half = cubn.BatchNormState.from_arrays(**held)
    widened = {name: half.to_dict()[name].astype(np.float32) for name in held}
    full = cubn.BatchNormState.from_arrays(**widened)
    assert str(half.running_var.dtype).endswith(dtype)
    rng = np.random.default_rng(1)
    x, dy = (arrays.carry(arrays.normal(rng, (4, C, 5), data), library) for _ in range(2))
    expected = arrays.store_of(cubn.forward(x, full))
    arrays.assert_same(arrays.store_of(cubn.forward(x, half)), expected)
    y, saved = cubn.forward_frozen(x, half)
    arrays.assert_same(arrays.store_of(y), expected)
    gradients = cubn.backward(dy, saved)
    wanted = cubn.backward(dy, cubn.forward_frozen(x, full)[1])
    arrays.assert_same(arrays.store_of(gradients.dx), arrays.store_of(wanted.dx))
    y, _ = cubn.forward_train(x, half, update=False)
    arrays.assert_same(arrays.store_of(y), arrays.store_of(cubn.forward_train(x, full)[0]))


@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_reset_gives_zero_and_one_to_the_bit(backend, library, dtype, wild):
    """0 and 1 to the bit, whatever there was before."""
    mean, var = np.full(C, -3.0, dtype), np.full(C, 7.0, dtype)
    if wild:
        mean[[0, 3]], var[[1, 3]], var[2] = np.nan, np.inf, -1
    held = {"running_mean": arrays.carry(mean, library), "running_var": arrays.carry(var, library)}
    state = cubn.BatchNormState.from_arrays(**held, momentum=0.5, tracked=5, skipped=2, check=False)
    state.reset()
    arrays.assert_same(arrays.store_of(state.running_mean), np.zeros(C, dtype))
    arrays.assert_same(arrays.store_of(state.running_var), np.ones(C, dtype))
    assert not np.signbit(arrays.store_of(state.running_mean)).any()
    assert not state.tracked.any() and not state.skipped.any()


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_assigned_counters_go_on(backend, library):
    x = arrays.normal(np.random.default_rng(0), (4, C, 5), centre=2.0)
    like = arrays.carry(x, library)
    state = cubn.BatchNormState(C, momentum=None, like=like)
    cubn.forward_train(like, state)  # which may have moved the counters
    before = np.array(arrays.store_of(state.running_mean))
    state.tracked = np.arange(1, C + 1)
    cubn.forward_train(arrays.carry(2 * x, library), state)
    np.testing.assert_array_equal(state.tracked, np.arange(2, C + 2))
    weight = 1 / np.arange(2.0, C + 2)
    expected = (1 - weight) * before + weight * 2 * x.mean((0, 2), np.float64)
    np.testing.assert_allclose(arrays.store_of(state.running_mean), expected, rtol=1e-5)
