"""The canonical tree as kernels: nodes of moments or of backward sums, over any layout.

Lanes are either 16 neighbouring columns of one channel (`columns`, rows of a dense nchw array of 256 positions or
more) or
16 channels (everything else). Above the leaves all of them share one device: a *binary counter* of nodes. Node number i
of a level is merged with the nodes that wait on its left while i is odd, then waits itself; what waits at the end is
merged
from the right. That is the contract's tree, neighbours first, an odd last node moving up alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba import njit

from cubn.backends.cpu.arithmetic import Coefficients, Moments, Node, Reduction, Term, centre, gated
from cubn.backends.cpu.launch import OFFSET
from cubn.backends.cpu.simd import (
    DOUBLE,
    EVEN,
    I1,
    I16,
    I32,
    I64,
    LANES,
    ODD,
    Element,
    Value,
    by_cases,
    constant,
    convert,
    first_lanes,
    get,
    instruction,
    pointer,
    prefetch,
    put,
    ratio,
    scalar_at,
    select,
    shuffle,
    splat,
    transposed,
    widen,
)

ROWS, COLUMNS, TILE = 8, 256, 2048
NODE = 256  # bytes of a node slot: two vectors of 16 float64
HALF_NODE = NODE // 2
FEW = 3  # positions that are cheaper gathered one by one than transposed
# Helpers are only ever inlined into a kernel, so they need no entry points of their own.
jit = njit(error_model="numpy", nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)  # type: ignore[call-overload]

CHANNELS, POSITIONS = OFFSET["channels"], OFFSET["positions"]
X_SAMPLE, X_CHANNEL, X_POSITION = OFFSET["x_sample"], OFFSET["x_channel"], OFFSET["x_position"]
G_SAMPLE, G_CHANNEL, G_POSITION = OFFSET["g_sample"], OFFSET["g_channel"], OFFSET["g_position"]
BITS_SAMPLE, BITS_CHANNEL, BITS_POSITION = OFFSET["bits_sample"], OFFSET["bits_channel"], OFFSET["bits_position"]
COEFFICIENTS, COEFFICIENT_ROW = OFFSET["coefficients"], OFFSET["coefficient_row"]
AT_PIVOT, AT_COUNTS, AT_COLUMNS, AT_BUFFER = (
    OFFSET["at_pivot"],
    OFFSET["at_counts"],
    OFFSET["at_columns"],
    OFFSET["at_buffer"],
)
AT_NODE, AT_TILES, AT_SAMPLES = OFFSET["at_node"], OFFSET["at_tiles"], OFFSET["at_samples"]
TABLES, TAIL = OFFSET["tables"], OFFSET["tail"]
COLUMN_BUFFER = (COLUMNS + 2 * LANES) * 8


class Source(NamedTuple):
    """How a reduction reads its terms: dtype, what is summed, and how dy is gated."""

    element: Element
    what: Reduction
    gate: str  # "none", "recompute" or "bits"


def coefficients_at(element: Element, address: Value, stride: Value, one_channel: bool = False) -> Coefficients:
    """Six vectors, `stride` bytes apart, or one channel's coefficients in all lanes; those not used cost nothing."""
    return Coefficients(*(acc_at(element, address + stride * i, one_channel) for i in range(6)))


def acc_at(element: Element, address: Value, one_channel: bool) -> Value:
    if one_channel:
        return splat(scalar_at(address, element.acc, element.acc_size))
    return element.load_acc(address)


def load_bits(address: Value) -> Value:
    """16 bits as lanes."""
    b = address.b
    word = b.load(pointer(address, I16), typ=I16)
    word.align = 2
    return Value(b, b.bitcast(word, ir.VectorType(I1, LANES)))


def at_most(i: int, last: Value) -> Value:
    b = last.b
    return Value(b, b.select(b.icmp_signed("<", last.v, I64(i)), last.v, I64(i)))


def gathered(base: Value, step: Value, last: Value, kind: ir.Type, align: int) -> Value:
    """Elements `step` bytes apart as lanes; lanes past the last repeat it."""
    b = base.b
    vector = ir.Constant(ir.VectorType(kind, LANES), ir.Undefined)
    for i in range(LANES):
        one = b.load(pointer(base + step * at_most(i, last), kind), typ=kind)
        one.align = align
        vector = b.insert_element(vector, one, I32(i))
    return Value(b, vector)


