"""Inference of a sample depends on nothing but the sample: not on its batch, its neighbours or its address."""

import numpy as np
import pytest

import cubn
from tests import oracle
from tests.ops import arrays

EPS = 1e-5


def state_of(C, axis, rng):
    return cubn.BatchNormState.from_arrays(
        gamma=arrays.normal(rng, C),
        beta=arrays.normal(rng, C),
        running_mean=arrays.normal(rng, C),
        running_var=np.abs(arrays.normal(rng, C, centre=1.0)),
        eps=EPS,
        channel_axis=axis,
    )


def place(store, axis, offset=0):
    """A store (N, C, S) at an address, its channels on the axis."""
    return arrays.carry(arrays.at_address(np.moveaxis(store, 1, axis), offset), "numpy")


@pytest.mark.every_pair
@pytest.mark.usefixtures("eager_threads")
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(33, 65, 1), (9, 17, 49), (5, 3, 2049), (7, 96, 7)])
@pytest.mark.parametrize("dtype", arrays.DTYPES)
def test_a_sample_alone_has_the_bits_it_has_in_any_batch(backend, dtype, shape, axis):
    rng = np.random.default_rng(0)
    x = arrays.normal(rng, shape, dtype, wild=0.01)
    state = state_of(shape[1], axis, rng)
    cubn.set_num_threads(3)
    whole = arrays.store_of(cubn.forward(place(x, axis), state))
    stats = oracle.frozen_statistics(state.running_mean, state.running_var, EPS)
    arrays.assert_same(oracle.as_ncs(whole, axis), oracle.normalize(x, stats, state.gamma, state.beta), "y of all")
    for first, count in ((0, 1), (shape[0] - 1, 1), (1, 1), (1, 2), (2, 3), (0, shape[0] - 1)):
        part = arrays.store_of(cubn.forward(place(x[first : first + count], axis), state))
        arrays.assert_same(part, whole[first : first + count], f"samples [{first}, {first + count})")


@pytest.mark.every_pair
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(2, 19, 13), (3, 33, 1), (1, 2, 2100)])
@pytest.mark.parametrize("dtype", arrays.DTYPES)
def test_no_address_changes_a_bit_of_inference(backend, dtype, shape, axis):
    """x, residual and out begin at every element-aligned offset within 64 bytes, each at another."""
    rng = np.random.default_rng(1)
    x, residual = arrays.normal(rng, shape, dtype), arrays.normal(rng, shape, dtype)
    state = state_of(shape[1], axis, rng)
    expected = arrays.store_of(cubn.forward(place(x, axis), state, residual=place(residual, axis), relu=True))
    for offset in range(0, 64, x.itemsize):
        out = place(np.zeros_like(x), axis, (offset + 3 * x.itemsize) % 64)
        y = cubn.forward(
            place(x, axis, offset),
            state,
            residual=place(residual, axis, (64 - x.itemsize - offset) % 64),
            relu=True,
            out=out,
        )
        assert y is out
        arrays.assert_same(arrays.store_of(y), expected, f"offset {offset}")


@pytest.mark.every_pair
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(3, 19, 13), (9, 33, 1), (2, 2, 2100)])
@pytest.mark.parametrize("dtype", arrays.DTYPES)
def test_no_address_changes_a_bit_of_training(backend, dtype, shape, axis):
    rng = np.random.default_rng(2)
    x, dy = arrays.normal(rng, shape, dtype), arrays.normal(rng, shape, dtype)
    first = None
    for offset in range(0, 64, x.itemsize):
        state = cubn.BatchNormState(shape[1], channel_axis=axis)
        y, saved = cubn.forward_train(place(x, axis, offset), state)
        grads = cubn.backward(place(dy, axis, 64 - x.itemsize - offset), saved)
        results = [
            *map(arrays.store_of, (y, grads.dx)),
            grads.dgamma,
            grads.dbeta,
            state.running_mean,
            state.running_var,
        ]
        first = first or results
        for got, expected in zip(results, first, strict=True):
            arrays.assert_same(got, expected, f"offset {offset}")


@pytest.mark.every_pair
@pytest.mark.usefixtures("eager_threads", "passes")
@pytest.mark.parametrize(("backend", "passes"), [("cpu", "plain"), ("cpu", "streamed by position")], indirect=True)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33, 49, 63, 64, 65, 79, 80, 81])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_that_end_amid_a_vector_may_be_overwritten(backend, dtype, length, axis):
    """y in new memory, in x's and in the residual's; rows are positions of a channel, or the channels of a position."""
    rng = np.random.default_rng(3)
    shape = (2, 5, length) if axis == 1 else (2, length, 5)
    x, residual = arrays.normal(rng, shape, dtype), arrays.normal(rng, shape, dtype)
    state = state_of(shape[1], axis, rng)
    stats = oracle.frozen_statistics(state.running_mean, state.running_var, EPS)
    expected = oracle.normalize(x, stats, state.gamma, state.beta, residual=residual)
    for out in ("new", "x", "residual"):
        given = {"x": place(x, axis, 3 * x.itemsize), "residual": place(residual, axis), "new": None}
        y = cubn.forward(given["x"], state, residual=given["residual"], out=given[out])
        arrays.assert_same(oracle.as_ncs(arrays.store_of(y), axis), expected, f"out is {out}")


@pytest.mark.parametrize("of_the_mean", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("axis", [1, -1])
def test_running_means_are_taken_to_their_last_bit_and_infinite_ones_give_nan(backend, axis, dtype, of_the_mean):
    rng = np.random.default_rng(4)
    x = arrays.normal(rng, (3, 19, 21), dtype)
    mean, var = arrays.normal(rng, 19, of_the_mean, centre=1.0), np.ones(19, of_the_mean)
    mean[[2, 11, 17]] = np.inf, -np.inf, np.nan
    state = cubn.BatchNormState.from_arrays(running_mean=mean, running_var=var, eps=EPS, channel_axis=axis, check=False)
    y = oracle.as_ncs(arrays.store_of(cubn.forward(place(x, axis), state)), axis)
    assert np.isnan(y[:, [2, 11, 17]]).all()
    arrays.assert_same(y, oracle.normalize(x, oracle.frozen_statistics(mean, var, EPS), None, None), "y")
