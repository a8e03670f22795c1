"""The backend protocol on the CPU: allocate what is returned, and launch kernels."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cubn import _nodes
from cubn._arrays import numpy_address
from cubn._tree import Block, Step, root_order
from cubn.backends import Extents, Gate, Nodes, Operand, Statistics, Vector
from cubn.backends.cpu import plan, prepare
from cubn.backends.cpu.plan import LANES
from cubn.backends.cpu.prepare import CODES, BitRows, launch

Doubles = NDArray[np.float64]
Sums = tuple[Doubles, Doubles]
Address = tuple[int]


class Bits(NamedTuple):
    """Which y passed a residual ReLU: one bit an element, in 16-bit words along channels (per_position) or along
    positions.
    """

    words: NDArray[np.uint16]
    per_position: bool


def at(a: NDArray[Any]) -> Address:
    return (numpy_address(a),)


def rows_of(count: int, length: int) -> Doubles:
    """(count, length) uninitialised, every row on its own cache lines."""
    padded = -(-length // LANES) * LANES
    memory = np.empty(count * padded + LANES, np.float64)
    start = -numpy_address(memory) % 128 // 8
    return memory[start : start + count * padded].reshape(count, padded)[:, :length]


def new_statistics(C: int) -> Statistics:
    return Statistics(np.zeros((), np.int64), *rows_of(4, C))


def addresses(s: Statistics) -> dict[str, Address]:
    return {"count": at(s.count), "mean": at(s.mean), "m2": at(s.m2), "var": at(s.var), "invstd": at(s.invstd)}


def new_bits(extents: Extents, kind: str) -> Bits:
    N, C, S = extents
    if kind in ("channels", "single"):
        return Bits(np.empty((N, S, -(-C // LANES)), np.uint16), True)
    return Bits(np.empty((N, C, -(-S // LANES)), np.uint16), False)


def rows_in(bits: Bits | None) -> BitRows | None:
    return bits and BitRows(numpy_address(bits.words), bits.per_position, *bits.words.strides[:2])


@functools.lru_cache(1024)
def program(steps: tuple[Step, ...], counts: tuple[int, ...]) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """The steps with the counts they merge, as the kernel reads them; and the counts of all rows in the end."""
    rows = list(counts)
    table = np.empty((len(steps), 4), np.int64)
    for i, (a, b) in enumerate(steps):
        table[i] = a, b, rows[a], rows[b]
        rows[a] += rows[b]
    return table, tuple(rows)


class Rows(NamedTuple):
    """Nodes with their parts apart: int64 (rows,) and twice float64 (rows, C)."""

    blocks: tuple[Block, ...]
    count: Any
    first: Doubles
    second: Doubles


def merged(nodes: Rows, steps: tuple[Step, ...], what: str) -> Rows:
    """The same arrays with the steps' merges done; rows merged into a left neighbour are spent."""
    if not steps:
        return nodes
    table, counts = program(steps, tuple(nodes.count.tolist()))
    C = nodes.first.shape[1]
    arrays = {"rows": at(table), "node_first": at(nodes.first), "node_second": at(nodes.second)}
    launch(prepare.merging, what, C, len(steps), **arrays)
    return nodes._replace(count=np.array(counts, np.int64))


def kept(nodes: Rows, rows: tuple[int, ...]) -> Rows:
    if len(rows) == len(nodes.count):
        return nodes
    index = list(rows)
    return Rows(nodes.blocks, nodes.count[index], nodes.first[index], nodes.second[index])


def root_of(nodes: Rows) -> tuple[NDArray[np.int64], Doubles, Doubles]:
    """The first node; zeros where there is none."""
    if not nodes.blocks:
        C = nodes.first.shape[1]
        return np.zeros((), np.int64), np.zeros(C), np.zeros(C)
    return np.array(nodes.count[0]), nodes.first[0], nodes.second[0]


