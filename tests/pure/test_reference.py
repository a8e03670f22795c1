"""The reference: the textbook against independent formulas, the fast oracle against the slow contract, bit for bit."""

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cubn import reference
from tests import oracle

EDGES = [1, 2, 7, 8, 9, 49, 255, 256, 257, 511, 513, 2047, 2048, 2049, 2304, 4096, 5000]
DTYPES = ["float16", "uint16", "float32", "float64"]  # uint16: bfloat16 bit patterns


def data(rng, shape, dtype, *, wild=0.0):
    """Values of several magnitudes around several means, a fraction `wild` of them not finite or close to it."""
    x = rng.normal(size=shape) * 10.0 ** rng.integers(-2, 2) + rng.choice([0.0, 1.0, -300.0])
    odd = rng.choice([np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-42, -0.0], size=shape)
    x = np.where(rng.random(shape) < wild, odd, x)
    return oracle.narrow(x.astype(np.float64 if dtype == "float64" else np.float32), np.dtype(dtype))


def some_mask(rng, shape, kind):
    return None if kind is None else rng.random(shape) < kind


# --- the oracle's bfloat16 ------------------------------------------------------------------------------------------


def test_every_bfloat16_survives_widening_and_rounding():
    bits = np.arange(2**16, dtype=np.uint16)
    back = oracle.narrow(oracle.widen(bits), np.uint16)
    nan = np.isnan(oracle.widen(bits))
    assert np.array_equal(back[~nan], bits[~nan])
    assert np.isnan(oracle.widen(back[nan])).all() and nan.sum() == 2 * 127


def test_rounding_to_bfloat16_goes_to_the_nearest_and_on_a_tie_to_the_even():
    low = np.arange(0x7F7F, dtype=np.uint16)  # every finite one but the largest, and its neighbour
    high = low + np.uint16(1)
    middle = (oracle.widen(low).astype(np.float64) + oracle.widen(high)) / 2
    even = np.where(low % 2 == 0, low, high)
    for sign, bit in ((1.0, 0), (-1.0, 0x8000)):
        assert np.array_equal(oracle.narrow(sign * middle, np.uint16), even | bit)
        assert np.array_equal(oracle.narrow((sign * middle).astype(np.float32), np.uint16), even | bit)
        for factor, nearest in ((1 - 2.0**-50, low), (1 + 2.0**-50, high)):
            assert np.array_equal(oracle.narrow(sign * middle * factor, np.uint16), nearest | bit)
        for towards, nearest in ((0.0, low), (np.inf, high)):
            beside = np.nextafter((sign * middle).astype(np.float32), np.float32(sign * towards))
            assert np.array_equal(oracle.narrow(beside, np.uint16), nearest | bit)
    assert oracle.widen(oracle.narrow(np.array([3.4e38, 1e300, np.inf]), np.uint16)).tolist() == [np.inf] * 3


# --- the oracle against the contract --------------------------------------------------------------------------------


@pytest.mark.parametrize("S", EDGES)
@pytest.mark.parametrize("mask", [None, 0.003, 0.5])
def test_the_oracle_is_the_contract_at_every_edge(S, mask):
    for dtype in DTYPES:
        the_oracle_is_the_contract(S, 3, 2, S, dtype, mask, 0.0, 3)


@given(
    seed=st.integers(0, 2**32 - 1),
    N=st.integers(0, 9),
    C=st.integers(1, 4),
    S=st.sampled_from(EDGES) | st.integers(0, 64),
    dtype=st.sampled_from(DTYPES),
    mask=st.sampled_from([None, 0.0, 0.003, 0.5, 0.99]),
    wild=st.sampled_from([0.0, 0.0, 0.001, 0.3]),
    start=st.integers(0, 40),
)
@settings(max_examples=60)
def test_the_oracle_is_the_contract(seed, N, C, S, dtype, mask, wild, start):
    the_oracle_is_the_contract(seed, N, C, S, dtype, mask, wild, start)


