"""The numerics contract, vectorised: whole operations on (N, C, S) arrays, fast enough to sit under every test.

The arithmetic of a merge and of one element is `cubn.reference`'s own; what is written again here, over whole arrays
instead of value by value, is the tree. tests/pure/test_reference.py holds it to the slow statement to the bit.

Data is float16, float32, float64, or bfloat16 as uint16 bit patterns. mask is (N, S), True where a position is present.
"""

from dataclasses import dataclass

import numpy as np

from cubn import reference
from cubn._tree import COLUMNS, ROWS, TILE


def widen(a):
    """Data in the dtype of its arithmetic, exactly: 16-bit floats become float32."""
    if a.dtype == np.uint16:
        return (a.astype(np.uint32) << 16).view(np.float32)
    return a.astype(np.float32) if a.dtype == np.float16 else a


def narrow(v, dtype):
    """v rounded once, to nearest even, to a data dtype; a NaN stays one."""
    if dtype != np.uint16:
        with np.errstate(over="ignore"):
            return v.astype(dtype)
    if v.dtype == np.float64:
        return _bfloat16_of_double(v)
    bits = v.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(v), bits >> 16 | 0x40, rounded).astype(np.uint16)


def _bfloat16_of_double(v):
    """By way of float32 rounded to odd, which loses nothing the second rounding needs."""
    with np.errstate(over="ignore"):
        near = v.astype(np.float32)
    bits = near.view(np.uint32).copy()
    beyond = np.abs(near.astype(np.float64)) > np.abs(v)
    inexact = (near.astype(np.float64) != v) & ~np.isnan(v)
    bits = np.where(inexact, np.where(beyond, bits - 1, bits) | 1, bits).astype(np.uint32)
    return narrow(bits.view(np.float32), np.uint16)


def equal(a, b):
    """The equality the contract is about: same values, NaN equal to NaN, +0 equal to -0; same dtype and shape."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(widen(a), widen(b), equal_nan=True)


# --- the tree -------------------------------------------------------------------------------------------------------


def tree(node, combine, start=0):
    """Root over the last axis of the arrays of a node, whose first entry has the global index `start`."""
    while node[0].shape[-1] > 1:
        before, after = start % 2, (start + node[0].shape[-1]) % 2
        node = tuple(np.pad(a, [(0, 0)] * (a.ndim - 1) + [(before, after)]) for a in node)
        node = combine(tuple(a[..., ::2] for a in node), tuple(a[..., 1::2] for a in node))
        start //= 2
    return tuple(a[..., 0] for a in node)


def _tiled(a):
    """(..., S) as (..., tiles, rows, columns), padded with zeros (for a mask: with absent positions)."""
    S = a.shape[-1]
    rows, columns = (ROWS, COLUMNS) if S > TILE else (-(-S // COLUMNS), min(S, COLUMNS))
    tiles = -(-S // (rows * columns))
    a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, tiles * rows * columns - S)])
    return a.reshape(*a.shape[:-1], tiles, rows, columns)


def _present(N, S, mask):
    """(N, 1, S), with the one channel that all channels share."""
    return (np.ones((N, S), bool) if mask is None else mask)[:, None]


def _sum_rows(terms, present):
    """Sum over the rows of each column, present values only, in row order: (..., rows, columns) -> (..., columns)."""
    total = np.zeros(terms.shape[:-2] + terms.shape[-1:], terms.dtype)
    for r in range(terms.shape[-2]):
        total = np.where(present[..., r, :], total + terms[..., r, :], total)
    return total


@np.errstate(all="ignore")
def sample_moments(x, mask=None):
    """(count (N,), mean (N, C), m2 (N, C)): the node of every sample."""
    N, C, S = x.shape
    if N * S == 0:
        return np.zeros(N, np.int64), np.zeros((N, C)), np.zeros((N, C))
    v, present = _tiled(widen(x)), _tiled(_present(N, S, mask))
    flat = present.reshape(*present.shape[:3], -1)
    first = np.broadcast_to(flat.argmax(-1)[..., None], (*v.shape[:3], 1))
    pivot = np.take_along_axis(v.reshape(*v.shape[:3], -1), first, -1)[..., 0]
    pivot = np.where(flat.any(-1), pivot, v.dtype.type(0))
    v = v - pivot[..., None, None]
    count = present.sum(-2)
    mean = np.where(count == 0, v.dtype.type(0), _sum_rows(v, present) / count.astype(v.dtype))
    d = v - mean[..., None, :]
    m2 = np.where(count < 2, v.dtype.type(0), _sum_rows(d * d, present))
    count, mean, m2 = tree((count, mean, m2), reference.merge)
    mean = pivot.astype(np.float64) + mean.astype(np.float64)
    count, mean, m2 = tree((count, mean, m2.astype(np.float64)), reference.merge)
    return count[:, 0], mean, m2


@np.errstate(all="ignore")
def sample_sums(*terms, mask=None):
    """(count (N,), sum (N, C), ...): the node of every sample, for terms already widened."""
    N, C, S = terms[0].shape
    if N * S == 0:
        return np.zeros(N, np.int64), *(np.zeros((N, C)) for _ in terms)
    present = _tiled(_present(N, S, mask))
    node = tree((present.sum(-2), *(_sum_rows(_tiled(v), present) for v in terms)), reference.add)
    count, *sums = tree((node[0], *(s.astype(np.float64) for s in node[1:])), reference.add)
    return count[:, 0], *sums


def root(samples, combine, start=0):
    """(count (), (C,), ...) over samples whose nodes were stacked by `sample_moments` or `sample_sums`."""
    count, *values = samples
    if not len(count):
        return np.int64(0), *(np.zeros(v.shape[1]) for v in values)
    count, *values = tree((count[None], *(v.T for v in values)), combine, start)
    return count[0], *values


# --- whole operations -----------------------------------------------------------------------------------------------


@dataclass
class Statistics:
    """count (), and float64 (C,) mean, m2, var, invstd; frozen statistics have count 0 and no m2."""

    count: np.int64
    mean: np.ndarray
    m2: np.ndarray | None
    var: np.ndarray
    invstd: np.ndarray


def statistics(node, eps):
    """What normalisation takes from a root (count, mean, m2)."""
    mean, var, invstd = reference.finalize(node, eps)
    return Statistics(node[0], mean, node[2], var, invstd)


def batch_statistics(x, eps, *, mask=None, start=0):
    return statistics(root(sample_moments(x, mask), reference.merge, start), eps)


@np.errstate(all="ignore")
def frozen_statistics(running_mean, running_var, eps):
    mean, var = widen(running_mean).astype(np.float64), widen(running_var).astype(np.float64)
    return Statistics(np.int64(0), mean, None, var, 1.0 / np.sqrt(var + np.float64(eps)))


def normalize(x, stats, gamma=None, beta=None, *, mask=None, residual=None, relu=False):
    """y in x's dtype: inference, training and frozen forward differ in their statistics only."""
    C = x.shape[1]
    gamma = np.ones(C, np.float32) if gamma is None else widen(gamma)
    beta = np.zeros(C, np.float32) if beta is None else widen(beta)
    y = reference.output(widen(x), stats.mean, stats.invstd, gamma, beta, None if residual is None else widen(residual))
    y = narrow(reference.relu(y) if relu else y, x.dtype)
    return np.where(_present(x.shape[0], x.shape[2], mask), y, y.dtype.type(0))


