"""Elementwise passes over channels of a sample, over positions of a sample, and over elements one after the other."""

from __future__ import annotations

from typing import Any

from cubn.backends.cpu.elementwise import (
    Pass,
    channel_steps,
    elements,
    position_steps,
    row_pass,
    sample,
    streams,
)
from cubn.backends.cpu.nodes import jit
from cubn.backends.cpu.parameters import OFFSET
from cubn.backends.cpu.plan import SHORT, SPREAD_ROW
from cubn.backends.cpu.simd import LANES, Element, Value, get, instruction, moved, pointer, splat

CHANNELS, POSITIONS = OFFSET["channels"], OFFSET["positions"]
X_CHANNEL, Y_CHANNEL, G_CHANNEL, R_CHANNEL = (OFFSET[f"{name}_channel"] for name in "xygr")
Y_SAMPLE, PERIOD, ENTRIES = OFFSET["y_sample"], OFFSET["period"], OFFSET["entries"]
COEFFICIENTS, COEFFICIENT_ROW = OFFSET["coefficients"], OFFSET["coefficient_row"]


def channel_pass(element: Element, what: Pass, in_slab: bool = False) -> Any:
    """For kernels: one sample of `count` channels from c0 of a dense nchw array; in a slab, the one before it is
    next.

    Channels that lie side by side are one long row: where one ends amid a vector, the next begins there.
    """
    row, seam, some = row_pass(element, what, False, in_slab)
    size, acc, lanes, vector = element.size, element.acc_size, LANES, LANES * element.size
    by_element = elements(size, 1)
    has_relu_mask, reads_g, has_r = what.has_relu_mask, what.reads_g, what.reads_r or what.writes_r

    @jit
    def side_by_side(p):  # type: ignore[no-untyped-def]
        step = get(p + POSITIONS) * size
        if has_relu_mask or step < vector or get(p + X_CHANNEL) != step or get(p + Y_CHANNEL) != step:
            return False
        return (not reads_g or get(p + G_CHANNEL) == step) and (not has_r or get(p + R_CHANNEL) == step)

    @jit
    def of_channels(p, n, c0, count):  # type: ignore[no-untyped-def]
        steps, length, ahead = channel_steps(p), get(p + POSITIONS), -get(p + Y_SAMPLE)
        at = moved(sample(p, n), steps, c0)
        table = get(p + COEFFICIENTS) + c0 * acc, get(p + COEFFICIENT_ROW)
        if not side_by_side(p):
            for _ in range(count):
                row(length, at, table, streams(p), ahead)
                at, table = moved(at, steps, 1), moved(table, (acc, 0), 1)
            return
        stream, begun = streams(p), 0
        if stream:
            begun = (-at[0] & (vector - 1)) // size
            if begun:
                some(at, table, begun)
                at = moved(at, by_element, begun)
        for c in range(count):
            left = (length - begun) % lanes
            row(length - begun - left, at, table, stream, ahead)
            at, begun = moved(at, by_element, length - begun - left), 0
            if left and c + 1 < count:
                seam(at, table, left, stream, ahead)
                at, begun = moved(at, by_element, lanes), lanes - left
            elif left:
                some(at, table, left)
            table = moved(table, (acc, 0), 1)

    return of_channels


def position_pass(element: Element, what: Pass) -> Any:
    """For kernels: all channels of `count` positions from s0 of one sample of an nhwc array."""
    row = row_pass(element, what, True).row

    @jit
    def of_positions(p, n, s0, count):  # type: ignore[no-untyped-def]
        steps = position_steps(p)
        at = moved(sample(p, n), steps, s0)
        table, stream = (get(p + COEFFICIENTS), get(p + COEFFICIENT_ROW)), streams(p)
        for _ in range(count):
            row(get(p + CHANNELS), at, table, stream, 0)
            at = moved(at, steps, 1)

    return of_positions


def flat_pass(element: Element, what: Pass) -> Any:
    """For kernels: `count` elements from the given one on, of dense arrays whose rows are short: nhwc ones of few
    channels, nchw ones of few positions.

    The table has an entry for each element of a row, over and over, so that rows are long; see `spread_channels` and
    `repeat_entries`.
    """
    row = row_pass(element, what, True).row
    by_element = elements(element.size, 1)

    @jit
    def of_elements(p, first, count):  # type: ignore[no-untyped-def]
        table, stream = (get(p + COEFFICIENTS), get(p + COEFFICIENT_ROW)), streams(p)
        at = moved(sample(p, 0), by_element, first)
        while count > 0:
            length = min(count, get(p + PERIOD))
            row(length, at, table, stream, 0)
            at = moved(at, by_element, length)
            count -= length

    return of_elements


def spread_channels(element: Element) -> Any:
    """For kernels: repeat each of the C entries of the coefficient table's rows as often as there are positions."""
    acc, lanes, copy, repeat = element.acc_size, LANES, _copy(element), _repeat(element)

    @jit
    def spread(p):  # type: ignore[no-untyped-def]
        c_all, length = get(p + CHANNELS), get(p + POSITIONS)
        for k in range(6):
            table = get(p + COEFFICIENTS) + k * get(p + COEFFICIENT_ROW)
            aside = table + (get(p + PERIOD) + lanes) * acc
            for c in range(0, c_all, lanes):
                copy(aside + c * acc, table + c * acc)
            for c in range(c_all):
                for s in range(0, length, lanes):  # what reaches into the next channel is overwritten by it
                    repeat(table + (c * length + s) * acc, aside + c * acc)

    return spread


def repeat_entries(element: Element) -> Any:
    """For kernels: fill the rows of the coefficient table up to the period with what their first entries are."""
    acc, lanes, copy = element.acc_size, LANES, _copy(element)

    @jit
    def repeat(p):  # type: ignore[no-untyped-def]
        for k in range(6):
            table, filled = get(p + COEFFICIENTS) + k * get(p + COEFFICIENT_ROW), get(p + ENTRIES)
            while filled < get(p + PERIOD):
                for i in range(0, filled, lanes):  # what is copied beyond the filled part is written again
                    copy(table + (filled + i) * acc, table + i * acc)
                filled *= 2

    return repeat


def _copy(element: Element) -> Any:
    @instruction()
    def copy(to: Value, at: Value) -> None:
        element.store_acc(element.load_acc(at), to)

    return copy


def _repeat(element: Element) -> Any:
    """An instruction: the entry at an address, 16 times."""

    @instruction()
    def repeat(to: Value, at: Value) -> None:
        b = to.b
        element.store_acc(splat(Value(b, b.load(pointer(at, element.acc), typ=element.acc))), to)

    return repeat


def group_pass(element: Element, what: Pass) -> tuple[Any, Any]:
    """(spread, of_group): 16 channels of short rows in a slab that lie side by side, as one long row with a coefficient
    an element.

    `spread` makes the long row's coefficient table in scratch, once for all samples, and says whether that is worth it.
    """
    row = row_pass(element, what, True, in_slab=True).row
    size, acc, has_relu_mask = element.size, element.acc_size, what.has_relu_mask
    reads_g, writes_r, repeat = what.reads_g, what.writes_r, _repeat(element)

    @jit
    def spread(p, table, c0, count):  # type: ignore[no-untyped-def]
        length = get(p + POSITIONS)
        step = length * size
        if has_relu_mask or length > SHORT or get(p + X_CHANNEL) != step or get(p + Y_CHANNEL) != step:
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
        row(get(p + POSITIONS) * count, at, (table, SPREAD_ROW), streams(p), -get(p + Y_SAMPLE))

    return spread, of_group
