"""Running statistics: the update rule over many batches, and the guard that keeps what is not finite out of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cubn
from cubn._types import Affine, Counters, Extents, NormalizeOptions, Operand, Operands, Running, Update, Vector
from cubn.backends import cpu
from tests import oracle
from tests.ops import arrays

EPS = 1e-5
C = 19


def fresh(momentum, dtype="float32", library="numpy", running_mean=None):
    """A state of running statistics alone, and the oracle's idea of it."""
    mean = np.zeros(C, dtype) if running_mean is None else running_mean
    var, none = np.ones(C, dtype), np.zeros(C, np.int64)
    state = cubn.BatchNormState.from_arrays(
        running_mean=arrays.carry(mean.copy(), library),
        running_var=arrays.carry(var.copy(), library),
        momentum=momentum,
        eps=EPS,
    )
    return state, oracle.State(mean, var, none, none)


def assert_state(state, expected):
    arrays.assert_same(arrays.store_of(state.running_mean), expected.mean, "running_mean")
    arrays.assert_same(arrays.store_of(state.running_var), expected.var, "running_var")
    arrays.assert_same(np.asarray(state.tracked), expected.tracked, "tracked")
    arrays.assert_same(np.asarray(state.skipped), expected.skipped, "skipped")


@given(
    seed=st.integers(0, 2**32 - 1),
    momentum=st.sampled_from([0.0, 0.1, 0.999, 1.0, None]),
    dtype=st.sampled_from(["float32", "float64"]),
    data=st.sampled_from(arrays.DTYPES),
    scales=st.lists(st.sampled_from([1.0, 1e-22, 1e18, 1e-3]), min_size=1, max_size=6),
    wild=st.sampled_from([0.0, 0.02]),
)
@settings(max_examples=80)
def test_running_statistics_of_many_batches_are_the_oracle_s(backend, seed, momentum, dtype, data, scales, wild):
    rng = np.random.default_rng(seed)
    state, expected = fresh(momentum, dtype)
    for scale in scales:
        x = arrays.normal(rng, (3, C, 5), data, centre=scale, scale=scale, wild=wild)
        cubn.forward_train(arrays.carry(x, "numpy"), state)
        expected = oracle.update(expected, oracle.batch_statistics(x, EPS), momentum)
        assert_state(state, expected)
        assert (state.running_var >= 0).all()


# --- statistics that are not finite, and batches that heal them ------------------------------------------------------

MOMENTA = [0.0, 0.25, 1.0, None]


def half_broken(momentum, dtype="float32"):
    """`fresh`, its mean or variance or both of them broken in some channels, in all ways."""
    state, expected = fresh(momentum, dtype)
    every = np.meshgrid([3.0, np.nan, np.inf, -np.inf], [2.0, np.nan, np.inf, 0.0, 1e-42])
    expected.mean[:], expected.var[:] = (values.reshape(-1)[:C] for values in every)
    state.running_mean[:], state.running_var[:] = expected.mean, expected.var
    return state, expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("momentum", MOMENTA)
def test_a_usable_batch_heals_what_is_broken(backend, momentum, dtype):
    rng = np.random.default_rng(8)
    state, expected = half_broken(momentum, dtype)
    batches = [arrays.normal(rng, (4, C, 3), centre=2.0) for _ in range(5)]
    batches[0][1, ::2, 0] = np.nan  # every other channel cannot be healed yet
    batches[3][:, 4] *= np.float32(1e20)
    for x in batches:
        cubn.forward_train(x, state)
        expected = oracle.update(expected, oracle.batch_statistics(x, EPS), momentum)
        assert_state(state, expected)
    healed = np.isfinite(state.running_mean) & np.isfinite(state.running_var)
    assert healed.all() == (momentum != 0.0)