def reduced(
    what: str,
    extents: Extents,
    start: int,
    *,
    whole: bool = False,
    before: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
    **arguments: tuple[Any, ...] | None,
) -> Rows:
    """Node rows, merged to maximal aligned blocks; or, of a whole batch, to one node."""
    N, C, _ = extents
    if 0 in extents:
        return Rows((), np.zeros(0, np.int64), np.zeros((0, C)), np.zeros((0, C)))
    cut = plan.reduction(extents, prepare.kind(extents, **arguments), start)
    rows = len(cut.table)
    nodes = Rows(cut.blocks, np.empty(rows, np.int64), np.empty((rows, C)), np.empty((rows, C)))
    into = {"node_count": at(nodes.count), "node_first": at(nodes.first), "node_second": at(nodes.second)}
    launch(prepare.reduction, before, (what, *options), extents, start, **arguments, **into)
    if whole:
        tree = merged(nodes, cut.to_root, what)
        return Rows(((start, start + N),), tree.count[:1], tree.first[:1], tree.second[:1])
    return kept(merged(nodes, cut.steps, what), cut.kept)


def rooted(nodes: Nodes, what: str) -> Rows:
    """All of them merged into the first row."""
    copies = Rows(nodes.blocks, nodes.count.copy(), nodes.first.copy(), nodes.second.copy())
    return merged(copies, root_order(nodes.blocks), what)