def bit_of(words: Value, index: Value) -> Value:
    """Bit `index` of each lane's 16-bit word."""
    b = words.b
    bit = splat(Value(b, b.shl(I16(1), b.trunc(index.v, I16))))
    return Value(b, b.icmp_unsigned("!=", b.and_(words.v, bit.v), ir.Constant(words.type, [0] * LANES)))


def term_at(
    source: Source,
    px: Value,
    pg: Value,
    pb: Value,
    context: Value,
    stride: Value,
    mask: Value | None = None,
    *,
    one_channel: bool = False,
) -> Term:
    """The term of 16 elements: x at px, dy at pg, bits at pb; context holds the pivot (moments) or the coefficients
    (sums), a lane each or one channel's for all.
    """
    element = source.element
    x = element.load(px, mask)
    if source.what is Moments:
        return Moments.term(x, acc_at(element, context, one_channel))
    c = coefficients_at(element, context, stride, one_channel)
    g = element.load(pg, mask)
    if source.gate == "recompute":
        g = gated(element, g, x, c)
    elif source.gate == "bits":
        g = select(load_bits(pb), g, constant(g, 0.0))
    return g, g * centre(x, c)


def neighbours(a: Node, b: Node) -> tuple[Node, Node]:
    """The even and the odd lanes of two nodes' vectors, a's first."""
    return (shuffle(a[0], b[0], EVEN), shuffle(a[1], b[1], EVEN)), (shuffle(a[0], b[0], ODD), shuffle(a[1], b[1], ODD))


def store_node(element: Element, node: Node, slot: Value) -> None:
    element.store_acc(node[0], slot)
    element.store_acc(node[1], slot + HALF_NODE)


def load_node(element: Element, slot: Value) -> Node:
    return element.load_acc(slot), element.load_acc(slot + HALF_NODE)


def equal_merge(what: Reduction, a: Node, b: Node, count: float) -> Node:
    """Merge of two nodes of `count` values each."""
    if count == 1:
        return what.pair(a, b)
    return what.merge(a, b, constant(a[0], 0.5), constant(a[0], count * 0.5))


def pairwise(what: Reduction, nodes: Iterable[Node], count: float) -> Node:
    """The tree over a power of two of nodes of `count` values each, merged as soon as they come so that few stay in
    registers.
    """
    waiting: list[Node] = []
    for index, node in enumerate(nodes):
        size = count
        while index & 1:
            node = equal_merge(what, waiting.pop(), node, size)
            size, index = size * 2, index >> 1
        waiting.append(node)
    return waiting[0]


def counter(element: Element, what: Reduction) -> tuple[Any, Any, Any]:
    """(push, count_up, settle): the binary counter over node slots of one precision.

    slot(level, lane) = stack + (level * width + lane) * NODE, width the vectors side by side. `push` does one vector;
    `count_up` then books the counts, which all vectors share; `settle` merges what waits and returns where it is.
    """

    @instruction()
    def merge(to: Value, a: Value, b: Value, count_a: Value, count_b: Value) -> None:
        share = ratio(count_b, count_a + count_b, element.acc)
        weight = convert(count_a, element.acc) * share
        merged = what.merge(load_node(element, a), load_node(element, b), splat(share), splat(weight))
        store_node(element, merged, to)

    @instruction()
    def copy(to: Value, slot: Value) -> None:
        store_node(element, load_node(element, slot), to)

    @jit
    def join(to, a, b, count_a, count_b):  # type: ignore[no-untyped-def]
        """Merge where a node of count 0 is the identity."""
        if count_b == 0:
            if to != a:
                copy(to, a)
        elif count_a == 0:
            if to != b:
                copy(to, b)
        else:
            merge(to, a, b, count_a, count_b)

    @jit
    def push(node, count, stack, counts, width, lane, level, index):  # type: ignore[no-untyped-def]
        slot = stack + (level * width + lane) * NODE
        while index & 1:
            left = get(counts + 8 * level)
            join(node, slot, node, left, count)
            count += left
            level += 1
            index >>= 1
            slot += width * NODE
        if slot != node:
            copy(slot, node)

    @jit
    def count_up(count, counts, level, index):  # type: ignore[no-untyped-def]
        while index & 1:
            count += get(counts + 8 * level)
            level += 1
            index >>= 1
        put(counts + 8 * level, count)

    @jit
    def settle(stack, counts, width, pushed):  # type: ignore[no-untyped-def]
        """The level whose slots and count hold the tree over `pushed` nodes."""
        level = 0
        while not (pushed >> level) & 1:
            level += 1
        base = level
        count = get(counts + 8 * base)
        level += 1
        while pushed >> level:
            if (pushed >> level) & 1:
                left = get(counts + 8 * level)
                for lane in range(width):
                    to = stack + (level * width + lane) * NODE
                    join(to, to, stack + (base * width + lane) * NODE, left, count)
                count += left
                put(counts + 8 * level, count)
                base = level
            level += 1
        return base

    return push, count_up, settle


