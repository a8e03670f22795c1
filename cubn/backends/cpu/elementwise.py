"""The elementwise passes: y from x, dx from dy and x. They read the coefficient table, not the statistics.

A row is what lies contiguous: positions of one channel (nchw: one coefficient for all lanes) or the channels of one
position (nhwc: a coefficient each). Rows are cut to the alignment of the output where stores bypass the caches, which
no result depends on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from cubn.backends.cpu.arithmetic import Coefficients, gated, input_gradient, normalized, relu
from cubn.backends.cpu.nodes import coefficients_at, jit, load_bits
from cubn.backends.cpu.parameters import OFFSET
from cubn.backends.cpu.plan import SHORT, SPREAD_ROW
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
    splat,
)

UNROLL = 4

CHANNELS, POSITIONS = OFFSET["channels"], OFFSET["positions"]
X_SAMPLE, X_CHANNEL, X_POSITION = OFFSET["x_sample"], OFFSET["x_channel"], OFFSET["x_position"]
Y_SAMPLE, Y_CHANNEL, Y_POSITION = OFFSET["y_sample"], OFFSET["y_channel"], OFFSET["y_position"]
G_SAMPLE, G_CHANNEL, G_POSITION = OFFSET["g_sample"], OFFSET["g_channel"], OFFSET["g_position"]
R_SAMPLE, R_CHANNEL, R_POSITION = OFFSET["r_sample"], OFFSET["r_channel"], OFFSET["r_position"]
BITS_SAMPLE, BITS_CHANNEL, BITS_POSITION = OFFSET["bits_sample"], OFFSET["bits_channel"], OFFSET["bits_position"]
X, Y, G, R, BITS = OFFSET["x"], OFFSET["y"], OFFSET["g"], OFFSET["r"], OFFSET["bits"]
COEFFICIENTS, COEFFICIENT_ROW, STREAM, PERIOD = (
    OFFSET[name] for name in ("coefficients", "coefficient_row", "stream", "period")
)


class Forward(NamedTuple):
    """y = relu((x - mean) * invstd * gamma + beta + residual)."""

    residual: bool
    relu: bool
    keep_bits: bool

    @property
    def reads_g(self) -> bool:
        return self.residual

    @property
    def writes_r(self) -> bool:
        return False

    @property
    def keeps_bits(self) -> bool:
        return self.keep_bits

    @property
    def has_bits(self) -> bool:
        return self.keep_bits


class Backward(NamedTuple):
    """dx from dy, behind its gate; and the gated dy as dresidual."""

    gate: str
    frozen: bool
    dresidual: bool

    @property
    def reads_g(self) -> bool:
        return True

    @property
    def writes_r(self) -> bool:
        return self.dresidual

    @property
    def keeps_bits(self) -> bool:
        return False

    @property
    def has_bits(self) -> bool:
        return self.gate == "mask"


Pass = Forward | Backward


def store_bits(lanes: Value, address: Value) -> None:
    b = lanes.b
    store = b.store(b.bitcast(lanes.v, I16), pointer(address, I16))
    store.align = 2


def vector_of(
    element: Element, what: Pass, load: Callable[..., Value] = load_bits, store: Callable[..., None] = store_bits
) -> Callable[..., tuple[Value, Value | None]]:
    """compute(x, g, place, coefficients): y or dx of 16 elements in acc, and dresidual.

    The bits of a residual ReLU are read by load(*place) and kept by store(bits, *place).
    """

    def forward(
        what: Forward, x: Value, g: Value | None, place: tuple[Value, ...], c: Coefficients
    ) -> tuple[Value, None]:
        v = normalized(x, c)
        if g is not None:
            v = v + g
        if what.relu:
            v = relu(v)
        if what.keep_bits:
            b = v.b
            store(Value(b, b.not_(not_positive(element.rounded(v)).v)), *place)
        return v, None

    def backward(
        what: Backward, x: Value, g: Value | None, place: tuple[Value, ...], c: Coefficients
    ) -> tuple[Value, Value | None]:
        assert g is not None
        if what.gate == "recompute":
            g = gated(element, g, x, c)
        elif what.gate == "mask":
            g = select(load(*place), g, constant(g, 0.0))
        dx = g * c.scale if what.frozen else input_gradient(g, x, c)
        return dx, g if what.dresidual else None

    if isinstance(what, Forward):
        return functools.partial(forward, what)
    return functools.partial(backward, what)


@jit
def sample(p, n):  # type: ignore[no-untyped-def]
    """Where sample n begins: addresses of y, x, g, r and bits, as everywhere in the passes."""
    at = get(p + Y), get(p + X), get(p + G), get(p + R), get(p + BITS)
    by_sample = get(p + Y_SAMPLE), get(p + X_SAMPLE), get(p + G_SAMPLE), get(p + R_SAMPLE), get(p + BITS_SAMPLE)
    py, px, pg, pr, pb = moved(at, by_sample, n)
    return py, px, pg, pr, pb


@jit
def channel_steps(p):  # type: ignore[no-untyped-def]
    return get(p + Y_CHANNEL), get(p + X_CHANNEL), get(p + G_CHANNEL), get(p + R_CHANNEL), get(p + BITS_CHANNEL)


@jit
def position_steps(p):  # type: ignore[no-untyped-def]
    return get(p + Y_POSITION), get(p + X_POSITION), get(p + G_POSITION), get(p + R_POSITION), get(p + BITS_POSITION)


def elements(size: int, count: int) -> tuple[int, ...]:
    """Steps of `count` elements that lie side by side, with the bits of whole bytes."""
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
    has_bits = what.has_bits

    @jit
    def pass_over(length, at, table, stream, ahead):  # type: ignore[no-untyped-def]
        if stream and not has_bits:  # bits are cut in words from the row's start
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


def channel_pass(element: Element, what: Pass, in_slab: bool = False) -> Any:
    """For kernels: one sample of `count` channels from c0 of a dense nchw array; in a slab, the one before it is
    next.
    """
    row = row_pass(element, what, False, in_slab)
    acc = element.acc_size

    @jit
    def of_channels(p, n, c0, count):  # type: ignore[no-untyped-def]
        steps = channel_steps(p)
        at = moved(sample(p, n), steps, c0)
        table = get(p + COEFFICIENTS) + c0 * acc, get(p + COEFFICIENT_ROW)
        for _ in range(count):
            row(get(p + POSITIONS), at, table, get(p + STREAM), -get(p + Y_SAMPLE))
            at, table = moved(at, steps, 1), moved(table, (acc, 0), 1)

    return of_channels


def position_pass(element: Element, what: Pass) -> Any:
    """For kernels: all channels of `count` positions from s0 of one sample of an nhwc array, four positions at a
    time.
    """
    row = row_pass(element, what, True)
    compute = vector_of(element, what)
    size, acc = element.size, element.acc_size
    vector, by_vector = LANES * size, elements(size, LANES)

    def four(stream: bool, at: Values, steps: Values, table: Values) -> None:
        """16 channels of four positions: coefficients are loaded once."""
        c = coefficients_at(element, table)
        places = [shifted(at, steps, i) for i in range(UNROLL)]
        xs = [element.load(px) for _, px, _, _, _ in places]
        gs = [element.load(pg) if what.reads_g else None for _, _, pg, _, _ in places]
        found = [compute(x, g, (pb,), c) for x, g, (*_, pb) in zip(xs, gs, places, strict=True)]
        for (y, dresidual), (py, _, _, pr, _) in zip(found, places, strict=True):
            element.store(y, py, stream=stream)
            if dresidual is not None:
                element.store(dresidual, pr)

    @instruction()
    def plain(at: Values, steps: Values, table: Values) -> None:
        four(False, at, steps, table)

    @instruction()
    def streamed(at: Values, steps: Values, table: Values) -> None:
        four(True, at, steps, table)

    @jit
    def of_positions(p, n, s0, count):  # type: ignore[no-untyped-def]
        steps = position_steps(p)
        at = moved(sample(p, n), steps, s0)
        length, stream = get(p + CHANNELS), get(p + STREAM)
        table = get(p + COEFFICIENTS), get(p + COEFFICIENT_ROW)
        vectors = length // LANES
        streams = stream and not (at[0] | steps[0]) & (vector - 1)
        while count >= UNROLL:
            place, entries = at, table
            for _ in range(vectors):
                if streams:
                    streamed(place, steps, entries)
                else:
                    plain(place, steps, entries)
                place, entries = moved(place, by_vector, 1), moved(entries, (acc, 0), LANES)
            if length % LANES:
                for i in range(UNROLL):
                    row(length % LANES, moved(place, steps, i), entries, 0, 0)
            at = moved(at, steps, UNROLL)
            count -= UNROLL
        for _ in range(count):
            row(length, at, table, stream, 0)
            at = moved(at, steps, 1)

    return of_positions


def flat_pass(element: Element, what: Pass) -> Any:
    """For kernels: `count` elements from the given one on, of dense nhwc arrays of few channels.

    The table has the channels over and over, so that rows are long; see `repeat_channels`.
    """
    row = row_pass(element, what, True)
    by_element = elements(element.size, 1)

    @jit
    def of_elements(p, first, count):  # type: ignore[no-untyped-def]
        table, stream = (get(p + COEFFICIENTS), get(p + COEFFICIENT_ROW)), get(p + STREAM)
        at = moved(sample(p, 0), by_element, first)
        while count > 0:
            length = min(count, get(p + PERIOD))
            row(length, at, table, stream, 0)
            at = moved(at, by_element, length)
            count -= length

    return of_elements


def repeat_channels(element: Element) -> Any:
    """For kernels: fill the rows of the coefficient table up to the period with what their first C entries are."""
    acc, lanes = element.acc_size, LANES

    @instruction()
    def copy(to: Value, at: Value) -> None:
        element.store_acc(element.load_acc(at), to)

    @jit
    def repeat(p):  # type: ignore[no-untyped-def]
        for k in range(6):
            table, filled = get(p + COEFFICIENTS) + k * get(p + COEFFICIENT_ROW), get(p + CHANNELS)
            while filled < get(p + PERIOD):
                for i in range(0, filled, lanes):  # what is copied beyond the filled part is written again
                    copy(table + (filled + i) * acc, table + i * acc)
                filled *= 2

    return repeat


def group_pass(element: Element, what: Pass) -> tuple[Any, Any]:
    """(spread, of_group): 16 channels of short rows in a slab that lie side by side, as one long row with a coefficient
    an element.

    `spread` makes the long row's coefficient table in scratch, once for all samples, and says whether that is worth it.
    """
    row = row_pass(element, what, True, in_slab=True)
    size, acc, has_bits = element.size, element.acc_size, what.has_bits
    reads_g, writes_r = what.reads_g, what.writes_r

    @instruction()
    def repeat(to: Value, at: Value) -> None:
        b = to.b
        element.store_acc(splat(Value(b, b.load(pointer(at, element.acc), typ=element.acc))), to)

    @jit
    def spread(p, table, c0, count):  # type: ignore[no-untyped-def]
        length = get(p + POSITIONS)
        step = length * size
        if has_bits or length > SHORT or get(p + X_CHANNEL) != step or get(p + Y_CHANNEL) != step:
            return False
        if (reads_g and get(p + G_CHANNEL) != step) or (writes_r and get(p + R_CHANNEL) != step):
            return False
        for k in range(6):
            to = table + k * SPREAD_ROW
            at = get(p + COEFFICIENTS) + k * get(p + COEFFICIENT_ROW) + c0 * acc
            for c in range(count):
                for s in range(0, length, LANES):  # what reaches into the next channel is overwritten by it
                    repeat(to + (c * length + s) * acc, at + c * acc)
        return True

    @jit
    def of_group(p, table, n, c0, count):  # type: ignore[no-untyped-def]
        at = moved(sample(p, n), channel_steps(p), c0)
        row(get(p + POSITIONS) * count, at, (table, SPREAD_ROW), get(p + STREAM), -get(p + Y_SAMPLE))

    return spread, of_group
