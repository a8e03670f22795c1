"""The backend protocol on the CPU: allocate what is returned, and launch kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cubn import _nodes
from cubn._arrays.numpy import address_of
from cubn.backends import Affine, Arrays, Extents, Gate, Nodes, Running, Statistics, Vector
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
    return (address_of(a),)


def rows_of(count: int, length: int) -> Doubles:
    """(count, length) uninitialised, every row on its own cache lines."""
    padded = -(-length // LANES) * LANES
    memory = np.empty(count * padded + LANES, np.float64)
    start = -address_of(memory) % 128 // 8
    return memory[start : start + count * padded].reshape(count, padded)[:, :length]


def new_statistics(C: int) -> Statistics:
    return Statistics(np.zeros((), np.int64), *rows_of(4, C))


def addresses(s: Statistics) -> dict[str, Address]:
    return {"count": at(s.count), "mean": at(s.mean), "m2": at(s.m2), "var": at(s.var), "invstd": at(s.invstd)}


def old(running: tuple[Vector, Vector]) -> dict[str, Vector]:
    return dict(zip(("old_mean", "old_var"), running, strict=True))


def moving(running: Running) -> dict[str, tuple[Any, ...]]:
    """The arguments of an update but for the statistics."""
    new = dict(zip(("new_mean", "new_var"), running.new, strict=True))
    return {**old(running.old), **new, "tracked": at(running.tracked), "skipped": at(running.skipped)}


def weight(running: Running) -> prepare.Numbers:
    """The numbers of an update."""
    return ("momentum", running.momentum or 0.0), ("cumulative", int(running.momentum is None))


def new_bits(extents: Extents, kind: str) -> Bits:
    N, C, S = extents
    if kind in ("channels", "single"):
        return Bits(np.empty((N, S, -(-C // LANES)), np.uint16), True)
    return Bits(np.empty((N, C, -(-S // LANES)), np.uint16), False)


def rows_in(bits: Bits | None) -> BitRows | None:
    return bits and BitRows(address_of(bits.words), bits.per_position, *bits.words.strides[:2])


def reduced(
    before: tuple[str, ...],
    what: tuple[str, ...],
    extents: Extents,
    start: int,
    **arguments: tuple[Any, ...] | None,
) -> Nodes:
    """Node rows, merged to maximal aligned blocks."""
    C = extents.C
    if 0 in extents:
        return Nodes((), np.zeros((0, 2 * C + 1)))
    cut = plan.reduction(extents, prepare.kind(extents, **arguments), start)
    rows = len(cut.table)
    parts: tuple[Any, ...] = np.empty(rows, np.int64), np.empty((rows, C)), np.empty((rows, C))
    into = dict(zip(("node_count", "node_first", "node_second"), map(at, parts), strict=True))
    launch(prepare.reduction, before, what, extents, start, **arguments, **into)
    return _nodes.joined(cut.blocks, *(part[list(cut.kept)] if len(cut.kept) < rows else part for part in parts))


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

    def new_vector(self, C: int) -> tuple[Doubles, Vector]:
        values = np.empty(C)
        return values, Vector(address_of(values), "float64", 1)

    def keep(self, parameter: Vector, C: int) -> tuple[Doubles, Vector]:
        values, vector = self.new_vector(C)
        launch(prepare.per_channel, "keep", (), C, (), gamma=parameter, kept_gamma=(vector.pointer,))
        return values, vector

    def moments(self, extents: Extents, arrays: Arrays, start: int) -> Nodes:
        return reduced((), ("moments",), extents, start, x=arrays.x, mask=arrays.mask)

    def root(self, nodes: Nodes) -> tuple[NDArray[np.int64], Doubles, Doubles]:
        return self._root("moments", nodes)

    def root_sums(self, nodes: Nodes) -> Sums:
        return self._root("sums", nodes)[1:]

    def _root(self, what: str, nodes: Nodes) -> tuple[NDArray[np.int64], Doubles, Doubles]:
        """Merged where they are."""
        C = nodes.table.shape[1] // 2
        count, (first, second) = np.zeros((), np.int64), np.zeros((2, C))
        if nodes.blocks:
            counts = nodes.count.copy()
            into = {"count": at(count), "first": at(first), "second": at(second)}
            given = {"node_count": at(counts), "node_first": at(nodes.first), "node_second": at(nodes.second)}
            launch(prepare.root, what, C, nodes.blocks, nodes.table.strides[0], **given, **into)
        return count, first, second

    def statistics(self, count: NDArray[np.int64], mean: Doubles, m2: Doubles, eps: float) -> Statistics:
        found = new_statistics(len(mean))
        found.count[...] = count
        arguments = {"first": at(mean), "second": at(m2), **addresses(found)}
        launch(prepare.per_channel, "statistics", (), len(mean), (("eps", eps),), **arguments)
        return found

    def frozen_statistics(self, running: tuple[Vector, Vector], C: int, eps: float) -> Statistics:
        found = new_statistics(C)
        arguments: Any = {**old(running), **addresses(found)}
        launch(prepare.per_channel, "frozen", (), C, (("eps", eps),), **arguments)
        return found

    def normalize(
        self,
        extents: Extents,
        arrays: Arrays,
        statistics: Statistics,
        affine: Affine,
        *,
        relu: bool,
        keep_bits: bool,
    ) -> Bits | None:
        given: Any = {**arrays._asdict(), **affine._asdict(), **addresses(statistics)}
        bits = new_bits(extents, prepare.kind(extents, **arrays._asdict())) if keep_bits else None
        if 0 in extents:
            return bits
        what = ("normalize", arrays.g is not None, relu, keep_bits)
        launch(prepare.elementwise, ("tabulate",), what, extents, (), **given, bits=rows_in(bits))
        return bits

    def forward(
        self,
        extents: Extents,
        arrays: Arrays,
        running: tuple[Vector, Vector],
        eps: float,
        affine: Affine,
        *,
        relu: bool,
    ) -> None:
        if 0 in extents:
            return
        given: Any = {**arrays._asdict(), **affine._asdict(), **old(running)}
        what = ("normalize", arrays.g is not None, relu, False)
        launch(prepare.elementwise, ("tabulate_frozen",), what, extents, (("eps", eps),), **given)

    def train(
        self,
        extents: Extents,
        arrays: Arrays,
        eps: float,
        affine: Affine,
        *,
        relu: bool,
        keep_bits: bool,
        kept: Affine | None = None,
        running: Running | None = None,
    ) -> tuple[Statistics, Bits | None]:
        found = new_statistics(extents.C)
        given: Any = {**arrays._asdict(), **affine._asdict(), **addresses(found)}
        bits = new_bits(extents, prepare.kind(extents, **arrays._asdict())) if keep_bits else None
        given["bits"] = rows_in(bits)
        options = arrays.g is not None, relu, keep_bits
        numbers: prepare.Numbers = (("eps", eps),)
        if kept:
            given |= {f"kept_{name}": (copy.pointer,) for name, copy in kept._asdict().items() if copy}
        if running:
            given |= moving(running)
            numbers += weight(running)
        launch(prepare.train, options, extents, numbers, **given)
        return found, bits

    def update(self, statistics: Statistics, running: Running) -> None:
        arguments: Any = {**moving(running), **addresses(statistics)}
        option = ("", CODES[running.old[0].dtype])
        launch(prepare.per_channel, "update", option, len(running.tracked), weight(running), **arguments)

    def backward_sums(
        self,
        extents: Extents,
        arrays: Arrays,
        statistics: Statistics,
        affine: Affine,
        *,
        gate: Gate,
        start: int,
    ) -> Nodes:
        read: Any = {"x": arrays.x, "g": arrays.g, "mask": arrays.mask, "bits": rows_in(gate.bits)}
        given: Any = {**read, **affine._asdict(), **addresses(statistics)}
        return reduced(("tabulate",), ("sums", gate.kind), extents, start, **given)

    def backward_apply(
        self,
        extents: Extents,
        arrays: Arrays,
        statistics: Statistics,
        affine: Affine,
        sums: Sums | None,
        *,
        gate: Gate,
    ) -> None:
        if 0 in extents:
            return
        given: Any = {**arrays._asdict(), **affine._asdict(), "bits": rows_in(gate.bits), **addresses(statistics)}
        before: tuple[str, ...] = ("tabulate",)
        if sums is not None:
            before = ("tabulate", "tabulate_gradient")
            given |= {"first": at(sums[0]), "second": at(sums[1])}
        what = ("input_gradient", gate.kind, sums is None, arrays.r is not None)
        launch(prepare.elementwise, before, what, extents, (), **given)

    def backward(
        self,
        extents: Extents,
        arrays: Arrays,
        statistics: Statistics,
        affine: Affine,
        *,
        frozen: bool,
        gate: Gate,
        parameters: tuple[Vector, Vector] | None = None,
    ) -> Sums:
        if 0 in extents:
            first, second = np.zeros((2, extents.C))
            if parameters:
                self.parameter_gradients(statistics, (first, second), *parameters)
            return first, second
        first, second = rows_of(2, extents.C)
        given: Any = {**arrays._asdict(), **affine._asdict(), "bits": rows_in(gate.bits), **addresses(statistics)}
        given |= {"first": at(first), "second": at(second)}
        if parameters:
            given |= zip(("dgamma", "dbeta"), parameters, strict=True)
        launch(prepare.backward, (gate.kind, frozen, arrays.r is not None), extents, **given)
        return first, second

    def parameter_gradients(self, statistics: Statistics, sums: Sums, dgamma: Vector, dbeta: Vector) -> None:
        vectors = {"dgamma": dgamma, "dbeta": dbeta}
        arguments = {**vectors, "first": at(sums[0]), "second": at(sums[1]), **addresses(statistics)}
        launch(prepare.per_channel, "parameter_gradients", (), len(sums[0]), (), **arguments)