def widened(element: Element, what: Reduction) -> Any:
    """An instruction: an acc node at a slot becomes a float64 node, the moments' mean counted from the pivot."""

    @instruction()
    def to_double(to: Value, slot: Value, pivot: Value) -> None:
        first, second = (widen(v, DOUBLE) for v in load_node(element, slot))
        if what is Moments:
            first = widen(element.load_acc(pivot), DOUBLE) + first
        store_node(Element("float64"), (first, second), to)

    return to_double


def of_channels(source: Source) -> Any:
    """tile(): lanes are neighbouring channels in memory (nhwc), `width` vectors of them at a time so that memory
    streams.
    """
    element, what = source.element, source.what
    push, count_up, settle = counter(element, what)
    to_double = widened(element, what)

    def leaf(
        rows: int,
        px: Value,
        pg: Value,
        pb: Value,
        steps: tuple[Value, Value, Value],
        context: Value,
        stride: Value,
        mask: Value | None = None,
    ) -> Node:
        terms = []
        for r in range(rows):
            terms.append(
                term_at(source, px + steps[0] * r, pg + steps[1] * r, pb + steps[2] * r, context, stride, mask)
            )
        return what.leaf(terms)

    def block(
        columns: int,
        rows: int,
        to: Value,
        px: Value,
        pg: Value,
        pb: Value,
        sx: Value,
        sg: Value,
        sb: Value,
        context: Value,
        stride: Value,
    ) -> None:
        """`columns` neighbouring columns of `rows` rows, merged in registers; the next ones are asked for meanwhile."""
        down = (sx * COLUMNS, sg * COLUMNS, sb * COLUMNS)

        def leaves() -> Iterator[Node]:
            for k in range(columns):
                for r in range(rows):
                    prefetch(px + down[0] * r + sx * (columns + k))
                    if what is not Moments:
                        prefetch(pg + down[1] * r + sg * (columns + k))
                yield leaf(rows, px + sx * k, pg + sg * k, pb + sb * k, down, context, stride)

        store_node(element, pairwise(what, leaves(), float(rows)), to)

    @instruction()
    def four(
        rows: Value,
        to: Value,
        px: Value,
        pg: Value,
        pb: Value,
        sx: Value,
        sg: Value,
        sb: Value,
        context: Value,
        stride: Value,
    ) -> None:
        by_cases(rows, range(1, ROWS + 1), lambda r: block(4, r, to, px, pg, pb, sx, sg, sb, context, stride))

    @instruction()
    def sixteen(
        to: Value, px: Value, pg: Value, pb: Value, sx: Value, sg: Value, sb: Value, context: Value, stride: Value
    ) -> None:
        block(16, 1, to, px, pg, pb, sx, sg, sb, context, stride)

    @instruction()
    def one(
        rows: Value,
        lanes: Value,
        to: Value,
        px: Value,
        pg: Value,
        pb: Value,
        sx: Value,
        sg: Value,
        sb: Value,
        context: Value,
        stride: Value,
    ) -> None:
        """A single column, of the first `lanes` channels."""
        mask = first_lanes(lanes)
        down = (sx * COLUMNS, sg * COLUMNS, sb * COLUMNS)
        by_cases(
            rows,
            range(1, ROWS + 1),
            lambda r: store_node(element, leaf(r, px, pg, pb, down, context, stride, mask), to),
        )

    @instruction()
    def set_pivot(to: Value, px: Value, lanes: Value) -> None:
        element.store_acc(element.load(px, first_lanes(lanes)), to)

    size, moments = element.size, what is Moments
    acc = element.acc_size
    vector, acc_vector = LANES * size, LANES * acc

    @jit
    def tile(p, work, px, pg, pb, n, t, length, c0, width, nodes, next_x, next_g):  # type: ignore[no-untyped-def]
        """Float64 nodes of one tile of `length` positions at (px, pg, pb), for `width` vectors from channel c0; its
        count.
        """
        channels = min(get(p + CHANNELS) - c0, width * LANES)
        sx, sg, sb = get(p + X_POSITION), get(p + G_POSITION), get(p + BITS_POSITION)
        context, stride = get(p + COEFFICIENTS) + c0 * acc, get(p + COEFFICIENT_ROW)
        step_context = acc_vector
        if moments:
            context, stride = work + get(p + AT_PIVOT), 0
            for lane in range(width):
                set_pivot(context + lane * acc_vector, px + lane * vector, channels - lane * LANES)
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
            ax, ag, ab = px + j * sx, pg + j * sg, pb + j * sb
            at = context
            for lane in range(width):
                lanes = channels - lane * LANES
                if lanes >= LANES and level:
                    if level == 4:
                        sixteen(node, ax, ag, ab, sx, sg, sb, at, stride)
                    else:
                        four(rows, node, ax, ag, ab, sx, sg, sb, at, stride)
                    push(node, rows << level, stack, counts, width, lane, level, j >> level)
                else:
                    for k in range(1 << level):
                        one(
                            rows, min(lanes, LANES), node, ax + k * sx, ag + k * sg, ab + k * sb, sx, sg, sb, at, stride
                        )
                        push(node, rows, stack, counts, width, lane, 0, j + k)
                ax += vector
                ag += vector
                ab += 2
                at += step_context
            count_up(rows << level, counts, level, j >> level)
            j += 1 << level
        base = settle(stack, counts, width, columns)
        for lane in range(width):
            to_double(
                nodes + lane * NODE, stack + (base * width + lane) * NODE, work + get(p + AT_PIVOT) + lane * acc_vector
            )
        return length

    return tile


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


