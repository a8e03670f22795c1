"""Kernels that do reduction and elementwise pass of some channels while these are in cache: a slab."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cubn.backends.cpu.arithmetic import Moments, Sums
from cubn.backends.cpu.channel_kernels import finish, gradient_table_of, table_of
from cubn.backends.cpu.elementwise import Backward, Forward, Pass
from cubn.backends.cpu.nodes import AT_SPREAD, HALF_NODE, Source, jit
from cubn.backends.cpu.parameters import OFFSET
from cubn.backends.cpu.passes import channel_pass, group_pass
from cubn.backends.cpu.plan import NODE, Reading
from cubn.backends.cpu.reduce import channels_of_a_slot, gather
from cubn.backends.cpu.row_kernels import store_lanes
from cubn.backends.cpu.simd import LANES, Element, get, put
from cubn.backends.cpu.tasks import next_task

Function = Callable[[int, int], None]

CLAIMED, TASKS, RANGES, CHUNK = OFFSET["claimed"], OFFSET["tasks"], OFFSET["ranges"], OFFSET["chunk"]
SAMPLES, CHANNELS, POSITIONS = OFFSET["samples"], OFFSET["channels"], OFFSET["positions"]
X, X_CHANNEL, G, G_CHANNEL = OFFSET["x"], OFFSET["x_channel"], OFFSET["g"], OFFSET["g_channel"]
RELU_MASK, RELU_MASK_CHANNEL = OFFSET["relu_mask"], OFFSET["relu_mask_channel"]
SCRATCH, SCRATCH_SIZE, AT_COUNTS = OFFSET["scratch"], OFFSET["scratch_size"], OFFSET["at_counts"]
COUNT, FIRST, SECOND = OFFSET["count"], OFFSET["first"], OFFSET["second"]


def slab_pass(element: Element, reading: Reading, what: Pass) -> Any:
    """For kernels: the elementwise pass over all samples of a chunk of channels, the last sample first."""
    of_channels = channel_pass(element, what, in_slab=True)
    if reading == "nchw_long":

        @jit
        def one_by_one(p, table, c0, few):  # type: ignore[no-untyped-def]
            for n in range(get(p + SAMPLES) - 1, -1, -1):
                of_channels(p, n, c0, few)

        return one_by_one

    spread, of_group = group_pass(element, what)

    groups = LANES

    @jit
    def together(p, table, c0, few):  # type: ignore[no-untyped-def]
        for c in range(0, few, groups):
            count = min(few - c, groups)
            long = spread(p, table, c0 + c, count)
            for n in range(get(p + SAMPLES) - 1, -1, -1):
                if long:
                    of_group(p, table, n, c0 + c, count)
                else:
                    of_channels(p, n, c0 + c, count)

    return together


def train_slab(element: Element, reading: Reading, what: Forward) -> Function:
    """Moments, statistics and y, a chunk of channels at a time; y in reverse, so that it starts on what is still in
    cache.
    """
    source = Source(element, Moments, "none")
    collect, tabulate, normalize = gather(source, reading), table_of(element), slab_pass(element, reading, what)
    in_slot, at_once = channels_of_a_slot(reading), LANES
    between = 8 if in_slot == LANES else NODE

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        work = get(p + SCRATCH) + worker * get(p + SCRATCH_SIZE)
        chunk, c_all = get(p + CHUNK), get(p + CHANNELS)
        tiles = (get(p + POSITIONS) + 2047) // 2048
        tasks, ranges = get(p + TASKS), get(p + RANGES)
        task, exhausted = next_task(p + CLAIMED, tasks, ranges, worker, 0)
        while task >= 0:
            c0 = task * chunk
            few = min(chunk, c_all - c0)
            width = (few + in_slot - 1) // in_slot
            at = get(p + X) + c0 * get(p + X_CHANNEL), 0, 0
            slots = collect(p, work, at, 0, get(p + SAMPLES), 0, tiles, c0, width)
            count = get(work + get(p + AT_COUNTS) + 2048)
            if task == 0:
                put(get(p + COUNT), count)
            for i in range(0, few, at_once):
                slot, lanes = slots + i // in_slot * NODE, min(few - i, at_once)
                finish(p, c0 + i, (slot, slot + HALF_NODE), between, count, lanes)
                tabulate(p, c0 + i, lanes)
            normalize(p, work + get(p + AT_SPREAD), c0, few)
            task, exhausted = next_task(p + CLAIMED, tasks, ranges, worker, exhausted)

    return kernel


def backward_slab(element: Element, reading: Reading, what: Backward) -> Function:
    """Sums and dx, a chunk of channels at a time. The table holds the coefficients already."""
    source = Source(element, Sums, what.relu)
    collect, apply = gather(source, reading), slab_pass(element, reading, what)
    tabulate, in_slot, at_once = gradient_table_of(element), channels_of_a_slot(reading), LANES

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        work = get(p + SCRATCH) + worker * get(p + SCRATCH_SIZE)
        chunk, c_all = get(p + CHUNK), get(p + CHANNELS)
        tiles = (get(p + POSITIONS) + 2047) // 2048
        tasks, ranges = get(p + TASKS), get(p + RANGES)
        task, exhausted = next_task(p + CLAIMED, tasks, ranges, worker, 0)
        while task >= 0:
            c0 = task * chunk
            few = min(chunk, c_all - c0)
            width = (few + in_slot - 1) // in_slot
            at = (
                get(p + X) + c0 * get(p + X_CHANNEL),
                get(p + G) + c0 * get(p + G_CHANNEL),
                get(p + RELU_MASK) + c0 * get(p + RELU_MASK_CHANNEL),
            )
            slots = collect(p, work, at, 0, get(p + SAMPLES), 0, tiles, c0, width)
            for c in range(0, few, in_slot):
                to, slot = 8 * (c0 + c), slots + c // in_slot * NODE
                store_lanes(get(p + FIRST) + to, slot, min(few - c, in_slot))
                store_lanes(get(p + SECOND) + to, slot + HALF_NODE, min(few - c, in_slot))
            for c in range(0, few, at_once):
                tabulate(p, c0 + c, min(few - c, at_once))
            apply(p, work + get(p + AT_SPREAD), c0, few)
            task, exhausted = next_task(p + CLAIMED, tasks, ranges, worker, exhausted)

    return kernel
