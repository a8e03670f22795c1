"""Copies of operands between nchw and nhwc, a square of elements at a time: exact, whatever their type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cubn.backends.cpu.nodes import jit
from cubn.backends.cpu.parameters import OFFSET
from cubn.backends.cpu.plan import RELAID_EDGE, WordLayout
from cubn.backends.cpu.simd import (
    LANES,
    Element,
    Value,
    get,
    instruction,
    load_raw,
    pointer,
    scalar_at,
    store_raw,
    transposed,
)
from cubn.backends.cpu.tasks import next_task

Function = Callable[[int, int], None]

TASKS, RANGES, BLOCK = OFFSET["relaid_tasks"], OFFSET["relaid_ranges"], OFFSET["relaid_block"]
SAMPLES, CHANNELS, POSITIONS = OFFSET["samples"], OFFSET["channels"], OFFSET["positions"]


def relayout(element: Element, name: str, given: WordLayout) -> Function:
    """An operand that the caller has in layout `given` copied to the workspace, which has it in x's; or, if it is
    written, back. Task: blocks of channels and positions of a sample.

    Rows are what lies contiguous where it is read, columns what does where it is written.
    """
    inwards = name == "g"
    source, to = (f"{name}_given", name) if inwards else (name, f"{name}_given")
    reads_nchw = inwards == (given == "nchw")
    along, across = ("position", "channel") if reads_nchw else ("channel", "position")
    rows_of, columns_of = (CHANNELS, POSITIONS) if reads_nchw else (POSITIONS, CHANNELS)
    source_at, source_sample, row_step = (OFFSET[f"{source}{part}"] for part in ("", "_sample", f"_{across}"))
    to_at, to_sample, column_step = (OFFSET[f"{to}{part}"] for part in ("", "_sample", f"_{along}"))
    claimed, copy = OFFSET[f"{name}_claimed"], copy_of(element)
    size, edge = element.size, RELAID_EDGE

    @jit
    def copy_block(p, n, i, j, row_blocks, column_blocks):  # type: ignore[no-untyped-def]
        """The last block along rows or columns has all that are left."""
        r, c = i * edge, j * edge
        rows, columns = edge, edge
        if i + 1 == row_blocks:
            rows = get(p + rows_of) - r
        if j + 1 == column_blocks:
            columns = get(p + columns_of) - c
        row, column = get(p + row_step), get(p + column_step)
        at = get(p + source_at) + n * get(p + source_sample) + r * row + c * size
        place = get(p + to_at) + n * get(p + to_sample) + c * column + r * size
        copy(at, row, place, column, rows, columns)

    def kernel(p, worker):  # type: ignore[no-untyped-def]
        row_blocks, column_blocks = max(get(p + rows_of) // edge, 1), max(get(p + columns_of) // edge, 1)
        in_sample = row_blocks * column_blocks
        blocks, many = get(p + SAMPLES) * in_sample, get(p + BLOCK)
        tasks, ranges = get(p + TASKS), get(p + RANGES)
        task, exhausted = next_task(p + claimed, tasks, ranges, worker, 0)
        while task >= 0:
            for block in range(task * many, min((task + 1) * many, blocks)):
                n, k = block // in_sample, block % in_sample
                copy_block(p, n, k % row_blocks, k // row_blocks, row_blocks, column_blocks)
            task, exhausted = next_task(p + claimed, tasks, ranges, worker, exhausted)

    return kernel


def copy_of(element: Element) -> Any:
    """For kernels: a matrix copied to where its columns lie contiguous, in the order in which it is written: that
    measured faster than the order in which it is read.
    """
    kind, size, at_once = element.stored, element.size, LANES
    side = 16 if size == 2 else 8  # of squares that fit the registers of AVX2

    @instruction()
    def square(at: Value, row: Value, to: Value, column: Value) -> None:
        """16 rows of 16 elements."""
        for c in range(0, LANES, side):
            for r in range(0, LANES, side):
                found = [load_raw(at + row * (r + i) + c * size, kind, size, lanes=side) for i in range(side)]
                for i, elements in enumerate(transposed(found)):
                    store_raw(elements, to + column * (c + i) + r * size, size)

    def copy_scalar(at: Value, to: Value) -> None:
        to.b.store(scalar_at(at, kind, size).v, pointer(to, kind)).align = size

    @instruction()
    def sixteen(at: Value, step: Value, to: Value, step_to: Value) -> None:
        for i in range(LANES):
            copy_scalar(at + step * i, to + step_to * i)

    single = instruction()(copy_scalar)

    @jit
    def copy(at, row, to, column, rows, columns):  # type: ignore[no-untyped-def]
        """The last sixteen may be in part those before them once more."""
        if rows >= at_once:
            for j in range(0, columns, at_once):
                c = max(min(j, columns - at_once), 0)
                for i in range(0, rows, at_once):
                    r = min(i, rows - at_once)
                    here, there = at + r * row + c * size, to + c * column + r * size
                    if columns >= at_once:
                        square(here, row, there, column)
                    else:
                        for k in range(columns):
                            sixteen(here + k * size, row, there + k * column, size)
        elif columns >= at_once:
            for j in range(0, columns, at_once):
                c = min(j, columns - at_once)
                for r in range(rows):
                    sixteen(at + r * row + c * size, size, to + c * column + r * size, column)
        else:
            for r in range(rows):
                for c in range(columns):
                    single(at + r * row + c * size, to + c * column + r * size)

    return copy
