"""Launches but for their addresses: what follows from shapes, strides, types and options is worked out once and kept.

An argument of a kernel is a tuple, its address first and its layout behind: an `Operand`, a `Vector`, a `BitRows`, or
an address alone. `launch` looks up the `Launch` for the layouts it is given, and runs it on the addresses.
"""

from __future__ import annotations

import functools
import math
import struct
from array import array
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cubn._arrays.numpy import address_of
from cubn._tree import TILE, Block, root_order
from cubn._types import Extents, ITEMSIZE, Operand, Vector
from cubn.backends import threads
from cubn.backends.cpu import plan, pool
from cubn.backends.cpu.compile import Kernel, compiled
from cubn.backends.cpu.kept import kept
from cubn.backends.cpu.launch import CODES, FIELDS, OPERANDS, PLACE, VECTORS

ALIGNMENT = 128  # bytes: a cache line, and its neighbour that is fetched along
POSITION_TABLES = 256 << 20  # bytes of those that are kept; eight for each position

Kernels = tuple[tuple[Kernel, int], ...]
Argument = tuple[Any, ...]
Layout = tuple[Any, ...]
Fields = dict[str, int]
Numbers = tuple[tuple[str, float], ...]
Arrays = tuple[NDArray[Any], ...]


class BitRows(NamedTuple):
    """Bits of a residual ReLU: 16-bit words along channels (per_position) or along positions; strides in bytes."""

    pointer: int
    per_position: bool
    sample_stride: int
    row_stride: int


