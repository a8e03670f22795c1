"""Terms, nodes and their merging: what all reductions share, whatever their lanes are.

Above the leaves there is one device, a *binary counter* of nodes. Node number i of a level is merged with the nodes
that wait on its left while i is odd, then waits itself; what waits at the end is merged from the right. That is the
contract's tree, neighbours first, an odd last node moving up alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir

from cubn.backends.cpu.arithmetic import Coefficients, Moments, Node, Reduction, Term, behind_relu, centre
from cubn.backends.cpu.language import Function
from cubn.backends.cpu.parameters import OFFSET
from cubn.backends.cpu.plan import NODE
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
    Values,
    constant,
    convert,
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
    widen,
)

ROWS, COLUMNS, TILE = 8, 256, 2048
HALF_NODE = NODE // 2
jit: Any = Function

CHANNELS, POSITIONS = OFFSET["channels"], OFFSET["positions"]
X_SAMPLE, X_CHANNEL, X_POSITION = OFFSET["x_sample"], OFFSET["x_channel"], OFFSET["x_position"]
G_SAMPLE, G_CHANNEL, G_POSITION = OFFSET["g_sample"], OFFSET["g_channel"], OFFSET["g_position"]
RELU_MASK_SAMPLE, RELU_MASK_CHANNEL, RELU_MASK_POSITION = (
    OFFSET["relu_mask_sample"],
    OFFSET["relu_mask_channel"],
    OFFSET["relu_mask_position"],
)
COEFFICIENTS, COEFFICIENT_ROW = OFFSET["coefficients"], OFFSET["coefficient_row"]
AT_PIVOT, AT_COUNTS, AT_COLUMNS, AT_BUFFER = (
    OFFSET["at_pivot"],
    OFFSET["at_counts"],
    OFFSET["at_columns"],
    OFFSET["at_buffer"],
)
AT_NODE, AT_TILES, AT_SAMPLES = OFFSET["at_node"], OFFSET["at_tiles"], OFFSET["at_samples"]
AT_SPREAD = OFFSET["at_spread"]
TABLES, TAIL = OFFSET["tables"], OFFSET["tail"]


class Source(NamedTuple):
    """How a reduction reads its terms: dtype, what is summed, and how dy passes its ReLU."""

    element: Element
    what: Reduction
    relu: str  # "none", "recompute" or "mask"


def coefficients_at(element: Element, table: Values, one_channel: bool = False) -> Coefficients:
    """Six vectors of a table (address, bytes from row to row), or one channel's coefficients in all lanes; those not
    used cost nothing.
    """
    address, row = table
    return Coefficients(*(acc_at(element, address + row * i, one_channel) for i in range(6)))


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


def term_at(source: Source, at: Values, table: Values, mask: Value | None = None, *, one_channel: bool = False) -> Term:
    """The term of 16 elements of x, dy and relu mask.

    The table holds the pivot (moments) or the coefficients (sums), a lane each or one channel's for all.
    """
    element = source.element
    at_x, at_g, at_mask = at
    x = element.load(at_x, mask)
    if source.what is Moments:
        return Moments.term(x, acc_at(element, table[0], one_channel))
    c = coefficients_at(element, table, one_channel)
    g = element.load(at_g, mask)
    if source.relu == "recompute":
        g = behind_relu(element, g, x, c)
    elif source.relu == "mask":
        g = select(load_bits(at_mask), g, constant(g, 0.0))
    return g, g * centre(x, c)


def ask_for(source: Source, at: Values) -> None:
    """Prefetch x, and dy where it is read."""
    for address in at[: 1 if source.what is Moments else 2]:
        prefetch(address)


def neighbours(a: Node, b: Node) -> tuple[Node, Node]:
    """The even and the odd lanes of two nodes' vectors, a's first."""
    return (shuffle(a[0], b[0], EVEN), shuffle(a[1], b[1], EVEN)), (shuffle(a[0], b[0], ODD), shuffle(a[1], b[1], ODD))


def store_node(element: Element, node: Node, slot: Value) -> None:
    element.store_acc(node[0], slot)
    element.store_acc(node[1], slot + HALF_NODE)


def load_node(element: Element, slot: Value, lanes: int = LANES) -> Node:
    return element.load_acc(slot, lanes), element.load_acc(slot + HALF_NODE, lanes)


def equal_merge(what: Reduction, a: Node, b: Node, count: int, halves: bool = False) -> Node:
    """Merge of two nodes of `count` values each; `halves` as in `Moments.equal_merge`."""
    if count == 1:
        return what.pair(a, b, halves)
    weight = constant(a[0], count * 0.5)
    if count & (count - 1) == 0:
        return what.equal_merge(a, b, weight, halves)
    return what.merge(a, b, constant(a[0], 0.5), weight)


def pairwise(what: Reduction, nodes: Iterable[Node], count: int, halves: bool = False) -> Node:
    """The tree over a power of two of nodes of `count` values each, merged as soon as they come so that few stay in
    registers.
    """
    waiting: list[Node] = []
    for index, node in enumerate(nodes):
        size = count
        while index & 1:
            node = equal_merge(what, waiting.pop(), node, size, halves)
            size, index = size * 2, index >> 1
        waiting.append(node)
    return waiting[0]


Join = Callable[[Node, Node, Value], Node]


def push_up(
    element: Element,
    parts: Sequence[Node],
    to: Values,
    index: Value,
    merge: Join,
    beside: Value,
    above: Callable[[Value], Value],
) -> None:
    """`push` (see `counter`) of a node of 16 lanes that is in registers, some lanes after the other.

    `to` is the slot of the node's level, and the bytes from a level to the next. merge(left, node, beside) merges with
    what waits there; above(beside) is what goes with the level above.
    """
    slot, step = to
    b, kind = slot.b, parts[0][0].type
    size = kind.count * element.acc_size
    before, test, join, end = b.block, *(b.append_basic_block(name) for name in ("test", "join", "end"))
    b.branch(test)
    b.position_at_end(test)
    first = *itertools.chain(*parts), slot, index, beside
    now = [Value(b, b.phi(value.type)) for value in first]
    *values, at, bits, with_it = now
    nodes = list(zip(values[::2], values[1::2], strict=True))
    b.cbranch(b.trunc(bits.v, I1), join, end)
    b.position_at_end(join)
    merged = [merge(load_node(element, at + size * i, kind.count), node, with_it) for i, node in enumerate(nodes)]
    then = *itertools.chain(*merged), at + step, Value(b, b.lshr(bits.v, I64(1))), above(with_it)
    b.branch(test)
    for phi, begin, later in zip(now, first, then, strict=True):
        phi.v.add_incoming(begin.v, before)
        phi.v.add_incoming(later.v, join)
    b.position_at_end(end)
    for i, node in enumerate(nodes):
        store_node(element, node, at + size * i)


def weighing(element: Element, what: Reduction) -> tuple[Any, Join, Callable[[Value], Value]]:
    """(weigh, merge, above): `weigh` is for kernels, the others for `push_up`.

    Before a node is pushed, `weigh` books its count as `count_up` does and puts the shares and weights of its merges
    into a table, once for all vectors. `beside` is that table.
    """
    moments, entry = what is Moments, 2 * element.acc_size

    @instruction()
    def share_out(to: Value, left: Value, count: Value) -> None:
        share = ratio(count, left + count, element.acc)
        for i, one in enumerate((share, convert(left, element.acc) * share)):
            one.b.store(one.v, pointer(to + element.acc_size * i, element.acc))

    @jit
    def weigh(count, counts, table, level, index):  # type: ignore[no-untyped-def]
        while index & 1:
            left = get(counts + 8 * level)
            if moments:
                share_out(table, left, count)
            count += left
            level += 1
            index >>= 1
            table += entry
        put(counts + 8 * level, count)

    def merge(left: Node, node: Node, table: Value) -> Node:
        share, weight = (acc_at(element, table + element.acc_size * i, one_channel=True) for i in range(2))
        return what.merge(left, node, share, weight)

    return weigh, merge, lambda table: table + entry


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
