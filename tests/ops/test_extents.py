"""Extents at their ends: nothing at all, one of a kind, axes over 65535, and arrays worth cutting between threads."""

import numpy as np
import pytest

import cubn
from tests import oracle
from tests.ops import arrays
from tests.ops.cases import assert_moments

EPS = 1e-5


def check(shape, axis=1, dtype="float32", threads=(2,)):
    """Training, its backward, moments and inference of one shape, against the oracle, on several numbers of threads."""
    rng = np.random.default_rng(0)
    C = shape[axis]
    x, dy = (arrays.normal(rng, shape, dtype, centre=0.3) for _ in range(2))
    gamma, beta = arrays.normal(rng, C), arrays.normal(rng, C)
    mean, var = np.zeros(C, np.float32), np.ones(C, np.float32)
    flat = oracle.as_ncs(x, axis)
    inferred = oracle.normalize(flat, oracle.frozen_statistics(mean, var, EPS), gamma, beta)
    stats = oracle.batch_statistics(flat, EPS)
    trained = oracle.normalize(flat, stats, gamma, beta)
    gradients = oracle.backward(oracle.as_ncs(dy, axis), flat, stats, gamma, beta)

    def same(got, expected, what):
        arrays.assert_same(oracle.as_ncs(arrays.store_of(got), axis), expected, what)

    x, dy = arrays.carry(x, "numpy"), arrays.carry(dy, "numpy")
    for n in threads:
        cubn.set_num_threads(n)
        state = cubn.BatchNormState.from_arrays(
            gamma=gamma, beta=beta, running_mean=mean.copy(), running_var=var.copy(), eps=EPS, channel_axis=axis
        )
        same(cubn.forward(x, state), inferred, "y of forward")
        y, saved = cubn.forward_train(x, state)
        same(y, trained, "y of forward_train")
        assert_moments(cubn.moments(x, channel_axis=axis), stats)
        grads = cubn.backward(dy, saved)
        same(grads.dx, gradients.dx, "dx")
        arrays.assert_same(grads.dgamma, gradients.dgamma, "dgamma")
        arrays.assert_same(grads.dbeta, gradients.dbeta, "dbeta")


@pytest.mark.parametrize(
    ("shape", "axis"), [((70001, 3), 1), ((2, 70001), 1), ((3, 70001, 2), 1), ((2, 2, 70001), 1), ((2, 70001, 3), -1)]
)
def test_axes_over_65535(backend, shape, axis):
    check(shape, axis)


ONES = [(2, 1), (1, 1, 2), (2, 1, 1, 1, 1, 1), (1, 40, 2), (300, 1), (1, 1, 5000)]


@pytest.mark.every_pair
@pytest.mark.parametrize(
    ("shape", "axis"), [(s, axis) for s in ONES for axis in (0, 1, -1) if np.prod(s) > s[axis]], ids=str
)
@pytest.mark.parametrize("dtype", arrays.DTYPES)
def test_one_of_a_kind(backend, dtype, shape, axis):
    check(shape, axis, dtype)


