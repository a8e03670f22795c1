"""The ReLU's gate at its edges: NaN, zeros of both signs, and outputs that only rounding makes zero."""

import numpy as np
import pytest

import cubn
from tests import oracle
from tests.ops import arrays

EPS = 1e-5

CALLS = {"frozen": cubn.forward_frozen, "train": cubn.forward_train}


def both(call, x, dy, axis, *, gamma, beta, residual=None):
    """(y, gradients), got and expected, for stores (N, C, S)."""
    C = x.shape[1]
    mean, var = np.zeros(C, np.float32), np.ones(C, np.float32)
    state = cubn.BatchNormState.from_arrays(
        gamma=gamma, beta=beta, running_mean=mean.copy(), running_var=var.copy(), eps=EPS, channel_axis=axis
    )

    def place(store):
        return arrays.carry(np.ascontiguousarray(np.moveaxis(store, 1, axis)), "numpy")

    y, saved = CALLS[call](place(x), state, residual=None if residual is None else place(residual), relu=True)
    grads = cubn.backward(place(dy), saved)
    stats = oracle.frozen_statistics(mean, var, EPS) if call == "frozen" else oracle.batch_statistics(x, EPS)
    options = {"residual": residual, "relu": True}
    got = oracle.as_ncs(arrays.store_of(y), axis), oracle.as_ncs(arrays.store_of(grads.dx), axis), grads.dbeta
    expected = oracle.backward(dy, x, stats, gamma, beta, frozen=call == "frozen", **options)
    return got, (oracle.normalize(x, stats, gamma, beta, **options), expected.dx, expected.dbeta)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_output_that_rounds_to_zero_lets_nothing_through(backend, dtype, with_residual, call, axis):
    """The gate is the y that was returned, not the one before rounding."""
    rng = np.random.default_rng(0)
    shape = 3, 19, 40
    x, dy = arrays.normal(rng, shape, dtype), arrays.normal(rng, shape, dtype)
    least = {"float16": 2.0**-24, "bfloat16": 2.0**-133}[dtype]  # the smallest subnormal
    gamma, beta = np.full(19, 0.6 * least, np.float32), np.zeros(19, np.float32)
    residual = np.zeros(shape, x.dtype) if with_residual else None
    got, expected = both(call, x, dy, axis, gamma=gamma, beta=beta, residual=residual)
    vanished = (oracle.widen(got[0]) == 0) & (oracle.widen(x) > 0.1)
    assert vanished.any() and (oracle.widen(got[0]) > 0).any()
    for a, b, what in zip(got, expected, ("y", "dx", "dbeta"), strict=True):
        arrays.assert_same(a, b, what)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("with_residual", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("dtype", arrays.DTYPES)
def test_nan_passes_and_zero_does_not(backend, dtype, with_residual, axis):
    """y of NaN stays and lets dy through; y of 0 and -0 stops it; the gradient may itself be infinite or NaN."""
    values = np.array([np.nan, 0.0, -0.0, np.inf, -np.inf, 1.0, -1.0, 1e-7, -1e-7])
    x = oracle.narrow(np.tile(values, (2, 18, 3)), np.dtype(arrays.STORES[dtype]))
    dy = arrays.normal(np.random.default_rng(0), x.shape, dtype, wild=0.2)
    residual = np.zeros(x.shape, x.dtype) if with_residual else None
    ones, zeros = np.ones(18, np.float32), np.zeros(18, np.float32)
    got, expected = both("frozen", x, dy, axis, gamma=ones, beta=zeros, residual=residual)
    y, dx = oracle.widen(got[0]), oracle.widen(got[1])
    assert np.isnan(y[..., 0]).all() and (y[..., [1, 2, 4, 6, 8]] == 0).all() and (y[..., 3] == np.inf).all()
    assert (dx[..., [1, 2, 4, 6, 8]] == 0).all()
    for a, b, what in zip(got, expected, ("y", "dx", "dbeta"), strict=True):
        arrays.assert_same(a, b, what)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize(("C", "S"), [(1, 1), (15, 1), (16, 3), (17, 31), (33, 16), (513, 2), (2, 257), (3, 2049)])
def test_the_kept_bits_of_every_shape(backend, C, S, axis):
    """One bit an element, wherever a row of them ends."""
    rng = np.random.default_rng(C + S)
    x, dy, residual = (arrays.normal(rng, (3, C, S)) for _ in range(3))
    gamma, beta = arrays.normal(rng, C), arrays.normal(rng, C)
    for call in CALLS:
        got, expected = both(call, x, dy, axis, gamma=gamma, beta=beta, residual=residual)
        for a, b, what in zip(got, expected, ("y", "dx", "dbeta"), strict=True):
            arrays.assert_same(a, b, f"{what} of {call}")
