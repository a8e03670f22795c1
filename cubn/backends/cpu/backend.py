"""The backend protocol on the CPU: allocate what is returned, and launch kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cubn import _nodes
from cubn._arrays.numpy import address_of
from cubn._types import Affine, Extents, Gate, Nodes, Operands, Running, Statistics, Vector
from cubn.backends.cpu import plan, prepare
from cubn.backends.cpu.launch import CODES
from cubn.backends.cpu.plan import LANES
from cubn.backends.cpu.prepare import BitRows, launch

Doubles = NDArray[np.float64]
Sums = tuple[Doubles, Doubles]
Address = tuple[int]

# Names of arguments, in the order in which they are given.
OLD = ("old_mean", "old_var")
FROZEN = (*OLD, *Statistics._fields)
INFERENCE = (*Operands._fields, *Affine._fields, *OLD)
PASS = (*Operands._fields, *Affine._fields, *Statistics._fields, "bits")
SUMS = ("first", "second")
KEPT = ("kept_gamma", "kept_beta")
UPDATE = (*OLD, "new_mean", "new_var", "tracked", "skipped")


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


def pass_over(arrays: Operands, affine: Affine, s: Statistics, bits: Bits | None) -> tuple[Any, ...]:
    """The arguments of a pass over all elements."""
    return (*arrays, *affine, *map(at, s), rows_in(bits))


def places(kept: Affine) -> tuple[Address | None, ...]:
    """Where copies of gamma and beta go."""
    return tuple(copy and (copy.pointer,) for copy in kept)


def moving(running: Running) -> tuple[Any, ...]:
    """The arguments of an update but for the statistics."""
    return (*running.old, *running.new, at(running.tracked), at(running.skipped))


def weight(running: Running) -> prepare.Numbers:
    """The numbers of an update."""
    numbers = {"momentum": running.momentum or 0.0, "cumulative": int(running.momentum is None)}
    return (*numbers.items(), ("ddof", int(not running.biased)))


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
    names: tuple[str, ...],
    arguments: tuple[Any, ...],
) -> Nodes:
    """Node rows, merged to maximal aligned blocks."""
    C = extents.C
    if 0 in extents:
        return Nodes((), np.zeros((0, 2 * C + 1)))
    layouts = [argument and argument[1:] for argument in arguments]
    cut = plan.reduction(extents, prepare.reduced_kind(extents, names, *layouts), start)
    rows = len(cut.table)
    parts: tuple[Any, ...] = np.empty(rows, np.int64), np.empty((rows, C)), np.empty((rows, C))
    names += ("node_count", "node_first", "node_second")
    launch(prepare.reduction, (before, what, extents, start), names, (*arguments, *map(at, parts)))
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

    def keep(self, affine: Affine, kept: Affine, C: int) -> None:
        launch(prepare.per_channel, ("keep", (), C, ()), (*Affine._fields, *KEPT), (*affine, *places(kept)))

    def moments(self, extents: Extents, arrays: Operands, start: int) -> Nodes:
        return reduced((), ("moments",), extents, start, ("x", "mask"), (arrays.x, arrays.mask))

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
            options = what, C, nodes.blocks, nodes.table.strides[0]
            arrays = counts, nodes.first, nodes.second, count, first, second
            launch(
                prepare.root, options, ("node_count", "node_first", "node_second", "count", *SUMS), [*map(at, arrays)]
            )
        return count, first, second

    def statistics(self, count: NDArray[np.int64], mean: Doubles, m2: Doubles, eps: float) -> Statistics:
        found = new_statistics(len(mean))
        found.count[...] = count
        options, names = ("statistics", (), len(mean), (("eps", eps),)), (*SUMS, *Statistics._fields)
        launch(prepare.per_channel, options, names, (at(mean), at(m2), *map(at, found)))
        return found

    def frozen_statistics(self, running: tuple[Vector, Vector], C: int, eps: float) -> Statistics:
        found = new_statistics(C)
        launch(prepare.per_channel, ("frozen", (), C, (("eps", eps),)), FROZEN, (*running, *map(at, found)))
        return found

    def normalize(
        self,
        extents: Extents,
        arrays: Operands,
        statistics: Statistics,
        affine: Affine,
        *,
        relu: bool,
        keep_bits: bool,
    ) -> Bits | None:
        bits = new_bits(extents, prepare.kind(extents, Operands._fields, arrays)) if keep_bits else None
        if 0 in extents:
            return bits
        what = ("normalize", arrays.g is not None, relu, keep_bits)
        given = pass_over(arrays, affine, statistics, bits)
        launch(prepare.elementwise, (("tabulate",), what, extents, ()), PASS, given)
        return bits

    def forward(
        self,
        extents: Extents,
        arrays: Operands,
        running: tuple[Vector, Vector],
        eps: float,
        affine: Affine,
        *,
        relu: bool,
    ) -> None:
        if 0 in extents:
            return
        options = ("tabulate_frozen",), ("normalize", arrays.g is not None, relu, False), extents, (("eps", eps),)
        launch(prepare.elementwise, options, INFERENCE, (*arrays, *affine, *running))

    def train(
        self,
        extents: Extents,
        arrays: Operands,
        eps: float,
        affine: Affine,
        *,
        relu: bool,
        keep_bits: bool,
        kept: Affine | None = None,
        running: Running | None = None,
    ) -> tuple[Statistics, Bits | None]:
        found = new_statistics(extents.C)
        bits = new_bits(extents, prepare.kind(extents, Operands._fields, arrays)) if keep_bits else None
        names: tuple[str, ...] = PASS
        given = pass_over(arrays, affine, found, bits)
        numbers: prepare.Numbers = (("eps", eps),)
        if kept and any(kept):
            names += KEPT
            given += places(kept)
        if running:
            names += UPDATE
            given += moving(running)
            numbers += weight(running)
        launch(prepare.train, ((arrays.g is not None, relu, keep_bits), extents, numbers), names, given)
        return found, bits

    def update(self, statistics: Statistics, running: Running) -> None:
        options = "update", ("", CODES[running.old[0].dtype]), len(running.tracked), weight(running)
        launch(prepare.per_channel, options, (*UPDATE, *Statistics._fields), (*moving(running), *map(at, statistics)))

    def backward_sums(
        self,
        extents: Extents,
        arrays: Operands,
        statistics: Statistics,
        affine: Affine,
        *,
        gate: Gate,
        start: int,
    ) -> Nodes:
        given = pass_over(arrays._replace(y=None, r=None), affine, statistics, gate.bits)
        return reduced(("tabulate",), ("sums", gate.kind), extents, start, PASS, given)

    def backward_apply(
        self,
        extents: Extents,
        arrays: Operands,
        statistics: Statistics,
        affine: Affine,
        sums: Sums | None,
        *,
        gate: Gate,
    ) -> None:
        if 0 in extents:
            return
        names: tuple[str, ...] = PASS
        given = pass_over(arrays, affine, statistics, gate.bits)
        before: tuple[str, ...] = ("tabulate",)
        if sums is not None:
            before += ("tabulate_gradient",)
            names += SUMS
            given += (*map(at, sums),)
        what = ("input_gradient", gate.kind, sums is None, arrays.r is not None)
        launch(prepare.elementwise, (before, what, extents, ()), names, given)

    def backward(
        self,
        extents: Extents,
        arrays: Operands,
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
        names: tuple[str, ...] = (*PASS, *SUMS)
        given = (*pass_over(arrays, affine, statistics, gate.bits), at(first), at(second))
        if parameters:
            names += ("dgamma", "dbeta")
            given += parameters
        launch(prepare.backward, ((gate.kind, frozen, arrays.r is not None), extents), names, given)
        return first, second

    def parameter_gradients(self, statistics: Statistics, sums: Sums, dgamma: Vector, dbeta: Vector) -> None:
        options, names = ("parameter_gradients", (), len(sums[0]), ()), ("dgamma", "dbeta", *SUMS, *Statistics._fields)
        launch(prepare.per_channel, options, names, (dgamma, dbeta, *map(at, sums), *map(at, statistics)))
