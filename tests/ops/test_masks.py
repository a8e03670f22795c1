"""Masked positions take no part in anything, whatever stands there."""

import numpy as np
import pytest

import cubn
from tests import oracle
from tests.ops import arrays
from tests.ops.cases import assert_moments

EPS = 1e-5
SHAPE = N, C, S = 5, 17, 4500  # two tiles and a part of one


def masks():
    """Patterns that leave out whole columns, tiles, samples, or almost everything."""
    rng = np.random.default_rng(0)
    yield "half", rng.random((N, S)) < 0.5
    one = np.ones((N, S), bool)
    one[2] = False
    yield "a sample", one
    one = np.ones((N, S), bool)
    one[:, ::256] = False
    one[1, 7::256] = False
    yield "columns", one
    one = np.ones((N, S), bool)
    one[0, 2048:4096] = False
    one[3, :4096] = False
    yield "tiles", one
    one = np.zeros((N, S), bool)
    one[1, 300], one[4, 4499] = True, True
    yield "all but two values", one
    one = np.zeros((N, S), bool)
    one[3, 5:9] = True
    yield "all but one sample", one
    one = np.ones((N, S), bool)
    one[:, 0] = False
    one[:, 2048:2051] = False
    yield "the first of a tile, its pivot", one
    yield "nothing", np.ones((N, S), bool)


MASKS = dict(masks())


def dirty(x, mask):
    """x with something that must not be read as a number wherever the mask is False."""
    return np.where(mask[:, None], x, np.float32(np.nan))


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", MASKS)
def test_what_is_masked_is_not_there(backend, name, last):
    rng = np.random.default_rng(1)
    mask = MASKS[name]
    x, dy, residual = (dirty(arrays.normal(rng, SHAPE), mask) for _ in range(3))
    axis = -1 if last else 1

    def place(a):
        return np.ascontiguousarray(np.moveaxis(a, 1, axis))

    state = cubn.BatchNormState(C, eps=EPS, channel_axis=axis)
    y, saved = cubn.forward_train(place(x), state, mask=mask, residual=place(residual), relu=True)
    stats = oracle.batch_statistics(x, EPS, mask=mask)
    options = {"mask": mask, "residual": residual, "relu": True}
    assert int(saved.count) == mask.sum()
    arrays.assert_same(oracle.as_ncs(y, axis), oracle.normalize(x, stats, **options), "y")
    grads, expected = cubn.backward(place(dy), saved), oracle.backward(dy, x, stats, **options)
    for got in (y, grads.dx, grads.dresidual):
        assert (oracle.as_ncs(got, axis)[np.broadcast_to(~mask[:, None], SHAPE)] == 0).all()
        assert np.isfinite(got).all()
    arrays.assert_same(oracle.as_ncs(grads.dx, axis), expected.dx, "dx")
    arrays.assert_same(oracle.as_ncs(grads.dresidual, axis), expected.dresidual, "dresidual")
    arrays.assert_same(grads.dgamma, expected.dgamma, "dgamma")
    arrays.assert_same(grads.dbeta, expected.dbeta, "dbeta")


def test_a_mask_that_lets_everything_through_is_no_mask(backend):
    x = arrays.normal(np.random.default_rng(2), SHAPE)
    with_mask = cubn.forward_train(x, cubn.BatchNormState(C), mask=np.ones((N, S), bool))[0]
    arrays.assert_same(with_mask, cubn.forward_train(x, cubn.BatchNormState(C))[0])


@pytest.mark.parametrize("shape", [SHAPE, (N, C, 9), (N, C)])
def test_a_mask_that_lets_nothing_through(backend, shape):
    """Statistics of nothing; y, dx and dresidual are 0; parameters get no gradient."""
    x = np.full(shape, np.nan, np.float32)
    mask = np.zeros((N, *shape[2:]), bool)
    m = cubn.moments(x, mask=mask)
    assert m.count == 0 and not m.mean.any() and not m.m2.any()
    state = cubn.BatchNormState(C)
    zeros = np.zeros(shape, np.float32)
    arrays.assert_same(cubn.forward(x, state, mask=mask), zeros)
    y, saved = cubn.forward_frozen(x, state, mask=mask, residual=x, relu=True)
    arrays.assert_same(y, zeros)
    grads = cubn.backward(x, saved)
    for got, expected in zip(grads[:4], (zeros, np.zeros(C, np.float32), np.zeros(C, np.float32), zeros), strict=True):
        arrays.assert_same(got, expected)


def test_moments_of_masked_parts_merge(backend):
    x, mask = arrays.normal(np.random.default_rng(3), SHAPE), MASKS["tiles"].copy()
    mask[1:3] = False
    parts = [cubn.moments(x[i : i + 1], mask=mask[i : i + 1], start=i) for i in range(N)]
    assert parts[1].count == 0
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    assert_moments(whole, oracle.batch_statistics(x, EPS, mask=mask))


@pytest.mark.parametrize("shape", [(1, 1, 1), (6, 1, 1), (1, 4, 5), (6, 4, 5), (6, 1, 5)])
@pytest.mark.parametrize("steps", [1, -1, 2])
def test_broadcast_and_strided_masks(backend, shape, steps):
    """An extent of 1 counts for all; the mask's own memory may have any strides."""
    rng = np.random.default_rng(4)
    x = arrays.normal(rng, (6, C, 4, 5))
    wide = rng.random([n * abs(steps) for n in shape]) < 0.6
    mask = wide[(slice(None, None, steps),) * 3]
    mask.flat[:2] = True
    options = {"mask": oracle.mask_as_ns(mask, x.shape)}
    y, _ = cubn.forward_train(x, cubn.BatchNormState(C, eps=EPS), mask=mask)
    flat = oracle.as_ncs(x)
    expected = oracle.normalize(flat, oracle.batch_statistics(flat, EPS, **options), **options)
    arrays.assert_same(oracle.as_ncs(y), expected)
