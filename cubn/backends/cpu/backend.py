"""The backend protocol on the CPU: allocate what is returned, and launch kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cubn import reference
from cubn._arrays.numpy import address_of
from cubn._floating_point import default_floating_point
from cubn._types import (
    Affine,
    CombineOptions,
    Counters,
    Extents,
    GradientOptions,
    Nodes,
    NormalizeOptions,
    Operands,
    Renormalised,
    Running,
    Statistics,
    StatisticsT,
    Update,
    Vector,
)
from cubn.backends import threads
from cubn.backends.cpu import plan, prepare
from cubn.backends.cpu.assemble import Copies
from cubn.backends.cpu.calls import (
    BackwardOfNothing,
    Doubles,
    PreparedBackward,
    PreparedForward,
    PreparedFrozen,
    PreparedMoments,
    PreparedNormalize,
    PreparedTrain,
    PreparedUpdate,
    Sums,
    forward_of_nothing,
    no_nodes,
    node_rows,
)
from cubn.backends.cpu.relayout import in_one_layout
from cubn.backends.cpu.relu_mask import ReluMask
from cubn.backends.cpu.stages import Elements, layout_of, reading_of
from cubn.backends.in_steps import FrozenInSteps


class CpuBackend:
    """See cubn.backends.protocol.Backend."""

    name = "cpu"
    device = None

    # --- arrays -------------------------------------------------------------------------------------------------------

    def to_host(self, array: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        if out is None:
            return array.copy()
        out[...] = array
        return out

    def from_host(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def staging(self, shape: tuple[int, ...]) -> Doubles:
        return np.empty(shape)

    def address(self, array: NDArray[Any]) -> int:
        return address_of(array)

    def apart(self, array: NDArray[Any], statistics: Statistics) -> NDArray[Any]:
        return array.copy()

    def place_statistics(self, memory: Doubles, C: int, *, gamma: bool = False, beta: bool = False) -> Statistics:
        return Statistics(memory, address_of(memory), C, gamma, beta)

    def statistics_on_host(self, statistics: Statistics) -> Statistics:
        return statistics._replace(memory=statistics.memory.copy(), address=0)

    def new_statistics(self, C: int, affine: Affine) -> Statistics:
        return _new(Statistics, C, affine)

    def new_renormalised(self, C: int, affine: Affine) -> Renormalised:
        return _new(Renormalised, C, affine)

    # --- whole batches ------------------------------------------------------------------------------------------------

    def prepare_forward(
        self, extents: Extents, operands: Operands, affine: Affine, running: Running, options: NormalizeOptions
    ) -> Callable[..., None]:
        if 0 in extents:
            return forward_of_nothing
        elements = _elements(extents, operands, None)
        return PreparedForward(prepare.forward(elements, _affine(affine), _running(running), options))

    def prepare_train(
        self,
        extents: Extents,
        operands: Operands,
        affine: Affine,
        running: Running | None,
        biased: bool,
        options: NormalizeOptions,
    ) -> PreparedTrain:
        elements = _writing(extents, operands, options)
        launch = prepare.train(elements, _affine(affine), running and _running(running), biased, options)
        copies = Copies(affine.gamma is not None, affine.beta is not None)
        return PreparedTrain(launch, extents, copies, elements.relu_mask)

    def prepare_backward(
        self,
        extents: Extents,
        operands: Operands,
        statistics: Statistics,
        relu_mask: ReluMask | None,
        parameters: tuple[Vector, Vector] | None,
        options: GradientOptions,
    ) -> PreparedBackward | BackwardOfNothing:
        vectors = parameters and (_vector(parameters[0]), _vector(parameters[1]))
        if 0 in extents:
            return BackwardOfNothing(extents.C, vectors and prepare.parameter_gradients(extents.C, *vectors))
        elements = _elements(extents, operands, relu_mask)
        return PreparedBackward(prepare.backward(elements, _copies(statistics), vectors, options), extents.C)

    def prepare_normalize(
        self, extents: Extents, operands: Operands, affine: Affine, options: NormalizeOptions
    ) -> PreparedNormalize:
        elements = _writing(extents, operands, options)
        launch = None if 0 in extents else prepare.normalize(elements, _affine(affine), options)
        return PreparedNormalize(launch, extents, elements.relu_mask)

    def prepare_frozen(
        self, extents: Extents, operands: Operands, affine: Affine, running: Running, options: NormalizeOptions
    ) -> PreparedFrozen | FrozenInSteps:
        if 0 in extents:
            return FrozenInSteps(self, extents, operands, affine, running, options)
        elements = _writing(extents, operands, options)
        launch = prepare.frozen(elements, _affine(affine), _running(running), options)
        copies = Copies(affine.gamma is not None, affine.beta is not None)
        return PreparedFrozen(launch, extents, copies, elements.relu_mask)

    def prepare_moments(self, extents: Extents, operands: Operands, start: int) -> PreparedMoments:
        elements = _elements(extents, Operands(operands.x, mask=operands.mask), None)
        cut = None if 0 in extents else plan.reduction(extents, reading_of(elements), start)
        return PreparedMoments(prepare.moments(elements, start) if cut else None, cut, extents.C)

    def prepare_update(self, C: int, old: Running, new: Running, biased: bool) -> PreparedUpdate:
        return PreparedUpdate(prepare.update(C, _running(old), _running(new), biased))

    # --- parts of batches ---------------------------------------------------------------------------------------------

    def keep(self, affine: Affine, statistics: Statistics) -> None:
        gamma, beta = affine
        if gamma or beta:
            prepare.keep(statistics.C, _affine(affine))(
                statistics.address, gamma.pointer if gamma else 0, beta.pointer if beta else 0
            )

    def moments(self, extents: Extents, operands: Operands, start: int) -> Nodes:
        return self.prepare_moments(extents, operands, start)(*_pointers(operands.x, operands.mask))

    def root(self, nodes: Nodes) -> tuple[NDArray[np.int64], Doubles, Doubles]:
        return _root("moments", nodes)

    def root_sums(self, nodes: Nodes) -> Sums:
        return _root("sums", nodes)[1:]

    def statistics(
        self, count: NDArray[np.int64], mean: Doubles, m2: Doubles, eps: float, into: StatisticsT
    ) -> StatisticsT:
        into.count[...] = count
        prepare.statistics(into.C)(into.address, address_of(mean), address_of(m2), eps)
        return into

    def frozen_statistics(self, running: Running, eps: float, into: Statistics) -> None:
        into.count[...] = 0
        launch = prepare.frozen_statistics(into.C, _running(running))
        launch(into.address, running.mean.pointer, running.var.pointer, eps)

    @default_floating_point
    def renormalise(self, found: Renormalised, before: Statistics, r_max: float, d_max: float) -> Renormalised:
        running = before.mean, before.var, before.invstd
        found.r[:], found.d[:] = reference.renormalisation(found.mean, found.invstd, *running, r_max, d_max)
        gamma = found.row("gamma") if found.gamma else np.ones(found.C)
        beta = found.row("beta") if found.beta else np.zeros(found.C)
        found.row("gamma")[:], found.row("beta")[:] = reference.renormalised_affine(gamma, beta, found.r, found.d)
        return found._replace(gamma=True, beta=True)

    def normalize(
        self, extents: Extents, operands: Operands, statistics: Statistics, affine: Affine, options: NormalizeOptions
    ) -> ReluMask | None:
        x, residual, y, mask = _pointers(operands.x, operands.g, operands.y, operands.mask)
        normalize = self.prepare_normalize(extents, operands, affine, options)
        return normalize(x, residual, y, mask, statistics, *_pointers(*affine))

    def given_statistics(self, C: int, count: int, mean: Vector, invstd: Vector, affine: Affine) -> Statistics:
        found, given = self.new_statistics(C, affine), self.new_statistics(C, Affine(mean, invstd))
        self.keep(Affine(mean, invstd), given)
        found.count[...], found.mean[:], found.invstd[:] = count, given.row("gamma"), given.row("beta")
        self.keep(affine, found)
        return found

    def update(self, statistics: Statistics, old: Running, new: Running, counters: Counters, update: Update) -> None:
        move = self.prepare_update(statistics.C, old, new, update.biased)
        at = old.mean.pointer, old.var.pointer, new.mean.pointer, new.var.pointer
        move(statistics, *at, *counters, update.momentum)

    def backward_sums(
        self,
        extents: Extents,
        operands: Operands,
        statistics: Statistics,
        relu_mask: ReluMask | None,
        options: GradientOptions,
        start: int,
    ) -> Nodes:
        x, g, _, _, mask = operands
        if 0 in extents:
            return no_nodes(extents.C)
        elements = _elements(extents, Operands(x, g, mask=mask), relu_mask)
        launch = prepare.backward_sums(elements, _copies(statistics), options, start)
        given = (*_pointers(x, g, mask), relu_mask.address if relu_mask else 0)
        cut = plan.reduction(extents, reading_of(elements), start)
        return node_rows(launch, cut, extents.C, statistics.address, *given)

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
        elements = _elements(extents, operands, relu_mask, relaid=not isinstance(options, CombineOptions))
        launch = prepare.backward_apply(elements, _copies(statistics), options)
        first, second = map(address_of, sums) if sums else (0, 0)
        launch(statistics.address, *_pointers(*operands), relu_mask.address if relu_mask else 0, first, second)

    def parameter_gradients(self, statistics: Statistics, sums: Sums, dgamma: Vector, dbeta: Vector) -> None:
        if isinstance(statistics, Renormalised):
            statistics, sums = self._renormalised_sums(statistics, sums)
        launch = prepare.parameter_gradients(statistics.C, _vector(dgamma), _vector(dbeta))
        launch(statistics.address, *map(address_of, sums), dgamma.pointer, dbeta.pointer)

    @default_floating_point
    def _renormalised_sums(self, statistics: Renormalised, sums: Sums) -> tuple[Statistics, Sums]:
        """Of which dgamma is the second, for its invstd is 1."""
        sum_dy, sum_dy_xmu = sums
        found = reference.renormalised_gamma_gradient(statistics.invstd, sum_dy, sum_dy_xmu, statistics.r, statistics.d)
        one = self.new_statistics(statistics.C, Affine(None, None))
        one.invstd[:] = 1
        return one, (sum_dy, found)


def _new(kind: type[StatisticsT], C: int, affine: Affine) -> StatisticsT:
    memory = np.zeros(kind.size(C))
    return kind(memory, address_of(memory), C, affine.gamma is not None, affine.beta is not None)


def _root(what: str, nodes: Nodes) -> tuple[NDArray[np.int64], Doubles, Doubles]:
    """Merged where they are."""
    C = nodes.table.shape[1] // 2
    count, (first, second) = np.zeros((), np.int64), np.zeros((2, C))
    if nodes.blocks:
        arrays = nodes.count.copy(), nodes.first, nodes.second, count, first, second
        prepare.root(what, C, nodes.blocks, nodes.table.strides[0])(0, *map(address_of, arrays))
    return count, first, second


# --- layouts: what is left of arrays without their addresses ----------------------------------------------------------


def _elements(extents: Extents, operands: Operands, relu_mask: ReluMask | None, *, relaid: bool = True) -> Elements:
    layouts = Operands._make(operand and operand._replace(pointer=0) for operand in operands)
    elements = Elements(extents, layouts, relu_mask and relu_mask.layout, threads.get_num_threads())
    return in_one_layout(elements) if relaid else elements


def _writing(extents: Extents, operands: Operands, options: NormalizeOptions) -> Elements:
    """With the relu mask that is to be kept."""
    elements = _elements(extents, operands, None)
    return elements._replace(relu_mask=plan.word_layout(layout_of(elements))) if options.keep_mask else elements


def _vector(vector: Vector) -> Vector:
    return vector._replace(pointer=0)


def _affine(affine: Affine) -> Affine:
    return Affine._make(vector and _vector(vector) for vector in affine)


def _running(running: Running) -> Running:
    return Running(*map(_vector, running))


def _copies(statistics: Statistics) -> Copies:
    return Copies(statistics.gamma, statistics.beta)


def _pointers(*arrays: Any) -> tuple[int, ...]:
    """0 for what is absent."""
    return tuple(array.pointer if array else 0 for array in arrays)
