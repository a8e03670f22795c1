"""Reductions of arrays with short rows of positions (dense nchw, 2 to 255 of them): a lane becomes a channel."""

from __future__ import annotations

from typing import Any

from cubn.backends.cpu.arithmetic import Moments, Node, Term, behind_relu, centre
from cubn.backends.cpu.nodes import (
    AT_BUFFER,
    AT_COLUMNS,
    AT_COUNTS,
    AT_PIVOT,
    CHANNELS,
    COEFFICIENT_ROW,
    COEFFICIENTS,
    G_CHANNEL,
    RELU_MASK_CHANNEL,
    X_CHANNEL,
    Source,
    ask_for,
    at_most,
    bit_of,
    coefficients_at,
    counter,
    equal_merge,
    gathered,
    jit,
    neighbours,
    store_node,
    term_at,
    widened,
)
from cubn.backends.cpu.plan import NODE
from cubn.backends.cpu.simd import (
    I16,
    LANES,
    Value,
    Values,
    constant,
    first_lanes,
    get,
    instruction,
    moved,
    pointer,
    scalar_at,
    select,
    shifted,
    transposed,
)

FEW = 3  # positions that are cheaper gathered one by one than transposed


def of_rows(source: Source) -> Any:
    """tile(): lanes are 16 channels with short rows (2 to 255 positions, dense nchw), which neighbours-first merging
    brings together: 16 rows of 16 positions become 8 vectors of 16 pairs, 4 of quadruples, and in the end one.
    """
    element, what = source.element, source.what
    push, count_up, settle = counter(element, what)
    to_double = widened(element, what)
    moments, size, acc = what is Moments, element.size, element.acc_size
    block = LANES * size

    def rows(
        at: Values, steps: Values, last: Value, table: Values, ahead: Values, mask: Value | None = None
    ) -> list[Term]:
        """Terms of 16 channels, 16 positions each; channels past the last repeat it. Ask for what comes `ahead`."""
        found = []
        for i in range(LANES):
            ask_for(source, shifted(shifted(at, steps, i), ahead, 1))
            row = shifted(at, steps, at_most(i, last))
            found.append(term_at(source, row, (table[0] + acc * i, table[1]), mask, one_channel=True))
        return found

    def merged_rows(nodes: list[Node]) -> Node:
        """The node of 16 positions, a channel a lane."""
        count = 1
        while len(nodes) > 1:
            nodes = [equal_merge(what, *neighbours(a, b), count) for a, b in zip(nodes[::2], nodes[1::2], strict=True)]
            count *= 2
        return nodes[0]

    @instruction()
    def sixteen(to: Value, at: Values, steps: Values, last: Value, table: Values, ahead: Values) -> None:
        """The node of 16 positions."""
        terms = rows(at, steps, last, table, ahead)
        store_node(element, merged_rows([what.leaf([t]) for t in terms]), to)

    @instruction()
    def fewer(
        to: Value, positions: Value, at: Values, steps: Values, last: Value, table: Values, ahead: Values
    ) -> None:
        """Leaves of fewer than 16 positions, in 16 slots."""
        terms = rows(at, steps, last, table, ahead, first_lanes(positions))
        parts = [transposed(part) for part in zip(*terms, strict=True)]
        for i, term in enumerate(zip(*parts, strict=True)):
            store_node(element, what.leaf([term]), to + NODE * i)

    @instruction()
    def single(to: Value, bit: Value, at: Values, steps: Values, last: Value, table: Values) -> None:
        """The leaf of one position."""
        (px, pg, pb), (sx, sg, sb) = at, steps
        x = element.from_stored(gathered(px, sx, last, element.stored, element.size))
        if what is Moments:
            store_node(element, what.leaf([Moments.term(x, element.load_acc(table[0]))]), to)
            return
        c = coefficients_at(element, table)
        g = element.from_stored(gathered(pg, sg, last, element.stored, element.size))
        if source.relu == "recompute":
            g = behind_relu(element, g, x, c)
        elif source.relu == "mask":
            g = select(bit_of(gathered(pb, sb, last, I16, 2), bit), g, constant(g, 0.0))
        store_node(element, what.leaf([(g, g * centre(x, c))]), to)

    @instruction()
    def set_pivot(to: Value, px: Value, sx: Value, last: Value) -> None:
        for i in range(LANES):
            raw = scalar_at(px + sx * at_most(i, last), element.stored, element.size)
            place = to + element.acc_size * i
            place.b.store(element.from_stored(raw).v, pointer(place, element.acc))

    @jit
    def group(p, work, at, length, c0, node_out, following):  # type: ignore[no-untyped-def]
        """The float64 node of 16 channels."""
        steps = get(p + X_CHANNEL), get(p + G_CHANNEL), get(p + RELU_MASK_CHANNEL)
        last = min(get(p + CHANNELS) - c0, LANES) - 1
        table = get(p + COEFFICIENTS) + c0 * acc, get(p + COEFFICIENT_ROW)
        ahead = moved(following, at, -1)
        if moments:
            table = work + get(p + AT_PIVOT), 0
            set_pivot(table[0], at[0], steps[0], last)
        stack, counts, node = work + get(p + AT_COLUMNS), work + get(p + AT_COUNTS), work + get(p + AT_BUFFER)
        whole = length // LANES
        for k in range(whole):
            sixteen(node, at, steps, last, table, ahead)
            at = moved(at, (block, block, 2), 1)
            push(node, LANES, stack, counts, 1, 0, 4, k)
            count_up(LANES, counts, 4, k)
        rest = length - whole * LANES
        if rest <= FEW:
            for i in range(rest):
                single(node + i * NODE, i, moved(at, (size, size, 0), i), steps, last, table)
        else:
            fewer(node, rest, at, steps, last, table, ahead)
        for i in range(rest):
            push(node + i * NODE, 1, stack, counts, 1, 0, 0, whole * LANES + i)
            count_up(1, counts, 0, whole * LANES + i)
        base = settle(stack, counts, 1, length)
        to_double(node_out, stack + base * NODE, work + get(p + AT_PIVOT))

    @jit
    def tile(p, work, at, n, t, length, c0, width, nodes, following):  # type: ignore[no-untyped-def]
        steps = get(p + X_CHANNEL), get(p + G_CHANNEL), get(p + RELU_MASK_CHANNEL)
        for lane in range(width):
            beside = moved(at, steps, LANES)
            then = beside
            if lane + 1 == width:
                then = following
            group(p, work, at, length, c0 + lane * LANES, nodes + lane * NODE, then)
            at = beside
        return length

    return tile
