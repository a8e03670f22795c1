"""Reductions of arrays with channels side by side (nhwc, 2-D): a lane is a channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cubn.backends.cpu.arithmetic import Moments, Node
from cubn.backends.cpu.nodes import (
    AT_BUFFER,
    AT_COLUMNS,
    AT_COUNTS,
    AT_PIVOT,
    CHANNELS,
    COEFFICIENT_ROW,
    COEFFICIENTS,
    COLUMNS,
    G_POSITION,
    RELU_MASK_POSITION,
    ROWS,
    X_POSITION,
    Source,
    ask_for,
    counter,
    jit,
    pairwise,
    store_node,
    term_at,
    widened,
)
from cubn.backends.cpu.plan import NODE
from cubn.backends.cpu.simd import (
    LANES,
    Value,
    Values,
    by_cases,
    first_lanes,
    get,
    instruction,
    moved,
    put,
    shifted,
)


def of_channels(source: Source) -> Any:
    """tile(): lanes are neighbouring channels in memory (nhwc), `width` vectors of them at a time so that memory
    streams.
    """
    element, what = source.element, source.what
    push, count_up, settle = counter(element, what)
    to_double = widened(element, what)

    def down(at: Values, steps: Values, rows: int) -> list[Values]:
        """One below the other."""
        return [shifted(at, steps, COLUMNS * r) for r in range(rows)]

    def leaf(rows: int, at: Values, steps: Values, table: Values, mask: Value | None = None) -> Node:
        return what.leaf([term_at(source, place, table, mask) for place in down(at, steps, rows)])

    def block(columns: int, rows: int, to: Value, at: Values, steps: Values, table: Values) -> None:
        """`columns` neighbouring columns of `rows` rows, merged in registers; the next ones are asked for meanwhile."""

        def leaves() -> Iterator[Node]:
            for k in range(columns):
                for place in down(shifted(at, steps, columns + k), steps, rows):
                    ask_for(source, place)
                yield leaf(rows, shifted(at, steps, k), steps, table)

        store_node(element, pairwise(what, leaves(), float(rows)), to)

    @instruction()
    def four(rows: Value, to: Value, at: Values, steps: Values, table: Values) -> None:
        by_cases(rows, range(1, ROWS + 1), lambda r: block(4, r, to, at, steps, table))

    @instruction()
    def sixteen(to: Value, at: Values, steps: Values, table: Values) -> None:
        block(16, 1, to, at, steps, table)

    @instruction()
    def one(rows: Value, lanes: Value, to: Value, at: Values, steps: Values, table: Values) -> None:
        """A single column, of the first `lanes` channels."""
        mask = first_lanes(lanes)
        by_cases(rows, range(1, ROWS + 1), lambda r: store_node(element, leaf(r, at, steps, table, mask), to))

    @instruction()
    def set_pivot(to: Value, px: Value, lanes: Value) -> None:
        element.store_acc(element.load(px, first_lanes(lanes)), to)

    size, moments = element.size, what is Moments
    acc = element.acc_size
    vector, acc_vector = LANES * size, LANES * acc

    @jit
    def tile(p, work, at, n, t, length, c0, width, nodes, following):  # type: ignore[no-untyped-def]
        """Float64 nodes of one tile of `length` positions, for `width` vectors from channel c0; its count."""
        channels = min(get(p + CHANNELS) - c0, width * LANES)
        steps = get(p + X_POSITION), get(p + G_POSITION), get(p + RELU_MASK_POSITION)
        table = get(p + COEFFICIENTS) + c0 * acc, get(p + COEFFICIENT_ROW)
        if moments:
            table = work + get(p + AT_PIVOT), 0
            for lane in range(width):
                set_pivot(table[0] + lane * acc_vector, at[0] + lane * vector, channels - lane * LANES)
        stack, counts, node = work + get(p + AT_COLUMNS), work + get(p + AT_COUNTS), work + get(p + AT_BUFFER)
        columns = min(length, COLUMNS)
        deepest = (length + COLUMNS - 1) // COLUMNS
        high = length - (deepest - 1) * COLUMNS  # columns with one row more
        j = 0
        while j < columns:
            rows, limit = (deepest, high) if j < high else (deepest - 1, columns)
            level = 0
            if deepest == 1 and j & 15 == 0 and j + 16 <= limit:
                level = 4
            elif j & 3 == 0 and j + 4 <= limit:
                level = 2
            for k in range(level):
                put(counts + 8 * k, rows << k)
            place, entries = moved(at, steps, j), table
            for lane in range(width):
                lanes = channels - lane * LANES
                if lanes >= LANES and level:
                    if level == 4:
                        sixteen(node, place, steps, entries)
                    else:
                        four(rows, node, place, steps, entries)
                    push(node, rows << level, stack, counts, width, lane, level, j >> level)
                else:
                    for k in range(1 << level):
                        one(rows, min(lanes, LANES), node, moved(place, steps, k), steps, entries)
                        push(node, rows, stack, counts, width, lane, 0, j + k)
                place, entries = moved(place, (vector, vector, 2), 1), moved(entries, (acc_vector, 0), 1)
            count_up(rows << level, counts, level, j >> level)
            j += 1 << level
        base = settle(stack, counts, width, columns)
        for lane in range(width):
            to_double(
                nodes + lane * NODE, stack + (base * width + lane) * NODE, work + get(p + AT_PIVOT) + lane * acc_vector
            )
        return length

    return tile
