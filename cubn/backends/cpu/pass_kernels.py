"""Kernels of the elementwise passes."""

from __future__ import annotations

from collections.abc import Callable

from cubn.backends.cpu.elementwise import Pass
from cubn.backends.cpu.parameters import OFFSET
from cubn.backends.cpu.passes import channel_pass, flat_pass, position_pass, repeat_entries, spread_channels
from cubn.backends.cpu.plan import Layout
from cubn.backends.cpu.simd import LANES, Element, get
from cubn.backends.cpu.strided import strided_pass
from cubn.backends.cpu.tasks import next_task_backwards

Function = Callable[[int, int], None]

CLAIMED, TASKS, RANGES, BLOCK = (OFFSET[name] for name in ("pass_claimed", "pass_tasks", "pass_ranges", "block"))
SAMPLES, CHANNELS, POSITIONS = OFFSET["samples"], OFFSET["channels"], OFFSET["positions"]


def elementwise_strided(element: Element, what: Pass) -> Function:
    """y or dx of arrays of any strides. Task: up to 16 channels of one sample."""
    one, groups_of = strided_pass(element, what), LANES

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        groups = (get(p + CHANNELS) + groups_of - 1) // groups_of
        tasks, ranges = get(p + TASKS), get(p + RANGES)
        task, exhausted = next_task_backwards(p + CLAIMED, tasks, ranges, worker, 0)
        while task >= 0:
            one(p, task // groups, task % groups * groups_of)
            task, exhausted = next_task_backwards(p + CLAIMED, tasks, ranges, worker, exhausted)

    return kernel


def elementwise_flat(element: Element, what: Pass) -> Function:
    """y or dx from a table of repeated entries. Task: a block of elements."""
    of_elements = flat_pass(element, what)

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        block = get(p + BLOCK)
        total = get(p + SAMPLES) * get(p + POSITIONS) * get(p + CHANNELS)
        tasks, ranges = get(p + TASKS), get(p + RANGES)
        task, exhausted = next_task_backwards(p + CLAIMED, tasks, ranges, worker, 0)
        while task >= 0:
            first = task * block
            of_elements(p, first, min(block, total - first))
            task, exhausted = next_task_backwards(p + CLAIMED, tasks, ranges, worker, exhausted)

    return kernel


def spread(element: Element) -> Function:
    """The coefficient table of few positions, spread and repeated."""
    spread_out, fill = spread_channels(element), repeat_entries(element)

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        spread_out(p)
        fill(p)

    return kernel


def repeat(element: Element) -> Function:
    """The coefficient table of few channels, repeated."""
    fill = repeat_entries(element)

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        fill(p)

    return kernel


def elementwise(element: Element, layout: Layout, what: Pass) -> Function:
    """y or dx from the coefficient table. Task: a block of rows."""
    of_rows = channel_pass(element, what) if layout == "nchw" else position_pass(element, what)
    inner = CHANNELS if layout == "nchw" else POSITIONS

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        many, block = get(p + inner), get(p + BLOCK)
        rows = get(p + SAMPLES) * many
        tasks, ranges = get(p + TASKS), get(p + RANGES)
        task, exhausted = next_task_backwards(p + CLAIMED, tasks, ranges, worker, 0)
        while task >= 0:
            at = task * block
            stop = min(at + block, rows)
            while at < stop:
                n, first = at // many, at % many
                count = min(many - first, stop - at)
                of_rows(p, n, first, count)
                at += count
            task, exhausted = next_task_backwards(p + CLAIMED, tasks, ranges, worker, exhausted)

    return kernel
