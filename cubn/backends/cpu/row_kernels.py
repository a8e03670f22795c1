"""Kernels of reductions: node rows from elements, and their merges."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from cubn.backends.cpu.arithmetic import Moments, Reduction
from cubn.backends.cpu.nodes import HALF_NODE, Source, jit
from cubn.backends.cpu.parameters import OFFSET
from cubn.backends.cpu.plan import NODE, Reading
from cubn.backends.cpu.reduce import channels_of_a_slot, gather
from cubn.backends.cpu.simd import (
    DOUBLE,
    LANES,
    Value,
    convert,
    first_lanes,
    get,
    instruction,
    load_raw,
    put,
    ratio,
    splat,
    store_raw,
)
from cubn.backends.cpu.tasks import next_task

Function = Callable[[int, int], None]

CLAIMED, TASKS, RANGES, CHANNELS = OFFSET["claimed"], OFFSET["tasks"], OFFSET["ranges"], OFFSET["channels"]
X, X_CHANNEL, G, G_CHANNEL = OFFSET["x"], OFFSET["x_channel"], OFFSET["g"], OFFSET["g_channel"]
RELU_MASK, RELU_MASK_CHANNEL = OFFSET["relu_mask"], OFFSET["relu_mask_channel"]
ROW_TABLE, CHUNK, CHUNKS = OFFSET["rows"], OFFSET["chunk"], OFFSET["chunks"]
NODE_FIRST, NODE_SECOND, NODE_COUNT = OFFSET["node_first"], OFFSET["node_second"], OFFSET["node_count"]
SCRATCH, SCRATCH_SIZE, AT_COUNTS = OFFSET["scratch"], OFFSET["scratch_size"], OFFSET["at_counts"]
COUNT, FIRST, SECOND = OFFSET["count"], OFFSET["first"], OFFSET["second"]
STEPS, STEP_TABLE, NODE_ROW = OFFSET["steps"], OFFSET["step_table"], OFFSET["node_row"]


@instruction()
def store_lanes(to: Value, slot: Value, lanes: Value) -> None:
    """The first `lanes` float64 of a vector in scratch."""
    store_raw(load_raw(slot, DOUBLE, 8), to, 8, first_lanes(lanes))


@instruction()
def clear(slot: Value) -> None:
    """The node of nothing."""
    zero = Value(slot.b, ir.Constant(ir.VectorType(DOUBLE, LANES), None))
    store_raw(zero, slot, 8)
    store_raw(zero, slot + HALF_NODE, 8)


def reduce_rows(source: Source, reading: Reading) -> Function:
    """One node a row and channel. Task: a row of the plan's table, a chunk of channels."""
    collect, in_slot = gather(source, reading), channels_of_a_slot(reading)
    # then a word is 16 channels, and strided.py finds its own
    words_by_position = reading.startswith("nhwc")

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        work = get(p + SCRATCH) + worker * get(p + SCRATCH_SIZE)
        chunk, chunks, c_all = get(p + CHUNK), get(p + CHUNKS), get(p + CHANNELS)
        tasks, ranges = get(p + TASKS), get(p + RANGES)
        task, exhausted = next_task(p + CLAIMED, tasks, ranges, worker, 0)
        while task >= 0:
            r, c0 = task // chunks, task % chunks * chunk
            row = get(p + ROW_TABLE) + 32 * r
            few = min(chunk, c_all - c0)
            relu_mask = get(p + RELU_MASK) + c0 * get(p + RELU_MASK_CHANNEL)
            if words_by_position:
                relu_mask += c0 // 8
            slots = collect(
                p,
                work,
                (get(p + X) + c0 * get(p + X_CHANNEL), get(p + G) + c0 * get(p + G_CHANNEL), relu_mask),
                get(row),
                get(row + 8),
                get(row + 16),
                get(row + 24),
                c0,
                (few + in_slot - 1) // in_slot,
            )
            count = get(work + get(p + AT_COUNTS) + 2048)
            if count == 0:
                for c in range(0, few, in_slot):
                    clear(slots + c // in_slot * NODE)
            for c in range(0, few, in_slot):
                to, slot = 8 * (r * c_all + c0 + c), slots + c // in_slot * NODE
                store_lanes(get(p + NODE_FIRST) + to, slot, min(few - c, in_slot))
                store_lanes(get(p + NODE_SECOND) + to, slot + HALF_NODE, min(few - c, in_slot))
            put(get(p + NODE_COUNT) + 8 * r, count)
            task, exhausted = next_task(p + CLAIMED, tasks, ranges, worker, exhausted)

    return kernel


def merge_rows(what: Reduction) -> Function:
    """The plan's steps (left row, right row) over node rows. Where a root is asked for, it is what row 0 then holds."""
    at_once, sets_count = LANES, what is Moments

    @instruction()
    def merge(a: Value, a2: Value, b: Value, b2: Value, count_a: Value, count_b: Value, lanes: Value) -> None:
        mask = first_lanes(lanes)
        left = load_raw(a, DOUBLE, 8, mask), load_raw(a2, DOUBLE, 8, mask)
        right = load_raw(b, DOUBLE, 8, mask), load_raw(b2, DOUBLE, 8, mask)
        share = ratio(count_b, count_a + count_b, DOUBLE)
        first, second = what.merge(left, right, splat(share), splat(convert(count_a, DOUBLE) * share))
        store_raw(first, a, 8, mask)
        store_raw(second, a2, 8, mask)

    @jit
    def replace(to, at, c_all):  # type: ignore[no-untyped-def]
        for c in range(0, c_all, at_once):
            store_lanes(to + 8 * c, at + 8 * c, min(c_all - c, at_once))

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        c_all, counts = get(p + CHANNELS), get(p + NODE_COUNT)
        first, second = get(p + NODE_FIRST), get(p + NODE_SECOND)
        row = get(p + NODE_ROW)
        for i in range(get(p + STEPS)):
            step = get(p + STEP_TABLE) + 16 * i
            a, b = get(step), get(step + 8)
            count_a, count_b = get(counts + 8 * a), get(counts + 8 * b)
            if count_a == 0:
                replace(first + a * row, first + b * row, c_all)
                replace(second + a * row, second + b * row, c_all)
            elif count_b != 0:
                for c in range(0, c_all, at_once):
                    at_a, at_b = a * row + 8 * c, b * row + 8 * c
                    lanes = min(c_all - c, at_once)
                    merge(first + at_a, second + at_a, first + at_b, second + at_b, count_a, count_b, lanes)
            put(counts + 8 * a, count_a + count_b)
        if get(p + FIRST):
            replace(get(p + FIRST), first, c_all)
            replace(get(p + SECOND), second, c_all)
            if sets_count:
                put(get(p + COUNT), get(counts))

    return kernel
