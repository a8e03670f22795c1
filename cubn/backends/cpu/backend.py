"""The backend protocol on the CPU: choose a plan, fill the parameters, run the kernel."""

from __future__ import annotations

import ctypes
import functools
import struct
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cubn._arrays import numpy_address
from cubn._tree import Step, pair_order, root_order
from cubn.backends import Extents, Gate, Nodes, Operand, Statistics, Vector, threads
from cubn.backends.cpu import plan, pool
from cubn.backends.cpu.compile import Kernel, compiled
from cubn.backends.cpu.launch import FIELDS, parameters

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "bool": 1}
CODES = {"float16": 1, "bfloat16": 2, "float32": 3, "float64": 4}  # as in channels.py
LANES = 16

Doubles = NDArray[np.float64]
Sums = tuple[Doubles, Doubles]
Fields = dict[str, int]


class Bits(NamedTuple):
    """Which y passed a residual ReLU: one bit an element, in 16-bit words along channels (per_position) or along
    positions.
    """

    words: NDArray[np.uint16]
    per_position: bool


@functools.cache
def kernel(name: str, dtype: str = "", *options: Any) -> Kernel:
    """A kernel of kernels.py by name, specialised; compiled when first asked for."""

    def build() -> Callable[[int, int], None]:
        from cubn.backends.cpu import kernels

        return kernels.build(name, dtype, options)

    return compiled(
        "-".join(filter(None, [name, dtype, *(str(int(o) if isinstance(o, bool) else o) for o in options)])), build
    )


@functools.lru_cache(256)
def double_bits(number: float) -> int:
    return int(struct.unpack("q", struct.pack("d", number))[0])


def at(a: NDArray[Any] | None) -> int:
    """An array's address; 0 for none."""
    return 0 if a is None else numpy_address(a)


