"""Reductions of arrays with long rows of positions (dense nchw, 256 and more): a lane is a column of one channel."""

from __future__ import annotations

from typing import Any

from cubn.backends.cpu.arithmetic import Moments, Node
from cubn.backends.cpu.nodes import (
    AT_BUFFER,
    AT_COLUMNS,
    AT_PIVOT,
    COEFFICIENT_ROW,
    COEFFICIENTS,
    COLUMNS,
    G_CHANNEL,
    RELU_MASK_CHANNEL,
    ROWS,
    TABLES,
    TAIL,
    TILE,
    X_CHANNEL,
    Source,
    ask_for,
    jit,
    neighbours,
    store_node,
    term_at,
    widened,
)
from cubn.backends.cpu.plan import NODE
from cubn.backends.cpu.simd import (
    I32,
    LANES,
    Value,
    Values,
    by_cases,
    first_lanes,
    get,
    instruction,
    moved,
    pointer,
    select,
    shifted,
    splat,
)

COLUMN_BUFFER = (COLUMNS + 2 * LANES) * 8


def of_columns(source: Source) -> Any:
    """tile(): lanes are 16 neighbouring columns of one channel's long row (dense nchw)."""
    element, what = source.element, source.what
    to_double = widened(element, what)
    moments = what is Moments
    acc, size = element.acc_size, element.size
    second = COLUMN_BUFFER  # the buffer of means (sums of dy), then that of m2 (sums of dy * (x - mean))

    def below(at: Values, rows: int) -> Values:
        """The same columns, so many rows further down."""
        at_x, at_g, at_mask = at
        return at_x + COLUMNS * size * rows, at_g + COLUMNS * size * rows, at_mask + COLUMNS // 8 * rows

    def keep(node: Node, to: Value) -> None:
        element.store_acc(node[0], to)
        element.store_acc(node[1], to + second)

    @instruction()
    def leaf(rows: Value, to: Value, at: Values, table: Values, ahead: Values) -> None:
        """16 columns; ask for what comes `ahead`."""

        def body(r: int) -> None:
            for i in range(r):
                ask_for(source, below(shifted(at, ahead, 1), i))
            keep(what.leaf([term_at(source, below(at, i), table) for i in range(r)]), to)

        by_cases(rows, range(1, ROWS + 1), body)

    @instruction()
    def mixed(rows: Value, deeper: Value, to: Value, at: Values, table: Values) -> None:
        """As `leaf`, the first `deeper` columns having one row more; with no rows only those are columns at all."""
        mask = first_lanes(deeper)

        def body(r: int) -> None:
            common = [term_at(source, below(at, i), table) for i in range(r)]
            node = what.leaf([*common, term_at(source, below(at, r), table, mask)])
            if r:
                shallow = what.leaf(common)
                node = (select(mask, node[0], shallow[0]), select(mask, node[1], shallow[1]))
            keep(node, to)

        by_cases(rows, range(ROWS), body)

    @instruction()
    def merge_neighbours(to: Value, pair: Value, share: Value) -> None:
        """32 neighbouring columns become 16; their shares and weights are a table's row (sums: none)."""
        a = element.load_acc(pair), element.load_acc(pair + second)
        b = element.load_acc(pair + LANES * acc), element.load_acc(pair + LANES * acc + second)
        even, odd = neighbours(a, b)
        if moments:
            keep(what.merge(even, odd, element.load_acc(share), element.load_acc(share + LANES * acc)), to)
        else:
            keep(what.merge(even, odd, even[0], even[0]), to)

    @instruction()
    def fold(slot: Value, buffer: Value, shares: Value) -> None:
        """The tree over all 256 columns in registers, depth first; the node goes to all lanes of a slot."""
        firsts = [
            sum(8 >> k for k in range(level)) if level < 4 else 11 + level for level in range(8)
        ]  # table rows, 16 pairs each

        def merged(a: Node, b: Node, level: int, j: int) -> Node:
            even, odd = neighbours(a, b)
            at = shares + (firsts[level] + j) * 2 * LANES * acc
            share, weight = (
                (element.load_acc(at), element.load_acc(at + LANES * acc)) if moments else (even[0], even[0])
            )
            return what.merge(even, odd, share, weight)

        def node(level: int, j: int) -> Node:
            """Vector j of the nodes below `level`."""
            if level == 0:
                at = buffer + j * LANES * acc
                return element.load_acc(at), element.load_acc(at + second)
            return merged(node(level - 1, 2 * j), node(level - 1, 2 * j + 1), level - 1, j)

        found = node(4, 0)
        for level in range(4, 8):
            found = merged(found, found, level, 0)
        b = slot.b
        first, other = (splat(Value(b, b.extract_element(v.v, I32(0)))) for v in found)
        store_node(element, (first, other), slot)

    @instruction()
    def move(to: Value, at: Value) -> None:
        """One column's node."""
        b = to.b
        for offset in (0, second):
            b.store(b.load(pointer(at + offset, element.acc), typ=element.acc), pointer(to + offset, element.acc))

    @instruction()
    def spread(to: Value, at: Value) -> None:
        """One column's node in all lanes of a node slot."""
        b = to.b
        first, other = (splat(Value(b, b.load(pointer(at + o, element.acc), typ=element.acc))) for o in (0, second))
        store_node(element, (first, other), to)

    @instruction()
    def set_pivot(to: Value, px: Value) -> None:
        raw = Value(px.b, px.b.load(pointer(px, element.stored), typ=element.stored))
        element.store_acc(splat(element.from_stored(raw)), to)

    @instruction()
    def spread_coefficients(to: Value, at: Value, row: Value) -> None:
        """One channel's coefficients in all lanes, 16 lanes apart."""
        b = to.b
        for i in range(6):
            one = b.load(pointer(at + row * i, element.acc), typ=element.acc)
            element.store_acc(splat(Value(b, one)), to + LANES * acc * i)

    @jit
    def one_channel(p, work, at, length, c0, node, following):  # type: ignore[no-untyped-def]
        """The float64 node of one channel, in all lanes."""
        context = work + get(p + AT_PIVOT)
        table = context, LANES * acc
        ahead = moved(following, at, -1)
        if moments:
            set_pivot(context, at[0])
        else:
            spread_coefficients(context, get(p + COEFFICIENTS) + c0 * acc, get(p + COEFFICIENT_ROW))
        buffer = work + get(p + AT_BUFFER)
        count = min(length, COLUMNS)
        deepest = (length + COLUMNS - 1) // COLUMNS
        high = length - (deepest - 1) * COLUMNS
        for j in range(0, count, LANES):
            to = buffer + j * acc
            if j + LANES <= high:
                leaf(deepest, to, at, table, ahead)
            elif j < high:
                mixed(deepest - 1, high - j, to, at, table)
            else:
                leaf(deepest - 1, to, at, table, ahead)
            at = moved(at, (LANES * size, LANES * size, LANES // 8), 1)
        share = get(p + TABLES)
        if length < TILE:
            share = get(p + TAIL)
        slot = work + get(p + AT_COLUMNS)
        if count == COLUMNS:
            fold(slot, buffer, share)
            to_double(node, slot, context)
            return
        while count > 1:
            pairs = count >> 1
            last = buffer + (count - 1) * acc
            odd = count & 1
            if odd:
                move(buffer + (COLUMNS + LANES) * acc, last)
            for j in range(0, pairs, LANES):
                merge_neighbours(buffer + j * acc, buffer + 2 * j * acc, share)
                share += 2 * LANES * acc
            if odd:
                move(buffer + pairs * acc, buffer + (COLUMNS + LANES) * acc)
            count = pairs + odd
        spread(slot, buffer)
        to_double(node, slot, context)

    @jit
    def tile(p, work, at, n, t, length, c0, width, nodes, following):  # type: ignore[no-untyped-def]
        steps = get(p + X_CHANNEL), get(p + G_CHANNEL), get(p + RELU_MASK_CHANNEL)
        for c in range(width):
            beside = moved(at, steps, 1)
            then = beside
            if c + 1 == width:
                then = following
            one_channel(p, work, at, length, c0 + c, nodes + c * NODE, then)
            at = beside
        return length

    return tile