def of_columns(source: Source) -> Any:
    """tile(): lanes are 16 neighbouring columns of one channel's long row (dense nchw)."""
    element, what = source.element, source.what
    to_double = widened(element, what)
    moments = what is Moments
    acc, size = element.acc_size, element.size
    second = COLUMN_BUFFER  # the buffer of means (sums of dy), then that of m2 (sums of dy * (x - mean))

    def down(rows: int, px: Value, pg: Value, pb: Value, context: Value, stride: Value) -> list[Term]:
        step = COLUMNS * size
        return [
            term_at(source, px + step * r, pg + step * r, pb + COLUMNS // 8 * r, context, stride) for r in range(rows)
        ]

    def keep(node: Node, to: Value) -> None:
        element.store_acc(node[0], to)
        element.store_acc(node[1], to + second)

    @instruction()
    def leaf(
        rows: Value,
        to: Value,
        px: Value,
        pg: Value,
        pb: Value,
        context: Value,
        stride: Value,
        ahead_x: Value,
        ahead_g: Value,
    ) -> None:
        """16 columns; ask for what comes `ahead`."""

        def body(r: int) -> None:
            for i in range(r):
                prefetch(px + ahead_x + COLUMNS * size * i)
                if not moments:
                    prefetch(pg + ahead_g + COLUMNS * size * i)
            keep(what.leaf(down(r, px, pg, pb, context, stride)), to)

        by_cases(rows, range(1, ROWS + 1), body)

    @instruction()
    def mixed(
        rows: Value, deeper: Value, to: Value, px: Value, pg: Value, pb: Value, context: Value, stride: Value
    ) -> None:
        """As `leaf`, the first `deeper` columns having one row more; with no rows only those are columns at all."""
        mask = first_lanes(deeper)

        def body(r: int) -> None:
            common = down(r, px, pg, pb, context, stride)
            at = (px + COLUMNS * size * r, pg + COLUMNS * size * r, pb + COLUMNS // 8 * r)
            node = what.leaf([*common, term_at(source, *at, context, stride, mask)])
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
    def one_channel(p, work, px, pg, pb, length, c0, node, next_x, next_g):  # type: ignore[no-untyped-def]
        """The float64 node of one channel, in all lanes."""
        context, stride = work + get(p + AT_PIVOT), 0
        ahead_x, ahead_g = next_x - px, next_g - pg
        if moments:
            set_pivot(context, px)
        else:
            stride = LANES * acc
            spread_coefficients(context, get(p + COEFFICIENTS) + c0 * acc, get(p + COEFFICIENT_ROW))
        buffer = work + get(p + AT_BUFFER)
        count = min(length, COLUMNS)
        deepest = (length + COLUMNS - 1) // COLUMNS
        high = length - (deepest - 1) * COLUMNS
        for j in range(0, count, LANES):
            ax, ag, ab, to = px + j * size, pg + j * size, pb + j // 8, buffer + j * acc
            if j + LANES <= high:
                leaf(deepest, to, ax, ag, ab, context, stride, ahead_x, ahead_g)
            elif j < high:
                mixed(deepest - 1, high - j, to, ax, ag, ab, context, stride)
            else:
                leaf(deepest - 1, to, ax, ag, ab, context, stride, ahead_x, ahead_g)
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
    def tile(p, work, px, pg, pb, n, t, length, c0, width, nodes, next_x, next_g):  # type: ignore[no-untyped-def]
        step_x, step_g, step_b = get(p + X_CHANNEL), get(p + G_CHANNEL), get(p + BITS_CHANNEL)
        for c in range(width):
            ask_x, ask_g = px + step_x, pg + step_g
            if c + 1 == width:
                ask_x, ask_g = next_x, next_g
            one_channel(p, work, px, pg, pb, length, c0 + c, nodes + c * NODE, ask_x, ask_g)
            px += step_x
            pg += step_g
            pb += step_b
        return length

    return tile


def of_single_positions(source: Source) -> Any:
    """samples(): one position a sample (2-D input), lanes are channels; every merge is in float64, 16 samples in
    registers.
    """
    element, what = source.element, source.what
    push, count_up, _ = counter(Element("float64"), what)

    cannot_overflow = element.acc != DOUBLE

    def node_at(
        px: Value, pg: Value, pb: Value, context: Value, stride: Value, mask: Value | None = None, trusted: bool = False
    ) -> Node:
        """The node of one value. Its mean is pivot + (x - pivot), NaN where x is not finite; `trusted` leaves that."""
        if what is Moments:
            x = element.load(px, mask)
            wide = widen(x, DOUBLE)
            return wide if trusted else wide + widen(x - x, DOUBLE), constant(wide, 0.0)
        g, t = term_at(source, px, pg, pb, context, stride, mask)
        return widen(g, DOUBLE), widen(t, DOUBLE)

    def doubted(node: Node) -> Node:
        """NaNs where a value was not finite: m2 is not finite then, and is otherwise where float64 cannot overflow."""
        mean, m2 = node
        return mean + (m2 - m2), m2 + (m2 - m2)

    @instruction()
    def sixteen(
        to: Value, px: Value, pg: Value, pb: Value, sx: Value, sg: Value, sb: Value, context: Value, stride: Value
    ) -> None:
        def nodes() -> Iterator[Node]:
            for i in range(LANES):
                prefetch(px + sx * (LANES + i))
                if what is not Moments:
                    prefetch(pg + sg * (LANES + i))
                yield node_at(px + sx * i, pg + sg * i, pb + sb * i, context, stride, trusted=cannot_overflow)

        node = pairwise(what, nodes(), 1.0)
        if what is Moments and cannot_overflow:
            node = doubted(node)
        store_node(Element("float64"), node, to)

    @instruction()
    def one(to: Value, lanes: Value, px: Value, pg: Value, pb: Value, context: Value, stride: Value) -> None:
        store_node(Element("float64"), node_at(px, pg, pb, context, stride, first_lanes(lanes)), to)

    acc = element.acc_size
    vector, acc_vector = LANES * element.size, LANES * acc

    @jit
    def samples(p, work, px, pg, pb, first, last, c0, width):  # type: ignore[no-untyped-def]
        """Push samples [first, last) of `width` vectors from channel c0 onto the counter of samples."""
        channels = min(get(p + CHANNELS) - c0, width * LANES)
        sx, sg, sb = get(p + X_SAMPLE), get(p + G_SAMPLE), get(p + BITS_SAMPLE)
        context, stride = get(p + COEFFICIENTS) + c0 * acc, get(p + COEFFICIENT_ROW)
        stack, counts, node = work + get(p + AT_SAMPLES), work + get(p + AT_COUNTS) + 1024, work + get(p + AT_NODE)
        n, stop = 0, last - first
        while n < stop:
            level = 4 if n + LANES <= stop else 0
            for k in range(level):
                put(counts + 8 * k, 1 << k)
            ax, ag, ab = px + (first + n) * sx, pg + (first + n) * sg, pb + (first + n) * sb
            at = context
            for lane in range(width):
                lanes = channels - lane * LANES
                if lanes >= LANES and level:
                    sixteen(node, ax, ag, ab, sx, sg, sb, at, stride)
                    push(node, LANES, stack, counts, width, lane, 4, n >> 4)
                else:
                    for k in range(1 << level):
                        one(node, min(lanes, LANES), ax + k * sx, ag + k * sg, ab + k * sb, at, stride)
                        push(node, 1, stack, counts, width, lane, 0, n + k)
                ax += vector
                ag += vector
                ab += 2
                at += acc_vector
            count_up(1 << level, counts, level, n >> level)
            n += 1 << level

    return samples


def channels_of_a_slot(kind: str) -> int:
    """How many channels one node slot holds."""
    return 1 if kind == "columns" else LANES


def gather(source: Source, kind: str) -> Any:
    """A numba function: the nodes of `width` slots of channels from c0 over samples [first, last) and tiles [from,
    to) of each.

    It returns the address of `width` float64 node slots and leaves their count at `work + AT_COUNTS + 2048`. `first`
    and
    `from` are aligned to the tree (see rows in plan.py), so that the counters start at 0.
    """
    push, count_up, settle = counter(Element("float64"), source.what)

    if kind == "single":
        samples = of_single_positions(source)

        @jit
        def collect_single(p, work, px, pg, pb, first, last, tile_from, tile_to, c0, width):  # type: ignore[no-untyped-def]
            samples(p, work, px, pg, pb, first, last, c0, width)
            stack, counts = work + get(p + AT_SAMPLES), work + get(p + AT_COUNTS) + 1024
            level = settle(stack, counts, width, last - first)
            put(work + get(p + AT_COUNTS) + 2048, get(counts + 8 * level))
            return stack + level * width * NODE

        return collect_single

    if kind == "strided":
        from cubn.backends.cpu.strided import of_any

        tile = of_any(source)
    else:
        tile = {"channels": of_channels, "rows": of_rows, "columns": of_columns}[kind](source)

    rowwise, anyhow = kind in ("rows", "columns"), kind == "strided"  # strided arrays find positions by their tables

    @jit
    def collect(p, work, px, pg, pb, first, last, tile_from, tile_to, c0, width):  # type: ignore[no-untyped-def]
        positions = get(p + POSITIONS)
        tiles, samples, node = work + get(p + AT_TILES), work + get(p + AT_SAMPLES), work + get(p + AT_NODE)
        tile_counts, sample_counts = work + get(p + AT_COUNTS) + 512, work + get(p + AT_COUNTS) + 1024
        step_x, step_g, step_b = TILE * get(p + X_POSITION), TILE * get(p + G_POSITION), TILE * get(p + BITS_POSITION)
        if rowwise:
            step_b = TILE // 8
        if anyhow:
            step_x = step_g = step_b = 0
        whole = tile_to - tile_from == 1
        for n in range(first, last):
            ax = px + n * get(p + X_SAMPLE)
            ag = pg + n * get(p + G_SAMPLE)
            ab = pb + n * get(p + BITS_SAMPLE)
            for t in range(tile_from, tile_to):
                next_x, next_g = ax + (t + 1) * step_x, ag + (t + 1) * step_g
                if t + 1 == tile_to:
                    next_x, next_g = (
                        ax + get(p + X_SAMPLE) + tile_from * step_x,
                        ag + get(p + G_SAMPLE) + tile_from * step_g,
                    )
                length = min(positions - t * TILE, TILE)
                at_x, at_g, at_b = ax + t * step_x, ag + t * step_g, ab + t * step_b
                count = tile(p, work, at_x, at_g, at_b, n, t, length, c0, width, node, next_x, next_g)
                stack, counts, index = tiles, tile_counts, t - tile_from
                if whole:  # a sample of one tile is that tile
                    stack, counts, index = samples, sample_counts, n - first
                for lane in range(width):
                    push(node + lane * NODE, count, stack, counts, width, lane, 0, index)
                count_up(count, counts, 0, index)
            if not whole:
                level = settle(tiles, tile_counts, width, tile_to - tile_from)
                count = get(tile_counts + 8 * level)
                for lane in range(width):
                    push(
                        tiles + (level * width + lane) * NODE, count, samples, sample_counts, width, lane, 0, n - first
                    )
                count_up(count, sample_counts, 0, n - first)
        level = settle(samples, sample_counts, width, last - first)
        put(work + get(p + AT_COUNTS) + 2048, get(sample_counts + 8 * level))
        return samples + level * width * NODE

    return collect
