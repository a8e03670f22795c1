"""What every operation means, in plain NumPy: twice, and never fast.

The first half is the textbook in float64. It is what tolerances are measured against; it promises no bits.

The second half, from `merge` on, is the numerics contract as an executable statement: what every backend computes, to
the bit, for every layout, thread count and cut of the batch. docs/numerics.md says the same in words and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from cubn._tree import COLUMNS, TILE, Block, aligned_blocks, root_order

Float = NDArray[np.floating[Any]]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Mask = NDArray[np.bool_]


# ---------------------------------------------------------------------------------------------------------------------
# The textbook, in float64. x is array-like of rank >= 2 with C channels along channel_axis; per-channel arguments and
# results have shape (C,). mask is bool, of x's shape without the channel axis, each extent full or 1; True is present.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchStatistics:
    """Number of present values, mean and biased variance (divided by count), each of shape (C,)."""

    count: Int64
    mean: Float64
    var: Float64


class Gradients(NamedTuple):
    """Gradients of a scalar loss; dresidual is the gradient that passed the ReLU."""

    dx: Float64
    dgamma: Float64
    dbeta: Float64
    dresidual: Float64


class DoubleGradients(NamedTuple):
    """Gradients of a scalar of `Gradients`, by dy, x and gamma."""

    ddy: Float64
    dx: Float64
    dgamma: Float64


class RunningStatistics(NamedTuple):
    """Mean, variance and both counters of every channel, each of shape (C,)."""

    mean: Float
    var: Float
    tracked: Int64
    skipped: Int64


def moments(x: ArrayLike, *, channel_axis: int = 1, mask: ArrayLike | None = None) -> BatchStatistics:
    """Count, mean and variance of the present values of each channel, in two passes."""
    x, present = _described(x, channel_axis, mask)
    axes = _all_but(channel_axis, x.ndim)
    count = present.sum(axes)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(present, x, 0.0).sum(axes) / count
        deviation = np.where(present, x - _along(channel_axis, x.ndim, mean), 0.0)
        return BatchStatistics(count, mean, (deviation**2).sum(axes) / count)


def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    *,
    gamma: ArrayLike = 1.0,
    beta: ArrayLike = 0.0,
    eps: float = 1e-5,
    channel_axis: int = 1,
    mask: ArrayLike | None = None,
    residual: ArrayLike = 0.0,
    relu: bool = False,
) -> Float64:
    """y = (x - mean) / sqrt(var + eps) * gamma + beta + residual, then ReLU; 0 where the mask is False.

    With running statistics this is `cubn.forward`; with a batch's own it is `cubn.forward_train`.
    """
    x, present = _described(x, channel_axis, mask)
    mean, var, gamma, beta = (_along(channel_axis, x.ndim, v) for v in (mean, var, gamma, beta))
    y = (x - mean) / np.sqrt(var + eps) * gamma + beta + np.asarray(residual, np.float64)
    if relu:
        y = np.where(y <= 0.0, 0.0, y)
    return np.where(present, y, 0.0)


def forward_train(
    x: ArrayLike,
    *,
    gamma: ArrayLike = 1.0,
    beta: ArrayLike = 0.0,
    eps: float = 1e-5,
    channel_axis: int = 1,
    mask: ArrayLike | None = None,
    residual: ArrayLike = 0.0,
    relu: bool = False,
) -> tuple[Float64, BatchStatistics]:
    """Normalise with the batch's own statistics (Ioffe & Szegedy 2015); returns y and the statistics."""
    batch = moments(x, channel_axis=channel_axis, mask=mask)
    y = normalize(
        x,
        batch.mean,
        batch.var,
        gamma=gamma,
        beta=beta,
        eps=eps,
        channel_axis=channel_axis,
        mask=mask,
        residual=residual,
        relu=relu,
    )
    return y, batch


def update(
    running_mean: ArrayLike,
    running_var: ArrayLike,
    batch: BatchStatistics,
    momentum: float,
    *,
    biased: bool = False,
) -> tuple[Float64, Float64]:
    """running = (1 - momentum) * running + momentum * batch, the variance divided by count - 1, or biased by count."""
    var = batch.var if biased else batch.var * batch.count / (batch.count - 1)
    return (
        (1.0 - momentum) * np.asarray(running_mean, np.float64) + momentum * batch.mean,
        (1.0 - momentum) * np.asarray(running_var, np.float64) + momentum * var,
    )


def backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    *,
    frozen: bool = False,
    gamma: ArrayLike = 1.0,
    beta: ArrayLike = 0.0,
    eps: float = 1e-5,
    channel_axis: int = 1,
    mask: ArrayLike | None = None,
    residual: ArrayLike = 0.0,
    relu: bool = False,
) -> Gradients:
    """Gradients of sum(dy * y). Unless frozen, mean and var are the batch's own and depend on x.

    With xhat = (x - mean) / sqrt(var + eps), and dy behind the ReLU:
    dbeta = sum(dy), dgamma = sum(dy * xhat),
    dx = gamma / sqrt(var + eps) * (dy - dbeta / count - xhat * dgamma / count),
    or, frozen, dx = gamma / sqrt(var + eps) * dy.
    """
    y = normalize(
        x,
        mean,
        var,
        gamma=gamma,
        beta=beta,
        eps=eps,
        channel_axis=channel_axis,
        mask=mask,
        residual=residual,
        relu=relu,
    )
    x, present = _described(x, channel_axis, mask)
    axes = _all_but(channel_axis, x.ndim)
    mean, invstd, gamma = (
        _along(channel_axis, x.ndim, v) for v in (mean, 1.0 / np.sqrt(np.asarray(var, np.float64) + eps), gamma)
    )
    passed = present & (y > 0.0) if relu else present
    dy = np.where(passed, np.asarray(dy, np.float64), 0.0)
    xhat = np.where(present, (x - mean) * invstd, 0.0)
    dbeta = dy.sum(axes)
    dgamma = (dy * xhat).sum(axes)
    if frozen:
        dx = gamma * invstd * dy
    else:
        k1, k2 = (_along(channel_axis, x.ndim, v / present.sum(axes)) for v in (dbeta, dgamma))
        dx = np.where(present, gamma * invstd * (dy - k1 - xhat * k2), 0.0)
    return Gradients(dx, dgamma, dbeta, dy)


def double_backward(
    ddx: ArrayLike,
    ddgamma: ArrayLike,
    ddbeta: ArrayLike,
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    *,
    ddresidual: ArrayLike = 0.0,
    frozen: bool = False,
    gamma: ArrayLike = 1.0,
    beta: ArrayLike = 0.0,
    eps: float = 1e-5,
    channel_axis: int = 1,
    mask: ArrayLike | None = None,
    residual: ArrayLike = 0.0,
    relu: bool = False,
) -> DoubleGradients:
    """Gradients of sum(ddx * dx) + sum(ddgamma * dgamma) + sum(ddbeta * dbeta) + sum(ddresidual * dresidual).

    dx and the others are those of `backward` with the same arguments. With d = x - mean, r = 1 / sqrt(var + eps), bars
    for means over a channel's present values, and dy behind the ReLU:
    ddy = gamma * r * (ddx - bar(ddx) - d * r**2 * bar(ddx * d)) + ddgamma * r * d + ddbeta + ddresidual, behind it too;
    dgamma = sum(ddx * dx) / gamma, as it would be with a gamma of 1; and in dx everything depends on x.
    Or, frozen, ddy = gamma * r * ddx + ddgamma * r * d + ddbeta + ddresidual, dx = ddgamma * r * dy.
    """
    forward = {"beta": beta, "eps": eps, "channel_axis": channel_axis, "mask": mask, "residual": residual, "relu": relu}
    y = normalize(x, mean, var, gamma=gamma, **forward)  # type: ignore[arg-type]
    x, present = _described(x, channel_axis, mask)
    axes = _all_but(channel_axis, x.ndim)
    passed = present & (y > 0.0) if relu else present
    r = 1.0 / np.sqrt(np.asarray(var, np.float64) + eps)
    mean, r, gamma, u, w = (_along(channel_axis, x.ndim, v) for v in (mean, r, gamma, ddgamma, ddbeta))
    g = np.where(passed, np.asarray(dy, np.float64), 0.0)
    v = np.where(present, np.asarray(ddx, np.float64), 0.0)
    d = np.where(present, x - mean, 0.0)

    def bar(terms: Float64) -> Float64:
        return _along(channel_axis, x.ndim, terms.sum(axes) / present.sum(axes))

    if frozen:
        ddy, dx, dgamma = gamma * r * v, u * r * g, (r * g * v).sum(axes)
    else:
        a, b, p, q = bar(g), bar(g * d), bar(v), bar(v * d)
        ddy = gamma * r * (v - p - d * r**2 * q)
        dgamma = (r * v * (g - a - d * r**2 * b)).sum(axes)
        delta = gamma * (bar(g * v) - a * p - 3 * r**2 * b * q) + u * b
        dx = -gamma * r**3 * b * (v - p) + (u * r - gamma * r**3 * q) * (g - a) - r**3 * delta * d
    ddy = ddy + u * r * d + w + np.asarray(ddresidual, np.float64)
    return DoubleGradients(np.where(passed, ddy, 0.0), np.where(present, dx, 0.0), dgamma)


