"""A double backward: what it is given, checked, its sums, and the two combinations of arrays that it consists of."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cubn import _arrays, reference
from cubn._arguments import one_of, refusal
from cubn._arrays import Array, Output
from cubn._differentiation import WHOSE, check_unchanged, terms_of
from cubn._floating_point import default_floating_point
from cubn._inputs import Inputs, joined, like_x, parameter
from cubn._layout import vector
from cubn._types import Affine, CombineOptions, GradientOptions, Nodes, Renormalised, Statistics, Third, Vector
from cubn.backends.protocol import Backend, Sums
from cubn.gradients import DoubleGradients
from cubn.reference import Combination, DoubleSums
from cubn.saved import Forward
from cubn.sync.collective import Gathered, Terms
from cubn.typing import ParameterGradients

Float64 = NDArray[np.float64]


class Reduction(NamedTuple):
    """One of the sums: what is exchanged between ranks, as an operation of which the nodes are all that comes."""

    terms: Terms
    backend: Backend
    part: Callable[[int, int], Nodes]

    def accept(self, values: int) -> None:
        """The forward has been."""

    def finish(self, gathered: Gathered) -> Gathered:
        return gathered


class Parts(NamedTuple):
    """Neighbouring parts of a batch, (K, C): what ddgamma was for each, and its sums of dy and dy * (x - mean)."""

    ddgamma: Float64
    dy: Float64
    dy_xmu: Float64


class DoubleDifferentiation:
    """A double backward whose arguments were checked and whose outputs are ready; nothing is written yet."""

    def __init__(
        self,
        ddx: Any,
        ddgamma: Any,
        ddbeta: Any,
        dy: Any,
        forward: Forward,
        ddresidual: Any,
        parameter_gradients: ParameterGradients,
    ) -> None:
        self.everywhere = one_of(WHOSE, parameter_gradients, "parameter_gradients") == "global"
        self.forward = forward
        parameters = forward.held.arrays
        self.of_gamma = _of_channels("ddgamma", ddgamma, forward.inputs, "gamma" in parameters)
        self.of_beta = _of_channels("ddbeta", ddbeta, forward.inputs, "beta" in parameters)
        self.inputs = joined(forward.inputs, self.of_gamma, self.of_beta)
        self.backend, x = self.inputs.backend, self.inputs.x
        self.v = self._zeros() if ddx is None else like_x("ddx", ddx, x)
        self.r = None if ddresidual is None else like_x("ddresidual", ddresidual, x)
        if self.r and not forward.layouts.residual:
            raise ValueError(refusal("ddresidual", "be None, as the residual of the forward was", self.r))
        self.dy = like_x("dy", dy, x)
        check_unchanged(forward, self.inputs)
        self.ddy, self.dx = _arrays.empty_like(x), _arrays.empty_like(x)
        home = parameters.get("gamma")
        self.dgamma = home and _arrays.empty_vector(forward.statistics.C, home.dtype, home)

    def _zeros(self) -> Array:
        """An array like x in the memory of one number."""
        zero, x = self.backend.from_host(np.zeros(1)), self.inputs.x
        return x._replace(pointer=self.backend.address(zero), strides=(0,) * len(x.shape), owner=zero, capsule=None)

    # --- sums ---------------------------------------------------------------------------------------------------------

    @property
    def reductions(self) -> tuple[Reduction, ...]:
        """Those that are needed; that of products is the last."""
        terms = terms_of("double_backward", self.forward, self.everywhere)
        parts = (self._products,) if self.forward.frozen else (self._of_dy, self._of_ddx, self._products)
        return tuple(Reduction(terms, self.backend, part) for part in parts)

    def _of_dy(self, start: int, total: int) -> Nodes:
        return self._sums(self.inputs.x, self.g, self.forward.statistics, start)

    def _of_ddx(self, start: int, total: int) -> Nodes:
        return self._sums(self.inputs.x, self.v, self.forward.statistics, start)

    def _products(self, start: int, total: int) -> Nodes:
        """Of dy * ddx, which is dy * (x - mean) of another x and a mean of 0. For other ranks, ddgamma is in the place
        of the sums of dy, which are there already.
        """
        nodes = self._sums(self.v, self.g, self._statistics(), start)
        if self.forward.context is None or not nodes.blocks:
            return nodes
        with_ddgamma = nodes._replace(table=self.backend.to_host(nodes.table))
        with_ddgamma.first[...] = self.of_backward[0]
        return nodes._replace(table=self.backend.from_host(with_ddgamma.table))

    def _sums(self, x: Array, g: Array, statistics: Statistics, start: int) -> Nodes:
        inputs = self.inputs._replace(x=x, residual_or_dy=g)
        options = GradientOptions("none", frozen=False, residual=False)
        return self.backend.backward_sums(inputs.extents, inputs.operands(), statistics, None, options, start)

    @cached_property
    def g(self) -> Array:
        """dy behind the ReLU; where there is one, in the memory of ddy, which is written last."""
        forward = self.forward
        if forward.layouts.relu == "none":
            return self.dy
        options = GradientOptions(forward.layouts.relu, frozen=True, residual=True)
        self._write(self.dx, self.dy, self.ddy.array, forward.statistics, None, options)
        return self.ddy.array

    def _roots(self, nodes: list[Nodes]) -> DoubleSums:
        """On the host, of the nodes of each reduction; zeros for those that are not needed."""
        roots = [self.backend.to_host(root) for each in nodes for root in self.backend.root_sums(each)]
        before = roots[:-2] or [np.zeros_like(roots[-1])] * 4
        return DoubleSums._make((*before, roots[-1]))

    # --- gradients ----------------------------------------------------------------------------------------------------

    def run(self) -> DoubleGradients[Any]:
        """The whole batch is here."""
        of = self._roots([reduction.part(0, self.inputs.extents.N) for reduction in self.reductions])
        if self.forward.frozen:
            return self._apply(of)
        return self._apply(of, of, Parts(self.of_backward[0][None], of.dy[None], of.dy_xmu[None]))

    def finish(self, gathered: list[Gathered]) -> DoubleGradients[Any]:
        """With the nodes of all ranks, or of this one where they suffice."""
        nodes = [each.nodes for each in gathered]
        if self.forward.frozen:
            return self._apply(self._roots(nodes))
        of_dy, products = (each._replace(table=self.backend.to_host(each.table)) for each in (nodes[0], nodes[-1]))
        present = of_dy.count > 0
        parts = Parts(products.first[present], of_dy.first[present], of_dy.second[present])
        whole = self._roots(nodes)
        of = whole if self.everywhere else self._roots([each.own for each in gathered])
        return self._apply(of, whole, parts)

    def _apply(
        self, of: DoubleSums, whole: DoubleSums | None = None, parts: Parts | None = None
    ) -> DoubleGradients[Any]:
        """dx, then ddy, in whose memory dy may be till then, and dgamma, the share of those whose sums are `of`. Of the
        whole batch unless the statistics are frozen.
        """
        of_ddy, of_dx, dgamma = self._coefficients(of, whole, parts)
        if of_dx is None:
            statistics = self._statistics(invstd=self.statistics.invstd, gamma=self.of_backward[0])
            options = GradientOptions("none", frozen=True, residual=False)
            self._write(self.dx, self.g, None, statistics, None, options)
        else:
            self._combine(self.dx, self.g, self.v, of_dx, CombineOptions("none", "weighted"))
        third: Third = "added" if self.r else "none"
        self._combine(self.ddy, self.v, self.r, of_ddy, CombineOptions(self.forward.layouts.relu, third))
        if self.dgamma:
            value, scratch = map(self.backend.from_host, (dgamma, np.zeros_like(dgamma)))
            into = Vector(self.backend.address(scratch), "float64", 1), vector(self.dgamma.array)
            self.backend.parameter_gradients(self.forward.statistics, (value, scratch), *into)
        return DoubleGradients(self.ddy.finish(), self.dx.finish(), self.dgamma and self.dgamma.finish())

    @default_floating_point
    def _coefficients(
        self, of: DoubleSums, whole: DoubleSums | None, parts: Parts | None
    ) -> tuple[Combination, Combination | None, Float64]:
        """Of ddy and, unless the statistics are frozen, of dx; and dgamma."""
        acc = np.float64 if self.inputs.x.dtype == "float64" else np.float32
        invstd, gamma, (u, w) = self.statistics.invstd, _row(self.statistics, "gamma", 1.0), self.of_backward
        sums = None if whole is None else (self.statistics.count, whole)
        of_ddy = reference.ddy_combination(invstd, gamma, acc, u, w, sums)
        dgamma = reference.gamma_gradient(invstd, of, sums)
        if isinstance(self.statistics, Renormalised):
            dgamma = dgamma * self.statistics.r
        if sums is None or whole is None or parts is None:
            return of_ddy, None, dgamma
        u_dy = reference.times_ddgamma(whole.dy, parts.ddgamma, parts.dy)
        u_dy_xmu = reference.times_ddgamma(whole.dy_xmu, parts.ddgamma, parts.dy_xmu)
        return of_ddy, reference.dx_combination(invstd, gamma, u, *sums, u_dy, u_dy_xmu), dgamma

    def _combine(self, to: Output, a: Array, b: Array | None, by: Combination, options: CombineOptions) -> None:
        beta = _row(self.statistics, "beta", 0.0) if by.weight is None else by.weight
        statistics = self._statistics(mean=self.statistics.mean, gamma=by.scale, beta=beta)
        sums = self.backend.from_host(by.k1), self.backend.from_host(by.k2)
        self._write(to, a, b, statistics, sums, options)

    def _write(
        self,
        to: Output,
        a: Array,
        b: Array | None,
        statistics: Statistics,
        sums: Sums | None,
        options: GradientOptions | CombineOptions,
    ) -> None:
        inputs = self.inputs._replace(residual_or_dy=a)
        operands = inputs.operands(to.array, b)
        relu_mask = self.forward.relu_mask if options.relu == "mask" else None
        self.backend.backward_apply(inputs.extents, operands, statistics, relu_mask, sums, options)

    # --- channels -----------------------------------------------------------------------------------------------------

    @cached_property
    def statistics(self) -> Statistics:
        """The forward's, on the host."""
        return self.backend.statistics_on_host(self.forward.statistics)

    @cached_property
    def of_backward(self) -> tuple[Float64, Float64]:
        """ddgamma and ddbeta, on the host."""
        given = Affine(self.of_gamma and vector(self.of_gamma), self.of_beta and vector(self.of_beta))
        copies = self.backend.new_statistics(self.forward.statistics.C, given)
        self.backend.keep(given, copies)
        found = self.backend.statistics_on_host(copies)
        return _through(self.statistics, _row(found, "gamma", 0.0), _row(found, "beta", 0.0))

    def _statistics(self, **rows: Float64) -> Statistics:
        """Statistics that make of gamma the scale itself, and of sums k1 and k2: of one value, whose invstd is 1."""
        C = self.forward.statistics.C
        found = Statistics(np.zeros(Statistics.size(C)), 0, C, "gamma" in rows, "beta" in rows)
        found.count[...] = found.invstd[...] = 1
        for name, row in rows.items():
            found.row(name)[...] = row
        return self.backend.place_statistics(found.memory, C, gamma=found.gamma, beta=found.beta)


@default_floating_point
@np.errstate(all="ignore")
def _through(statistics: Statistics, u: Float64, w: Float64) -> tuple[Float64, Float64]:
    """ddgamma and ddbeta, as those of gamma * r and beta + gamma * d where a forward was renormalised."""
    if not isinstance(statistics, Renormalised):
        return u, w
    return u * statistics.r, w + u * statistics.d


def _row(statistics: Statistics, name: Literal["gamma", "beta"], missing: float) -> Float64:
    """A parameter, or a number for one that is not there."""
    row: Float64 = statistics.row(name) if getattr(statistics, name) else np.full(statistics.C, missing)
    return row


def _of_channels(argument: str, given: Any, inputs: Inputs, has_one: bool) -> Array | None:
    """A gradient by dgamma or dbeta, if there is such a parameter."""
    if given is None:
        return None
    array = parameter(argument, given, inputs)
    if not has_one:
        raise ValueError(refusal(argument, f"be None, as the forward's {argument.removeprefix('dd')} was", array))
    return array
