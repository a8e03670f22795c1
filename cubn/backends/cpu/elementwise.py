"""The elementwise passes: y from x, dx from dy and x. They read the coefficient table, not the statistics.

A row is what lies contiguous: positions of one channel (nchw: one coefficient for all lanes) or the channels of one
position (nhwc: a coefficient each). Rows are cut to the alignment of the output where stores bypass the caches, which
no result depends on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from cubn.backends.cpu.arithmetic import Coefficients, behind_relu, input_gradient, normalized, relu
from cubn.backends.cpu.nodes import coefficients_at, jit, load_bits
from cubn.backends.cpu.parameters import OFFSET
from cubn.backends.cpu.simd import (
    I16,
    LANES,
    LINE,
    Element,
    Value,
    Values,
    constant,
    first_lanes,
    get,
    instruction,
    moved,
    not_positive,
    pointer,
    prefetch,
    select,
)

UNROLL = 4

CHANNELS, POSITIONS = OFFSET["channels"], OFFSET["positions"]
X_SAMPLE, X_CHANNEL, X_POSITION = OFFSET["x_sample"], OFFSET["x_channel"], OFFSET["x_position"]
Y_SAMPLE, Y_CHANNEL, Y_POSITION = OFFSET["y_sample"], OFFSET["y_channel"], OFFSET["y_position"]
G_SAMPLE, G_CHANNEL, G_POSITION = OFFSET["g_sample"], OFFSET["g_channel"], OFFSET["g_position"]
R_SAMPLE, R_CHANNEL, R_POSITION = OFFSET["r_sample"], OFFSET["r_channel"], OFFSET["r_position"]
RELU_MASK_SAMPLE, RELU_MASK_CHANNEL, RELU_MASK_POSITION = (
    OFFSET["relu_mask_sample"],
    OFFSET["relu_mask_channel"],
    OFFSET["relu_mask_position"],
)
X, Y, G, R, RELU_MASK = OFFSET["x"], OFFSET["y"], OFFSET["g"], OFFSET["r"], OFFSET["relu_mask"]


class Forward(NamedTuple):
    """y = relu((x - mean) * invstd * gamma + beta + residual)."""

    residual: bool
    relu: bool
    keep_mask: bool

    @property
    def reads_g(self) -> bool:
        return self.residual

    @property
    def writes_r(self) -> bool:
        return False

    @property
    def keeps_mask(self) -> bool:
        return self.keep_mask

    @property
    def has_relu_mask(self) -> bool:
        return self.keep_mask


class Backward(NamedTuple):
    """dx from dy, behind its ReLU; and that dy as dresidual."""

    relu: str
    frozen: bool
    dresidual: bool

    @property
    def reads_g(self) -> bool:
        return True

    @property
    def writes_r(self) -> bool:
        return self.dresidual

    @property
    def keeps_mask(self) -> bool:
        return False

    @property
    def has_relu_mask(self) -> bool:
        return self.relu == "mask"


Pass = Forward | Backward


def store_bits(lanes: Value, address: Value) -> None:
    b = lanes.b
    store = b.store(b.bitcast(lanes.v, I16), pointer(address, I16))
    store.align = 2


def vector_of(
    element: Element, what: Pass, load: Callable[..., Value] = load_bits, store: Callable[..., None] = store_bits
) -> Callable[..., tuple[Value, Value | None]]:
    """compute(x, g, place, coefficients): y or dx of 16 elements in acc, and dresidual.

    Words of the relu mask are read by load(*place) and kept by store(lanes, *place).
    """

    def forward(
        what: Forward, x: Value, g: Value | None, place: tuple[Value, ...], c: Coefficients
    ) -> tuple[Value, None]:
        v = normalized(x, c)
        if g is not None:
            v = v + g
        if what.relu:
            v = relu(v)
        if what.keep_mask:
            b = v.b
            store(Value(b, b.not_(not_positive(element.rounded(v)).v)), *place)
        return v, None

    def backward(
        what: Backward, x: Value, g: Value | None, place: tuple[Value, ...], c: Coefficients
    ) -> tuple[Value, Value | None]:
        assert g is not None
        if what.relu == "recompute":
            g = behind_relu(element, g, x, c)
        elif what.relu == "mask":
            g = select(load(*place), g, constant(g, 0.0))
        dx = g * c.scale if what.frozen else input_gradient(g, x, c)
        return dx, g if what.dresidual else None

    if isinstance(what, Forward):
        return functools.partial(forward, what)
    return functools.partial(backward, what)


@jit
def sample(p, n):  # type: ignore[no-untyped-def]
    """Where sample n begins: addresses of y, x, g, r and relu mask, as everywhere in the passes."""
    at = get(p + Y), get(p + X), get(p + G), get(p + R), get(p + RELU_MASK)
    by_sample = get(p + Y_SAMPLE), get(p + X_SAMPLE), get(p + G_SAMPLE), get(p + R_SAMPLE), get(p + RELU_MASK_SAMPLE)
    py, px, pg, pr, pb = moved(at, by_sample, n)
    return py, px, pg, pr, pb


@jit
def channel_steps(p):  # type: ignore[no-untyped-def]
    return get(p + Y_CHANNEL), get(p + X_CHANNEL), get(p + G_CHANNEL), get(p + R_CHANNEL), get(p + RELU_MASK_CHANNEL)


@jit
def position_steps(p):  # type: ignore[no-untyped-def]
    return (
        get(p + Y_POSITION),
        get(p + X_POSITION),
        get(p + G_POSITION),
        get(p + R_POSITION),
        get(p + RELU_MASK_POSITION),
    )


def elements(size: int, count: int) -> tuple[int, ...]:
    """Steps of `count` elements that lie side by side, with the relu mask of whole bytes."""
    return (size * count,) * 4 + (count // 8,)


def row_pass(element: Element, what: Pass, per_lane: bool, in_slab: bool = False) -> Any:
    """For kernels: one row of `length` elements, by the entries of a coefficient table (a channel's, or with
    per_lane one a lane).

    In a slab x and dy are in cache, and the output's next row is too far away for the processor to see it coming: it is
    asked for, `ahead` bytes from this one.
    """
    size, acc = element.size, element.acc_size
    compute = vector_of(element, what)

    def steps(
        count: int, stream: bool, at: Values, table: Values, ahead: Value | None = None, lanes: Value | None = None
    ) -> None:
        """`count` vectors, loads before stores."""
        (py, px, pg, pr, pb), (context, row) = at, table
        if in_slab and ahead is not None:
            for o in range(0, LANES * size * count, LINE):
                prefetch(py + ahead + o, to_write=True)
        mask = None if lanes is None else first_lanes(lanes)
        offsets = [LANES * size * i for i in range(count)]
        xs = [element.load(px + o, mask) for o in offsets]
        gs = [element.load(pg + o, mask) if what.reads_g else None for o in offsets]
        if per_lane:
            tables = [coefficients_at(element, (context + LANES * acc * i, row)) for i in range(count)]
        else:
            tables = [coefficients_at(element, table, one_channel=True)] * count
        found = [compute(x, g, (pb + 2 * i,), c) for i, (x, g, c) in enumerate(zip(xs, gs, tables, strict=True))]
        for o, (y, dresidual) in zip(offsets, found, strict=True):
            element.store(y, py + o, mask, stream=stream)
            if dresidual is not None:
                element.store(dresidual, pr + o, mask)

    @instruction()
    def many(at: Values, table: Values, ahead: Value) -> None:
        steps(UNROLL, False, at, table, ahead)

    @instruction()
    def one(at: Values, table: Values, ahead: Value) -> None:
        steps(1, False, at, table, ahead)

    @instruction()
    def streamed(at: Values, table: Values) -> None:
        steps(UNROLL, True, at, table)

    @instruction()
    def some(at: Values, table: Values, lanes: Value) -> None:
        steps(1, False, at, table, lanes=lanes)

    vector, by_element, by_vector = LANES * size, elements(size, 1), elements(size, LANES)
    entry = (acc, 0) if per_lane else (0, 0)
    has_relu_mask = what.has_relu_mask

    @jit
    def pass_over(length, at, table, stream, ahead):  # type: ignore[no-untyped-def]
        if stream and not has_relu_mask:  # a relu mask is cut in words from the row's start
            head = (-at[0] & (vector - 1)) // size
            if head and head < length:
                some(at, table, head)
                length -= head
                at, table = moved(at, by_element, head), moved(table, entry, head)
        if stream and not at[0] & (vector - 1):
            while length >= UNROLL * LANES:
                streamed(at, table)
                length -= UNROLL * LANES
                at, table = moved(at, by_vector, UNROLL), moved(table, entry, UNROLL * LANES)
        while length >= UNROLL * LANES:
            many(at, table, ahead)
            length -= UNROLL * LANES
            at, table = moved(at, by_vector, UNROLL), moved(table, entry, UNROLL * LANES)
        while length >= LANES:
            one(at, table, ahead)
            length -= LANES
            at, table = moved(at, by_vector, 1), moved(table, entry, LANES)
        if length:
            some(at, table, length)

    return pass_over
