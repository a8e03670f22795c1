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
from cubn.backends.cpu.launch import OFFSET
from cubn.backends.cpu.nodes import coefficients_at, jit, load_bits
from cubn.backends.cpu.plan import SHORT, SPREAD_ROW
from cubn.backends.cpu.simd import (
    I16,
    LANES,
    LINE,
    Element,
    Value,
    constant,
    first_lanes,
    get,
    instruction,
    not_positive,
    pointer,
    prefetch,
    select,
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
        return self.gate == "bits"


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
        elif what.gate == "bits":
            g = select(load(*place), g, constant(g, 0.0))
        dx = g * c.scale if what.frozen else input_gradient(g, x, c)
        return dx, g if what.dresidual else None

    if isinstance(what, Forward):
        return functools.partial(forward, what)
    return functools.partial(backward, what)


def row_pass(element: Element, what: Pass, per_lane: bool, in_slab: bool = False) -> Any:
    """A numba function: one row of `length` elements, coefficients at `context` (a channel's, or with per_lane one a
    lane).

    In a slab x and dy are in cache, and the output's next row is too far away for the processor to see it coming: it is
    asked for, `ahead` bytes from this one.
    """
    size, acc = element.size, element.acc_size
    compute = vector_of(element, what)

    def steps(
        count: int,
        stream: bool,
        py: Value,
        px: Value,
        pg: Value,
        pr: Value,
        pb: Value,
        context: Value,
        row: Value,
        ahead: Value | None = None,
        lanes: Value | None = None,
    ) -> None:
        """`count` vectors, loads before stores."""
        if in_slab and ahead is not None:
            for o in range(0, LANES * size * count, LINE):
                prefetch(py + ahead + o, to_write=True)
        mask = None if lanes is None else first_lanes(lanes)
        offsets = [LANES * size * i for i in range(count)]
        xs = [element.load(px + o, mask) for o in offsets]
        gs = [element.load(pg + o, mask) if what.reads_g else None for o in offsets]
        if per_lane:
            tables = [coefficients_at(element, context + LANES * acc * i, row) for i in range(count)]
        else:
            b = context.b
            one = []
            for i in range(6):
                at = b.load(pointer(context + row * i, element.acc), typ=element.acc)
                one.append(splat(Value(b, at)))
            tables = [Coefficients(*one)] * count
        found = [compute(x, g, (pb + 2 * i,), c) for i, (x, g, c) in enumerate(zip(xs, gs, tables, strict=True))]
        for o, (y, dresidual) in zip(offsets, found, strict=True):
            element.store(y, py + o, mask, stream=stream)
            if dresidual is not None:
                element.store(dresidual, pr + o, mask)

    @instruction()
    def many(py: Value, px: Value, pg: Value, pr: Value, pb: Value, context: Value, row: Value, ahead: Value) -> None:
        steps(UNROLL, False, py, px, pg, pr, pb, context, row, ahead)

    @instruction()
    def one(py: Value, px: Value, pg: Value, pr: Value, pb: Value, context: Value, row: Value, ahead: Value) -> None:
        steps(1, False, py, px, pg, pr, pb, context, row, ahead)

    @instruction()
    def streamed(py: Value, px: Value, pg: Value, pr: Value, pb: Value, context: Value, row: Value) -> None:
        steps(UNROLL, True, py, px, pg, pr, pb, context, row)

    @instruction()
    def some(py: Value, px: Value, pg: Value, pr: Value, pb: Value, context: Value, row: Value, lanes: Value) -> None:
        steps(1, False, py, px, pg, pr, pb, context, row, lanes=lanes)

    vector = LANES * size
    step = UNROLL * vector
    context_step = LANES * acc if per_lane else 0
    has_bits = what.has_bits

    @jit
    def pass_over(length, py, px, pg, pr, pb, context, row, stream, ahead):  # type: ignore[no-untyped-def]
        if stream and not has_bits:  # bits are cut in words from the row's start
            head = (-py & (vector - 1)) // size
            if head and head < length:
                some(py, px, pg, pr, pb, context, row, head)
                length -= head
                py += head * size
                px += head * size
                pg += head * size
                pr += head * size
                if context_step:
                    context += head * acc
        if stream and not py & (vector - 1):
            while length >= UNROLL * LANES:
                streamed(py, px, pg, pr, pb, context, row)
                length -= UNROLL * LANES
                py += step
                px += step
                pg += step
                pr += step
                pb += 2 * UNROLL
                context += UNROLL * context_step
        while length >= UNROLL * LANES:
            many(py, px, pg, pr, pb, context, row, ahead)
            length -= UNROLL * LANES
            py += step
            px += step
            pg += step
            pr += step
            pb += 2 * UNROLL
            context += UNROLL * context_step
        while length >= LANES:
            one(py, px, pg, pr, pb, context, row, ahead)
            length -= LANES
            py += vector
            px += vector
            pg += vector
            pr += vector
            pb += 2
            context += context_step
        if length:
            some(py, px, pg, pr, pb, context, row, length)

    return pass_over


def channel_pass(element: Element, what: Pass, in_slab: bool = False) -> Any:
    """A numba function: one sample of `count` channels from c0 of a dense nchw array; in a slab, the one before it is
    next.
    """
    row = row_pass(element, what, False, in_slab)
    acc = element.acc_size

    @jit
    def of_channels(p, n, c0, count):  # type: ignore[no-untyped-def]
        sy, sx, sg, sr, sb = (
            get(p + Y_CHANNEL),
            get(p + X_CHANNEL),
            get(p + G_CHANNEL),
            get(p + R_CHANNEL),
            get(p + BITS_CHANNEL),
        )
        py = get(p + Y) + n * get(p + Y_SAMPLE) + c0 * sy
        px = get(p + X) + n * get(p + X_SAMPLE) + c0 * sx
        pg = get(p + G) + n * get(p + G_SAMPLE) + c0 * sg
        pr = get(p + R) + n * get(p + R_SAMPLE) + c0 * sr
        pb = get(p + BITS) + n * get(p + BITS_SAMPLE) + c0 * sb
        length, stream, stride = get(p + POSITIONS), get(p + STREAM), get(p + COEFFICIENT_ROW)
        context = get(p + COEFFICIENTS) + c0 * acc
        for _ in range(count):
            row(length, py, px, pg, pr, pb, context, stride, stream, -get(p + Y_SAMPLE))
            py += sy
            px += sx
            pg += sg
            pr += sr
            pb += sb
            context += acc

    return of_channels


def position_pass(element: Element, what: Pass) -> Any:
    """A numba function: all channels of `count` positions from s0 of one sample of an nhwc array, four positions at a
    time.
    """
    row = row_pass(element, what, True)
    compute = vector_of(element, what)
    size, acc = element.size, element.acc_size
    vector = LANES * size

    def four(
        stream: bool,
        py: Value,
        px: Value,
        pg: Value,
        pr: Value,
        pb: Value,
        sy: Value,
        sx: Value,
        sg: Value,
        sr: Value,
        sb: Value,
        context: Value,
        stride: Value,
    ) -> None:
        """16 channels of four positions: coefficients are loaded once."""
        c = coefficients_at(element, context, stride)
        xs = [element.load(px + sx * i) for i in range(UNROLL)]
        gs = [element.load(pg + sg * i) if what.reads_g else None for i in range(UNROLL)]
        found = [compute(x, g, (pb + sb * i,), c) for i, (x, g) in enumerate(zip(xs, gs, strict=True))]
        for i, (y, dresidual) in enumerate(found):
            element.store(y, py + sy * i, stream=stream)
            if dresidual is not None:
                element.store(dresidual, pr + sr * i)

    @instruction()
    def plain(
        py: Value,
        px: Value,
        pg: Value,
        pr: Value,
        pb: Value,
        sy: Value,
        sx: Value,
        sg: Value,
        sr: Value,
        sb: Value,
        context: Value,
        stride: Value,
    ) -> None:
        four(False, py, px, pg, pr, pb, sy, sx, sg, sr, sb, context, stride)

    @instruction()
    def streamed(
        py: Value,
        px: Value,
        pg: Value,
        pr: Value,
        pb: Value,
        sy: Value,
        sx: Value,
        sg: Value,
        sr: Value,
        sb: Value,
        context: Value,
        stride: Value,
    ) -> None:
        four(True, py, px, pg, pr, pb, sy, sx, sg, sr, sb, context, stride)

    @jit
    def of_positions(p, n, s0, count):  # type: ignore[no-untyped-def]
        sy, sx, sg, sr, sb = (
            get(p + Y_POSITION),
            get(p + X_POSITION),
            get(p + G_POSITION),
            get(p + R_POSITION),
            get(p + BITS_POSITION),
        )
        py = get(p + Y) + n * get(p + Y_SAMPLE) + s0 * sy
        px = get(p + X) + n * get(p + X_SAMPLE) + s0 * sx
        pg = get(p + G) + n * get(p + G_SAMPLE) + s0 * sg
        pr = get(p + R) + n * get(p + R_SAMPLE) + s0 * sr
        pb = get(p + BITS) + n * get(p + BITS_SAMPLE) + s0 * sb
        length, stream, stride, context = (
            get(p + CHANNELS),
            get(p + STREAM),
            get(p + COEFFICIENT_ROW),
            get(p + COEFFICIENTS),
        )
        whole = length - length % LANES
        streams = stream and not (py | sy) & (vector - 1)
        while count >= UNROLL:
            for c in range(0, whole, LANES):
                o = c * size
                if streams:
                    streamed(py + o, px + o, pg + o, pr + o, pb + c // 8, sy, sx, sg, sr, sb, context + c * acc, stride)
                else:
                    plain(py + o, px + o, pg + o, pr + o, pb + c // 8, sy, sx, sg, sr, sb, context + c * acc, stride)
            if whole < length:
                o = whole * size
                for i in range(UNROLL):
                    row(
                        length - whole,
                        py + o + i * sy,
                        px + o + i * sx,
                        pg + o + i * sg,
                        pr + o + i * sr,
                        pb + whole // 8 + i * sb,
                        context + whole * acc,
                        stride,
                        0,
                        0,
                    )
            py += UNROLL * sy
            px += UNROLL * sx
            pg += UNROLL * sg
            pr += UNROLL * sr
            pb += UNROLL * sb
            count -= UNROLL
        for _ in range(count):
            row(length, py, px, pg, pr, pb, context, stride, stream, 0)
            py += sy
            px += sx
            pg += sg
            pr += sr
            pb += sb

    return of_positions


def flat_pass(element: Element, what: Pass) -> Any:
    """A numba function: `count` elements from the given one on, of dense nhwc arrays of few channels.

    The table has the channels over and over, so that rows are long; see `repeat_channels`.
    """
    row = row_pass(element, what, True)
    size = element.size

    @jit
    def of_elements(p, first, count):  # type: ignore[no-untyped-def]
        context, stride, stream = get(p + COEFFICIENTS), get(p + COEFFICIENT_ROW), get(p + STREAM)
        py, px = get(p + Y) + first * size, get(p + X) + first * size
        pg, pr = get(p + G) + first * size, get(p + R) + first * size
        while count > 0:
            length = min(count, get(p + PERIOD))
            row(length, py, px, pg, pr, 0, context, stride, stream, 0)
            py += length * size
            px += length * size
            pg += length * size
            pr += length * size
            count -= length

    return of_elements


def repeat_channels(element: Element) -> Any:
    """A numba function: fill the rows of the coefficient table up to the period with what their first C entries are."""
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
        row(
            get(p + POSITIONS) * count,
            get(p + Y) + n * get(p + Y_SAMPLE) + c0 * get(p + Y_CHANNEL),
            get(p + X) + n * get(p + X_SAMPLE) + c0 * get(p + X_CHANNEL),
            get(p + G) + n * get(p + G_SAMPLE) + c0 * get(p + G_CHANNEL),
            get(p + R) + n * get(p + R_SAMPLE) + c0 * get(p + R_CHANNEL),
            0,
            table,
            SPREAD_ROW,
            get(p + STREAM),
            -get(p + Y_SAMPLE),
        )

    return spread, of_group
