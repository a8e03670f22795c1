"""Operands of any strides, and masks: 16 channels at a time are gathered into lanes, position by position.

Bits as on the fast paths: present values of a column are packed into consecutive rows, and the same leaf is taken of
them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from cubn.backends.cpu.arithmetic import Moments, behind_relu
from cubn.backends.cpu.elementwise import (
    Pass,
    channel_steps,
    sample,
    store_bits,
    vector_of,
)
from cubn.backends.cpu.nodes import (
    AT_BUFFER,
    AT_COLUMNS,
    AT_COUNTS,
    AT_PIVOT,
    COLUMNS,
    ROWS,
    TILE,
    Source,
    bit_of,
    coefficients_at,
    counter,
    gathered,
    jit,
    load_bits,
    store_node,
    term_at,
    widened,
)
from cubn.backends.cpu.parameters import OFFSET
from cubn.backends.cpu.plan import NODE
from cubn.backends.cpu.simd import (
    I8,
    I16,
    I64,
    LANES,
    Element,
    Value,
    Values,
    by_cases,
    constant,
    first_lanes,
    get,
    instruction,
    load_raw,
    moved,
    pointer,
    select,
    store_raw,
)

CHANNELS, POSITIONS = OFFSET["channels"], OFFSET["positions"]
X_CHANNEL, G_CHANNEL = OFFSET["x_channel"], OFFSET["g_channel"]
X_OFFSETS, Y_OFFSETS, G_OFFSETS, R_OFFSETS = (OFFSET[f"{k}_offsets"] for k in "xygr")
MASK, MASK_SAMPLE, MASK_OFFSETS = OFFSET["mask"], OFFSET["mask_sample"], OFFSET["mask_offsets"]
RELU_MASK_CHANNEL, RELU_MASK_POSITION = OFFSET["relu_mask_channel"], OFFSET["relu_mask_position"]
COEFFICIENTS, COEFFICIENT_ROW = OFFSET["coefficients"], OFFSET["coefficient_row"]


@instruction(I64)
def get_byte(address: Value) -> Value:
    """The byte at an address."""
    b = address.b
    return Value(b, b.zext(b.load(pointer(address, I8), typ=I8), I64))


@jit
def present(p, n, position):  # type: ignore[no-untyped-def]
    """Whether the mask, if there is one, keeps a position."""
    mask = get(p + MASK)
    return mask == 0 or get_byte(mask + n * get(p + MASK_SAMPLE) + get(get(p + MASK_OFFSETS) + 8 * position)) != 0


def load_lanes(element: Element, base: Value, step: Value, last: Value) -> Value:
    """16 channels in acc; neighbours in memory in one load."""
    b = base.b
    dense = b.icmp_signed("==", step.v, I64(element.size))
    with b.if_else(dense) as (then, otherwise):
        with then:
            together = load_raw(base, element.stored, element.size, first_lanes(last + 1))
            then_block = b.block
        with otherwise:
            apart = gathered(base, step, last, element.stored, element.size)
            otherwise_block = b.block
    phi = b.phi(together.type)
    phi.add_incoming(together.v, then_block)
    phi.add_incoming(apart.v, otherwise_block)
    return element.from_stored(Value(b, phi))


def store_lanes(element: Element, value: Value, base: Value, step: Value, last: Value) -> None:
    b = base.b
    stored = element.to_stored(value)
    dense = b.icmp_signed("==", step.v, I64(element.size))
    with b.if_else(dense) as (then, otherwise):
        with then:
            store_raw(stored, base, element.size, first_lanes(last + 1))
        with otherwise:
            scatter(stored, base, step, last, element.size)


def scatter(lanes: Value, base: Value, step: Value, last: Value, align: int) -> None:
    b = base.b
    for i in range(LANES):
        with b.if_then(b.icmp_signed(">=", last.v, I64(i))):
            one = b.extract_element(lanes.v, ir.IntType(32)(i))
            b.store(one, pointer(base + step * i, one.type)).align = align


def bits_at(pb: Value, step: Value, last: Value, position: Value) -> Value:
    """The relu mask of 16 channels at one position: a word of theirs, or (step > 0) a bit in the word of each one's
    row.
    """
    b = pb.b
    by_row = b.icmp_signed(">", step.v, I64(0))
    with b.if_else(by_row) as (then, otherwise):
        with then:
            word = Value(b, b.shl(b.lshr(position.v, I64(4)), I64(1)))
            rows = bit_of(gathered(pb + word, step, last, I16, 2), Value(b, b.and_(position.v, I64(15))))
            then_block = b.block
        with otherwise:
            together = load_bits(pb)
            otherwise_block = b.block
    phi = b.phi(rows.type)
    phi.add_incoming(rows.v, then_block)
    phi.add_incoming(together.v, otherwise_block)
    return Value(b, phi)


def keep_bits_at(passes: Value, pb: Value, step: Value, last: Value, position: Value) -> None:
    """The opposite of `bits_at`; positions of a row come in order."""
    b = pb.b
    by_row = b.icmp_signed(">", step.v, I64(0))
    with b.if_else(by_row) as (then, otherwise):
        with then:
            at = pb + Value(b, b.shl(b.lshr(position.v, I64(4)), I64(1)))
            index = b.trunc(b.and_(position.v, I64(15)), I16)
            before = gathered(at, step, last, I16, 2)
            vector = before.type
            kept = b.select(b.icmp_signed("==", index, I16(0)), ir.Constant(vector, [0] * LANES), before.v)
            bit = b.shl(b.zext(passes.v, vector), _spread(b, index, vector))
            scatter(Value(b, b.or_(kept, bit)), at, step, last, 2)
        with otherwise:
            store_bits(passes, pb)


def _spread(b: ir.IRBuilder, value: ir.Value, vector: ir.VectorType) -> ir.Value:
    one = b.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
    return b.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def of_any(source: Source) -> Any:
    """tile(): see nhwc.py. Present values of a column are staged in acc, then reduced like any other leaf."""
    element, what = source.element, source.what
    staged = Source(Element("float64" if element.acc_size == 8 else "float32"), what, "none")
    push, count_up, settle = counter(element, what)
    to_double = widened(element, what)
    acc_vector = LANES * element.acc_size

    @instruction()
    def stage_x(to: Value, px: Value, step: Value, last: Value) -> None:
        element.store_acc(load_lanes(element, px, step, last), to)

    @instruction()
    def stage_dy(to: Value, x: Value, at: Values, steps: Values, last: Value, position: Value, table: Values) -> None:
        """dy behind its ReLU, from where dy and relu mask are."""
        (pg, pb), (sg, sb) = at, steps
        g = load_lanes(element, pg, sg, last)
        if source.relu == "recompute":
            g = behind_relu(element, g, element.load_acc(x), coefficients_at(element, table))
        elif source.relu == "mask":
            g = select(bits_at(pb, sb, last, position), g, constant(g, 0.0))
        element.store_acc(g, to)

    @instruction()
    def leaf(count: Value, to: Value, xs: Value, gs: Value, table: Values) -> None:
        def body(rows: int) -> None:
            terms = [term_at(staged, (xs + acc_vector * r, gs + acc_vector * r, xs), table) for r in range(rows)]
            store_node(element, what.leaf(terms), to)

        by_cases(count, range(1, ROWS + 1), body)

    moments, acc = what is Moments, element.acc_size

    @jit
    def tile(p, work, at, n, t, length, c0, width, nodes, following):  # type: ignore[no-untyped-def]
        last = min(get(p + CHANNELS) - c0, LANES) - 1
        (px, pg, pb), x_step, steps = at, get(p + X_CHANNEL), (get(p + G_CHANNEL), get(p + RELU_MASK_CHANNEL))
        x_offsets, g_offsets = get(p + X_OFFSETS), get(p + G_OFFSETS)
        coefficients = get(p + COEFFICIENTS) + c0 * acc, get(p + COEFFICIENT_ROW)
        table = coefficients
        pivot = work + get(p + AT_PIVOT)
        start = t * TILE
        if moments:
            table = pivot, 0
            first = start
            while first < start + length and not present(p, n, first):
                first += 1
            if first == start + length:
                return 0
            stage_x(pivot, px + get(x_offsets + 8 * first), x_step, last)
        stack, counts = work + get(p + AT_COLUMNS), work + get(p + AT_COUNTS)
        node = work + get(p + AT_BUFFER)
        xs, gs = node + NODE, node + NODE + ROWS * acc_vector
        columns = min(length, COLUMNS)
        total = 0
        for j in range(columns):
            count = 0
            for position in range(start + j, start + length, COLUMNS):
                if present(p, n, position):
                    stage_x(xs + count * acc_vector, px + get(x_offsets + 8 * position), x_step, last)
                    if not moments:
                        at_mask = pb
                        if steps[1] == 0:
                            at_mask += c0 // 8 + position * get(p + RELU_MASK_POSITION)
                        dy = pg + get(g_offsets + 8 * position), at_mask
                        to = count * acc_vector
                        stage_dy(gs + to, xs + to, dy, steps, last, position, coefficients)
                    count += 1
            if count:
                leaf(count, node, xs, gs, table)
            push(node, count, stack, counts, 1, 0, 0, j)
            count_up(count, counts, 0, j)
            total += count
        if total:
            to_double(nodes, stack + settle(stack, counts, 1, columns) * NODE, pivot)
        return total

    return tile


def strided_pass(element: Element, what: Pass) -> Any:
    """For kernels: y or dx of up to 16 channels of one sample; 0 where masked."""
    compute = vector_of(element, what, bits_at, keep_bits_at)

    @instruction()
    def one(at: Values, steps: Values, last: Value, position: Value, table: Values) -> None:
        (py, px, pg, pr, pb), (sy, sx, sg, sr, sb) = at, steps
        x = load_lanes(element, px, sx, last)
        g = load_lanes(element, pg, sg, last) if what.reads_g else None
        r = load_lanes(element, pr, sr, last) if what.reads_r else None
        y, dresidual = compute(x, g, r, (pb, sb, last, position), coefficients_at(element, table))
        store_lanes(element, y, py, sy, last)
        if dresidual is not None:
            store_lanes(element, dresidual, pr, sr, last)

    @instruction()
    def nothing(to: Value, step: Value, last: Value) -> None:
        store_lanes(element, Value(to.b, ir.Constant(ir.VectorType(element.acc, LANES), [0.0] * LANES)), to, step, last)

    @instruction()
    def no_bits(pb: Value, step: Value, last: Value, position: Value) -> None:
        keep_bits_at(
            Value(pb.b, ir.Constant(ir.VectorType(ir.IntType(1), LANES), [0] * LANES)), pb, step, last, position
        )

    acc, writes_r, keeps = element.acc_size, what.writes_r, what.keeps_mask
    has_r = what.reads_r or writes_r

    @jit
    def of_channels(p, n, c0):  # type: ignore[no-untyped-def]
        last = min(get(p + CHANNELS) - c0, LANES) - 1
        steps = channel_steps(p)
        sy, _, _, sr, sb = steps
        py, px, pg, pr, pb = moved(sample(p, n), steps, c0)
        if sb == 0:
            pb += c0 // 8
        table = get(p + COEFFICIENTS) + c0 * acc, get(p + COEFFICIENT_ROW)
        ox, oy, og, outr = get(p + X_OFFSETS), get(p + Y_OFFSETS), get(p + G_OFFSETS), get(p + R_OFFSETS)
        for position in range(get(p + POSITIONS)):
            ay = py + get(oy + 8 * position)
            ar = pr
            if has_r:
                ar += get(outr + 8 * position)
            ab = pb + position * get(p + RELU_MASK_POSITION)
            if present(p, n, position):
                ag = pg
                if og:
                    ag += get(og + 8 * position)
                one((ay, px + get(ox + 8 * position), ag, ar, ab), steps, last, position, table)
            else:
                nothing(ay, sy, last)
                if writes_r:
                    nothing(ar, sr, last)
                if keeps:
                    no_bits(ab, sb, last, position)

    return of_channels