def test_a_broken_channel_takes_both_values_of_the_batch(backend):
    x = arrays.normal(np.random.default_rng(8), (4, C, 3), centre=2.0)
    batch = oracle.batch_statistics(x, EPS)
    for momentum in (0.25, 1.0, None):
        state, old = half_broken(momentum)
        broken = ~(np.isfinite(old.mean) & np.isfinite(old.var))
        cubn.update(state, cubn.moments(x))
        arrays.assert_same(state.running_mean[broken], batch.mean[broken].astype(np.float32))
        arrays.assert_same(state.running_var[broken], (batch.m2 / 11)[broken].astype(np.float32))


def test_a_broken_channel_begins_its_cumulative_average_anew(backend):
    rng = np.random.default_rng(9)
    batches = [arrays.normal(rng, (4, C, 3), "float64", centre=k) for k in range(5)]
    state, _ = fresh(None, "float64")
    for x in batches[:2]:
        cubn.forward_train(x, state)
    state.running_var[3] = np.inf
    for x in batches[2:]:
        cubn.forward_train(x, state)
    assert np.asarray(state.tracked).tolist() == [3 if c == 3 else 5 for c in range(C)]
    for c, since in ((3, 2), (4, 0)):
        assert state.running_mean[c] == pytest.approx(np.mean([x[:, c].mean() for x in batches[since:]]), rel=1e-12)
        variances = [x[:, c].var(ddof=1) for x in batches[since:]]
        assert state.running_var[c] == pytest.approx(np.mean(variances), rel=1e-12)


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_biased_running_variance_is_divided_by_the_count(backend, momentum, dtype):
    """In training and by itself; two values are needed as for the unbiased variance."""
    x = arrays.normal(np.random.default_rng(10), (4, C, 3), wild=0.01)
    works = cpu.backend()
    for values in (x, x[:1, :, :1].copy()):
        _, state = fresh(momentum, dtype)
        extents = Extents(values.shape[0], C, values.shape[2])
        out = np.empty_like(values)
        given, y = (
            Operand(a.ctypes.data, "float32", C * extents.S, extents.S, (extents.S,), (1,)) for a in (values, out)
        )
        old, (tracked, skipped) = running(state), counters(state, works)
        train = works.prepare_train(
            extents, Operands(given, y=y), Affine(None, None), old, True, NormalizeOptions(residual=False, relu=False)
        )
        moving = (old.mean.pointer, old.var.pointer) * 2
        addresses = works.address(tracked), works.address(skipped)
        statistics, _ = train(given.pointer, 0, y.pointer, 0, 0, 0, EPS, *moving, *addresses, momentum)
        expected = oracle.update(fresh(momentum, dtype)[1], oracle.batch_statistics(values, EPS), momentum, biased=True)
        arrays.assert_same(state.mean, expected.mean)
        arrays.assert_same(state.var, expected.var)
        _, later = fresh(momentum, dtype)
        old, (tracked, skipped) = running(later), counters(later, works)
        addresses = Counters(works.address(tracked), works.address(skipped))
        works.update(statistics, old, old, addresses, Update(momentum, biased=True))
        arrays.assert_same(later.var, expected.var)


def running(state):
    """An oracle's state, which a backend moves."""
    return Running(*(Vector(a.ctypes.data, str(a.dtype), 1) for a in (state.mean, state.var)))


def counters(state, works):
    return [works.from_host(a.copy()) for a in (state.tracked, state.skipped)]


