"""Reductions of arrays with channels side by side (nhwc, 2-D): a lane is a channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cubn.backends.cpu.arithmetic import Moments, Node
from cubn.backends.cpu.nodes import (
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
    counter,
    jit,
    pairwise,
    push_up,
    term_at,
    weighing,
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
    shifted,
)

FOUR, EIGHT, TWO_BY_TWO = ROWS, ROWS + 1, ROWS + 2
BLOCKS = (*((rows, 1) for rows in range(1, ROWS + 1)), (1, 4), (1, 8), (2, 2))
"""(rows, columns) that are taken at a time: one column, or some of one or two rows. More streams of memory than a
processor follows cost more than the pushes that they save: twice the time at 256@56², where four columns of eight rows
were taken.
"""


def of_channels(source: Source) -> Any:
    """tile(): lanes are neighbouring channels in memory (nhwc), `width` vectors of them at a time so that memory
    streams, a block after the other.
    """
    element, what = source.element, source.what
    _, _, settle = counter(element, what)
    weigh, merge, above = weighing(element, what)
    to_double = widened(element, what)

    def leaf(rows: int, at: Values, steps: Values, table: Values, mask: Value | None) -> Node:
        """Of rows one below the other."""
        places = [shifted(at, steps, COLUMNS * r) for r in range(rows)]
        return what.leaf([term_at(source, place, table, mask) for place in places])

    def push(k: int, index: Value, to: Values, shares: Value, nodes: Iterator[Node]) -> None:
        """The node of block k from those of its columns."""
        rows, _ = BLOCKS[k]
        push_up(element, [pairwise(what, nodes, rows)], to, index, merge, shares, above)

    def columns_of(k: int, at: Values, steps: Values, table: Values, mask: Value | None = None) -> Iterator[Node]:
        rows, columns = BLOCKS[k]
        return (leaf(rows, shifted(at, steps, j), steps, table, mask) for j in range(columns))

    every_block = range(len(BLOCKS))

    @instruction()
    def push_all(
        which: Value, index: Value, to: Values, shares: Value, at: Values, steps: Values, table: Values
    ) -> None:
        by_cases(which, every_block, lambda k: push(k, index, to, shares, columns_of(k, at, steps, table)))

    @instruction()
    def push_some(
        which: Value, lanes: Value, index: Value, to: Values, shares: Value, at: Values, steps: Values, table: Values
    ) -> None:
        """Of the first `lanes` channels."""
        mask = first_lanes(lanes)
        by_cases(which, every_block, lambda k: push(k, index, to, shares, columns_of(k, at, steps, table, mask)))

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
        stack, counts = work + get(p + AT_COLUMNS), work + get(p + AT_COUNTS)
        shares = counts + 256
        columns = min(length, COLUMNS)
        deepest = (length + COLUMNS - 1) // COLUMNS
        high = length - (deepest - 1) * COLUMNS  # columns with one row more
        j = 0
        while j < columns:
            rows, limit = (deepest, high) if j < high else (deepest - 1, columns)
            which, level = rows - 1, 0
            if rows == 1 and j & 7 == 0 and j + 8 <= limit:
                which, level = EIGHT, 3
            elif rows == 1 and j & 3 == 0 and j + 4 <= limit:
                which, level = FOUR, 2
            elif rows == 2 and j & 1 == 0 and j + 2 <= limit:
                which, level = TWO_BY_TWO, 1
            index = j >> level
            weigh(rows << level, counts, shares, level, index)
            place, entries = moved(at, steps, j), table
            to = stack + level * width * NODE, width * NODE
            for lane in range(width):
                lanes = channels - lane * LANES
                if lanes >= LANES:
                    push_all(which, index, to, shares, place, steps, entries)
                else:
                    push_some(which, lanes, index, to, shares, place, steps, entries)
                place, entries = moved(place, (vector, vector, 2), 1), moved(entries, (acc_vector, 0), 1)
                to = moved(to, (NODE, 0), 1)
            j += 1 << level
        base = settle(stack, counts, width, columns)
        for lane in range(width):
            to_double(
                nodes + lane * NODE, stack + (base * width + lane) * NODE, work + get(p + AT_PIVOT) + lane * acc_vector
            )
        return length

    return tile