@dataclass
class Renormalised:
    """r and d, and what takes the place of gamma and beta; float64 (C,)."""

    r: np.ndarray
    d: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray


def renormalised(stats, running_mean, running_var, eps, limits, gamma=None, beta=None):
    """What `normalize` and `backward` take as gamma and beta, of which the latter's dgamma is no gradient yet."""
    C = len(stats.mean)
    gamma, beta = (np.full(C, v) if a is None else widen(a) for a, v in ((gamma, 1.0), (beta, 0.0)))
    before = frozen_statistics(running_mean, running_var, eps)
    running = before.mean, before.var, before.invstd
    r, d = reference.renormalisation(stats.mean, stats.invstd, *running, *limits)
    return Renormalised(r, d, *reference.renormalised_affine(gamma, beta, r, d))


@dataclass
class Gradients:
    dx: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray
    dresidual: np.ndarray


def backward(dy, x, stats, gamma=None, beta=None, *, frozen=False, mask=None, residual=None, relu=False, start=0):
    """Gradients of `normalize` with the same arguments; dgamma and dbeta in the parameters' dtype, float32 without."""
    N, C, S = x.shape
    present = _present(N, S, mask)
    gated = widen(dy)
    if relu:
        y = normalize(x, stats, gamma, beta, residual=residual, relu=True)
        gated = reference.behind_relu(gated, widen(y))
    scale = np.ones(C, np.float32) if gamma is None else widen(gamma)
    with np.errstate(all="ignore"):
        samples = sample_sums(gated, gated * reference.centre(widen(x), stats.mean), mask=mask)
    _, sum_dy, sum_dy_xmu = root(samples, reference.add, start)
    if frozen:
        dx = reference.frozen_input_gradient(gated, stats.invstd, scale)
    else:
        dx = reference.input_gradient(gated, widen(x), stats.mean, stats.invstd, scale, stats.count, sum_dy, sum_dy_xmu)
    dx, dresidual = (np.where(present, v, v.dtype.type(0)) for v in (dx, gated))
    with np.errstate(all="ignore"):
        dgamma = narrow(sum_dy_xmu * stats.invstd, np.float32 if gamma is None else gamma.dtype)
    dbeta = narrow(sum_dy, np.float32 if beta is None else beta.dtype)
    return Gradients(narrow(dx, x.dtype), dgamma, dbeta, narrow(dresidual, x.dtype))


