"""The contract's formulas (docs/numerics.md) on vectors: what is computed, nothing of where the data is.

A node of the tree is a pair of vectors: (mean, m2) for the moments, (sum_dy, sum_dy_xmu) for the backward sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cubn.backends.cpu.simd import DOUBLE, Element, Value, constant, narrow, not_positive, plus_scaled, select, widen

Node = tuple[Value, Value]
Term = tuple[Value, ...]


class Coefficients(NamedTuple):
    """What elementwise code needs of a channel, in acc, in the order of the coefficient table's rows."""

    high: Value
    low: Value
    scale: Value
    beta: Value
    k1: Value
    k2: Value


def divided(total: Value, count: int) -> Value:
    """total / count for a count of 2 to 8, rounded as the division is, without dividing where that is slow.

    A power of two: its inverse is exact. Else a float32 total times the inverse in float64: no quotient of a float32 by
    such a count lies within that product's error of the middle between two float32, unless it is that middle, and then
    the product is exact.
    """
    if count & (count - 1) == 0:
        return total * constant(total, 1 / count)
    if total.type.element == DOUBLE:
        return total / constant(total, float(count))
    wide = widen(total, DOUBLE)
    return narrow(wide * constant(wide, 1 / count), total.type.element)


def centre(x: Value, c: Coefficients) -> Value:
    """x - mean, the mean as two acc numbers."""
    return (x - c.high) - c.low


def normalized(x: Value, c: Coefficients, exact_mean: bool = False) -> Value:
    """`exact_mean`: of a mean that is an acc number, low is 0 (and x - 0 is x)."""
    centred = x - c.high if exact_mean else centre(x, c)
    return centred * c.scale + c.beta


def relu(v: Value) -> Value:
    """0 where v <= 0, else v: a NaN stays."""
    return select(not_positive(v), constant(v, 0.0), v)


def behind_relu(element: Element, dy: Value, x: Value, c: Coefficients) -> Value:
    """dy behind a ReLU: 0 where y, recomputed from x and rounded to its dtype, is <= 0."""
    return select(not_positive(element.rounded(normalized(x, c))), constant(dy, 0.0), dy)


def input_gradient(dy: Value, x: Value, c: Coefficients) -> Value:
    return ((dy - c.k1) - centre(x, c) * c.k2) * c.scale


def combined(g: Value, x: Value, c: Coefficients) -> Value:
    return (g * c.scale + centre(x, c) * c.k1) + c.k2


class Moments:
    """Count, mean and m2: leaves about the tile's pivot, nodes merged by Chan's formula."""

    name = "moments"

    @staticmethod
    def term(x: Value, pivot: Value) -> Term:
        return (x - pivot,)

    @staticmethod
    def leaf(rows: Sequence[Term]) -> Node:
        """The node of up to 8 values: two passes, in row order. One value has m2 = 0 by definition."""
        values = [v for (v,) in rows]
        if len(values) == 1:
            return values[0], constant(values[0], 0.0)
        total = values[0]
        for v in values[1:]:
            total = total + v
        mean = divided(total, len(values))
        m2: Value | None = None
        for v in values:
            d = v - mean
            m2 = d * d if m2 is None else m2 + d * d
        assert m2 is not None
        return mean, m2

    @staticmethod
    def pair(a: Node, b: Node, halves: bool) -> Node:
        """`merge` of two values, whose m2 is 0; `halves` as below."""
        d, half = b[0] - a[0], constant(a[0], 0.5)
        return plus_scaled(a[0], d, half) if halves else a[0] + d * half, (d * d) * half

    @staticmethod
    def equal_merge(a: Node, b: Node, weight: Value, halves: bool) -> Node:
        """`merge` of two nodes of equally many values, a power of two and not 1, so that products with the weight are
        exact; `halves`: so are those of differences with 0.5, since none is a subnormal number.
        """
        d, half = b[0] - a[0], constant(a[0], 0.5)
        mean = plus_scaled(a[0], d, half) if halves else a[0] + d * half
        return mean, plus_scaled(a[1] + b[1], d * d, weight)

    @staticmethod
    def merge(a: Node, b: Node, share: Value, weight: Value) -> Node:
        """share = count_b / count, weight = count_a * share."""
        d = b[0] - a[0]
        return a[0] + d * share, (a[1] + b[1]) + (d * d) * weight


class Sums:
    """Sums of dy and of dy * (x - mean): plain additions in the same order."""

    name = "sums"

    @staticmethod
    def leaf(rows: Sequence[Term]) -> Node:
        first, second = rows[0]
        for g, t in rows[1:]:
            first, second = first + g, second + t
        return first, second

    @staticmethod
    def pair(a: Node, b: Node, halves: bool = False) -> Node:
        return a[0] + b[0], a[1] + b[1]

    @staticmethod
    def equal_merge(a: Node, b: Node, weight: Value, halves: bool) -> Node:
        return Sums.pair(a, b)

    @staticmethod
    def merge(a: Node, b: Node, share: Value, weight: Value) -> Node:
        return Sums.pair(a, b)


Reduction = type[Moments] | type[Sums]