def rows_of(count: int, length: int, dtype: Any = np.float64) -> NDArray[Any]:
    """(count, length) uninitialised, every row on its own cache lines and padded to whole vectors of 16."""
    size = np.dtype(dtype).itemsize
    padded = -(-length // LANES) * LANES
    memory = np.empty(count * padded + 128 // size, dtype)
    start = (-at(memory) % 128) // size
    return memory[start : start + count * padded].reshape(count, padded)[:, :length]


def launch(run: Kernel, tasks: int, workers: int, fields: Fields) -> None:
    block = parameters(tasks=tasks, **fields)
    pool.run(run, block.buffer_info()[0], workers)


def operand_fields(name: str, o: Operand | None) -> Fields:
    if o is None:
        return {}
    size = ITEMSIZE[o.dtype]
    position = o.position_strides[0] if o.position_strides else 0
    return {
        name: o.pointer,
        f"{name}_sample": o.sample_stride * size,
        f"{name}_channel": o.channel_stride * size,
        f"{name}_position": position * size,
    }


def position_fields(S: int, operands: dict[str, Operand | None]) -> tuple[list[NDArray[np.int64]], Fields]:
    """For arrays of any strides: where each position is, in bytes, per operand; and the mask itself."""
    tables, fields = [], {}
    for name, o in operands.items():
        if o is None:
            continue
        offsets = np.zeros((), np.int64)
        for extent, stride in zip(o.position_shape, o.position_strides, strict=True):
            offsets = np.add.outer(offsets, np.arange(extent, dtype=np.int64) * (stride * ITEMSIZE[o.dtype]))
        tables.append(np.ascontiguousarray(np.broadcast_to(offsets.reshape(-1), (S,))))
        fields[f"{name}_offsets"] = at(tables[-1])
        if name == "mask":
            fields |= {"mask": o.pointer, "mask_sample": o.sample_stride}
    return tables, fields


def vector_fields(name: str, v: Vector | None) -> Fields:
    if v is None:
        return {}
    return {name: v.pointer, f"{name}_code": CODES[v.dtype], f"{name}_stride": v.stride * ITEMSIZE[v.dtype]}


def bits_fields(bits: Bits | None) -> Fields:
    if bits is None:
        return {}
    sample, row = bits.words.strides[:2]
    along = {"bits_position": row} if bits.per_position else {"bits_channel": row}
    return {
        "bits": at(bits.words),
        "bits_sample": sample,
        **along,
        **({"bits_channel": 0} if bits.per_position else {}),
    }


def statistics_fields(s: Statistics) -> Fields:
    return {"count": at(s.count), "mean": at(s.mean), "m2": at(s.m2), "var": at(s.var), "invstd": at(s.invstd)}


def extents_fields(extents: Extents) -> Fields:
    return dict(zip(("samples", "channels", "positions"), extents, strict=True))


def scratch_fields(offsets: tuple[int, ...], size: int, workers: int) -> tuple[NDArray[np.uint8], Fields]:
    memory = np.empty(size * workers + 64, np.uint8)
    names = ("at_pivot", "at_counts", "at_columns", "at_buffer", "at_node", "at_tiles", "at_samples", "at_spread")
    start = -(-at(memory) // 64) * 64
    return memory, {"scratch": start, "scratch_size": size, **dict(zip(names, offsets, strict=True))}


class Table(NamedTuple):
    """The coefficient table: six rows of acc, padded to whole vectors."""

    memory: NDArray[Any]

    @classmethod
    def empty(cls, C: int, dtype: str) -> Table:
        return cls(rows_of(6, C, np.float64 if dtype == "float64" else np.float32))

    def fields(self) -> Fields:
        return {"coefficients": at(self.memory), "coefficient_row": self.memory.strides[0]}


POINTERS = tuple(FIELDS.index(name) for name in ("x", "y", "g", "old_mean", "old_var", "gamma", "beta"))


class Inference(NamedTuple):
    """A call of `CpuBackend.forward` but for the addresses: everything that follows from shapes, strides and dtypes.

    `block` is the parameters with room for statistics and table behind them; `inside` lists the fields that point
    there.
    """

    block: array[int]
    inside: tuple[tuple[int, int], ...]
    tabulate: Kernel
    normalize: Kernel
    tasks: int
    size: int
    tables: list[NDArray[np.int64]]


@functools.lru_cache(1024)
def inference(extents: Extents, eps: float, relu: bool, *layouts: tuple[Any, ...] | None) -> Inference:
    """`layouts` are those of x, y, residual, running mean and var, gamma and beta, as they come without their
    addresses.
    """
    x, y, residual = (None if layout is None else Operand(0, *layout) for layout in layouts[:3])
    mean, var, gamma, beta = (None if layout is None else Vector(0, *layout) for layout in layouts[3:])
    assert x is not None and y is not None and mean is not None and var is not None
    operands = [o for o in (x, y, residual) if o is not None]
    kind = plan.kind_of(extents, operands)
    N, C, S = extents
    tasks, block = plan.elementwise_tasks(extents, kind, ITEMSIZE[x.dtype])
    tables, positions = position_fields(S, {"x": x, "y": y, "g": residual}) if kind == "strided" else ([], {})
    padded, acc = -(-C // LANES) * LANES, 8 if x.dtype == "float64" else 4
    at_table = 8 * len(FIELDS) + 24 * C
    fields = {
        **extents_fields(extents),
        **operand_fields("x", x),
        **operand_fields("y", y),
        **operand_fields("g", residual),
        **_running_fields("old", mean, var),
        **vector_fields("gamma", gamma),
        **vector_fields("beta", beta),
        **positions,
        "tasks": tasks,
        "block": block,
        "eps": double_bits(eps),
        "coefficient_row": padded * acc,
        "stream": plan.streams(extents, ITEMSIZE[x.dtype]),
    }
    inside = {
        "mean": 8 * len(FIELDS),
        "var": 8 * len(FIELDS) + 8 * C,
        "invstd": 8 * len(FIELDS) + 16 * C,
        "coefficients": at_table,
    }
    memory = parameters(**fields)
    memory.extend([0] * (3 * C + 6 * padded * acc // 8))
    return Inference(
        memory,
        tuple((FIELDS.index(name), offset) for name, offset in inside.items()),
        kernel("tabulate_frozen", _acc(x.dtype)),
        kernel("normalize", x.dtype, kind, residual is not None, relu, False),
        tasks,
        N * C * S * ITEMSIZE[x.dtype],
        tables,
    )


def new_statistics(C: int) -> Statistics:
    return Statistics(np.zeros((), np.int64), *rows_of(4, C))


def empty_nodes(C: int) -> Nodes:
    return Nodes((), np.zeros(0, np.int64), np.zeros((0, C)), np.zeros((0, C)))


@functools.lru_cache(1024)
def program(steps: tuple[Step, ...], counts: tuple[int, ...]) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """The steps with the counts they merge, as the kernel reads them; and the counts of all rows in the end."""
    rows = list(counts)
    table = np.empty((len(steps), 4), np.int64)
    for i, (a, b) in enumerate(steps):
        table[i] = a, b, rows[a], rows[b]
        rows[a] += rows[b]
    return table, tuple(rows)


steps_to_root = functools.lru_cache(1024)(root_order)


def merged(nodes: Nodes, steps: tuple[Step, ...], what: str) -> Nodes:
    """The same arrays with the steps' merges done; rows merged into a left neighbour are spent."""
    if not steps:
        return nodes
    table, counts = program(steps, tuple(nodes.count.tolist()))
    C = nodes.first.shape[1]
    chunk = max(LANES, -(-C // 8 // LANES) * LANES)
    tasks = -(-C // chunk)
    workers = plan.threads_for(16 * len(steps) * C, tasks, threads.get_num_threads())
    fields = {
        "channels": C,
        "chunk": chunk,
        "rows": at(table),
        "steps": len(steps),
        "node_first": at(nodes.first),
        "node_second": at(nodes.second),
    }
    launch(kernel("merge_rows", "", what), tasks, workers, fields)
    return nodes._replace(count=np.array(counts, np.int64))


def kept(nodes: Nodes, rows: tuple[int, ...]) -> Nodes:
    if len(rows) == len(nodes.count):
        return nodes
    index = list(rows)
    return Nodes(nodes.blocks, nodes.count[index], nodes.first[index], nodes.second[index])


class CpuBackend:
    """See cubn.backends.Backend."""

    name = "cpu"

    def to_host(self, array: NDArray[Any]) -> NDArray[Any]:
        return array.copy()

    def from_host(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def keep(self, parameter: Vector, C: int) -> tuple[NDArray[Any], Vector]:
        storage = np.dtype("uint16" if parameter.dtype == "bfloat16" else parameter.dtype)
        step = parameter.stride * storage.itemsize
        low = parameter.pointer + min(0, step * (C - 1))
        memory = memoryview((ctypes.c_char * (abs(step) * (C - 1) + storage.itemsize)).from_address(low))
        values = np.ndarray((C,), storage, memory, parameter.pointer - low, (step,)).copy()
        return values, Vector(at(values), parameter.dtype, 1)

    def moments(self, extents: Extents, x: Operand, mask: Operand | None, start: int) -> Nodes:
        return self._reduce("moments", extents, x, None, mask, start, (), {})

    def _reduce(
        self,
        what: str,
        extents: Extents,
        x: Operand,
        dy: Operand | None,
        mask: Operand | None,
        start: int,
        options: tuple[str, ...],
        fields: Fields,
        bits: Bits | None = None,
        *,
        whole: bool = False,
    ) -> Nodes:
        """Node rows, merged to maximal aligned blocks; or, of a whole batch, to one node."""
        N, C, S = extents
        if N == 0 or S == 0 or C == 0:
            return empty_nodes(C)
        kind = self._kind(extents, [o for o in (x, dy) if o is not None], mask, bits)
        cut = plan.reduction(extents, kind, start)
        rows = len(cut.table)
        nodes = Nodes(cut.blocks, np.empty(rows, np.int64), np.empty((rows, C)), np.empty((rows, C)))
        tasks = rows * cut.chunks
        workers = plan.threads_for(N * C * S * ITEMSIZE[x.dtype], tasks, threads.get_num_threads())
        memory, scratch = scratch_fields(cut.offsets, cut.scratch, workers)
        full, tail = plan.column_tables(S, ITEMSIZE[x.dtype])
        tables, positions = position_fields(S, {"x": x, "g": dy, "mask": mask}) if kind == "strided" else ([], {})
        launch(
            kernel(what, x.dtype, kind, *options),
            tasks,
            workers,
            {
                **positions,
                **extents_fields(extents),
                **operand_fields("x", x),
                **operand_fields("g", dy),
                **bits_fields(bits),
                **scratch,
                **fields,
                "rows": at(cut.table),
                "chunk": cut.chunk,
                "chunks": cut.chunks,
                "node_first": at(nodes.first),
                "node_second": at(nodes.second),
                "node_count": at(nodes.count),
                "tables": at(full),
                "tail": at(tail),
            },
        )
        del memory, tables
        if whole:
            tree = merged(nodes, cut.to_root, what)
            return Nodes(((start, start + N),), tree.count[:1], tree.first[:1], tree.second[:1])
        return kept(merged(nodes, cut.steps, what), cut.kept)

    def _kind(self, extents: Extents, operands: list[Operand], mask: Operand | None, bits: Bits | None) -> str:
        if mask is not None:
            return "strided"
        kind = plan.kind_of(extents, operands)
        if bits is not None and bits.per_position != (kind in ("channels", "single")):
            return "strided"
        return kind

    def merge(self, nodes: Nodes) -> Nodes:
        steps, rows, blocks = pair_order(nodes.blocks)
        return kept(merged(_copy(nodes), steps, "moments")._replace(blocks=blocks), rows)

    def root(self, nodes: Nodes) -> tuple[NDArray[np.int64], Doubles, Doubles]:
        if not nodes.blocks:
            C = nodes.first.shape[1]
            return np.zeros((), np.int64), np.zeros(C), np.zeros(C)
        steps = steps_to_root(nodes.blocks)
        tree = merged(_copy(nodes) if steps else nodes, steps, "moments")
        return np.array(tree.count[0]), tree.first[0], tree.second[0]

    def root_sums(self, nodes: Nodes) -> Sums:
        if not nodes.blocks:
            C = nodes.first.shape[1]
            return np.zeros(C), np.zeros(C)
        steps = steps_to_root(nodes.blocks)
        tree = merged(_copy(nodes) if steps else nodes, steps, "sums")
        return tree.first[0], tree.second[0]

    def statistics(self, count: NDArray[np.int64], mean: Doubles, m2: Doubles, eps: float) -> Statistics:
        s = new_statistics(len(mean))
        s.count[...] = count
        fields = {
            "channels": len(mean),
            "first": at(mean),
            "second": at(m2),
            "eps": double_bits(eps),
            **statistics_fields(s),
        }
        launch(kernel("statistics"), 1, 1, fields)
        return s

    def frozen_statistics(self, running_mean: Vector, running_var: Vector, C: int, eps: float) -> Statistics:
        s = new_statistics(C)
        fields = {
            "channels": C,
            "eps": double_bits(eps),
            **statistics_fields(s),
            **_running_fields("old", running_mean, running_var),
        }
        launch(kernel("frozen"), 1, 1, fields)
        return s

    def normalize(
        self,
        extents: Extents,
        x: Operand,
        y: Operand,
        statistics: Statistics,
        gamma: Vector | None,
        beta: Vector | None,
        *,
        mask: Operand | None,
        residual: Operand | None,
        relu: bool,
        keep_bits: bool,
    ) -> Bits | None:
        if 0 in extents:
            return None
        table = self._table(extents.C, x.dtype, statistics, gamma, beta)
        return self._normalize(extents, x, y, table, mask, residual, relu, keep_bits)

    def _table(self, C: int, dtype: str, statistics: Statistics, gamma: Vector | None, beta: Vector | None) -> Table:
        table = Table.empty(C, dtype)
        fields = {
            "channels": C,
            **table.fields(),
            **statistics_fields(statistics),
            **vector_fields("gamma", gamma),
            **vector_fields("beta", beta),
        }
        launch(kernel("tabulate", _acc(dtype)), 1, 1, fields)
        return table

    def _normalize(
        self,
        extents: Extents,
        x: Operand,
        y: Operand,
        table: Table,
        mask: Operand | None,
        residual: Operand | None,
        relu: bool,
        keep_bits: bool,
    ) -> Bits | None:
        operands = [o for o in (x, y, residual) if o is not None]
        kind = self._kind(extents, operands, mask, None)
        bits = self._new_bits(extents, kind) if keep_bits else None
        name = ("normalize", x.dtype, kind, residual is not None, relu, keep_bits)
        self._elementwise(
            name,
            extents,
            operands,
            {
                **operand_fields("x", x),
                **operand_fields("y", y),
                **operand_fields("g", residual),
                **bits_fields(bits),
                **table.fields(),
            },
            {"x": x, "y": y, "g": residual, "mask": mask},
        )
        return bits

    def _elementwise(
        self,
        name: tuple[Any, ...],
        extents: Extents,
        operands: list[Operand],
        fields: Fields,
        named: dict[str, Operand | None],
    ) -> None:
        N, C, S = extents
        kind, size = name[2], ITEMSIZE[operands[0].dtype]
        tasks, block = plan.elementwise_tasks(extents, kind, size)
        workers = plan.threads_for(N * C * S * size, tasks, threads.get_num_threads())
        tables, positions = position_fields(S, named) if kind == "strided" else ([], {})
        fields = {
            **extents_fields(extents),
            **fields,
            **positions,
            "block": block,
            "stream": plan.streams(extents, size),
        }
        launch(kernel(*name), tasks, workers, fields)
        del tables

    def _new_bits(self, extents: Extents, kind: str) -> Bits:
        N, C, S = extents
        if kind in ("channels", "single"):
            return Bits(np.empty((N, S, -(-C // LANES)), np.uint16), True)
        return Bits(np.empty((N, C, -(-S // LANES)), np.uint16), False)

    def forward(
        self,
        extents: Extents,
        x: Operand,
        y: Operand,
        running_mean: Vector,
        running_var: Vector,
        eps: float,
        gamma: Vector | None,
        beta: Vector | None,
        *,
        mask: Operand | None,
        residual: Operand | None,
        relu: bool,
    ) -> None:
        if 0 in extents:
            return
        if mask is not None:
            found = self.frozen_statistics(running_mean, running_var, extents.C, eps)
            self.normalize(extents, x, y, found, gamma, beta, mask=mask, residual=residual, relu=relu, keep_bits=False)
            return
        given = (x, y, residual, running_mean, running_var, gamma, beta)
        ready = inference(extents, eps, relu, *(v and v[1:] for v in given))
        block = ready.block[:]
        start = block.buffer_info()[0]
        for place, offset in ready.inside:
            block[place] = start + offset
        for place, one in zip(POINTERS, given, strict=True):
            if one is not None:
                block[place] = one.pointer
        ready.tabulate.call(start, 0)
        workers = plan.threads_for(ready.size, ready.tasks, threads.get_num_threads())
        pool.run(ready.normalize, start, workers)

    def train(
        self,
        extents: Extents,
        x: Operand,
        y: Operand,
        eps: float,
        gamma: Vector | None,
        beta: Vector | None,
        *,
        mask: Operand | None,
        residual: Operand | None,
        relu: bool,
        keep_bits: bool,
    ) -> tuple[Statistics, Bits | None]:
        N, C, S = extents
        operands = [o for o in (x, y, residual) if o is not None]
        kind = self._kind(extents, operands, mask, None)
        size = N * C * S * ITEMSIZE[x.dtype]
        limit = plan.threads_for(size, C, threads.get_num_threads())
        slab = plan.slab(extents, kind, ITEMSIZE[x.dtype], limit) if size else None
        if slab is None:
            return self._train_in_two(extents, x, y, eps, gamma, beta, mask, residual, relu, keep_bits)
        found, table = new_statistics(C), Table.empty(C, x.dtype)
        bits = self._new_bits(extents, kind) if keep_bits else None
        workers = min(limit, slab.tasks)
        memory, scratch = scratch_fields(slab.offsets, slab.scratch, workers)
        full, tail = plan.column_tables(S, ITEMSIZE[x.dtype])
        launch(
            kernel("train_slab", x.dtype, kind, residual is not None, relu, keep_bits),
            slab.tasks,
            workers,
            {
                **extents_fields(extents),
                **operand_fields("x", x),
                **operand_fields("y", y),
                **operand_fields("g", residual),
                **bits_fields(bits),
                **table.fields(),
                **scratch,
                **statistics_fields(found),
                **vector_fields("gamma", gamma),
                **vector_fields("beta", beta),
                "eps": double_bits(eps),
                "chunk": slab.chunk,
                "tables": at(full),
                "tail": at(tail),
                "stream": plan.streams(extents, ITEMSIZE[x.dtype]),
            },
        )
        del memory
        return found, bits

    def _train_in_two(
        self,
        extents: Extents,
        x: Operand,
        y: Operand,
        eps: float,
        gamma: Vector | None,
        beta: Vector | None,
        mask: Operand | None,
        residual: Operand | None,
        relu: bool,
        keep_bits: bool,
    ) -> tuple[Statistics, Bits | None]:
        """`train` where statistics and y are passes of their own."""
        nodes = self._reduce("moments", extents, x, None, mask, 0, (), {}, whole=0 not in extents)
        count, mean, m2 = self.root(nodes)
        found, table = new_statistics(extents.C), Table.empty(extents.C, x.dtype)
        found.count[...] = count
        fields = {
            "channels": extents.C,
            "first": at(mean),
            "second": at(m2),
            "eps": double_bits(eps),
            **statistics_fields(found),
            **table.fields(),
            **vector_fields("gamma", gamma),
            **vector_fields("beta", beta),
        }
        launch(kernel("finish", _acc(x.dtype)), 1, 1, fields)
        if 0 in extents:
            return found, None
        return found, self._normalize(extents, x, y, table, mask, residual, relu, keep_bits)

    def update(
        self,
        statistics: Statistics,
        old: tuple[Vector, Vector],
        new: tuple[Vector, Vector],
        tracked: NDArray[np.int64],
        skipped: NDArray[np.int64],
        momentum: float | None,
    ) -> None:
        fields = {
            "channels": len(tracked),
            **statistics_fields(statistics),
            **_running_fields("old", *old),
            **_running_fields("new", *new),
            "tracked": at(tracked),
            "skipped": at(skipped),
            "momentum": double_bits(momentum or 0.0),
            "cumulative": int(momentum is None),
        }
        launch(kernel("update", "", CODES[old[0].dtype]), 1, 1, fields)

    def backward_sums(
        self,
        extents: Extents,
        dy: Operand,
        x: Operand,
        statistics: Statistics,
        gamma: Vector | None,
        beta: Vector | None,
        *,
        mask: Operand | None,
        gate: Gate,
        start: int,
    ) -> Nodes:
        table = self._table(extents.C, x.dtype, statistics, gamma, beta)
        return self._reduce("sums", extents, x, dy, mask, start, (gate.kind,), table.fields(), gate.bits)

    def backward_apply(
        self,
        extents: Extents,
        dy: Operand,
        x: Operand,
        dx: Operand,
        dresidual: Operand | None,
        statistics: Statistics,
        gamma: Vector | None,
        beta: Vector | None,
        sums: Sums | None,
        *,
        mask: Operand | None,
        gate: Gate,
    ) -> None:
        if 0 in extents:
            return
        table = self._table(extents.C, x.dtype, statistics, gamma, beta)
        self._apply(extents, dy, x, dx, dresidual, statistics, table, sums, mask, gate)

    def _apply(
        self,
        extents: Extents,
        dy: Operand,
        x: Operand,
        dx: Operand,
        dresidual: Operand | None,
        statistics: Statistics,
        table: Table,
        sums: Sums | None,
        mask: Operand | None,
        gate: Gate,
    ) -> None:
        if sums is not None:
            fields = {
                "first": at(sums[0]),
                "second": at(sums[1]),
                "channels": extents.C,
                **table.fields(),
                **statistics_fields(statistics),
            }
            launch(kernel("tabulate_gradient", _acc(x.dtype)), 1, 1, fields)
        operands = [o for o in (x, dy, dx, dresidual) if o is not None]
        kind = self._kind(extents, operands, mask, gate.bits)
        name = ("input_gradient", x.dtype, kind, gate.kind, sums is None, dresidual is not None)
        self._elementwise(
            name,
            extents,
            operands,
            {
                **operand_fields("x", x),
                **operand_fields("g", dy),
                **operand_fields("y", dx),
                **operand_fields("r", dresidual),
                **bits_fields(gate.bits),
                **table.fields(),
            },
            {"x": x, "y": dx, "g": dy, "r": dresidual, "mask": mask},
        )

    def backward(
        self,
        extents: Extents,
        dy: Operand,
        x: Operand,
        dx: Operand,
        dresidual: Operand | None,
        statistics: Statistics,
        gamma: Vector | None,
        beta: Vector | None,
        *,
        frozen: bool,
        mask: Operand | None,
        gate: Gate,
    ) -> Sums:
        N, C, S = extents
        operands = [o for o in (x, dy, dx, dresidual) if o is not None]
        kind = self._kind(extents, operands, mask, gate.bits)
        size = N * C * S * ITEMSIZE[x.dtype]
        limit = plan.threads_for(size, C, threads.get_num_threads())
        slab = plan.slab(extents, kind, ITEMSIZE[x.dtype], limit) if size else None
        table = self._table(C, x.dtype, statistics, gamma, beta)
        if slab is None:
            nodes = self._reduce(
                "sums", extents, x, dy, mask, 0, (gate.kind,), table.fields(), gate.bits, whole=size > 0
            )
            sums = self.root_sums(nodes)
            if size:
                self._apply(extents, dy, x, dx, dresidual, statistics, table, None if frozen else sums, mask, gate)
            return sums
        first, second = rows_of(2, C)
        workers = min(limit, slab.tasks)
        memory, scratch = scratch_fields(slab.offsets, slab.scratch, workers)
        full, tail = plan.column_tables(S, ITEMSIZE[x.dtype])
        launch(
            kernel("backward_slab", x.dtype, kind, gate.kind, frozen, dresidual is not None),
            slab.tasks,
            workers,
            {
                **extents_fields(extents),
                **operand_fields("x", x),
                **operand_fields("g", dy),
                **operand_fields("y", dx),
                **operand_fields("r", dresidual),
                **bits_fields(gate.bits),
                **table.fields(),
                **scratch,
                **statistics_fields(statistics),
                "first": at(first),
                "second": at(second),
                "chunk": slab.chunk,
                "tables": at(full),
                "tail": at(tail),
                "stream": plan.streams(extents, ITEMSIZE[x.dtype]),
            },
        )
        del memory
        return first, second

    def parameter_gradients(self, statistics: Statistics, sums: Sums, dgamma: Vector, dbeta: Vector) -> None:
        fields = {
            "channels": len(sums[0]),
            "first": at(sums[0]),
            "second": at(sums[1]),
            **statistics_fields(statistics),
            **vector_fields("gamma", dgamma),
            **vector_fields("beta", dbeta),
        }
        launch(kernel("parameter_gradients"), 1, 1, fields)


def _acc(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _copy(nodes: Nodes) -> Nodes:
    return Nodes(nodes.blocks, nodes.count.copy(), nodes.first.copy(), nodes.second.copy())


def _running_fields(name: str, mean: Vector, var: Vector) -> Fields:
    size = ITEMSIZE[mean.dtype]
    return {
        f"{name}_mean": mean.pointer,
        f"{name}_mean_stride": mean.stride * size,
        f"{name}_var": var.pointer,
        f"{name}_var_stride": var.stride * size,
        "running_code": CODES[mean.dtype],
    }
