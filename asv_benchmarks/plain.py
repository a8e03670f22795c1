"""What a framework's batch norm does per element, as plain loops: no canonical order, products and sums fused.

They are written with the kernels' own instructions, for a comparison of arithmetic alone: sums stay in registers, and
all channels of a vector are whole.
"""

from collections.abc import Callable, Sequence

from cubn.backends.cpu.simd import LANES, Element, Value, constant, get, instruction, scalar_at, splat

Kernel = Callable[[int, int], None]

VECTORS, X, G, TABLE, Y = range(0, 40, 8)
"""Where a loop's block of numbers has what: how many vectors, and addresses."""

SUMMED = 3
"""Vectors at a time, where each has two sums: as many as 16 registers of 8 lanes hold."""
MAPPED = 4


def _looped(
    count: Value, carried: Sequence[Value], body: Callable[[Value, Sequence[Value]], Sequence[Value]]
) -> Sequence[Value]:
    """What `carried` becomes by body(i, carried), for i from 0 to count - 1; one time at least."""
    b = count.b
    before, again, end = b.block, b.append_basic_block("again"), b.append_basic_block("end")
    b.branch(again)
    b.position_at_end(again)
    index, values = b.phi(count.type), [b.phi(value.type) for value in carried]
    found = body(Value(b, index), [Value(b, value) for value in values])
    following = b.add(index, count.type(1))
    begin, then = (count.type(0), *(value.v for value in carried)), (following, *(value.v for value in found))
    for phi, first, next_ in zip((index, *values), begin, then, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(next_, b.block)
    b.cbranch(b.icmp_signed("<", following, count.v), again, end)
    b.position_at_end(end)
    return found


def _fused(a: Value, b: Value, c: Value) -> Value:
    """a * b + c, rounded once where the processor can."""
    product = a.b.fmul(a.v, b.v, flags=("contract",))
    return Value(a.b, a.b.fadd(product, c.v, flags=("contract",)))


def plain(name: str, dtype: str, per_lane: bool) -> Kernel:
    """The loop called as cubn's kernel is: over vectors of one channel, or with a channel a lane.

    Coefficients are then loaded for some positions at a time.
    """
    element = Element(dtype)
    vector, acc_vector = LANES * element.size, LANES * element.acc_size

    def coefficients(table: Value, count: int) -> list[Value]:
        places = [table + 4096 * row for row in range(count)]
        if per_lane:
            return [element.load_acc(place) for place in places]
        return [splat(scalar_at(place, element.acc, element.acc_size)) for place in places]

    def added_up(length: Value, x: Value, g: Value, table: Value, to: Value) -> None:
        """Two sums of each lane, which are then stored."""
        (mean,) = coefficients(table, 1)
        zero = constant(mean, 0.0)

        def body(i: Value, sums: Sequence[Value]) -> list[Value]:
            found = []
            for k in range(SUMMED):
                place = i * (SUMMED * vector) + k * vector
                first, second = sums[2 * k : 2 * k + 2]
                value = element.load(x + place)
                if name == "moments":
                    found += [first + value, _fused(value, value, second)]
                else:
                    dy = element.load(g + place)
                    found += [first + dy, _fused(dy, value - mean, second)]
            return found

        for k, total in enumerate(_looped(length, [zero] * (2 * SUMMED), body)):
            element.store_acc(total, to + acc_vector * k)

    def mapped(length: Value, x: Value, g: Value, table: Value, to: Value) -> None:
        """y or dx."""

        of_all = coefficients(table, 4)

        def body(i: Value, _: Sequence[Value]) -> list[Value]:
            first, second, third, fourth = coefficients(table, 4) if per_lane else of_all
            for k in range(MAPPED):
                place = i * (MAPPED * vector) + k * vector
                value = element.load(x + place)
                if name == "normalize":
                    found = _fused(value, first, second)
                else:
                    found = _fused(first - value, second, element.load(g + place) - third) * fourth
                element.store(found, to + place)
            return []

        _looped(length, [], body)

    loop, at_once = (added_up, SUMMED) if name in ("moments", "sums") else (mapped, MAPPED)
    run = instruction()(loop)

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        run(get(p + VECTORS) // at_once, get(p + X), get(p + G), get(p + TABLE), get(p + Y))

    return kernel
