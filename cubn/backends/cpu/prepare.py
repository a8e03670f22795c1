"""Launches but for their addresses: what follows from shapes, strides, types and options is worked out once and kept.

An argument of a kernel is a tuple, its address first and its layout behind: an `Operand`, a `Vector`, a `BitRows`, or
an address alone. `launch` looks up the `Launch` for the layouts it is given, and runs it on the addresses.
"""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cubn._arrays import numpy_address
from cubn._tree import TILE
from cubn.backends import Extents, Operand, Vector, threads
from cubn.backends.cpu import plan, pool
from cubn.backends.cpu.compile import Kernel, compiled
from cubn.backends.cpu.launch import FIELDS, OPERANDS, PLACE, VECTORS

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "bool": 1}
CODES = {"float16": 1, "bfloat16": 2, "float32": 3, "float64": 4}  # as in channels.py
ALIGNMENT = 128  # bytes: a cache line, and its neighbour that is fetched along

Kernels = tuple[tuple[Kernel, int], ...]
Argument = tuple[Any, ...]
Layout = tuple[Any, ...]
Fields = dict[str, int]
Numbers = tuple[tuple[str, float], ...]


class BitRows(NamedTuple):
    """Bits of a residual ReLU: 16-bit words along channels (per_position) or along positions; strides in bytes."""

    pointer: int
    per_position: bool
    sample_stride: int
    row_stride: int