class Launch(NamedTuple):
    """Kernels to run one after the other on the same block, in one native call."""

    program: pool.Program
    block: array[int]
    places: tuple[int, ...]  # in the block, of the arguments' addresses
    room: tuple[tuple[int, int], ...]  # place in the block, offset in memory that the launch brings along
    size: int  # of that memory
    tabulated: tuple[tuple[int, int], ...]  # place in the block, argument of which it is the position table
    keeps: Arrays  # which the block has addresses of

    @property
    def nbytes(self) -> int:
        return self.block.itemsize * len(self.block) + sum(array.nbytes for array in self.keeps)

    def run(self, arguments: Collection[Argument | None]) -> None:
        block = self.block[:]
        for place, argument in zip(self.places, arguments, strict=True):
            if argument is not None:
                block[place] = argument[0]
        if self.size:
            memory = np.empty(self.size + ALIGNMENT, np.uint8)
            start = -(-address_of(memory) // ALIGNMENT) * ALIGNMENT
            for place, offset in self.room:
                block[place] = start + offset
        if self.tabulated:
            operands = tuple(arguments)
            tables = [position_table(*(operands[i] or ())[1:]) for _, i in self.tabulated]
            for (place, _), table in zip(self.tabulated, tables, strict=True):
                block[place] = address_of(table)
        pool.run(self.program, block.buffer_info()[0])


def launch(
    prepare: Callable[..., Launch], options: tuple[Any, ...], names: tuple[str, ...], arguments: Sequence[Any]
) -> None:
    """Run what `prepare` makes of options and of the layouts of named arguments, some of which may be None."""
    layouts = [argument and argument[1:] for argument in arguments]
    prepare(*options, threads.get_num_threads(), names, *layouts).run(arguments)


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


def position_table(
    dtype: str, sample_stride: int, channel_stride: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> NDArray[np.int64]:
    """Where each position of an operand of any strides is, in bytes."""
    return _positions(shape, tuple(stride * ITEMSIZE[dtype] for stride in strides))


@kept(POSITION_TABLES)
def _positions(shape: tuple[int, ...], strides: tuple[int, ...]) -> NDArray[np.int64]:
    offsets = np.zeros((), np.int64)
    for extent, stride in zip(shape, strides, strict=True):
        offsets = np.add.outer(offsets, np.arange(extent, dtype=np.int64) * stride)
    return offsets.reshape(-1)


def kind(extents: Extents, names: tuple[str, ...], arguments: Sequence[Any]) -> str:
    """Which kernels can read and write these arguments."""
    return kind_of(extents, names, *[argument and argument[1:] for argument in arguments])


def _operands(layouts: dict[str, Any]) -> list[Operand]:
    return [Operand(0, *layouts[name]) for name in OPERANDS if layouts.get(name)]


@functools.lru_cache(1024)
def kind_of(extents: Extents, names: tuple[str, ...], *layouts: Layout | None) -> str:
    """`plan.kind_of` of the operands among the arguments; a mask, or bits of another kind, need the general kernels."""
    given = {name: layout for name, layout in zip(names, layouts, strict=True) if layout}
    if "mask" in given:
        return "strided"
    kind = plan.kind_of(extents, _operands(given))
    bits = given.get("bits")
    if bits and BitRows(0, *bits).per_position != (kind in ("channels", "single")):
        return "strided"
    return kind


@functools.lru_cache(1024)
def reduced_kind(extents: Extents, names: tuple[str, ...], *layouts: Layout | None) -> str:
    """`kind_of` for a reduction, which takes narrow 2-D arrays in a way of its own."""
    kind = kind_of(extents, names, *layouts)
    if kind == "single" and plan.is_narrow(extents, _operands(dict(zip(names, layouts, strict=True)))):
        return "narrow"
    return kind


def _prepared(
    kernels: Kernels,
    names: tuple[str, ...],
    layouts: tuple[Layout | None, ...],
    numbers: Fields,
    room: Fields | None = None,
    tabulate: bool = False,
    keeps: Arrays = (),
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
    block = array("q", values.values())
    return Launch(pool.program(kernels), block, places, tuple(inside), size, tuple(tables), keeps)


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


def _over_channels(names: tuple[str, ...], dtype: str) -> Kernels:
    """Kernels that take all channels, by one thread."""
    return tuple((kernel(name, _acc(dtype)), 1) for name in names)


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


def _table(entries: int, dtype: str) -> tuple[Fields, Fields]:
    """(numbers, room) of the coefficient table: six rows of acc, padded to whole vectors."""
    row = -(-entries // plan.LANES) * plan.LANES * ITEMSIZE[_acc(dtype)]
    row = -(-row // ALIGNMENT) * ALIGNMENT
    return {"coefficient_row": row}, {"coefficients": 6 * row}


def _scratch(offsets: tuple[int, ...], size: int, threads: int) -> tuple[Fields, Fields]:
    """(numbers, room) of the workers' scratch memory."""
    names = ("at_pivot", "at_counts", "at_columns", "at_buffer", "at_node", "at_tiles", "at_samples", "at_spread")
    return {"scratch_size": size, **dict(zip(names, offsets, strict=True))}, {"scratch": size * threads}


def _column_tables(S: int, dtype: str) -> tuple[Fields, tuple[NDArray[np.floating], ...]]:
    """Shares of a full tile and of a sample's last: addresses, and the tables."""
    tables = [plan.column_table(length, dtype == "float64") for length in (min(S, TILE), S % TILE or min(S, TILE))]
    return dict(zip(("tables", "tail"), map(address_of, tables), strict=True)), tuple(tables)


@kept(plan.KEPT_BYTES)
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


class Part(NamedTuple):
    """Kernels one after the other, and what they need in the block: numbers, room, and what is to be kept alive."""

    kernels: Kernels
    fields: Fields
    room: Fields
    keeps: Arrays = ()


def _pass(
    what: tuple[Any, ...], extents: Extents, limit: int, names: tuple[str, ...], layouts: tuple[Layout | None, ...]
) -> tuple[str, Part]:
    """A pass over all elements, and its kind."""
    dtype, kind = _dtype(names, layouts), kind_of(extents, names, *layouts)
    size = ITEMSIZE[dtype]
    before: Kernels = ()
    room: Fields = {}
    given = dict(zip(names, layouts, strict=True))
    flat = kind in ("channels", "single") and not given.get("bits") and plan.is_flat(extents, _operands(given))
    if flat:
        tasks, block, period = plan.flat_tasks(extents, size)
        table, room = _table(2 * period + plan.LANES, dtype)
        fields = {**table, "period": period}
        before = _over_channels(("repeat",), dtype)
    else:
        tasks, block = plan.elementwise_tasks(extents, kind, size)
        fields = {}
    fields |= {"pass_tasks": tasks, "block": block, "stream": plan.streams(extents, size)}
    threads = plan.threads_for(math.prod(extents) * size, tasks, limit)
    name, *options = what
    run = kernel(name, dtype, "flat" if flat else kind, *options)
    return kind, Part((*before, (run, threads)), fields, room)


def _reduction(
    what: tuple[str, ...],
    extents: Extents,
    start: int | None,
    limit: int,
    names: tuple[str, ...],
    layouts: tuple[Layout | None, ...],
) -> tuple[str, Part]:
    """Node rows and their merges, as `plan.reduction` cuts it, and the kind; without a start of a whole batch."""
    dtype, kind = _dtype(names, layouts), reduced_kind(extents, names, *layouts)
    cut = plan.reduction(extents, kind, start or 0)
    steps = cut.to_root if start is None else cut.steps
    tasks = len(cut.table) * cut.chunks
    workers = plan.threads_for(math.prod(extents) * ITEMSIZE[dtype], tasks, limit)
    scratch, memory = _scratch(cut.offsets, cut.scratch, workers)
    shares, tables = _column_tables(extents.S, dtype)
    fields = {**scratch, **shares, "rows": address_of(cut.table)}
    fields |= {"tasks": tasks, "chunk": cut.chunk, "chunks": cut.chunks}
    fields |= {"steps": len(steps), "step_table": address_of(steps), "node_row": 8 * extents.C}
    if start is None:
        rows = len(cut.table)
        memory |= {"node_count": 8 * rows, "node_first": 8 * rows * extents.C, "node_second": 8 * rows * extents.C}
    name, *options = what
    kernels: Kernels = ((kernel(name, dtype, kind, *options), workers),)
    if start is None or len(steps):
        kernels += ((kernel("merge_rows", "", name), 1),)
    return kind, Part(kernels, fields, memory, (cut.table, steps, *tables))


def _slab(
    what: tuple[Any, ...], extents: Extents, limit: int, names: tuple[str, ...], layouts: tuple[Layout | None, ...]
) -> Part | None:
    """Reduction and pass in one, a few channels at a time; None where `plan.slab` has no such cut."""
    dtype, kind = _dtype(names, layouts), kind_of(extents, names, *layouts)
    size = math.prod(extents) * ITEMSIZE[dtype]
    limit = plan.threads_for(size, extents.C, limit)
    slab = plan.slab(extents, kind, ITEMSIZE[dtype], limit)
    if slab is None:
        return None
    workers = min(limit, slab.tasks)
    scratch, memory = _scratch(slab.offsets, slab.scratch, workers)
    shares, tables = _column_tables(extents.S, dtype)
    fields = {**scratch, **shares, "tasks": slab.tasks, "chunk": slab.chunk}
    fields["stream"] = plan.streams(extents, ITEMSIZE[dtype])
    name, *options = what
    return Part(((kernel(name, dtype, kind, *options), workers),), fields, memory, tables)


def _joined(
    parts: Collection[Part],
    extents: Extents,
    names: tuple[str, ...],
    layouts: tuple[Layout | None, ...],
    numbers: Numbers = (),
    *,
    strided: bool = False,
) -> Launch:
    """One launch of all parts, with a coefficient table, and room for statistics that nobody asked for."""
    fields, room = _table(extents.C, _dtype(names, layouts))
    fields |= {**_extents(extents), **_numbers(numbers)}
    kernels: Kernels = ()
    for part in parts:
        kernels += part.kernels
        fields |= part.fields
        room |= part.room
    keeps = tuple(array for part in parts for array in part.keeps)
    return _prepared(kernels, names, layouts, fields, room, strided, keeps)


def _vectors(C: int, names: Collection[str], wanted: Collection[str]) -> Fields:
    """Room for float64 vectors that are not among the arguments."""
    return {name: 8 * C for name in wanted if name not in names}


@kept(plan.KEPT_BYTES)
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
    kind, run = _pass(what, extents, limit, names, layouts)
    table = Part(
        _over_channels(before, _dtype(names, layouts)), {}, _vectors(extents.C, names, ("mean", "var", "invstd"))
    )
    return _joined((table, run), extents, names, layouts, numbers, strided=kind == "strided")


@kept(plan.KEPT_BYTES)
def reduction(
    before: tuple[str, ...],
    what: tuple[str, ...],
    extents: Extents,
    start: int,
    limit: int,
    names: tuple[str, ...],
    *layouts: Layout | None,
) -> Launch:
    """Node rows of a part of a batch, merged to maximal aligned blocks."""
    kind, run = _reduction(what, extents, start, limit, names, layouts)
    table = Part(_over_channels(before, _dtype(names, layouts)), {}, {})
    return _joined((table, run), extents, names, layouts, strided=kind == "strided")


@kept(plan.KEPT_BYTES)
def root(
    what: str,
    C: int,
    blocks: tuple[Block, ...],
    row_bytes: int,
    limit: int,
    names: tuple[str, ...],
    *layouts: Layout | None,
) -> Launch:
    """The merges of neighbouring blocks into the first, and what that holds then."""
    steps = plan.table_of(root_order(blocks))
    fields = {"channels": C, "node_row": row_bytes, "steps": len(steps), "step_table": address_of(steps)}
    return _prepared(((kernel("merge_rows", "", what), 1),), names, layouts, fields, keeps=(steps,))


@kept(plan.KEPT_BYTES)
def train(
    options: tuple[Any, ...],
    extents: Extents,
    numbers: Numbers,
    limit: int,
    names: tuple[str, ...],
    *layouts: Layout | None,
) -> Launch:
    """Moments, statistics and y of a whole batch, a few channels at a time, or else in two passes; copies of gamma and
    beta, and what the running statistics become.
    """
    keep = ((kernel("keep"), 1),) if {"kept_gamma", "kept_beta"} & set(names) else ()
    rest = Part((*keep, *_update(names, layouts)), {}, {})
    run = _slab(("train_slab", *options), extents, limit, names, layouts)
    if run:
        return _joined((run, rest), extents, names, layouts, numbers)
    kind, pass_ = _pass(("normalize", *options), extents, limit, names, layouts)
    read = _only(("x", "mask"), names, layouts)
    read_as, reduced = _reduction(("moments",), extents, None, limit, *read)
    finish = Part(
        _over_channels(("finish",), _dtype(names, layouts)), {}, _vectors(extents.C, names, ("first", "second"))
    )
    strided = "strided" in (kind, read_as)
    return _joined((reduced, finish, pass_, rest), extents, names, layouts, numbers, strided=strided)


def _update(names: tuple[str, ...], layouts: tuple[Layout | None, ...]) -> Kernels:
    """The update of the running statistics, if they are among the arguments."""
    if "old_mean" not in names:
        return ()
    (running,) = _only(("old_mean",), names, layouts)[1]
    assert running is not None
    return ((kernel("update", "", CODES[running[0]]), 1),)


@kept(plan.KEPT_BYTES)
def backward(
    options: tuple[Any, ...],
    extents: Extents,
    limit: int,
    names: tuple[str, ...],
    *layouts: Layout | None,
) -> Launch:
    """Sums, dx, dgamma and dbeta of a whole batch: a few channels at a time, or else in two passes."""
    gate, frozen, _ = options
    dtype = _dtype(names, layouts)
    tabulate = Part(_over_channels(("tabulate",), dtype), {}, {})
    gradients = Part(((kernel("parameter_gradients"), 1),) if "dgamma" in names else (), {}, {})
    run = _slab(("backward_slab", *options), extents, limit, names, layouts)
    if run:
        return _joined((tabulate, run, gradients), extents, names, layouts)
    kind, pass_ = _pass(("input_gradient", *options), extents, limit, names, layouts)
    read = _only(("x", "g", "mask", "bits"), names, layouts)
    read_as, reduced = _reduction(("sums", gate), extents, None, limit, *read)
    gradient = Part(_over_channels(() if frozen else ("tabulate_gradient",), dtype), {}, {})
    strided = "strided" in (kind, read_as)
    return _joined((tabulate, reduced, gradient, pass_, gradients), extents, names, layouts, strided=strided)


def _only(
    wanted: tuple[str, ...], names: tuple[str, ...], layouts: tuple[Layout | None, ...]
) -> tuple[tuple[str, ...], tuple[Layout | None, ...]]:
    """The wanted ones among arguments."""
    return wanted, tuple(layouts[names.index(name)] for name in wanted)
