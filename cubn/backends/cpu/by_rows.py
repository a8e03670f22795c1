"""Reductions of arrays with short rows of positions (dense nchw, 2 to 255 of them): a lane becomes a channel."""

from __future__ import annotations

from typing import Any

from cubn.backends.cpu.arithmetic import Moments, Node, Term, centre, gated
from cubn.backends.cpu.nodes import (
    AT_BUFFER,
    AT_COLUMNS,
    AT_COUNTS,
    AT_PIVOT,
    BITS_CHANNEL,
    CHANNELS,
    COEFFICIENT_ROW,
    COEFFICIENTS,
    G_CHANNEL,
    X_CHANNEL,
    Source,
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
    constant,
    first_lanes,
    get,
    instruction,
    pointer,
    prefetch,
    scalar_at,
    select,
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
        px: Value,
        pg: Value,
        pb: Value,
        sx: Value,
        sg: Value,
        sb: Value,
        last: Value,
        context: Value,
        stride: Value,
        ahead_x: Value,
        ahead_g: Value,
        mask: Value | None = None,
    ) -> list[Term]:
        """Terms of 16 channels, 16 positions each; channels past the last repeat it. Ask for what comes `ahead`."""
        found = []
        for i in range(LANES):
            prefetch(px + sx * i + ahead_x)
            if not moments:
                prefetch(pg + sg * i + ahead_g)
            row = at_most(i, last)
            at = (px + sx * row, pg + sg * row, pb + sb * row, context + acc * i)
            found.append(term_at(source, *at, stride, mask, one_channel=True))
        return found

    def merged_rows(nodes: list[Node]) -> Node:
        """The node of 16 positions, a channel a lane."""
        count = 1.0
        while len(nodes) > 1:
            nodes = [equal_merge(what, *neighbours(a, b), count) for a, b in zip(nodes[::2], nodes[1::2], strict=True)]
            count *= 2
        return nodes[0]

    @instruction()
    def sixteen(
        to: Value,
        px: Value,
        pg: Value,
        pb: Value,
        sx: Value,
        sg: Value,
        sb: Value,
        last: Value,
        context: Value,
        stride: Value,
        ahead_x: Value,
        ahead_g: Value,
    ) -> None:
        """The node of 16 positions."""
        terms = rows(px, pg, pb, sx, sg, sb, last, context, stride, ahead_x, ahead_g)
        store_node(element, merged_rows([what.leaf([t]) for t in terms]), to)

    @instruction()
    def fewer(
        to: Value,
        px: Value,
        pg: Value,
        pb: Value,
        sx: Value,
        sg: Value,
        sb: Value,
        last: Value,
        positions: Value,
        context: Value,
        stride: Value,
        ahead_x: Value,
        ahead_g: Value,
    ) -> None:
        """Leaves of fewer than 16 positions, in 16 slots."""
        mask = first_lanes(positions)
        terms = rows(px, pg, pb, sx, sg, sb, last, context, stride, ahead_x, ahead_g, mask)
        parts = [transposed(part) for part in zip(*terms, strict=True)]
        for i, term in enumerate(zip(*parts, strict=True)):
            store_node(element, what.leaf([term]), to + NODE * i)

    @instruction()
    def single(
        to: Value,
        px: Value,
        pg: Value,
        pb: Value,
        sx: Value,
        sg: Value,
        sb: Value,
        last: Value,
        bit: Value,
        context: Value,
        stride: Value,
    ) -> None:
        """The leaf of one position."""
        x = element.from_stored(gathered(px, sx, last, element.stored, element.size))
        if what is Moments:
            store_node(element, what.leaf([Moments.term(x, element.load_acc(context))]), to)
            return
        c = coefficients_at(element, context, stride)
        g = element.from_stored(gathered(pg, sg, last, element.stored, element.size))
        if source.gate == "recompute":
            g = gated(element, g, x, c)
        elif source.gate == "bits":
            g = select(bit_of(gathered(pb, sb, last, I16, 2), bit), g, constant(g, 0.0))
        store_node(element, what.leaf([(g, g * centre(x, c))]), to)

    @instruction()
    def set_pivot(to: Value, px: Value, sx: Value, last: Value) -> None:
        for i in range(LANES):
            raw = scalar_at(px + sx * at_most(i, last), element.stored, element.size)
            place = to + element.acc_size * i
            place.b.store(element.from_stored(raw).v, pointer(place, element.acc))

    @jit
    def group(p, work, px, pg, pb, length, c0, node_out, next_x, next_g):  # type: ignore[no-untyped-def]
        """The float64 node of 16 channels."""
        sx, sg, sb = get(p + X_CHANNEL), get(p + G_CHANNEL), get(p + BITS_CHANNEL)
        last = min(get(p + CHANNELS) - c0, LANES) - 1
        context, stride = get(p + COEFFICIENTS) + c0 * acc, get(p + COEFFICIENT_ROW)
        ahead_x, ahead_g = next_x - px, next_g - pg
        if moments:
            context, stride = work + get(p + AT_PIVOT), 0
            set_pivot(context, px, sx, last)
        stack, counts, node = work + get(p + AT_COLUMNS), work + get(p + AT_COUNTS), work + get(p + AT_BUFFER)
        whole = length // LANES
        for k in range(whole):
            ax, ag, ab = px + k * block, pg + k * block, pb + 2 * k
            sixteen(node, ax, ag, ab, sx, sg, sb, last, context, stride, ahead_x, ahead_g)
            push(node, LANES, stack, counts, 1, 0, 4, k)
            count_up(LANES, counts, 4, k)
        rest = length - whole * LANES
        if rest <= FEW:
            for i in range(rest):
                at = (whole * LANES + i) * size
                single(node + i * NODE, px + at, pg + at, pb + 2 * whole, sx, sg, sb, last, i, context, stride)
        else:
            ax, ag, ab = px + whole * block, pg + whole * block, pb + 2 * whole
            fewer(node, ax, ag, ab, sx, sg, sb, last, rest, context, stride, ahead_x, ahead_g)
        for i in range(rest):
            push(node + i * NODE, 1, stack, counts, 1, 0, 0, whole * LANES + i)
            count_up(1, counts, 0, whole * LANES + i)
        base = settle(stack, counts, 1, length)
        to_double(node_out, stack + base * NODE, work + get(p + AT_PIVOT))

    @jit
    def tile(p, work, px, pg, pb, n, t, length, c0, width, nodes, next_x, next_g):  # type: ignore[no-untyped-def]
        step_x, step_g, step_b = LANES * get(p + X_CHANNEL), LANES * get(p + G_CHANNEL), LANES * get(p + BITS_CHANNEL)
        for lane in range(width):
            ask_x, ask_g = px + step_x, pg + step_g
            if lane + 1 == width:
                ask_x, ask_g = next_x, next_g
            group(p, work, px, pg, pb, length, c0 + lane * LANES, nodes + lane * NODE, ask_x, ask_g)
            px += step_x
            pg += step_g
            pb += step_b
        return length

    return tile