class Launch(NamedTuple):
    """Kernels to run one after the other on the same block; the last may have tasks to claim."""

    kernels: Kernels  # and how many threads each is worth
    block: array[int]
    places: tuple[int, ...]  # in the block, of the arguments' addresses
    room: tuple[tuple[int, int], ...]  # place in the block, offset in memory that the launch brings along
    size: int  # of that memory
    tabulated: tuple[tuple[int, int], ...]  # place in the block, argument of which it is the position table
    keeps: object  # what the block has addresses of

    def run(self, arguments: Collection[Argument | None]) -> None:
        block = self.block[:]
        for place, argument in zip(self.places, arguments, strict=True):
            if argument is not None:
                block[place] = argument[0]
        if self.size:
            memory = np.empty(self.size + ALIGNMENT, np.uint8)
            start = -(-numpy_address(memory) // ALIGNMENT) * ALIGNMENT
            for place, offset in self.room:
                block[place] = start + offset
        if self.tabulated:
            operands = tuple(arguments)
            tables = [position_table(*(operands[i] or ())[1:]) for _, i in self.tabulated]
            for (place, _), table in zip(self.tabulated, tables, strict=True):
                block[place] = numpy_address(table)
        address = block.buffer_info()[0]
        for kernel, count in self.kernels:
            pool.run(kernel, address, count)


def launch(prepare: Callable[..., Launch | None], *options: Any, **arguments: Argument | None) -> bool:
    """Run what `prepare` makes of options and layouts; False if that is nothing."""
    layouts = [argument and argument[1:] for argument in arguments.values()]
    ready = prepare(*options, threads.get_num_threads(), tuple(arguments), *layouts)
    if ready is None:
        return False
    ready.run(arguments.values())
    return True


@functools.cache
def kernel(name: str, dtype: str = "", *options: Any) -> Kernel:
    """A kernel of kernels.py by name, specialised; compiled when first asked for."""

    def build() -> Callable[[int, int], None]:
        from cubn.backends.cpu import kernels

        return kernels.build(name, dtype, options)

    return compiled(
        "-".join(filter(None, [name, dtype, *(str(int(o) if isinstance(o, bool) else o) for o in options)])), build
    )


def double_bits(number: float) -> int:
    """A float64 as the integer that has its bits."""
    return int(struct.unpack("q", struct.pack("d", number))[0])


@functools.lru_cache(64)
def position_table(
    dtype: str, sample_stride: int, channel_stride: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> NDArray[np.int64]:
    """Where each position of an operand of any strides is, in bytes."""
    offsets = np.zeros((), np.int64)
    for extent, stride in zip(shape, strides, strict=True):
        offsets = np.add.outer(offsets, np.arange(extent, dtype=np.int64) * (stride * ITEMSIZE[dtype]))
    return offsets.reshape(-1)


def kind(extents: Extents, **arguments: Argument | None) -> str:
    """Which kernels can read and write these arguments."""
    return kind_of(extents, tuple(arguments), *[argument and argument[1:] for argument in arguments.values()])


@functools.lru_cache(1024)
def kind_of(extents: Extents, names: tuple[str, ...], *layouts: Layout | None) -> str:
    """`plan.kind_of` of the operands among the arguments; a mask, or bits of another kind, need the general kernels."""
    given = {name: layout for name, layout in zip(names, layouts, strict=True) if layout}
    if "mask" in given:
        return "strided"
    kind = plan.kind_of(extents, [Operand(0, *given[name]) for name in OPERANDS if name in given])
    bits = given.get("bits")
    if bits and BitRows(0, *bits).per_position != (kind in ("channels", "single")):
        return "strided"
    return kind


def _prepared(
    kernels: Kernels,
    names: tuple[str, ...],
    layouts: tuple[Layout | None, ...],
    numbers: Fields,
    room: Fields | None = None,
    tabulate: bool = False,
    keeps: object = None,
) -> Launch:
    """A launch that takes arguments of these names and layouts; `room` is memory it brings along, in bytes by name."""
    values = dict.fromkeys(FIELDS, 0) | numbers
    for name, layout in zip(names, layouts, strict=True):
        if layout:
            values |= _described(name, layout)
    inside, size = [], 0
    for name, part in (room or {}).items():
        inside.append((PLACE[name], size))
        size += -(-part // ALIGNMENT) * ALIGNMENT
    tables = [(PLACE[f"{n}_offsets"], i) for i, n in enumerate(names) if tabulate and n in OPERANDS and layouts[i]]
    assert len(values) == len(FIELDS), values.keys() - set(FIELDS)
    places = tuple(PLACE[name] for name in names)
    return Launch(kernels, array("q", values.values()), places, tuple(inside), size, tuple(tables), keeps)


def _described(name: str, layout: Layout) -> Fields:
    """The fields of an argument that follow from its layout, in bytes."""
    if name in OPERANDS:
        o = Operand(0, *layout)
        size, position = ITEMSIZE[o.dtype], o.position_strides[0] if o.position_strides else 0
        strides = {"sample": o.sample_stride, "channel": o.channel_stride, "position": position}
        return {f"{name}_{along}": stride * size for along, stride in strides.items()}
    if name in VECTORS:
        v = Vector(0, *layout)
        return {f"{name}_code": CODES[v.dtype], f"{name}_stride": v.stride * ITEMSIZE[v.dtype]}
    bits = BitRows(0, *layout)
    along = "position" if bits.per_position else "channel"
    return {"bits_sample": bits.sample_stride, f"bits_{along}": bits.row_stride}


def _kernels(before: tuple[str, ...], what: tuple[Any, ...], dtype: str, kind: str, threads: int) -> Kernels:
    """Kernels over channels, then one over everything."""
    name, *options = what
    return (*((kernel(first, _acc(dtype)), 1) for first in before), (kernel(name, dtype, kind, *options), threads))


def _acc(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _dtype(names: tuple[str, ...], layouts: tuple[Layout | None, ...]) -> str:
    """x's."""
    return str(layouts[names.index("x")][0])  # type: ignore[index]


def _numbers(numbers: Numbers) -> Fields:
    """Floats as their bits."""
    return {name: double_bits(value) if isinstance(value, float) else value for name, value in numbers}


def _extents(extents: Extents) -> Fields:
    return dict(zip(("samples", "channels", "positions"), extents, strict=True))


def _table(extents: Extents, dtype: str) -> tuple[Fields, Fields]:
    """(numbers, room) of the coefficient table: six rows of acc, padded to whole vectors."""
    row = -(-extents.C // plan.LANES) * plan.LANES * ITEMSIZE[_acc(dtype)]
    row = -(-row // ALIGNMENT) * ALIGNMENT
    return {"coefficient_row": row}, {"coefficients": 6 * row}


def _scratch(offsets: tuple[int, ...], size: int, threads: int) -> tuple[Fields, Fields]:
    """(numbers, room) of the workers' scratch memory."""
    names = ("at_pivot", "at_counts", "at_columns", "at_buffer", "at_node", "at_tiles", "at_samples", "at_spread")
    return {"scratch_size": size, **dict(zip(names, offsets, strict=True))}, {"scratch": size * threads}


def _column_tables(S: int, dtype: str) -> tuple[Fields, tuple[NDArray[np.floating], ...]]:
    """Shares of a full tile and of a sample's last: addresses, and the tables."""
    tables = [plan.column_table(length, dtype == "float64") for length in (min(S, TILE), S % TILE or min(S, TILE))]
    return dict(zip(("tables", "tail"), map(numpy_address, tables), strict=True)), tuple(tables)


@functools.lru_cache(1024)
def per_channel(
    name: str,
    options: tuple[Any, ...],
    C: int,
    numbers: Numbers,
    limit: int,
    names: tuple[str, ...],
    *layouts: Layout | None,
) -> Launch:
    """A kernel over all channels, from vectors and float64 numbers."""
    return _prepared(((kernel(name, *options), 1),), names, layouts, {"channels": C, **_numbers(numbers)})


@functools.lru_cache(1024)
def elementwise(
    before: tuple[str, ...],
    what: tuple[Any, ...],
    extents: Extents,
    numbers: Numbers,
    limit: int,
    names: tuple[str, ...],
    *layouts: Layout | None,
) -> Launch:
    """A pass over all elements, after kernels that make its coefficient table."""
    dtype, kind = _dtype(names, layouts), kind_of(extents, names, *layouts)
    N, C, S = extents
    size = ITEMSIZE[dtype]
    tasks, block = plan.elementwise_tasks(extents, kind, size)
    row, table = _table(extents, dtype)
    fields = {**_extents(extents), **row, **_numbers(numbers), "tasks": tasks, "block": block}
    fields["stream"] = plan.streams(extents, size)
    room = table | {name: 8 * C for name in ("mean", "var", "invstd") if name not in names}
    kernels = _kernels(before, what, dtype, kind, plan.threads_for(N * C * S * size, tasks, limit))
    return _prepared(kernels, names, layouts, fields, room, kind == "strided")


@functools.lru_cache(1024)
def reduction(
    before: tuple[str, ...],
    what: tuple[str, ...],
    extents: Extents,
    start: int,
    limit: int,
    names: tuple[str, ...],
    *layouts: Layout | None,
) -> Launch:
    """Node rows of a reduction, as `plan.reduction` cuts it."""
    dtype, kind = _dtype(names, layouts), kind_of(extents, names, *layouts)
    N, C, S = extents
    cut = plan.reduction(extents, kind, start)
    tasks = len(cut.table) * cut.chunks
    workers = plan.threads_for(N * C * S * ITEMSIZE[dtype], tasks, limit)
    row, table = _table(extents, dtype) if before else ({}, {})
    scratch, memory = _scratch(cut.offsets, cut.scratch, workers)
    shares, tables = _column_tables(S, dtype)
    fields = {**_extents(extents), **row, **scratch, **shares, "rows": numpy_address(cut.table)}
    fields |= {"tasks": tasks, "chunk": cut.chunk, "chunks": cut.chunks}
    kernels = _kernels(before, what, dtype, kind, workers)
    return _prepared(kernels, names, layouts, fields, table | memory, kind == "strided", (cut, tables))


@functools.lru_cache(1024)
def fused(
    before: tuple[str, ...],
    what: tuple[Any, ...],
    extents: Extents,
    numbers: Numbers,
    limit: int,
    names: tuple[str, ...],
    *layouts: Layout | None,
) -> Launch | None:
    """Reduction and pass in one, a few channels at a time; None where `plan.slab` has no such cut."""
    dtype, kind = _dtype(names, layouts), kind_of(extents, names, *layouts)
    N, C, S = extents
    size = N * C * S * ITEMSIZE[dtype]
    limit = plan.threads_for(size, C, limit)
    slab = plan.slab(extents, kind, ITEMSIZE[dtype], limit) if size else None
    if slab is None:
        return None
    workers = min(limit, slab.tasks)
    row, table = _table(extents, dtype)
    scratch, memory = _scratch(slab.offsets, slab.scratch, workers)
    shares, tables = _column_tables(S, dtype)
    fields = {**_extents(extents), **row, **scratch, **shares, **_numbers(numbers)}
    fields |= {"tasks": slab.tasks, "chunk": slab.chunk, "stream": plan.streams(extents, ITEMSIZE[dtype])}
    kernels = _kernels(before, what, dtype, kind, workers)
    return _prepared(kernels, names, layouts, fields, table | memory, keeps=tables)


@functools.lru_cache(1024)
def merging(what: str, C: int, steps: int, limit: int, names: tuple[str, ...], *layouts: Layout | None) -> Launch:
    """`steps` merges of node rows."""
    chunk = max(plan.LANES, -(-C // 8 // plan.LANES) * plan.LANES)
    tasks = -(-C // chunk)
    run = kernel("merge_rows", "", what), plan.threads_for(16 * steps * C, tasks, limit)
    return _prepared((run,), names, layouts, {"channels": C, "steps": steps, "chunk": chunk, "tasks": tasks})
