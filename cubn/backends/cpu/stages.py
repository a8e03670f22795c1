"""Parts of launches: stages that run one after the other, and what these find in the parameter block."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cubn._arrays.numpy import address_of
from cubn._tree import TILE
from cubn._types import ITEMSIZE, Extents, Operand, Operands
from cubn.backends.cpu import plan
from cubn.backends.cpu.compile import Kernel, compiled
from cubn.backends.cpu.launch import ALIGNMENT
from cubn.backends.cpu.parameters import RANGES, Fields
from cubn.backends.cpu.pool import Stage

CACHE_WAY = 4096
"""Bytes from which on addresses share the lines of a core's first cache; a row of the coefficient table ends
`ROW_IN_CACHE` behind a multiple of them, and six such rows are spread over all lines.
"""
ROW_IN_CACHE = 5 * ALIGNMENT

Arrays = tuple[NDArray[Any], ...]


class Part(NamedTuple):
    """Part of a launch: stages, fields of the block, memory that they write (bytes by field), arrays they point to."""

    stages: tuple[Stage, ...] = ()
    fields: Fields = {}  # noqa: RUF012
    room: Fields = {}  # noqa: RUF012
    keeps: Arrays = ()


class Elements(NamedTuple):
    """What a pass over all elements is prepared for; operands are without their pointers."""

    extents: Extents
    operands: Operands
    relu_mask: plan.WordLayout | None
    threads: int
    relaid: tuple[tuple[str, Operand], ...] = ()
    """As the caller has them, by name: those that `operands` have in x's layout, in the workspace."""

    @property
    def dtype(self) -> str:
        return self.operands.x.dtype

    @property
    def nbytes(self) -> int:
        """Of x."""
        return math.prod(self.extents) * ITEMSIZE[self.dtype]


@functools.lru_cache(1024)
def layout_of(elements: Elements) -> plan.Layout:
    return plan.layout_of(elements.extents, elements.operands, elements.relu_mask)


@functools.lru_cache(1024)
def reading_of(elements: Elements) -> plan.Reading:
    return plan.reading_of(elements.extents, elements.operands, layout_of(elements))


@functools.cache
def kernel(name: str, dtype: str = "", *options: Any) -> Kernel:
    """A kernel of kernels.py by name, specialised; compiled when first asked for."""

    def build() -> Callable[[int, int], None]:
        from cubn.backends.cpu import kernels

        return kernels.build(name, dtype, options)

    return compiled(
        "-".join(filter(None, [name, dtype, *(str(int(o) if isinstance(o, bool) else o) for o in options)])), build
    )


def over_channels(*names: str, dtype: str) -> Part:
    """Kernels that take all channels, by one thread."""
    return Part(tuple(Stage(kernel(name, _acc(dtype)), 1) for name in names))


def coefficients(entries: int, dtype: str) -> Part:
    """Room for the coefficient table: six rows of acc, padded to whole vectors, and so that they do not take turns in
    the same lines of a cache.
    """
    row = -(-entries // plan.LANES) * plan.LANES * ITEMSIZE[_acc(dtype)]
    row += (ROW_IN_CACHE - row) % CACHE_WAY
    return Part((), {"coefficient_row": row}, {"coefficients": 6 * row})


def elementwise(name: str, options: tuple[Any, ...], elements: Elements) -> Part:
    """A pass over all elements, from the coefficient table."""
    extents, dtype, layout = elements.extents, elements.dtype, layout_of(elements)
    size = ITEMSIZE[dtype]
    entries = None if elements.relu_mask else plan.flat_entries(extents, elements.operands, layout)
    if entries:
        tasks, block, period = plan.flat_tasks(extents, entries, size)
        table = coefficients(2 * period + 2 * plan.LANES, dtype)
        before = over_channels("repeat" if layout == "nhwc" else "spread", dtype=dtype).stages
        fields, room = {**table.fields, "entries": entries, "period": period}, table.room
    else:
        tasks, block = plan.elementwise_tasks(extents, layout, size)
        before, fields, room = (), {}, {}
    threads = plan.threads_for(elements.nbytes, tasks, elements.threads)
    fields |= {"pass_tasks": tasks, "pass_ranges": min(threads, RANGES), "block": block}
    fields |= {"stream": plan.streams(extents, size, threads)}
    run = kernel(name, dtype, "flat" if entries else layout, *options)
    return Part((*before, Stage(run, threads)), fields, room)


def reduction(name: str, options: tuple[Any, ...], elements: Elements, start: int | None) -> Part:
    """Node rows and their merges, as `plan.reduction` cuts it; without a start of a whole batch, up to the root."""
    extents, dtype, reading = elements.extents, elements.dtype, reading_of(elements)
    cut = plan.reduction(extents, reading, start or 0)
    steps = cut.to_root if start is None else cut.steps
    tasks, rows = len(cut.table) * cut.chunks, len(cut.table)
    workers = plan.threads_for(elements.nbytes, tasks, elements.threads)
    scratch, shares = _scratch(cut.offsets, cut.scratch, workers), _shares(extents.S, dtype)
    fields = {**scratch.fields, **shares.fields, "rows": address_of(cut.table)}
    fields |= {"tasks": tasks, "ranges": min(workers, RANGES), "chunk": cut.chunk, "chunks": cut.chunks}
    fields |= {"steps": len(steps), "step_table": address_of(steps), "node_row": 8 * extents.C}
    nodes = {"node_count": 8 * rows, "node_first": 8 * rows * extents.C, "node_second": 8 * rows * extents.C}
    stages: tuple[Stage, ...] = (Stage(kernel(name, dtype, reading, *options), workers),)
    if start is None or len(steps):
        stages += (Stage(kernel("merge_rows", "", name), 1),)
    return Part(stages, fields, scratch.room | nodes, (cut.table, steps, *shares.keeps))


def slab(name: str, options: tuple[Any, ...], elements: Elements) -> Part | None:
    """Reduction and pass in one, a few channels at a time; None where `plan.slab` has no such cut."""
    extents, dtype, reading = elements.extents, elements.dtype, reading_of(elements)
    threads = plan.threads_for(elements.nbytes, extents.C, elements.threads)
    cut = plan.slab(extents, reading, ITEMSIZE[dtype], threads)
    if cut is None:
        return None
    workers = min(threads, cut.tasks)
    scratch, shares = _scratch(cut.offsets, cut.scratch, workers), _shares(extents.S, dtype)
    fields = {**scratch.fields, **shares.fields, "tasks": cut.tasks, "ranges": min(workers, RANGES)}
    fields["chunk"] = cut.chunk
    fields["stream"] = plan.streams(extents, ITEMSIZE[dtype], workers)
    return Part((Stage(kernel(name, dtype, reading, *options), workers),), fields, scratch.room, shares.keeps)


def _acc(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _scratch(offsets: tuple[int, ...], size: int, threads: int) -> Part:
    """The workers' scratch memory."""
    names = ("at_pivot", "at_counts", "at_columns", "at_buffer", "at_node", "at_tiles", "at_samples", "at_spread")
    return Part((), {"scratch_size": size, **dict(zip(names, offsets, strict=True))}, {"scratch": size * threads})


def _shares(S: int, dtype: str) -> Part:
    """Shares of the column tree, of a full tile and of a sample's last."""
    lengths = min(S, TILE), S % TILE or min(S, TILE)
    tables: list[NDArray[np.floating]] = [plan.column_table(length, dtype == "float64") for length in lengths]
    return Part((), dict(zip(("tables", "tail"), map(address_of, tables), strict=True)), {}, tuple(tables))