@pytest.mark.parametrize("library", arrays.LIBRARIES)
def test_updated_in_place_or_rebound(backend, library):
    state, expected = fresh(0.3, library=library)
    held = state.running_mean, state.running_var
    x = arrays.normal(np.random.default_rng(0), (4, C, 3))
    cubn.forward_train(arrays.carry(x, library), state)
    expected = oracle.update(expected, oracle.batch_statistics(x, EPS), 0.3)
    assert_state(state, expected)
    assert arrays.library_of(state.running_mean) == library
    same = state.running_mean is held[0] and state.running_var is held[1]
    assert same == (library != "jax")
    if library == "jax":
        arrays.assert_same(arrays.store_of(held[0]), np.zeros(C, np.float32), "the old running_mean")


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_a_numpy_state_serves_other_libraries(backend, library):
    state, expected = fresh(0.3)
    x = arrays.normal(np.random.default_rng(0), (4, C, 3))
    y, _ = cubn.forward_train(arrays.carry(x, library), state)
    assert arrays.library_of(y) == library
    assert_state(state, oracle.update(expected, oracle.batch_statistics(x, EPS), 0.3))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_channel_that_is_not_finite_is_skipped_and_counted(backend, bad):
    state, _ = fresh(0.5)
    x = arrays.normal(np.random.default_rng(1), (4, C, 3))
    cubn.forward_train(x, state)
    before = state.running_mean.copy(), state.running_var.copy()
    x[2, 7, 1] = bad
    y, _ = cubn.forward_train(x, state)
    assert state.running_mean[7] == before[0][7] and state.running_var[7] == before[1][7]
    others = np.arange(C) != 7
    assert (state.running_mean[others] != before[0][others]).all()
    assert state.skipped.tolist() == [int(c == 7) for c in range(C)] and (state.tracked == 2).all()
    assert np.isnan(y[:, 7]).any() and np.isfinite(y[:, others]).all()


def test_values_whose_squares_overflow_are_skipped(backend):
    """float32 values of 1e20 are finite, the sum of their squares is not."""
    state, expected = fresh(0.5)
    x = arrays.normal(np.random.default_rng(1), (4, C, 300))
    x[:, 3] *= np.float32(1e20)
    cubn.forward_train(x, state)
    assert state.skipped[3] == 1 and state.skipped.sum() == 1
    assert state.running_mean[3] == 0 and state.running_var[3] == 1
    assert_state(state, oracle.update(expected, oracle.batch_statistics(x, EPS), 0.5))


def test_a_mean_too_large_for_the_state_is_skipped(backend):
    """Finite in float64, infinite once rounded to the state's float32."""
    state, _ = fresh(1.0)
    x = arrays.normal(np.random.default_rng(1), (4, C, 3), "float64")
    x[:, 5] += 1e39
    cubn.forward_train(x, state)
    assert np.flatnonzero(state.skipped).tolist() == [5]
    assert state.running_mean[5] == 0 and state.running_var[5] == 1


def test_subnormal_variances_are_kept(backend):
    """A running variance of 5.6e-45 was seen in a real network: it is neither flushed to zero nor skipped."""
    state, _ = fresh(1.0)
    x = np.zeros((2, C, 4), np.float32)
    x[0] = np.float32(1.2e-22)
    cubn.forward_train(x, state)
    assert ((state.running_var > 0) & (state.running_var < np.finfo(np.float32).tiny)).all()
    assert (state.skipped == 0).all()


def test_a_constant_channel_has_variance_zero_and_never_below(backend):
    state, _ = fresh(1.0)
    for value in (1e8, 1 / 3, -7e-12, 3e37):
        cubn.forward_train(np.full((5, C, 700), value, np.float32), state)
        assert (state.running_var == 0).all()
        assert (state.running_mean == np.float32(value)).all()


def test_cumulative_average_counts_what_was_kept(backend):
    """With momentum None a skipped batch has no weight at all."""
    rng = np.random.default_rng(2)
    batches = [arrays.normal(rng, (4, C, 3), "float64", centre=k) for k in range(4)]
    state, _ = fresh(None, "float64")
    for k, x in enumerate(batches):
        if k == 2:
            x[0, 4, 0] = np.nan
        cubn.forward_train(x, state)
    means = np.array([x.mean((0, 2)) for x in batches])
    variances = np.array([x.var((0, 2), ddof=1) for x in batches])
    kept = ~np.isnan(means[:, :, None]).any(2)
    assert state.skipped.tolist() == [int(c == 4) for c in range(C)]
    for c in range(C):
        assert state.running_mean[c] == pytest.approx(means[kept[:, c], c].mean(), rel=1e-12)
        assert state.running_var[c] == pytest.approx(variances[kept[:, c], c].mean(), rel=1e-12)