def the_oracle_is_the_contract(seed, N, C, S, dtype, mask, wild, start):
    rng = np.random.default_rng(seed)
    x, dy = data(rng, (N, C, S), dtype, wild=wild), data(rng, (N, C, S), dtype, wild=wild)
    mask = some_mask(rng, (N, S), mask)
    gamma, beta = rng.normal(size=(2, C)).astype(np.float32)
    acc = oracle.widen(x)
    masks = [None] * N if mask is None else mask
    slow = [reference.sample_moments(v, m) for v, m in zip(acc, masks, strict=True)]
    same_nodes(oracle.sample_moments(x, mask), slow)
    if N == 0:
        return
    node = reference.root(*reference.range_nodes(slow, start, reference.merge), reference.merge)
    mean, var, invstd = reference.finalize(node, 1e-5)
    fast = oracle.batch_statistics(x, 1e-5, mask=mask, start=start)
    assert (fast.count == node[0]).all()
    for a, b in ((fast.mean, mean), (fast.m2, node[2]), (fast.var, var), (fast.invstd, invstd)):
        assert oracle.equal(a, b)

    y = oracle.narrow(reference.relu(reference.output(acc, mean, invstd, gamma, beta)), x.dtype)
    present = np.ones((N, 1, S), bool) if mask is None else mask[:, None]
    assert oracle.equal(
        oracle.normalize(x, fast, gamma, beta, mask=mask, relu=True), np.where(present, y, y.dtype.type(0))
    )

    gated = reference.behind_relu(oracle.widen(dy), oracle.widen(y))
    with np.errstate(all="ignore"):
        terms = gated, gated * reference.centre(acc, mean)
    slow = [reference.sample_sums(u, v, mask=m) for u, v, m in zip(*terms, masks, strict=True)]
    same_nodes(oracle.sample_sums(*terms, mask=mask), slow)
    count, *sums = reference.root(*reference.range_nodes(slow, start, reference.add), reference.add)
    dgamma, dbeta = reference.parameter_gradients(invstd, *sums, np.float32)
    for frozen, dx in (
        (False, reference.input_gradient(gated, acc, mean, invstd, gamma, count, *sums)),
        (True, reference.frozen_input_gradient(gated, invstd, gamma)),
    ):
        fast_gradients = oracle.backward(dy, x, fast, gamma, beta, frozen=frozen, mask=mask, relu=True, start=start)
        for a, b in (
            (fast_gradients.dx, oracle.narrow(np.where(present, dx, dx.dtype.type(0)), x.dtype)),
            (fast_gradients.dresidual, oracle.narrow(np.where(present, gated, gated.dtype.type(0)), x.dtype)),
            (fast_gradients.dgamma, dgamma),
            (fast_gradients.dbeta, dbeta),
        ):
            assert oracle.equal(a, b)