def fold(
    running_mean: ArrayLike, running_var: ArrayLike, *, gamma: ArrayLike = 1.0, beta: ArrayLike = 0.0, eps: float = 1e-5
) -> tuple[Float64, Float64]:
    """(scale, shift) with which normalising by running statistics is x * scale + shift."""
    scale = np.asarray(gamma, np.float64) / np.sqrt(np.asarray(running_var, np.float64) + eps)
    return scale, np.asarray(beta, np.float64) - np.asarray(running_mean, np.float64) * scale


def groups(N: int, size: int) -> list[slice]:
    """The samples of each ghost batch, which is a batch of its own: N // size of them, one at least.

    The last one takes the rest (Hoffer et al. 2017; Summers & Dinneen 2020). dgamma and dbeta are sums over all groups.
    """
    last = max(1, N // size) - 1
    return [slice(i * size, (i + 1) * size if i < last else N) for i in range(last + 1)]


def _described(x: ArrayLike, channel_axis: int, mask: ArrayLike | None) -> tuple[Float64, Mask]:
    """x in float64, and which of its values are present, in x's shape."""
    x = np.asarray(x, np.float64)
    if mask is None:
        return x, np.ones(x.shape, np.bool_)
    return x, np.broadcast_to(np.expand_dims(np.asarray(mask, np.bool_), channel_axis), x.shape)


def _all_but(channel_axis: int, ndim: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis != channel_axis % ndim)


def _along(channel_axis: int, ndim: int, v: ArrayLike) -> Float64:
    """A per-channel vector, or one number for all channels, placed to broadcast along channel_axis."""
    v = np.asarray(v, np.float64)
    return v if v.ndim == 0 else np.expand_dims(v, _all_but(channel_axis, ndim))


# ---------------------------------------------------------------------------------------------------------------------
# The numerics contract. Here x is (..., C, S), already in `acc`: float32 for float16, bfloat16 and float32 data,
# float64 for float64 data. Each + - * / sqrt below is one IEEE-754 operation, rounded to nearest even, subnormals kept,
# never contracted into a fused multiply-add. Everything per channel, and everything above a tile, is float64.
#
# S counts the positions of one sample (the axes that are neither the sample's nor the channel's, flattened in C order
# of the logical shape; 1 for 2-D input), and may differ from sample to sample. Infinities and NaN are results like any
# other. At a masked position y, dx and dresidual are 0.
#
# A node is what the tree keeps of a set of values: (count, mean, m2) for moments, (count, sum, ...) for plain sums.
# ---------------------------------------------------------------------------------------------------------------------

Node = tuple[Any, ...]
"""An integer count first, then floating arrays; all broadcast together."""

Combine = Callable[[Node, Node], Node]


@np.errstate(all="ignore")
def merge(a: Node, b: Node) -> Node:
    """Moments (count, mean, m2) of a and b together (Chan, Golub & LeVeque 1979); a count of 0 is the identity."""
    count_a, mean_a, m2_a = a
    count_b, mean_b, m2_b = b
    real = mean_a.dtype.type
    count = count_a + count_b
    share = count_b.astype(real) / count.astype(real)
    d = mean_b - mean_a
    mean = mean_a + d * share
    m2 = (m2_a + m2_b) + (d * d) * (count_a.astype(real) * share)
    return count, _unless_absent(a, b, mean_a, mean_b, mean), _unless_absent(a, b, m2_a, m2_b, m2)


@np.errstate(all="ignore")
def add(a: Node, b: Node) -> Node:
    """Sums (count, sum, ...) of a and b together; a count of 0 is the identity."""
    sums = (_unless_absent(a, b, u, v, u + v) for u, v in zip(a[1:], b[1:], strict=True))
    return a[0] + b[0], *sums


def _unless_absent(a: Node, b: Node, of_a: Float, of_b: Float, of_both: Float) -> Float:
    return np.where(b[0] == 0, of_a, np.where(a[0] == 0, of_b, of_both))


def tree(nodes: Sequence[Node], combine: Combine) -> Node:
    """Binary tree over adjacent nodes: neighbours (0, 1), (2, 3), ... first; an odd last node moves up alone."""
    if not nodes:
        raise ValueError("tree: nodes must not be empty; got none. Leave an empty range out of the tree above it")
    while len(nodes) > 1:
        nodes = [combine(*nodes[i : i + 2]) if i + 1 < len(nodes) else nodes[i] for i in range(0, len(nodes), 2)]
    return nodes[0]


@np.errstate(all="ignore")
def sample_moments(x: Float, mask: Mask | None = None) -> Node:
    """(count, mean, m2) of one sample x (C, S); mask (S,), True where a position is present.

    Inside a tile every value is taken relative to the tile's pivot, its first present value.
    """
    C, S = x.shape
    acc = x.dtype.type
    tiles: list[Node] = []
    for first in range(0, S, TILE):
        columns = _columns(first, S, mask)
        present = sorted(p for rows in columns for p in rows)
        pivot = x[:, present[0]] if present else np.zeros(C, acc)
        nodes = []
        for rows in columns:
            v = [x[:, p] - pivot for p in rows]
            if len(rows) < 2:
                mean, m2 = (v[0] if v else np.zeros(C, acc)), np.zeros(C, acc)
            else:
                mean = _in_order(v) / acc(len(rows))
                m2 = _in_order([(u - mean) * (u - mean) for u in v])
            nodes.append((np.full(C, len(rows)), mean, m2))
        count, mean, m2 = tree(nodes, merge)
        tiles.append((count, pivot.astype(np.float64) + mean.astype(np.float64), m2.astype(np.float64)))
    return tree(tiles, merge) if tiles else _nothing(C, 2)


def sample_sums(*terms: Float, mask: Mask | None = None) -> Node:
    """(count, sum, ...) of one sample for each of the terms, all (C, S): the same tree, with plain sums.

    An absent position is left out, never multiplied by zero.
    """
    C, S = terms[0].shape
    tiles: list[Node] = []
    for first in range(0, S, TILE):
        nodes = []
        for rows in _columns(first, S, mask):
            sums = [_in_order([v[:, p] for p in rows]) if rows else np.zeros(C, v.dtype) for v in terms]
            nodes.append((np.full(C, len(rows)), *sums))
        count, *sums = tree(nodes, add)
        tiles.append((count, *(s.astype(np.float64) for s in sums)))
    return tree(tiles, add) if tiles else _nothing(C, len(terms))


def _columns(first: int, S: int, mask: Mask | None) -> list[list[int]]:
    """The present positions of each column of the tile that begins at `first`, in row order."""
    stop = min(first + TILE, S)
    return [
        [p for p in range(j, stop, COLUMNS) if mask is None or mask[p]] for j in range(first, min(first + COLUMNS, S))
    ]


@np.errstate(all="ignore")
def _in_order(terms: Sequence[Float]) -> Float:
    """Sum of the terms from the first to the last."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _nothing(C: int, width: int) -> Node:
    """The node of no values."""
    return np.zeros(C, np.int64), *(np.zeros(C) for _ in range(width))


def range_nodes(samples: Sequence[Node], start: int, combine: Combine) -> tuple[tuple[Block, ...], list[Node]]:
    """The samples from the global index `start` on, as one node per maximal aligned power-of-two block."""
    blocks = aligned_blocks(start, start + len(samples))
    return blocks, [tree(samples[lo - start : hi - start], combine) for lo, hi in blocks]


def root(blocks: Sequence[Block], nodes: Sequence[Node], combine: Combine) -> Node:
    """The node of neighbouring blocks together, the same however the range was cut; absent samples are nothing."""
    nodes = list(nodes)
    for left, right in root_order(blocks):
        nodes[left] = combine(nodes[left], nodes[right])
    return nodes[0]


@np.errstate(all="ignore")
def finalize(node: Node, eps: float) -> tuple[Float64, Float64, Float64]:
    """(mean, var, invstd) of a root, all float64: var = m2 / count, invstd = 1 / sqrt(var + eps)."""
    count, mean, m2 = node
    var = m2 / count.astype(np.float64)
    return mean, var, 1.0 / np.sqrt(var + np.float64(eps))


@np.errstate(all="ignore")
def centre(x: Float, mean: Float64) -> Float:
    """(x - high) - low, with the mean taken as two `acc` numbers: high = acc(mean), low = acc(mean - high).

    x - high is exact when x is near the mean, so a large mean costs no accuracy.
    """
    high = mean.astype(x.dtype)
    low = (mean - high.astype(np.float64)).astype(x.dtype)
    return (x - high[:, None]) - low[:, None]


@np.errstate(all="ignore")
def output(x: Float, mean: Float64, invstd: Float64, gamma: Float, beta: Float, residual: Float | None = None) -> Float:
    """y before ReLU and its one rounding: centre(x) * scale + beta, then + residual; scale = acc(invstd) * gamma.

    gamma, beta and residual are first rounded to `acc`.
    """
    acc = x.dtype
    y = centre(x, mean) * _scale(invstd, gamma, acc)[:, None] + beta.astype(acc)[:, None]
    return y if residual is None else y + residual.astype(acc)


def relu(v: Float) -> Float:
    """0 where v <= 0, else v: a NaN stays. Taken in `acc`, before the one rounding to x's own dtype."""
    return np.where(v <= 0, v.dtype.type(0), v)


def behind_relu(dy: Float, y: Float) -> Float:
    """dy where it passes the ReLU: 0 where the *rounded* output y is <= 0, else dy."""
    return np.where(y <= 0, dy.dtype.type(0), dy)


@np.errstate(all="ignore")
def renormalisation(
    mean: Float64,
    invstd: Float64,
    running_mean: Float64,
    running_var: Float64,
    running_invstd: Float64,
    r_max: float,
    d_max: float,
) -> tuple[Float64, Float64]:
    """(r, d) of batch renormalisation, float64 and no functions of x to a backward.

    r = running_invstd / invstd, from 1 / r_max to r_max; d = (mean - running_mean) * running_invstd, from -d_max to
    d_max, with running_invstd = 1 / sqrt(running_var + eps). NaN stays NaN. Where a running number is not finite, r is
    1 and d is 0.
    """
    r = np.clip(running_invstd / invstd, 1.0 / np.float64(r_max), r_max)
    d = np.clip((mean - running_mean) * running_invstd, -d_max, d_max)
    usable = np.isfinite(running_mean) & np.isfinite(running_var) & np.isfinite(running_invstd)
    return np.where(usable, r, 1.0), np.where(usable, d, 0.0)


@np.errstate(all="ignore")
def renormalised_affine(gamma: Float, beta: Float, r: Float64, d: Float64) -> tuple[Float64, Float64]:
    """(gamma * r, beta + gamma * d) in float64: with these in the place of gamma and beta, a plain `output` and
    `input_gradient` are the renormalised ones.
    """
    wide = gamma.astype(np.float64)
    return wide * r, beta.astype(np.float64) + wide * d


@np.errstate(all="ignore")
def renormalised_gamma_gradient(
    invstd: Float64, sum_dy: Float64, sum_dy_xmu: Float64, r: Float64, d: Float64
) -> Float64:
    """dgamma behind `renormalised_affine`, before its one rounding; dbeta is sum_dy, as without."""
    return r * (sum_dy_xmu * invstd) + d * sum_dy


@np.errstate(all="ignore")
def input_gradient(
    dy: Float,
    x: Float,
    mean: Float64,
    invstd: Float64,
    gamma: Float,
    count: Int64,
    sum_dy: Float64,
    sum_dy_xmu: Float64,
) -> Float:
    """dx before its one rounding: ((dy - k1) - centre(x) * k2) * scale, k1 and k2 in float64, rounded to `acc` once.

    count, sum_dy and sum_dy_xmu are the root of `sample_sums(dy, dy * centre(x))`, dy behind its ReLU.
    With frozen statistics dx is `dy * scale` instead: `frozen_input_gradient`.
    """
    acc = x.dtype
    k1 = (sum_dy / count).astype(acc)
    k2 = ((sum_dy_xmu / count) * (invstd * invstd)).astype(acc)
    return ((dy - k1[:, None]) - centre(x, mean) * k2[:, None]) * _scale(invstd, gamma, acc)[:, None]


@np.errstate(all="ignore")
def frozen_input_gradient(dy: Float, invstd: Float64, gamma: Float) -> Float:
    """dx before its one rounding, for statistics that do not depend on x: dy * scale."""
    return dy * _scale(invstd, gamma, dy.dtype)[:, None]


@np.errstate(all="ignore")
def parameter_gradients(invstd: Float64, sum_dy: Float64, sum_dy_xmu: Float64, dtype: DTypeLike) -> tuple[Float, Float]:
    """(dgamma, dbeta): sum_dy_xmu * invstd and sum_dy in float64, rounded once to the parameters' dtype."""
    return (sum_dy_xmu * invstd).astype(dtype), sum_dy.astype(dtype)


@np.errstate(all="ignore")
def group_parameter_gradients(
    nodes: Sequence[Node], invstd: Sequence[Float64], dtype: DTypeLike, first: int = 0
) -> tuple[Float, Float]:
    """(dgamma, dbeta) of ghost batches, neighbours of which the first has the index `first` among all.

    nodes are each group's root of `sample_sums(dy, dy * centre(x))`. What `parameter_gradients` makes of one is merged
    over the groups, in their tree, before its one rounding; a group of no values adds nothing.
    """
    each = [(count, dy_xmu * r, dy) for (count, dy, dy_xmu), r in zip(nodes, invstd, strict=True)]
    blocks = [(group, group + 1) for group in range(first, first + len(each))]
    _, dgamma, dbeta = root(blocks, each, add)
    return dgamma.astype(dtype), dbeta.astype(dtype)


class DoubleSums(NamedTuple):
    """Roots of `sample_sums` over the batch, (C,): of dy behind its ReLU, of ddx, and of their products."""

    dy: Float64
    dy_xmu: Float64
    ddx: Float64
    ddx_xmu: Float64
    dy_ddx: Float64


class Combination(NamedTuple):
    """Coefficients of `combine`, (C,) in float64: each is rounded to `acc` once."""

    scale: Float64
    k1: Float64
    k2: Float64
    weight: Float64 | None = None


@np.errstate(all="ignore")
def combine(a: Float, x: Float, mean: Float64, by: Combination, b: Float | None = None) -> Float:
    """a * scale + centre(x) * k1 + k2, from left to right; then + b, or + b * weight where there is a weight."""
    scale, k1, k2 = (v.astype(x.dtype)[:, None] for v in by[:3])
    y = (a * scale + centre(x, mean) * k1) + k2
    if b is None:
        return y
    return y + (b if by.weight is None else b * by.weight.astype(x.dtype)[:, None])


@np.errstate(all="ignore")
def ddy_combination(
    invstd: Float64, gamma: Float, acc: DTypeLike, u: Float64, w: Float64, sums: tuple[Int64, DoubleSums] | None
) -> Combination:
    """ddy = combine(ddx, x, mean, ..., ddresidual), before its ReLU and its one rounding.

    u is ddgamma and w is ddbeta. `sums` are of a count of values; there are none where the statistics are frozen.
    """
    scale = _scale(invstd, gamma, acc).astype(np.float64)
    if sums is None:
        return Combination(scale, u * invstd, w)
    m, of = sums
    p, q = of.ddx / m, (of.ddx_xmu / m) * (invstd * invstd)
    return Combination(scale, u * invstd - scale * q, w - scale * p)


@np.errstate(all="ignore")
def dx_combination(
    invstd: Float64, gamma: Float, u: Float64, count: Int64, sums: DoubleSums, u_dy: Float64, u_dy_xmu: Float64
) -> Combination:
    """dx = combine(dy, x, mean, ..., ddx), before its one rounding, dy behind its ReLU.

    u_dy and u_dy_xmu are the sums of dy and dy * centre(x) times ddgamma: see `times_ddgamma`.
    With frozen statistics dx is that of the frozen backward with ddgamma in the place of gamma.
    """
    m, square, c = count, invstd * invstd, gamma.astype(np.float64) * invstd
    a, b = sums.dy / m, sums.dy_xmu / m
    p, q = sums.ddx / m, (sums.ddx_xmu / m) * square
    weight = -(c * (b * square))
    k1 = -((c * square) * ((sums.dy_ddx / m - p * a) - 3.0 * (q * b)) + ((u_dy_xmu / m) * square) * invstd)
    k2 = -(weight * p + ((u_dy / m) * invstd - (c * q) * a))
    return Combination(u * invstd - c * q, k1, k2, weight)


@np.errstate(all="ignore")
def times_ddgamma(total: Float64, us: Float64, parts: Float64) -> Float64:
    """sum(u * part) over neighbouring parts of the batch, (K, C), that add up to `total`; us are ddgamma, for each one.

    u of the first * total + sum((u - u of the first) * part), from the first to the last. So where all u are the same
    it is u * total, however the batch was cut.
    """
    if not len(us):
        return total
    of_others = np.zeros_like(total)
    for u, part in zip(us, parts, strict=True):
        of_others = of_others + np.where(u == us[0], 0.0, (u - us[0]) * part)
    result: Float64 = us[0] * total + of_others
    return result


@np.errstate(all="ignore")
def gamma_gradient(invstd: Float64, of: DoubleSums, sums: tuple[Int64, DoubleSums] | None) -> Float64:
    """dgamma of a double backward before its one rounding: the share of the samples whose sums are `of`.

    `sums` are those of the whole batch, of a count of values; there are none where the statistics are frozen.
    """
    if sums is None:
        return of.dy_ddx * invstd
    count, whole = sums
    a, b = whole.dy / count, (whole.dy_xmu / count) * (invstd * invstd)
    return ((of.dy_ddx - of.ddx * a) - of.ddx_xmu * b) * invstd


@np.errstate(all="ignore")
def running(
    old: RunningStatistics, count: Int64, mean: Float64, m2: Float64, momentum: float | None, *, biased: bool = False
) -> RunningStatistics:
    """Running statistics after one more batch: (1 - w) * old + w * value in float64, rounded once to old's dtype.

    value is the batch's mean, or its variance: m2 / (count - 1), or m2 / count if biased. w = momentum, or with
    momentum None 1 / (tracked - skipped), where both counters are as if this batch were kept. The value stands alone,
    rounded once, where w is 1, and where the old mean or variance is not finite (is broken) and w is not 0. Where such
    a channel has a cumulative average, that begins anew with this batch.

    A channel is kept if it has two values or more and both results are finite, as they are only if the batch's
    statistics are. The others stay as they were and are counted as skipped.
    """
    tracked = old.tracked + 1
    w = np.float64(momentum) if momentum is not None else 1.0 / (tracked - old.skipped).astype(np.float64)
    var = m2 / (count if biased else count - 1)
    broken = ~(np.isfinite(old.mean) & np.isfinite(old.var))
    alone = (w == 1.0) | (broken & (w != 0.0))
    new_mean, new_var = (
        np.where(alone, value, (1.0 - w) * before.astype(np.float64) + w * value).astype(before.dtype)
        for before, value in ((old.mean, mean), (old.var, var))
    )
    kept = (count >= 2) & np.isfinite(new_mean) & np.isfinite(new_var)
    anew = kept & broken & (w != 1.0) & (momentum is None)
    return RunningStatistics(
        mean=np.where(kept, new_mean, old.mean),
        var=np.where(kept, new_var, old.var),
        tracked=np.where(anew, 1, tracked),
        skipped=np.where(anew, 0, old.skipped + ~kept),
    )


@np.errstate(all="ignore")
def _scale(invstd: Float64, gamma: Float, acc: DTypeLike) -> Float:
    scale: Float = invstd.astype(acc) * gamma.astype(acc)
    return scale