@pytest.mark.parametrize("momentum", [0.25, None])
def test_update_by_moments_is_the_update_of_training(backend, momentum):
    x = arrays.normal(np.random.default_rng(3), (9, C, 7), wild=0.003)
    trained, by_moments = fresh(momentum)[0], fresh(momentum)[0]
    cubn.forward_train(x, trained)
    cubn.update(by_moments, cubn.moments(x[:4]).merge(cubn.moments(x[4:], start=4)))
    arrays.assert_same(by_moments.running_mean, trained.running_mean)
    arrays.assert_same(by_moments.running_var, trained.running_var)
    arrays.assert_same(by_moments.skipped, trained.skipped)
    assert trained.skipped.any()


def test_moments_of_one_value_leave_the_state_as_it_was(backend):
    state, expected = fresh(0.5)
    cubn.update(state, cubn.moments(np.ones((1, C), np.float32)))
    expected.tracked, expected.skipped = expected.tracked + 1, expected.skipped + 1
    assert_state(state, expected)


def test_without_update_nothing_moves(backend):
    state, expected = fresh(0.5)
    x = arrays.normal(np.random.default_rng(4), (4, C, 3))
    y, _ = cubn.forward_train(x, state, update=False)
    assert_state(state, expected)
    arrays.assert_same(y, oracle.normalize(x, oracle.batch_statistics(x, EPS)))


def test_without_tracking_there_is_nothing_to_move(backend):
    state = cubn.BatchNormState(C, track=False, eps=EPS)
    x = arrays.normal(np.random.default_rng(4), (4, C, 3))
    y, saved = cubn.forward_train(x, state)
    stats = oracle.batch_statistics(x, EPS)
    arrays.assert_same(y, oracle.normalize(x, stats))
    arrays.assert_same(cubn.backward(x, saved).dx, oracle.backward(x, x, stats).dx)
    assert state.running_mean is None and state.tracked is None


@pytest.mark.parametrize("data", arrays.DTYPES)
def test_a_float64_state_is_read_in_full(backend, data):
    """Under float32 arithmetic a float64 running mean counts as two numbers, high and low."""
    rng = np.random.default_rng(5)
    state, _ = fresh(0.5, "float64", running_mean=1000.0 + rng.normal(size=C))
    x = arrays.normal(rng, (4, C, 3), data, centre=1000.0)
    dy = arrays.normal(rng, (4, C, 3), data)
    stats = oracle.frozen_statistics(state.running_mean, state.running_var, EPS)
    assert data == "float64" or (stats.mean != stats.mean.astype(np.float32)).all()
    y, saved = cubn.forward_frozen(arrays.carry(x, "numpy"), state)
    arrays.assert_same(arrays.store_of(y), oracle.normalize(x, stats))
    grads = cubn.backward(arrays.carry(dy, "numpy"), saved)
    arrays.assert_same(arrays.store_of(grads.dx), oracle.backward(dy, x, stats, frozen=True).dx)


def test_a_saved_forward_does_not_see_later_updates(backend):
    rng = np.random.default_rng(6)
    state = cubn.BatchNormState(C, eps=EPS)
    x, dy = arrays.normal(rng, (2, 4, C, 3))
    saved = [cubn.forward_train(x, state)[1], cubn.forward_frozen(x, state)[1]]
    before = [cubn.backward(dy, s) for s in saved]
    state.gamma[:] = 7
    state.beta[:] = -9
    cubn.forward_train(dy, state)
    for s, old in zip(saved, before, strict=True):
        again = cubn.backward(dy, s)
        for name in ("dx", "dgamma", "dbeta"):
            arrays.assert_same(getattr(again, name), getattr(old, name), name)