@pytest.mark.every_value
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((6, 64, 56, 56), 1),
        ((6, 56, 56, 64), -1),
        ((2, 3, 300, 301), 1),
        ((16, 2048, 7, 7), 1),
        ((8, 14, 14, 1024), -1),
        ((1025, 1024), 1),
        ((16384, 64), 1),
        ((32, 70, 14, 14), 1),
        ((2, 32, 32, 32, 32), 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_share_what_is_large(shape, axis, dtype):
    """No number of threads changes a bit, here with arrays large enough to be cut between them as shipped."""
    check(shape, axis, dtype, threads=(1, 2, 3, 11))


FEW_POSITIONS = [(16, 3, 2), (17, 40, 5), (16, 100, 31), (40, 17, 15), (300, 16, 16), (15, 40, 5), (16, 40, 32)]
"""Around those arrays that an elementwise pass takes as one row, with a coefficient an element."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [*FEW_POSITIONS, (16, 1100, 15)], ids=str)
def test_many_samples_of_few_positions(shape, dtype):
    check(shape, dtype=dtype, threads=(1, 2))


@pytest.mark.parametrize("shape", FEW_POSITIONS, ids=str)
def test_few_positions_of_arrays_with_gaps(shape):
    """Samples or channels that do not lie side by side: slices of larger arrays."""
    N, C, S = shape
    rng = np.random.default_rng(0)
    mean, var = np.zeros(C, np.float32), np.ones(C, np.float32)
    for store in (arrays.normal(rng, (N, C + 1, S))[:, 1:], arrays.normal(rng, (N, C, S + 1))[:, :, :S]):
        x = np.ascontiguousarray(store)
        state = cubn.BatchNormState.from_arrays(running_mean=mean, running_var=var, num_features=C)
        arrays.assert_same(cubn.forward(store, state), cubn.forward(x, state))
        arrays.assert_same(cubn.forward(x, state, residual=store), cubn.forward(x, state, residual=x))


def test_an_output_larger_than_the_caches():
    check((22, 64, 112, 112))


@pytest.mark.parametrize(
    ("shape", "axis"), [((0, 3), 1), ((0, 3, 4), 1), ((5, 3, 0), 1), ((0, 4, 3), -1), ((3, 0, 2), 0)]
)
@pytest.mark.parametrize("library", arrays.LIBRARIES)
def test_no_samples_or_no_positions(backend, shape, axis, library):
    x = arrays.carry(np.zeros(shape, np.float32), library)
    state = cubn.BatchNormState(3, channel_axis=axis)
    m = cubn.moments(x, channel_axis=axis)
    assert m.count == 0 and not m.mean.any() and not m.m2.any()
    y, saved = cubn.forward_frozen(x, state, residual=x, relu=True)
    grads = cubn.backward(x, saved)
    for got in (cubn.forward(x, state), y, grads.dx, grads.dresidual):
        assert tuple(got.shape) == shape and arrays.library_of(got) == library
    arrays.assert_same(arrays.store_of(grads.dgamma), np.zeros(3, np.float32))
    arrays.assert_same(arrays.store_of(grads.dbeta), np.zeros(3, np.float32))
    before = state.to_dict()
    with pytest.raises(ValueError, match="forward_train: x must have values"):
        cubn.forward_train(x, state)
    assert (state.tracked == before["tracked"]).all()


def test_merging_with_nothing(backend):
    x = arrays.normal(np.random.default_rng(0), (5, 3, 4))
    nothing = cubn.moments(x[:0], start=5)
    assert_moments(cubn.moments(x).merge(nothing), oracle.batch_statistics(x, EPS))
    assert_moments(nothing.merge(cubn.moments(x, start=5)), oracle.batch_statistics(x, EPS, start=5))


def test_samples_of_different_sizes(backend):
    """Ranges merge whatever their number of positions, none at all included."""
    rng = np.random.default_rng(0)
    xs = [arrays.normal(rng, (n, 3, s)) for n, s in ((3, 7), (2, 0), (4, 2500), (1, 1))]
    whole, start, nodes = None, 0, []
    for x in xs:
        part = cubn.moments(x, start=start)
        whole = part if whole is None else whole.merge(part)
        start += len(x)
        nodes.append(oracle.sample_moments(x))
    stacked = tuple(np.concatenate(arrays_of) for arrays_of in zip(*nodes, strict=True))
    assert_moments(whole, oracle.statistics(oracle.root(stacked, oracle.reference.merge), EPS))


def gappy(values, gap):
    """The same numbers in memory with room after each sample, or after each position; and all of that memory."""
    N, S, C = values.shape
    memory = np.full((N, S + 1, C) if gap == "samples" else (N, S, C + 1), 7, values.dtype)
    view = memory[:, :S, :C]
    view[...] = values
    return view, memory


@pytest.mark.parametrize("gap", ["samples", "positions"])
@pytest.mark.parametrize("gaps", ["x", "out", "residual", "dy", "all"])
@pytest.mark.parametrize("C", [3, 16, 65])
def test_few_channels_with_gaps_between_them(backend, C, gaps, gap):
    """What lies side by side in one array need not in another."""
    rng = np.random.default_rng(C)
    shape = (5, 300, C)
    given = {name: arrays.normal(rng, shape) for name in ("x", "residual", "dy")}
    expected = np.empty(shape, np.float32)
    _, saved = cubn.forward_train(
        given["x"], cubn.BatchNormState(C, channel_axis=-1), residual=given["residual"], out=expected
    )
    gradients = cubn.backward(given["dy"], saved)
    placed = {
        name: gappy(values, gap) if gaps in (name, "all") else (values, None)
        for name, values in {**given, "out": np.zeros(shape, np.float32)}.items()
    }
    out, memory = placed["out"]
    state = cubn.BatchNormState(C, channel_axis=-1)
    _, saved = cubn.forward_train(placed["x"][0], state, residual=placed["residual"][0], out=out)
    np.testing.assert_array_equal(out, expected)
    found = cubn.backward(placed["dy"][0], saved, out=out)
    for name in ("dx", "dresidual", "dgamma", "dbeta"):
        np.testing.assert_array_equal(getattr(found, name), getattr(gradients, name), name)
    if memory is not None:
        assert (memory[:, 300:] == 7).all() and (memory[..., C:] == 7).all()


@pytest.mark.parametrize("dtype", arrays.DTYPES)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(("samples", "sample"), [(35, 0), (35, 34), (48, 21), (32, 31), (48, 47)])
def test_one_value_that_is_not_finite_of_single_positions(backend, dtype, value, samples, sample):
    """Its channel's mean is a NaN, not infinite, whether samples are taken in sixteens or one by one."""
    values = np.random.default_rng(0).normal(size=(samples, 40))
    values[sample, 17] = value
    store = oracle.narrow(values, np.dtype(arrays.STORES[dtype]))
    stats = oracle.batch_statistics(oracle.as_ncs(store, 1), EPS)
    assert np.isnan(stats.mean[17])
    assert_moments(cubn.moments(arrays.carry(store, "numpy")), stats)


@pytest.mark.parametrize("large", [1e38, 3e38])
def test_the_largest_single_positions_are_finite(backend, large):
    """Squares of float32 do not overflow a float64, so a mean that is a NaN says that a value was not finite."""
    x = np.where(np.arange(48)[:, None] % 2, large, -large).astype(np.float32) * np.ones((1, 20), np.float32)
    found = cubn.moments(x)
    assert_moments(found, oracle.batch_statistics(oracle.as_ncs(x, 1), EPS))
    assert np.isfinite(found.m2).all()