class CpuBackend:
    """See cubn.backends.Backend."""

    name = "cpu"

    device = None

    def to_host(self, array: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        if out is None:
            return array.copy()
        out[...] = array
        return out

    def from_host(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def staging(self, shape: tuple[int, ...]) -> Doubles:
        return np.empty(shape)

    def keep(self, parameter: Vector, C: int) -> tuple[NDArray[Any], Vector]:
        storage = np.dtype("uint16" if parameter.dtype == "bfloat16" else parameter.dtype)
        step = parameter.stride * storage.itemsize
        low = parameter.pointer + min(0, step * (C - 1))
        memory = memoryview((ctypes.c_char * (abs(step) * (C - 1) + storage.itemsize)).from_address(low))
        values = np.ndarray((C,), storage, memory, parameter.pointer - low, (step,)).copy()
        return values, Vector(numpy_address(values), parameter.dtype, 1)

    def moments(self, extents: Extents, x: Operand, mask: Operand | None, start: int) -> Nodes:
        return _nodes.joined(*reduced("moments", extents, start, x=x, mask=mask))

    def root(self, nodes: Nodes) -> tuple[NDArray[np.int64], Doubles, Doubles]:
        return root_of(rooted(nodes, "moments"))

    def root_sums(self, nodes: Nodes) -> Sums:
        return root_of(rooted(nodes, "sums"))[1:]

    def statistics(self, count: NDArray[np.int64], mean: Doubles, m2: Doubles, eps: float) -> Statistics:
        found = new_statistics(len(mean))
        found.count[...] = count
        arguments = {"first": at(mean), "second": at(m2), **addresses(found)}
        launch(prepare.per_channel, "statistics", (), len(mean), (("eps", eps),), **arguments)
        return found

    def frozen_statistics(self, running_mean: Vector, running_var: Vector, C: int, eps: float) -> Statistics:
        found = new_statistics(C)
        arguments = {"old_mean": running_mean, "old_var": running_var, **addresses(found)}
        launch(prepare.per_channel, "frozen", (), C, (("eps", eps),), **arguments)
        return found

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
        operands = {"x": x, "y": y, "g": residual, "mask": mask}
        bits = new_bits(extents, prepare.kind(extents, **operands)) if keep_bits else None
        if 0 in extents:
            return bits
        what = ("normalize", residual is not None, relu, keep_bits)
        given = {"gamma": gamma, "beta": beta, "bits": rows_in(bits), **addresses(statistics)}
        launch(prepare.elementwise, ("tabulate",), what, extents, (), **operands, **given)
        return bits

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
        launch(
            prepare.elementwise,
            ("tabulate_frozen",),
            ("normalize", residual is not None, relu, False),
            extents,
            (("eps", eps),),
            x=x,
            y=y,
            g=residual,
            mask=mask,
            old_mean=running_mean,
            old_var=running_var,
            gamma=gamma,
            beta=beta,
        )

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
        operands = {"x": x, "y": y, "g": residual, "mask": mask}
        found = new_statistics(extents.C)
        bits = new_bits(extents, prepare.kind(extents, **operands)) if keep_bits else None
        options, numbers = (residual is not None, relu, keep_bits), (("eps", eps),)
        given = {**operands, "gamma": gamma, "beta": beta, "bits": rows_in(bits), **addresses(found)}
        if launch(prepare.fused, (), ("train_slab", *options), extents, numbers, **given):
            return found, bits
        count, mean, m2 = root_of(reduced("moments", extents, 0, whole=True, x=x, mask=mask))
        if 0 in extents:
            return self.statistics(count, mean, m2, eps), bits
        found.count[...] = count
        given |= {"first": at(mean), "second": at(m2)}
        launch(prepare.elementwise, ("finish",), ("normalize", *options), extents, numbers, **given)
        return found, bits

    def update(
        self,
        statistics: Statistics,
        old: tuple[Vector, Vector],
        new: tuple[Vector, Vector],
        tracked: NDArray[np.int64],
        skipped: NDArray[np.int64],
        momentum: float | None,
    ) -> None:
        numbers = (("momentum", momentum or 0.0), ("cumulative", int(momentum is None)))
        vectors = dict(zip(("old_mean", "old_var", "new_mean", "new_var"), (*old, *new), strict=True))
        arguments = {**vectors, "tracked": at(tracked), "skipped": at(skipped), **addresses(statistics)}
        option = ("", CODES[old[0].dtype])
        launch(prepare.per_channel, "update", option, len(tracked), numbers, **arguments)

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
        return _nodes.joined(*self._sums(extents, dy, x, statistics, gamma, beta, mask=mask, gate=gate, start=start))

    def _sums(
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
        start: int = 0,
        whole: bool = False,
    ) -> Rows:
        given: Any = {"gamma": gamma, "beta": beta, "bits": rows_in(gate.bits), **addresses(statistics)}
        how: Any = {"whole": whole, "before": ("tabulate",), "options": (gate.kind,)}
        return reduced("sums", extents, start, **how, x=x, g=dy, mask=mask, **given)

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
        given: Any = {"x": x, "y": dx, "g": dy, "r": dresidual, "mask": mask, "bits": rows_in(gate.bits)}
        given |= {"gamma": gamma, "beta": beta, **addresses(statistics)}
        before: tuple[str, ...] = ("tabulate",)
        if sums is not None:
            before = ("tabulate", "tabulate_gradient")
            given |= {"first": at(sums[0]), "second": at(sums[1])}
        what = ("input_gradient", gate.kind, sums is None, dresidual is not None)
        launch(prepare.elementwise, before, what, extents, (), **given)

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
        first, second = rows_of(2, extents.C)
        given: Any = {"x": x, "y": dx, "g": dy, "r": dresidual, "mask": mask, "bits": rows_in(gate.bits)}
        given |= {"gamma": gamma, "beta": beta, **addresses(statistics), "first": at(first), "second": at(second)}
        what = ("backward_slab", gate.kind, frozen, dresidual is not None)
        if launch(prepare.fused, ("tabulate",), what, extents, (), **given):
            return first, second
        common: Any = {"mask": mask, "gate": gate}
        _, first, second = root_of(self._sums(extents, dy, x, statistics, gamma, beta, **common, whole=True))
        used = None if frozen else (first, second)
        self.backward_apply(extents, dy, x, dx, dresidual, statistics, gamma, beta, used, **common)
        return first, second

    def parameter_gradients(self, statistics: Statistics, sums: Sums, dgamma: Vector, dbeta: Vector) -> None:
        vectors = {"gamma": dgamma, "beta": dbeta}
        arguments = {**vectors, "first": at(sums[0]), "second": at(sums[1]), **addresses(statistics)}
        launch(prepare.per_channel, "parameter_gradients", (), len(sums[0]), (), **arguments)