def ghost_batches(x, dy, size, eps, gamma=None, beta=None, *, mask=None, residual=None, relu=False):
    """y of groups of so many samples, their gradients, and the statistics of each group."""
    each, outputs, gradients, nodes = [], [], [], []
    for group in reference.groups(len(x), size):
        parts = {name: None if a is None else a[group] for name, a in (("mask", mask), ("residual", residual))}
        stats = batch_statistics(x[group], eps, mask=parts["mask"])
        y = normalize(x[group], stats, gamma, beta, relu=relu, **parts)
        each.append(stats)
        outputs.append(y)
        gradients.append(backward(dy[group], x[group], stats, gamma, beta, relu=relu, **parts))
        gated = reference.behind_relu(widen(dy[group]), widen(y)) if relu else widen(dy[group])
        with np.errstate(all="ignore"):
            terms = gated, gated * reference.centre(widen(x[group]), stats.mean)
        nodes.append(root(sample_sums(*terms, mask=parts["mask"]), reference.add))
    with np.errstate(all="ignore"):
        sums = reference.group_parameter_gradients(nodes, [stats.invstd for stats in each], np.float64)
    dgamma, dbeta = (narrow(s, np.float32 if a is None else a.dtype) for s, a in zip(sums, (gamma, beta), strict=True))
    dx, dresidual = (np.concatenate([getattr(g, name) for g in gradients]) for name in ("dx", "dresidual"))
    return np.concatenate(outputs), Gradients(dx, dgamma, dbeta, dresidual), each


@dataclass
class DoubleGradients:
    ddy: np.ndarray
    dx: np.ndarray
    dgamma: np.ndarray


def double_backward(
    ddx,
    ddgamma,
    ddbeta,
    dy,
    x,
    stats,
    gamma=None,
    beta=None,
    *,
    ddresidual=None,
    frozen=False,
    mask=None,
    residual=None,
    relu=False,
    start=0,
):
    """Gradients of `backward` with the same arguments; ddgamma and ddbeta in float64, dgamma in gamma's dtype."""
    N, C, S = x.shape
    present = _present(N, S, mask)
    data, v, scale = widen(x), widen(ddx), np.ones(C, np.float32) if gamma is None else widen(gamma)
    y = widen(normalize(x, stats, gamma, beta, residual=residual, relu=True)) if relu else None
    g = reference.behind_relu(widen(dy), y) if relu else widen(dy)
    with np.errstate(all="ignore"):
        d = reference.centre(data, stats.mean)
        terms = (g, g * d, v, v * d, g * v)
    sums = reference.DoubleSums(*root(sample_sums(*terms, mask=mask), reference.add, start)[1:])
    whole = None if frozen else (stats.count, sums)
    of_ddy = reference.ddy_combination(stats.invstd, scale, data.dtype, ddgamma, ddbeta, whole)
    ddy = reference.combine(v, data, stats.mean, of_ddy, None if ddresidual is None else widen(ddresidual))
    ddy = reference.behind_relu(ddy, y) if relu else ddy
    if frozen:
        dx = reference.frozen_input_gradient(g, stats.invstd, ddgamma)
    else:
        with np.errstate(all="ignore"):
            of_u = ddgamma * sums.dy, ddgamma * sums.dy_xmu
        of_dx = reference.dx_combination(stats.invstd, scale, ddgamma, stats.count, sums, *of_u)
        dx = reference.combine(g, data, stats.mean, of_dx, v)
    ddy, dx = (narrow(np.where(present, a, a.dtype.type(0)), x.dtype) for a in (ddy, dx))
    dgamma = reference.gamma_gradient(stats.invstd, sums, whole)
    return DoubleGradients(ddy, dx, narrow(dgamma, np.float32 if gamma is None else gamma.dtype))


@dataclass
class State:
    """Running statistics and their counters, all (C,)."""

    mean: np.ndarray
    var: np.ndarray
    tracked: np.ndarray
    skipped: np.ndarray


def update(state, stats, momentum, *, biased=False):
    """The state after one more batch."""
    old = reference.RunningStatistics(state.mean, state.var, state.tracked, state.skipped)
    return State(*reference.running(old, stats.count, stats.mean, stats.m2, momentum, biased=biased))


# --- any shape ------------------------------------------------------------------------------------------------------


def as_ncs(a, channel_axis=1):
    """A logical array of any rank as (N, C, S): the sample axis is the first that is not the channel's."""
    a = np.moveaxis(a, channel_axis, 1)
    return a.reshape(a.shape[0], a.shape[1], int(np.prod(a.shape[2:])))


def from_ncs(a, shape, channel_axis=1):
    """The inverse of `as_ncs`, for an array of the given logical shape."""
    moved = [n for axis, n in enumerate(shape) if axis != channel_axis % len(shape)]
    moved.insert(1, shape[channel_axis])
    return np.moveaxis(a.reshape(moved), 1, channel_axis)


def mask_as_ns(mask, shape, channel_axis=1):
    """A mask without the channel axis (each extent full or 1) as (N, S)."""
    extents = [n for axis, n in enumerate(shape) if axis != channel_axis % len(shape)]
    full = np.broadcast_to(mask, extents)
    return full.reshape(extents[0], int(np.prod(extents[1:])))
