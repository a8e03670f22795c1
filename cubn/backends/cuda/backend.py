"""The backend protocol on CUDA: prepared calls and series, kept by layouts and options. Nothing here waits for the
device.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from cubn._layout import from_sample
from cubn._tree import aligned_blocks, stack_order
from cubn._types import (
    Affine,
    BackendArray,
    CombineOptions,
    Counters,
    Extents,
    GradientOptions,
    Nodes,
    NormalizeOptions,
    Operands,
    ReluGradient,
    Renormalised,
    Running,
    Statistics,
    StatisticsT,
    Update,
    Vector,
)
from cubn.backends.cuda import calls, parts
from cubn.backends.cuda.calls import ReluMask, new_statistics
from cubn.backends.cuda.device import Device, Stream
from cubn.backends.cuda.parameters import Values
from cubn.backends.cuda.plan import What
from cubn.backends.cuda.prepare import STATISTICS, affine_vectors, layouts, running_vectors
from cubn.backends.cuda.series import Series
from cubn.backends.in_steps import FrozenInSteps
from cubn.backends.protocol import (
    PreparedBackward,
    PreparedForward,
    PreparedMoments,
    PreparedNormalize,
    PreparedTrain,
    PreparedUpdate,
    Sums,
)

MOST = 512
"""Prepared calls and series that are kept, of each kind: 9 to 15 KB each."""


class CudaBackend:
    """See cubn.backends.protocol.Backend."""

    name = "cuda"

    def __init__(self, device: Device) -> None:
        self.device = device
        keep = functools.lru_cache(MOST)
        self._forward = keep(functools.partial(calls.forward, device))
        self._train = keep(functools.partial(calls.train, device))
        self._backward = keep(functools.partial(calls.backward, device))
        self._per_channel = keep(parts.per_channel)
        self._pass = keep(functools.partial(parts.elementwise, device.limits))
        self._node = keep(functools.partial(parts.node, device.limits))
        self._root = keep(parts.root)
        self._orders = keep(self._placed)

    # --- arrays -------------------------------------------------------------------------------------------------------

    def to_host(self, array: BackendArray, out: Any = None) -> Any:
        return self.device.to_host(array, out)

    def from_host(self, array: Any) -> BackendArray:
        return self.device.from_host(array)

    def staging(self, shape: tuple[int, ...]) -> Any:
        return self.device.staging(shape, "float64")

    def address(self, array: BackendArray) -> int:
        return self.device.address(array)

    def apart(self, array: BackendArray, statistics: Statistics) -> Any:
        device, before = self.device, statistics.stream
        if before is None or before is device.stream():
            return device.as_users(array)
        device.wait_for(before)
        copy = device.beside((array.reshape(1, -1),)).reshape(array.shape)  # memory of this stream's
        device.hold(array)
        return device.as_users(copy)

    def place_statistics(self, memory: Any, C: int, *, gamma: bool = False, beta: bool = False) -> Statistics:
        placed = self.from_host(memory)
        return Statistics(placed, self._at(placed), C, gamma, beta, self.device.stream())

    def statistics_on_host(self, statistics: Statistics) -> Statistics:
        before = statistics.stream
        if before is not None and before is not self.device.stream():
            self.device.wait_for(before)
        return statistics._replace(memory=self.device.to_host(statistics.memory), address=0, stream=None)

    def new_statistics(self, C: int, affine: Affine) -> Statistics:
        return new_statistics(self.device, C, affine, Statistics)

    def new_renormalised(self, C: int, affine: Affine) -> Renormalised:
        return new_statistics(self.device, C, affine, Renormalised)

    # --- whole batches ------------------------------------------------------------------------------------------------

    def prepare_forward(
        self, extents: Extents, operands: Operands, affine: Affine, running: Running, options: NormalizeOptions
    ) -> PreparedForward:
        return self._forward(extents, layouts(operands), _affine(affine), _running(running), options)

    def prepare_train(
        self,
        extents: Extents,
        operands: Operands,
        affine: Affine,
        running: Running | None,
        biased: bool,
        options: NormalizeOptions,
    ) -> PreparedTrain:
        moved = running and _running(running)
        return self._train(extents, layouts(operands), _affine(affine), moved, biased, options)

    def prepare_backward(
        self,
        extents: Extents,
        operands: Operands,
        statistics: Statistics,
        relu_mask: ReluMask | None,
        parameters: tuple[Vector, Vector] | None,
        options: GradientOptions,
    ) -> PreparedBackward:
        copies, mask = _affine(statistics.affine), relu_mask and relu_mask.layout
        gradients = parameters and (_vector(parameters[0]), _vector(parameters[1]))
        return self._backward(extents, layouts(operands), copies, mask, gradients, options)

    def prepare_normalize(
        self, extents: Extents, operands: Operands, affine: Affine, options: NormalizeOptions
    ) -> PreparedNormalize:
        if 0 in extents:
            return calls.normalize_nothing
        series, layout = self._pass(extents, layouts(operands), _affine(affine), None, False, options)
        return calls.normalize(self.device, series, extents, layout if options.keep_mask else None)

    def prepare_frozen(
        self, extents: Extents, operands: Operands, affine: Affine, running: Running, options: NormalizeOptions
    ) -> FrozenInSteps:
        return FrozenInSteps(self, extents, layouts(operands), _affine(affine), _running(running), options)

    def prepare_moments(self, extents: Extents, operands: Operands, start: int) -> PreparedMoments:
        read = Operands(operands.x, mask=operands.mask)

        def call(x: int, mask: int, /) -> Nodes:
            here = Operands(read.x._replace(pointer=x), mask=read.mask and read.mask._replace(pointer=mask))
            return self._nodes("Moments", extents, here, None, None, "none", start)

        return call

    def prepare_update(self, C: int, old: Running, new: Running, biased: bool) -> PreparedUpdate:
        moved = tuple((name, _vector(v)) for name, v in running_vectors(old, new).items())
        return calls.update(self.device, self._per_channel("update", C, moved, calls.OF_UPDATE), biased)

    # --- per-channel arrays -------------------------------------------------------------------------------------------

    def keep(self, affine: Affine, statistics: Statistics) -> None:
        given = affine_vectors(affine)
        if given:
            copies = {f"kept_{name}": statistics.at(name) for name in given}
            self._channelwise("keep", statistics, given, copies)

    def statistics(
        self, count: BackendArray, mean: BackendArray, m2: BackendArray, eps: float, into: StatisticsT
    ) -> StatisticsT:
        if into.stream is not self.device.stream():
            elsewhere, into = into, new_statistics(self.device, into.C, into.affine, type(into))
            copies = {f"kept_{name}": into.at(name) for name in affine_vectors(elsewhere.affine)}
            if copies:
                self._channelwise("keep", elsewhere, affine_vectors(elsewhere.affine), copies)
        root = {"from_count": self._at(count), "first": self._at(mean), "second": self._at(m2)}
        self._channelwise("statistics", into, {}, {**_rows_of(into), **root, "eps": eps})
        return into

    def frozen_statistics(self, running: Running, eps: float, into: Statistics) -> None:
        old = {"old_mean": running.mean, "old_var": running.var}
        self._channelwise("frozen", into, old, {**_rows_of(into), "eps": eps})

    def renormalise(self, found: Renormalised, before: Statistics, r_max: float, d_max: float) -> Renormalised:
        copies, running = affine_vectors(found.affine), Running(*(before.vector(name) for name in ("mean", "var")))
        given = {**copies, "old_mean": running.mean, "old_var": running.var}
        rows = {"mean": found.at("mean"), "invstd": found.at("invstd"), "first": before.at("invstd")}
        written = {"kept_gamma": "gamma", "kept_beta": "beta", "node_first": "r", "node_second": "d"}
        written_at = {name: found.at(row) for name, row in written.items()}
        limits = {"momentum": r_max, "eps": d_max}
        self._channelwise("renormalise", found, given, {**rows, **written_at, **limits})
        return found._replace(gamma=True, beta=True)

    def given_statistics(self, C: int, count: int, mean: Vector, invstd: Vector, affine: Affine) -> Statistics:
        found = self.new_statistics(C, affine)
        zeros = self.device.zeros((C,), "float64")
        self.statistics(self.from_host(np.array(count)), zeros, zeros, 1.0, found)
        copies = {"kept_gamma": found.at("mean"), "kept_beta": found.at("invstd")}
        self._channelwise("keep", found, {"gamma": mean, "beta": invstd}, copies)
        self.keep(affine, found)
        return found

    def update(self, statistics: Statistics, old: Running, new: Running, counters: Counters, update: Update) -> None:
        move = self.prepare_update(statistics.C, old, new, update.biased)
        at = old.mean.pointer, old.var.pointer, new.mean.pointer, new.var.pointer
        move(statistics, *at, *counters, update.momentum)

    def parameter_gradients(self, statistics: Statistics, sums: Sums, dgamma: Vector, dbeta: Vector) -> None:
        first, second = map(self._at, sums)
        given = {"invstd": statistics.at("invstd"), "first": first, "second": second}
        kernel = "parameter_gradients"
        if isinstance(statistics, Renormalised):
            kernel = "renormalised_gradients"
            given |= {"from_first": statistics.at("r"), "from_second": statistics.at("d")}
        self._channelwise(kernel, statistics, {"dgamma": dgamma, "dbeta": dbeta}, given)

    def _channelwise(
        self, kernel: str, statistics: Statistics, given: dict[str, Vector], values: Mapping[str, float]
    ) -> None:
        """On statistics, whose addresses are among the values."""
        formats = tuple((name, _vector(v)) for name, v in given.items())
        series = self._per_channel(kernel, statistics.C, formats, tuple(values))
        pointers = (v.pointer for v in given.values())
        stream = self.device.stream()
        series.run_behind(self.device, (*pointers, *values.values()), stream, statistics.stream, statistics.memory)

    # --- passes over all elements -------------------------------------------------------------------------------------

    def normalize(
        self, extents: Extents, operands: Operands, statistics: Statistics, affine: Affine, options: NormalizeOptions
    ) -> ReluMask | None:
        normalize = self.prepare_normalize(extents, operands, affine, options)
        x, residual, y, _, mask, gamma, beta = (o.pointer if o else 0 for o in (*operands, *affine))
        return normalize(x, residual, y, mask, statistics, gamma, beta)

    def backward_apply(
        self,
        extents: Extents,
        operands: Operands,
        statistics: Statistics,
        relu_mask: ReluMask | None,
        sums: Sums | None,
        options: GradientOptions | CombineOptions,
    ) -> None:
        if 0 in extents:
            return
        affine, mask = statistics.affine, relu_mask and relu_mask.layout
        series, _ = self._pass(extents, layouts(operands), _affine(affine), mask, sums is not None, options)
        first, second = map(self._at, sums) if sums else (0, 0)
        values = (*_pass_values(operands, affine, statistics, relu_mask), first, second)
        self._run(series, values, statistics, relu_mask)

    # --- the tree -----------------------------------------------------------------------------------------------------

    def moments(self, extents: Extents, operands: Operands, start: int) -> Nodes:
        x, _, _, _, mask = (operand.pointer if operand else 0 for operand in operands)
        return self.prepare_moments(extents, operands, start)(x, mask)

    def backward_sums(
        self,
        extents: Extents,
        operands: Operands,
        statistics: Statistics,
        relu_mask: ReluMask | None,
        options: GradientOptions,
        start: int,
    ) -> Nodes:
        read = operands._replace(y=None, r=None)
        return self._nodes("Sums", extents, read, statistics, relu_mask, options.relu, start)

    def _nodes(
        self,
        what: What,
        extents: Extents,
        operands: Operands,
        statistics: Statistics | None,
        relu_mask: ReluMask | None,
        relu: ReluGradient,
        start: int,
    ) -> Nodes:
        """One node for each maximal aligned block of samples: each is a batch of its own."""
        N, C, S = extents
        blocks = aligned_blocks(start, start + N) if S else ()
        nodes = Nodes(blocks, self.device.empty((len(blocks), 2 * C + 1), "float64"))
        table, affine = self._at(nodes.table), statistics.affine if statistics else Affine(None, None)
        layout = relu_mask and relu_mask.layout
        for i, (lo, hi) in enumerate(blocks):
            part = from_sample(lo - start, operands)
            series = self._node(what, extents._replace(N=hi - lo), layouts(part), _affine(affine), relu, layout)
            row = table + 8 * i * (2 * C + 1)
            first_bit = (lo - start) * C * S
            node = (first_bit, row, row + 8, row + 8 + 8 * C)
            self._run(series, (*_pass_values(part, affine, statistics, relu_mask), *node), statistics, relu_mask)
        return nodes

    def root(self, nodes: Nodes) -> tuple[BackendArray, BackendArray, BackendArray]:
        return self._root_of("Moments", nodes)

    def root_sums(self, nodes: Nodes) -> Sums:
        return self._root_of("Sums", nodes)[1:]

    def _root_of(self, what: What, nodes: Nodes) -> tuple[BackendArray, BackendArray, BackendArray]:
        C = nodes.table.shape[1] // 2
        order = stack_order(nodes.blocks)
        stream = self.device.stream()
        merges, before = self._merges(order) if order else (None, None)  # of what two threads make, one is kept
        memory = self.device.empty((1 + 2 * C,), "float64")
        found = self._at(memory)
        table = (self._at(nodes.table), nodes.table.strides[0] // 8, 0 if merges is None else self._at(merges))
        values = (*table, found, found + 8, found + 8 + 8 * C)
        self._root(C, what, order).run_behind(self.device, values, stream, before, merges)
        return memory[:1].view("int64").reshape(()), memory[1 : 1 + C], memory[1 + C :]

    def _merges(self, order: tuple[int, ...]) -> tuple[BackendArray, Stream]:
        """An order of merges on the device, and the stream it came on. What a graph copies belongs to the graph."""
        return self._placed(order) if self.device.capturing() else self._orders(order)

    def _placed(self, order: tuple[int, ...]) -> tuple[BackendArray, Stream]:
        return self.from_host(np.array(order, np.int64)), self.device.stream()

    # --- launches -----------------------------------------------------------------------------------------------------

    def _at(self, array: BackendArray) -> int:
        return self.device.address(array)

    def _run(self, series: Series, values: Values, statistics: Statistics | None, relu_mask: ReluMask | None) -> None:
        """With memory of its own, behind what wrote statistics and relu mask."""
        memory = self.device.empty((series.numbers,), "float64")
        all_values = (*values, *series.parts(self._at(memory)))
        before, kept = (statistics.stream, statistics.memory) if statistics else (None, None)
        series.run_behind(self.device, all_values, self.device.stream(), before, kept, relu_mask)


def _vector(v: Vector) -> Vector:
    return Vector(0, v.dtype, v.stride)


def _affine(affine: Affine) -> Affine:
    gamma, beta = affine
    return Affine(gamma and _vector(gamma), beta and _vector(beta))


def _running(running: Running) -> Running:
    return Running(_vector(running.mean), _vector(running.var))


def _rows_of(statistics: Statistics) -> dict[str, int]:
    """Where each row is that kernels know by its name."""
    return {name: statistics.at(name) for name in STATISTICS}


def _pass_values(
    operands: Operands, affine: Affine, statistics: Statistics | None, relu_mask: ReluMask | None
) -> Values:
    """Those that every pass over elements begins with; see `parts.PASS`."""
    rows = (statistics.at(name) for name in STATISTICS) if statistics else (0,) * len(STATISTICS)
    return (*[o.pointer if o else 0 for o in (*operands, *affine)], *rows, relu_mask.address if relu_mask else 0)