@pytest.mark.parametrize("mask", [None, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_oracle_s_second_derivatives_are_the_contract(dtype, mask):
    rng, start = np.random.default_rng(1), 5
    shape = N, C, S = 3, 2, 300
    x, dy, ddx, ddresidual = (data(rng, shape, dtype) for _ in range(4))
    gamma, beta, u, w = rng.normal(size=(4, C))
    mask = some_mask(rng, (N, S), mask)
    stats = oracle.batch_statistics(x, 1e-5, mask=mask, start=start)
    acc, v, y = oracle.widen(x), oracle.widen(ddx), oracle.widen(oracle.normalize(x, stats, gamma, beta, relu=True))
    g = reference.behind_relu(oracle.widen(dy), y)
    with np.errstate(all="ignore"):
        d = reference.centre(acc, stats.mean)
        terms = g, g * d, v, v * d, g * v
    masks = [None] * N if mask is None else mask
    slow = [reference.sample_sums(*each, mask=m) for *each, m in zip(*terms, masks, strict=True)]
    count, *sums = reference.root(*reference.range_nodes(slow, start, reference.add), reference.add)
    sums = reference.DoubleSums(*sums)
    present = np.ones((N, 1, S), bool) if mask is None else mask[:, None]
    for whole in (None, (count, sums)):
        of_ddy = reference.ddy_combination(stats.invstd, gamma, acc.dtype, u, w, whole)
        ddy = reference.combine(v, acc, stats.mean, of_ddy, oracle.widen(ddresidual))
        if whole is None:
            dx = reference.frozen_input_gradient(g, stats.invstd, u)
        else:
            with np.errstate(all="ignore"):
                of_u = u * sums.dy, u * sums.dy_xmu
            of_dx = reference.dx_combination(stats.invstd, gamma, u, count, sums, *of_u)
            dx = reference.combine(g, acc, stats.mean, of_dx, v)
        options = {"ddresidual": ddresidual, "frozen": whole is None, "mask": mask, "relu": True, "start": start}
        fast = oracle.double_backward(ddx, u, w, dy, x, stats, gamma, beta, **options)
        for a, b in ((fast.ddy, reference.behind_relu(ddy, y)), (fast.dx, dx)):
            assert oracle.equal(a, oracle.narrow(np.where(present, b, b.dtype.type(0)), x.dtype))
        dgamma = reference.gamma_gradient(stats.invstd, sums, whole)
        assert oracle.equal(fast.dgamma, dgamma)


def same_nodes(fast, slow):
    """The oracle's stacked nodes (N,), (N, C)... against a list of N nodes of the contract."""
    for n, node in enumerate(slow):
        assert (node[0] == fast[0][n]).all()
        for a, b in zip(fast[1:], node[1:], strict=True):
            assert oracle.equal(a[n], b)


@given(seed=st.integers(0, 2**32 - 1), N=st.integers(1, 30), cuts=st.lists(st.integers(0, 30), max_size=4))
@settings(max_examples=60)
def test_the_root_does_not_know_where_the_batch_was_cut(seed, N, cuts):
    x = data(np.random.default_rng(seed), (N, 3, 5), "float32")
    samples = [reference.sample_moments(v) for v in x]
    whole = reference.root(*reference.range_nodes(samples, 0, reference.merge), reference.merge)
    blocks, nodes = [], []
    edges = sorted({0, N, *(c for c in cuts if c < N)})
    for lo, hi in itertools.pairwise(edges):
        more_blocks, more_nodes = reference.range_nodes(samples[lo:hi], lo, reference.merge)
        blocks += more_blocks
        nodes += more_nodes
    for a, b in zip(whole, reference.root(blocks, nodes, reference.merge), strict=True):
        assert np.array_equal(a, b)


def test_the_contract_speaks_of_more_than_one_answer():
    """Another order of summation, no pivot or a fused multiply-add would show: the promise is not empty."""
    x = np.random.default_rng(0).normal(3.0, 1.0, (4, 8, 3000)).astype(np.float32)
    m = oracle.batch_statistics(x, 1e-5)
    swapped = oracle.batch_statistics(x[..., ::-1], 1e-5)
    assert not oracle.equal(m.mean, swapped.mean) and not oracle.equal(m.m2, swapped.m2)


def test_a_tree_needs_a_node():
    with pytest.raises(ValueError, match=r"tree: nodes must not be empty"):
        reference.tree([], reference.merge)


def test_infinities_and_nan_are_no_warning():
    x = np.array([[[np.inf, 1.0, -np.inf, 3e38]]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        node = reference.sample_moments(x[0])
        mean, _, invstd = reference.finalize(node, 1e-5)
        y = reference.output(x, mean, invstd, np.ones(1), np.zeros(1))
    assert np.isnan(y).all()


# --- running statistics ---------------------------------------------------------------------------------------------


def running(mean=0.0, var=1.0, tracked=0, skipped=0, dtype=np.float64):
    """Running statistics of one channel."""
    return reference.RunningStatistics(
        np.array([mean], dtype), np.array([var], dtype), np.array([tracked]), np.array([skipped])
    )


def after(old, mean, m2, momentum, count=3, **options):
    """The four numbers of a channel after a batch."""
    new = reference.running(old, np.int64(count), np.array([mean]), np.array([m2]), momentum, **options)
    assert [a.dtype for a in new] == [a.dtype for a in old]
    return tuple(a[0] for a in new)


def test_a_channel_is_kept_when_everything_about_it_is_finite():
    old = running(5.0, 7.0, tracked=3, skipped=1, dtype=np.float32)
    assert after(old, 1.0, 2.0, 0.5) == (3.0, 4.0, 4, 1)
    for batch in ((np.inf, 2.0), (1.0, np.nan), (1e40, 2.0), (1.0, 1e40)):
        for momentum in (0.5, 1.0, None):
            assert after(old, *batch, momentum) == (5.0, 7.0, 4, 2)
    assert after(old, 1.0, 0.0, 0.5, count=1) == after(old, np.nan, np.nan, 0.5, count=0) == (5.0, 7.0, 4, 2)


BROKEN = [(np.nan, 7.0), (5.0, np.inf), (-np.inf, np.nan)]


@pytest.mark.parametrize(("mean", "var"), BROKEN)
def test_a_usable_batch_replaces_both_statistics_of_a_broken_channel(mean, var):
    old = running(mean, var, tracked=9, skipped=2)
    assert after(old, 2.0, 8.0, 0.1) == after(old, 2.0, 8.0, 1.0) == (2.0, 4.0, 10, 2)
    assert after(old, 2.0, 8.0, None) == (2.0, 4.0, 1, 0)
    for momentum in (0.1, None):
        np.testing.assert_array_equal(after(old, np.inf, np.nan, momentum), (mean, var, 10, 3))
        np.testing.assert_array_equal(after(old, 2.0, 0.0, momentum, count=1), (mean, var, 10, 3))


@pytest.mark.parametrize(("mean", "var"), BROKEN)
def test_a_weight_of_zero_changes_nothing(mean, var):
    np.testing.assert_array_equal(after(running(mean, var), 2.0, 8.0, 0.0), (mean, var, 1, 1))
    assert after(running(5.0, 7.0), 2.0, 8.0, 0.0) == (5.0, 7.0, 1, 0)


def test_the_first_batch_of_a_cumulative_average_leaves_the_counters_of_a_broken_channel():
    """Its weight is 1: nothing begins anew, since nothing was there."""
    assert after(running(np.nan, np.nan, tracked=4, skipped=4), 2.0, 8.0, None) == (2.0, 4.0, 5, 4)


def test_cumulative_momentum_is_the_average_of_what_was_kept():
    old = running(tracked=2, skipped=2)
    for value in (3.0, 5.0, 10.0):
        old = reference.running(old, np.int64(2), np.array([value]), np.array([value]), None)
    assert old.mean[0] == pytest.approx(6.0) and old.var[0] == pytest.approx(6.0)


def test_a_biased_running_variance_is_divided_by_the_count():
    assert after(running(), 2.0, 8.0, 1.0, count=4) == (2.0, 8 / 3, 1, 0)
    assert after(running(), 2.0, 8.0, 1.0, count=4, biased=True) == (2.0, 2.0, 1, 0)
    assert after(running(), 2.0, 0.0, 1.0, count=1, biased=True) == (0.0, 1.0, 1, 1)


def test_running_values_are_rounded_once_to_their_own_dtype():
    assert after(running(1.0, dtype=np.float32), 2.0**-30, 2.0, 1.0)[0] == np.float32(2.0**-30)
    assert after(running(np.inf, dtype=np.float32), 1 / 3, 2.0, 0.5)[0] == np.float32(1 / 3)


# --- the textbook ---------------------------------------------------------------------------------------------------

CASES = [
    dict(),
    dict(channel_axis=-1),
    dict(channel_axis=0),
    dict(masked=True),
    dict(residual=True),
    dict(relu=True),
    dict(masked=True, residual=True, relu=True, channel_axis=2),
]


def textbook_case(channel_axis=1, masked=False, residual=False, relu=False, shape=(4, 3, 2, 5)):
    rng = np.random.default_rng(7)
    x = rng.normal(2.0, 3.0, shape)
    C = shape[channel_axis]
    extents = [n for axis, n in enumerate(shape) if axis != channel_axis % len(shape)]
    options = dict(channel_axis=channel_axis, relu=relu, gamma=rng.normal(size=C), beta=rng.normal(size=C), eps=1e-3)
    if masked:
        options["mask"] = rng.random(extents) < 0.6
    if residual:
        options["residual"] = rng.normal(size=shape)
    return x, options, rng


@pytest.mark.parametrize("case", CASES, ids=str)
def test_moments_are_numpys_over_the_present_values(case):
    x, options, _ = textbook_case(**case)
    axis, mask = options["channel_axis"], options.get("mask")
    m = reference.moments(x, channel_axis=axis, mask=mask)
    for c, channel in enumerate(np.moveaxis(x, axis, 0)):
        values = channel.ravel() if mask is None else channel[mask]
        assert m.count[c] == values.size
        assert m.mean[c] == pytest.approx(values.mean(), rel=1e-13)
        assert m.var[c] == pytest.approx(values.var(), rel=1e-13)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_the_slopes_of_the_forward(case, frozen):
    x, options, rng = textbook_case(**case)
    dy = rng.normal(size=x.shape)
    options.setdefault("residual", np.zeros(x.shape))
    C = x.shape[options["channel_axis"]]
    fixed = np.linspace(-1.0, 1.0, C), np.linspace(0.5, 2.0, C)

    def loss(**changed):
        arguments = {"x": x, **options, **changed}
        if frozen:
            return (dy * reference.normalize(arguments.pop("x"), *fixed, **arguments)).sum()
        return (dy * reference.forward_train(arguments.pop("x"), **arguments)[0]).sum()

    batch = reference.moments(x, channel_axis=options["channel_axis"], mask=options.get("mask"))
    mean, var = fixed if frozen else (batch.mean, batch.var)
    got = reference.backward(dy, x, mean, var, frozen=frozen, **options)
    step = 1e-6
    for name, value, gradient in (
        ("x", x, got.dx),
        ("gamma", options["gamma"], got.dgamma),
        ("beta", options["beta"], got.dbeta),
        ("residual", options["residual"], got.dresidual),
    ):
        slope = np.empty_like(value)
        for index in np.ndindex(value.shape):
            shift = np.zeros_like(value)
            shift[index] = step
            slope[index] = (loss(**{name: value + shift}) - loss(**{name: value - shift})) / (2 * step)
        np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_second_derivatives_are_the_slopes_of_the_gradients(case, frozen):
    """In some direction of each argument."""
    x, options, rng = textbook_case(**case)
    options.setdefault("residual", np.zeros(x.shape))
    axis, C = options["channel_axis"], x.shape[options["channel_axis"]]
    dy, ddx, ddresidual = rng.normal(size=(3, *x.shape))
    ddgamma, ddbeta = rng.normal(size=(2, C))
    fixed = np.linspace(-1.0, 1.0, C), np.linspace(0.5, 2.0, C)

    def statistics(x):
        batch = reference.moments(x, channel_axis=axis, mask=options.get("mask"))
        return fixed if frozen else (batch.mean, batch.var)

    def scalar(x=x, dy=dy, **changed):
        of = reference.backward(dy, x, *statistics(x), frozen=frozen, **options | changed)
        pairs = (ddx, of.dx), (ddgamma, of.dgamma), (ddbeta, of.dbeta), (ddresidual, of.dresidual)
        return sum((a * b).sum() for a, b in pairs)

    given = (ddx, ddgamma, ddbeta, dy, x, *statistics(x))
    got = reference.double_backward(*given, ddresidual=ddresidual, frozen=frozen, **options)
    step = 1e-6
    for name, value, gradient in (("dy", dy, got.ddy), ("x", x, got.dx), ("gamma", options["gamma"], got.dgamma)):
        for _ in range(3):
            towards = rng.normal(size=value.shape)
            ends = (scalar(**{name: value + move * towards}) for move in (step, -step))
            slope = next(ends) - next(ends)
            assert (gradient * towards).sum() == pytest.approx(slope / (2 * step), rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("biased", [False, True])
def test_running_variance_is_unbiased_unless_asked_for(biased):
    x = np.random.default_rng(0).normal(size=(6, 2))
    mean, var = reference.update([0.0, 0.0], [1.0, 1.0], reference.moments(x), 0.25, biased=biased)
    np.testing.assert_allclose(mean, 0.25 * x.mean(0))
    np.testing.assert_allclose(var, 0.75 + 0.25 * x.var(0, ddof=int(not biased)))


def test_folded_is_normalised():
    x, options, _ = textbook_case()
    scale, shift = reference.fold(
        [1.0, 2.0, 3.0], [0.5, 1.0, 2.0], gamma=options["gamma"], beta=options["beta"], eps=1e-3
    )
    y = reference.normalize(x, [1.0, 2.0, 3.0], [0.5, 1.0, 2.0], **options)
    np.testing.assert_allclose(x * scale[:, None, None] + shift[:, None, None], y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_contract_computes_what_the_textbook_says(dtype):
    rng = np.random.default_rng(3)
    x, dy, residual = rng.normal(1.0, 2.0, (3, 5, 4, 300)).astype(dtype)
    x, dy, residual = (v.reshape(5, 4, 300) for v in (x, dy, residual))
    gamma, beta = rng.normal(size=(2, 4)).astype(dtype)
    mask = rng.random((5, 300)) < 0.8
    options = dict(gamma=gamma, beta=beta, mask=mask, residual=residual, relu=True)
    y64, batch = reference.forward_train(x, **options)
    stats = oracle.batch_statistics(x, 1e-5, mask=mask)
    eps = np.finfo(dtype).eps
    assert (stats.count == batch.count).all()
    np.testing.assert_allclose(stats.mean, batch.mean, rtol=10 * eps, atol=10 * eps)
    np.testing.assert_allclose(stats.var, batch.var, rtol=10 * eps)
    np.testing.assert_allclose(oracle.normalize(x, stats, **options), y64, rtol=20 * eps, atol=20 * eps)
    for frozen in (False, True):
        got = oracle.backward(dy, x, stats, frozen=frozen, **options)
        want = reference.backward(dy, x, batch.mean, batch.var, frozen=frozen, **options)
        np.testing.assert_allclose(got.dx, want.dx, rtol=100 * eps, atol=20 * eps)
        np.testing.assert_allclose(got.dgamma, want.dgamma, rtol=1000 * eps, atol=1000 * eps)
        np.testing.assert_allclose(got.dbeta, want.dbeta, rtol=1000 * eps, atol=1000 * eps)
        np.testing.assert_allclose(got.dresidual, want.dresidual)
