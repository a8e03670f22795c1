"""Reductions of arrays with one position a sample (2-D): a lane is a channel, or a run of samples of one channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir

from cubn.backends.cpu.arithmetic import Moments, Node, behind_relu, centre
from cubn.backends.cpu.nodes import (
    AT_COUNTS,
    AT_NODE,
    AT_SAMPLES,
    AT_SPREAD,
    CHANNELS,
    COEFFICIENT_ROW,
    COEFFICIENTS,
    G_SAMPLE,
    HALF_NODE,
    RELU_MASK_SAMPLE,
    X_SAMPLE,
    Source,
    ask_for,
    bit_of,
    coefficients_at,
    counter,
    equal_merge,
    jit,
    load_node,
    neighbours,
    pairwise,
    push_up,
    store_node,
    term_at,
)
from cubn.backends.cpu.plan import NODE, RUNS
from cubn.backends.cpu.simd import (
    DOUBLE,
    I1,
    I16,
    I32,
    LANES,
    Element,
    Value,
    Values,
    constant,
    first_lanes,
    get,
    instruction,
    load_strided,
    moved,
    pointer,
    put,
    select,
    shifted,
    transposed,
    widen,
)

TOGETHER = 4  # samples of a vector that become one node in registers: more are more streams than a processor follows
LEVEL = TOGETHER.bit_length() - 1
HALF = LANES // 2
NEAR = 1024  # bytes from sample to sample up to which the next samples are asked for: processors foresee longer rows


def of_single_positions(source: Source, narrow: bool) -> Any:
    """samples(): one position a sample (2-D input), lanes are channels; every merge is in float64.

    `narrow`: fewer than 16 channels, and dense arrays. Then 256 samples are taken at a time, a channel after the other:
    lanes are 16 runs of 16 samples, which a transpose lays side by side.
    """
    element, what = source.element, source.what
    double = Element("float64")
    push, count_up, settle = counter(double, what)

    narrower = element.acc != DOUBLE  # than float64: then no square overflows, and no difference is subnormal
    acc = element.acc_size
    acc_vector = LANES * acc

    def node_of(x: Value, trusted: bool) -> Node:
        """The node of one value. Its mean is pivot + (x - pivot), NaN where x is not finite; `trusted` leaves that."""
        wide = widen(x, DOUBLE)
        return wide if trusted else wide + widen(x - x, DOUBLE), constant(wide, 0.0)

    def node_at(at: Values, table: Values, mask: Value | None = None) -> Node:
        if what is Moments:
            return node_of(element.load(at[0], mask), False)
        g, t = term_at(source, at, table, mask)
        return widen(g, DOUBLE), widen(t, DOUBLE)

    @instruction()
    def doubt(slot: Value) -> None:
        """Make the node NaNs where a value was not finite: m2 is not finite then, and is otherwise where float64 cannot
        overflow.
        """
        mean, m2 = load_node(double, slot)
        store_node(double, (mean + (m2 - m2), m2 + (m2 - m2)), slot)

    def parts(places: list[Values], table: Values) -> Iterator[Node]:
        """The node of some samples: of all lanes, or where it has more in registers of one half and the other."""
        if what is not Moments:
            yield pairwise(what, (node_at(place, table) for place in places), 1)
            return
        for half in range(0, LANES, HALF):
            xs = (element.load(x + half * element.size, lanes=HALF) for x, *_ in places)
            yield pairwise(what, (node_of(x, narrower) for x in xs), 1, narrower)

    def merge(left: Node, node: Node, weight: Value) -> Node:
        """In the counter above, all nodes of a level have the same power of two of samples."""
        return what.equal_merge(left, node, weight, narrower)

    @instruction()
    def several(to: Values, index: Value, at: Values, ahead: Values, steps: Values, table: Values) -> None:
        """Push the node of `TOGETHER` samples; ask for what comes `ahead`."""
        places = [shifted(at, steps, i) for i in range(TOGETHER)]
        for place in places:
            ask_for(source, shifted(place, ahead, 1))
        nodes = list(parts(places, table))
        weight = constant(nodes[0][0], TOGETHER / 2)
        push_up(double, nodes, to, index, merge, weight, lambda weight: weight + weight)

    @instruction()
    def one(to: Value, lanes: Value, at: Values, table: Values) -> None:
        store_node(double, node_at(at, table, first_lanes(lanes)), to)

    @instruction()
    def transpose(to: Value, at: Value, run: Value) -> None:
        """16 elements of each of 16 runs, `run` bytes apart: an element of all runs side by side, then the next."""
        for i, v in enumerate(transposed([element.load(at + run * j) for j in range(LANES)])):
            element.store_acc(v, to + acc_vector * i)

    def in_runs(at: Values, words: Value, run: Value, bit: Value, table: Values) -> Node:
        """The nodes of one value of a channel in each of 16 runs; where x's and dy's are side by side, and the first
        run's word of the relu mask.
        """
        x = element.load_acc(at[0])
        if what is Moments:
            return node_of(x, narrower)
        c, g = coefficients_at(element, table, one_channel=True), element.load_acc(at[1])
        if source.relu == "recompute":
            g = behind_relu(element, g, x, c)
        elif source.relu == "mask":
            every = Value(bit.b, ir.Constant(ir.VectorType(I1, LANES), [1] * LANES))
            g = select(bit_of(load_strided(words, run, I16, every), bit), g, constant(g, 0.0))
        return widen(g, DOUBLE), widen(g * centre(x, c), DOUBLE)

    @instruction()
    def runs(to: Value, bit: Value, at: Values, step: Value, words: Value, words_step: Value, table: Values) -> None:
        """The node of 256 samples of one channel."""
        every_run = words_step * LANES
        nodes = (
            in_runs(shifted(at, (step, step), i), words + words_step * i, every_run, bit, table) for i in range(LANES)
        )
        node = pairwise(what, nodes, 1, narrower)
        count = LANES
        while count < RUNS:
            node = equal_merge(what, *neighbours(node, node), count, narrower)
            count *= 2
        for part, place in zip(node, (to, to + HALF_NODE), strict=True):
            to.b.store(to.b.extract_element(part.v, I32(0)), pointer(place, DOUBLE))

    moments, vector = what is Moments, LANES * element.size
    doubts = moments and narrower

    @jit
    def push_runs(p, work, at, c_all, table, node, stack, counts, index):  # type: ignore[no-untyped-def]
        """Push 256 samples of all channels."""
        side_by_side = work + get(p + AT_SPREAD), work + get(p + AT_SPREAD) + LANES * c_all * acc_vector
        for i in range(c_all):
            transpose(side_by_side[0] + i * LANES * acc_vector, at[0] + i * vector, c_all * vector)
            if not moments:
                transpose(side_by_side[1] + i * LANES * acc_vector, at[1] + i * vector, c_all * vector)
        for c in range(c_all):
            beside = moved(side_by_side, (acc_vector, acc_vector), c)
            entries = moved(table, (acc, 0), c)
            runs(node + 8 * c, c, beside, c_all * acc_vector, at[2], get(p + RELU_MASK_SAMPLE), entries)
        push(node, RUNS, stack, counts, 1, 0, 8, index)

    @jit
    def samples(p, work, at, first, last, c0, width):  # type: ignore[no-untyped-def]
        """The address of `width` node slots, from channel c0 on, and the count of samples [first, last)."""
        channels = min(get(p + CHANNELS) - c0, width * LANES)
        steps = get(p + X_SAMPLE), get(p + G_SAMPLE), get(p + RELU_MASK_SAMPLE)
        table = get(p + COEFFICIENTS) + c0 * acc, get(p + COEFFICIENT_ROW)
        stack, counts, node = work + get(p + AT_SAMPLES), work + get(p + AT_COUNTS) + 1024, work + get(p + AT_NODE)
        n, stop = 0, last - first
        if narrow:
            while n + RUNS <= stop:
                for k in range(8):
                    put(counts + 8 * k, 1 << k)
                push_runs(p, work, moved(at, steps, first + n), channels, table, node, stack, counts, n >> 8)
                count_up(RUNS, counts, 8, n >> 8)
                n += RUNS
        ahead = 0, 0, 0
        if steps[0] <= NEAR:
            ahead = moved(ahead, steps, TOGETHER)
        while n < stop:
            level = LEVEL if n + TOGETHER <= stop else 0
            for k in range(level):
                put(counts + 8 * k, 1 << k)
            place, entries = moved(at, steps, first + n), table
            for lane in range(width):
                lanes = channels - lane * LANES
                if lanes >= LANES and level:
                    to = stack + (LEVEL * width + lane) * NODE, width * NODE
                    several(to, n >> LEVEL, place, ahead, steps, entries)
                else:
                    for k in range(1 << level):
                        one(node, min(lanes, LANES), moved(place, steps, k), entries)
                        push(node, 1, stack, counts, width, lane, 0, n + k)
                place, entries = moved(place, (vector, vector, 2), 1), moved(entries, (acc_vector, 0), 1)
            count_up(1 << level, counts, level, n >> level)
            n += 1 << level
        base = settle(stack, counts, width, stop)
        root = stack + base * width * NODE
        if doubts:
            for lane in range(width):
                doubt(root + lane * NODE)
        return root, get(counts + 8 * base)

    return samples
