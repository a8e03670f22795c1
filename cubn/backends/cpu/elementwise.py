"""The elementwise passes: y from x, dx from dy and x, both of a double backward. They read the coefficient table, not
the statistics.

A row is what lies contiguous: positions of one channel (nchw: one coefficient for all lanes) or the channels of one
position (nhwc: a coefficient each). Rows are cut to the alignment of the output where stores bypass the caches, which
no result depends on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cubn.backends.cpu.arithmetic import Coefficients, behind_relu, combined, input_gradient, normalized, relu
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
    shifted,
)

UNROLL = 4
FURTHER = 2048
"""Bytes ahead of what is streamed that x is asked for: half a page, behind which no processor looks ahead by itself."""

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
STREAM = OFFSET["stream"]
X, Y, G, R, RELU_MASK = OFFSET["x"], OFFSET["y"], OFFSET["g"], OFFSET["r"], OFFSET["relu_mask"]


class Forward(NamedTuple):
    """y = relu((x - mean) * invstd * gamma + beta + residual)."""

    residual: bool
    relu: bool
    keep_mask: bool
    exact_mean: bool = False

    @property
    def reads_g(self) -> bool:
        return self.residual

    @property
    def reads_r(self) -> bool:
        return False

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
    def reads_r(self) -> bool:
        return False

    @property
    def writes_r(self) -> bool:
        return self.dresidual

    @property
    def keeps_mask(self) -> bool:
        return False

    @property
    def has_relu_mask(self) -> bool:
        return self.relu == "mask"


class Combination(NamedTuple):
    """g * scale + (x - mean) * k1 + k2, then + r or + r * beta, then 0 where a ReLU was."""

    relu: str
    third: str

    @property
    def reads_g(self) -> bool:
        return True

    @property
    def reads_r(self) -> bool:
        return self.third != "none"

    @property
    def writes_r(self) -> bool:
        return False

    @property
    def keeps_mask(self) -> bool:
        return False

    @property
    def has_relu_mask(self) -> bool:
        return self.relu == "mask"


Pass = Forward | Backward | Combination


def store_bits(lanes: Value, address: Value) -> None:
    b = lanes.b
    store = b.store(b.bitcast(lanes.v, I16), pointer(address, I16))
    store.align = 2


def vector_of(
    element: Element, what: Pass, load: Callable[..., Value] = load_bits, store: Callable[..., None] = store_bits
) -> Callable[..., tuple[Value, Value | None]]:
    """compute(x, g, r, place, coefficients): y or dx of 16 elements in acc, and dresidual.

    Words of the relu mask are read by load(*place) and kept by store(lanes, *place).
    """

    def passed(relu: str, v: Value, x: Value, place: tuple[Value, ...], c: Coefficients) -> Value:
        """v where it passes a ReLU, else 0."""
        if relu == "recompute":
            return behind_relu(element, v, x, c)
        return select(load(*place), v, constant(v, 0.0)) if relu == "mask" else v

    def forward(
        what: Forward, x: Value, g: Value | None, r: Value | None, place: tuple[Value, ...], c: Coefficients
    ) -> tuple[Value, None]:
        v = normalized(x, c, what.exact_mean)
        if g is not None:
            v = v + g
        if what.relu:
            v = relu(v)
        if what.keep_mask:
            b = v.b
            store(Value(b, b.not_(not_positive(element.rounded(v)).v)), *place)
        return v, None

    def backward(
        what: Backward, x: Value, g: Value | None, r: Value | None, place: tuple[Value, ...], c: Coefficients
    ) -> tuple[Value, Value | None]:
        assert g is not None
        g = passed(what.relu, g, x, place, c)
        dx = g * c.scale if what.frozen else input_gradient(g, x, c)
        return dx, g if what.dresidual else None

    def combination(
        what: Combination, x: Value, g: Value | None, r: Value | None, place: tuple[Value, ...], c: Coefficients
    ) -> tuple[Value, None]:
        assert g is not None
        v = combined(g, x, c)
        if r is not None:
            v = v + (r * c.beta if what.third == "weighted" else r)
        return passed(what.relu, v, x, place, c), None

    if isinstance(what, Forward):
        return functools.partial(forward, what)
    if isinstance(what, Backward):
        return functools.partial(backward, what)
    return functools.partial(combination, what)


@jit
def sample(p, n):  # type: ignore[no-untyped-def]
    """Where sample n begins: addresses of y, x, g, r and relu mask, as everywhere in the passes."""
    at = get(p + Y), get(p + X), get(p + G), get(p + R), get(p + RELU_MASK)
    by_sample = get(p + Y_SAMPLE), get(p + X_SAMPLE), get(p + G_SAMPLE), get(p + R_SAMPLE), get(p + RELU_MASK_SAMPLE)
    py, px, pg, pr, pb = moved(at, by_sample, n)
    return py, px, pg, pr, pb


@jit
def streams(p):  # type: ignore[no-untyped-def]
    """Whether y is to bypass the caches: not where it replaces x or g, which are in them already."""
    return get(p + STREAM) and get(p + Y) != get(p + X) and get(p + Y) != get(p + G)


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


class RowPass(NamedTuple):
    """For kernels, over elements side by side: `row` of any length, `seam` of one vector across two channels, `some` of
    less than a vector.
    """

    row: Any
    seam: Any
    some: Any


def row_pass(element: Element, what: Pass, per_lane: bool, in_slab: bool = False) -> RowPass:
    """By the entries of a coefficient table (a channel's, or with per_lane one a lane).

    In a slab x and dy are in cache, and the output's next row is too far away for the processor to see it coming: it is
    asked for, `ahead` bytes from this one.
    """
    size, acc = element.size, element.acc_size
    compute = vector_of(element, what)
    by_element, by_vector = elements(size, 1), elements(size, LANES)
    entry = (acc, 0) if per_lane else (0, 0)
    entries = (entry[0] * LANES, 0)

    def coefficients(table: Values) -> Coefficients:
        return coefficients_at(element, table, one_channel=not per_lane)

    def vectors(
        places: Sequence[Values], found: Sequence[Coefficients], *, stream: bool = False, lanes: Value | None = None
    ) -> None:
        """A vector at each place, loads before stores. What is streamed is asked for long before."""
        if stream:
            for _, px, pg, _, _ in places:
                for o in range(0, LANES * size, LINE):
                    prefetch(px + FURTHER + o)
                    if what.reads_g:
                        prefetch(pg + FURTHER + o)
        mask = None if lanes is None else first_lanes(lanes)
        xs = [element.load(px, mask) for _, px, _, _, _ in places]
        gs = [element.load(pg, mask) if what.reads_g else None for _, _, pg, _, _ in places]
        rs = [element.load(pr, mask) if what.reads_r else None for _, _, _, pr, _ in places]
        results = [compute(x, g, r, (pb,), c) for x, g, r, (*_, pb), c in zip(xs, gs, rs, places, found, strict=True)]
        for (y, dresidual), (py, _, _, pr, _) in zip(results, places, strict=True):
            element.store(y, py, mask, stream=stream)
            if dresidual is not None:
                element.store(dresidual, pr, mask)

    def neighbours(count: int, at: Values, table: Values, *, stream: bool = False) -> None:
        tables = [shifted(table, entries, i) for i in range(count)] if per_lane else [table]
        found = [coefficients(one) for one in tables] * (1 if per_lane else count)
        vectors([shifted(at, by_vector, i) for i in range(count)], found, stream=stream)

    def ask_for_output(py: Value, ahead: Value, count: int = 1) -> None:
        if in_slab:
            for o in range(0, LANES * size * count, LINE):
                prefetch(py + ahead + o, to_write=True)

    @instruction()
    def many(at: Values, table: Values, ahead: Value) -> None:
        ask_for_output(at[0], ahead, UNROLL)
        neighbours(UNROLL, at, table)

    @instruction()
    def one(at: Values, table: Values, ahead: Value) -> None:
        ask_for_output(at[0], ahead)
        neighbours(1, at, table)

    @instruction()
    def two(at: Values, table: Values, apart: Value, ahead: Value) -> None:
        """Vectors so many elements apart. Where they overlap, both write the same."""
        ask_for_output(at[0], ahead)
        vectors([at, shifted(at, by_element, apart)], [coefficients(table), coefficients(shifted(table, entry, apart))])

    @instruction()
    def streamed_many(at: Values, table: Values) -> None:
        neighbours(UNROLL, at, table, stream=True)

    @instruction()
    def streamed_one(at: Values, table: Values) -> None:
        neighbours(1, at, table, stream=True)

    @instruction()
    def some(at: Values, table: Values, lanes: Value) -> None:
        vectors([at], [coefficients(table)], lanes=lanes)

    def across(at: Values, table: Values, lanes: Value, *, stream: bool = False) -> None:
        """The first lanes are of one channel, the others of the next."""
        mask, following = first_lanes(lanes), coefficients(shifted(table, (acc, 0), 1))
        found = Coefficients(*(select(mask, a, b) for a, b in zip(coefficients(table), following, strict=True)))
        vectors([at], [found], stream=stream)

    @instruction()
    def plain_seam(at: Values, table: Values, lanes: Value, ahead: Value) -> None:
        ask_for_output(at[0], ahead)
        across(at, table, lanes)

    @instruction()
    def streamed_seam(at: Values, table: Values, lanes: Value) -> None:
        across(at, table, lanes, stream=True)

    vector, has_relu_mask = LANES * size, what.has_relu_mask

    @jit
    def row(length, at, table, stream, ahead):  # type: ignore[no-untyped-def]
        apart = length % LANES
        if apart and length > LANES and not has_relu_mask:  # whose words do not overlap
            two(at, table, apart, ahead)
            apart += LANES
            at, table, length = moved(at, by_element, apart), moved(table, entry, apart), length - apart
        if stream and not at[0] & (vector - 1):
            while length >= UNROLL * LANES:
                streamed_many(at, table)
                length -= UNROLL * LANES
                at, table = moved(at, by_vector, UNROLL), moved(table, entries, UNROLL)
            while length >= LANES:
                streamed_one(at, table)
                length -= LANES
                at, table = moved(at, by_vector, 1), moved(table, entries, 1)
        while length >= UNROLL * LANES:
            many(at, table, ahead)
            length -= UNROLL * LANES
            at, table = moved(at, by_vector, UNROLL), moved(table, entries, UNROLL)
        while length >= LANES:
            one(at, table, ahead)
            length -= LANES
            at, table = moved(at, by_vector, 1), moved(table, entries, 1)
        if length:
            some(at, table, length)

    @jit
    def seam(at, table, lanes, stream, ahead):  # type: ignore[no-untyped-def]
        if stream:
            streamed_seam(at, table, lanes)
        else:
            plain_seam(at, table, lanes, ahead)

    return RowPass(row, seam, some)
