"""The gradient of the training and the frozen forward."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any, Literal, get_args, overload

import numpy as np

from cubn import _arguments, _arrays
from cubn._arguments import flag, one_of, refusal, region
from cubn._arrays import BOOL, FLOATS, Output
from cubn._floating_point import default_floating_point
from cubn._layout import operand, vector
from cubn.backends import Arrays, BackendArray, Nodes, Vector
from cubn.errors import message
from cubn.gradients import Gradients, StatisticsGradients
from cubn.saved import Forward, Saved
from cubn.sync import collective
from cubn.sync.collective import Gathered, Started, SyncContext, Terms
from cubn.typing import ArrayT, Like, ParameterGradients

Sums = tuple[BackendArray, BackendArray]
_WHOSE: tuple[ParameterGradients, ...] = get_args(ParameterGradients)

AnyGradients = Gradients[Any] | StatisticsGradients[Any]
OfChannels = tuple[Any, Any, Any, Any]  # dgamma, dbeta, dmean, dvar


@overload
def backward(
    dy: Like[ArrayT],
    saved: Saved[ArrayT],
    *,
    parameter_gradients: ParameterGradients = "local",
    statistics: Literal[False] = False,
    out: ArrayT | None = None,
) -> Gradients[ArrayT]: ...


@overload
def backward(
    dy: Like[ArrayT],
    saved: Saved[ArrayT],
    *,
    parameter_gradients: ParameterGradients = "local",
    statistics: Literal[True],
    out: ArrayT | None = None,
) -> StatisticsGradients[ArrayT]: ...


def backward(
    dy: Like[ArrayT],
    saved: Saved[ArrayT],
    *,
    parameter_gradients: ParameterGradients = "local",
    statistics: bool = False,
    out: ArrayT | None = None,
) -> Gradients[ArrayT] | StatisticsGradients[ArrayT]:
    """Gradients of a loss by x, gamma, beta and residual, from its gradient by y.

    With d = x - mean and dy taken as 0 where a ReLU or the mask stopped y:
    dbeta = sum(dy); dgamma = sum(dy * d) * invstd;
    dx = (dy - sum(dy) / count - d * invstd**2 * sum(dy * d) / count) * gamma * invstd; dresidual = dy.
    After `forward_frozen`, dx = dy * gamma * invstd, and on request
    dmean = -sum(dy) * gamma * invstd; dvar = -sum(dy * d) * gamma * invstd**3 / 2.

    After a forward with `comm=`, dx is that of the whole batch on all ranks, and dgamma and dbeta are **this rank's own
    sums**: a data-parallel framework adds or averages parameter gradients itself. `parameter_gradients="global"` gives
    every rank the sums over all ranks.

    Parameters
    ----------
    dy : array like x
        Of x's shape, dtype, library and device; any layout.
    saved : Saved
        From `forward_train` or `forward_frozen`; it is not used up. Of a forward with `comm=`, all ranks take part.
    parameter_gradients : {"local", "global"}
        Whose sums dgamma and dbeta are; without `comm=` there is no difference. Local ones are merged in blocks of the
        whole batch's order, so that they too depend on the batch and its cut alone.
    statistics : bool
        Whether the gradients by running_mean and running_var are wanted too, after `forward_frozen`: they are sums as
        dgamma and dbeta are, and waiting for a CUDA device is part of them. After `forward_train` the statistics are no
        input but functions of x, and dx has all of it.
    out : array like x, optional
        Where dx goes: exactly dy, or memory of its own.

    Returns
    -------
    Gradients
        (dx, dgamma, dbeta, dresidual). dx and dresidual share no memory, and are 0 where the mask is False.
    StatisticsGradients
        (dx, dgamma, dbeta, dresidual, dmean, dvar), with `statistics=True`.

    Raises
    ------
    TypeError
        If an array is not one, has another dtype or library, requires a gradient, or cannot be written (`out`).
    ValueError
        If shapes or devices do not fit, `out` overlaps another array, x was overwritten since the forward, or
        `statistics` are asked for after `forward_train`.
    CollectiveMismatch
        With `comm=`, on all ranks: if they do not do the same thing, or another one failed.

    Notes
    -----
    The same bits for every layout, number of threads and array library; dgamma and dbeta are rounded once.
    Reads x and dy twice from memory at most, and writes dx (and dresidual) once.

    References
    ----------
    Ioffe & Szegedy 2015, "Batch normalization", https://arxiv.org/abs/1502.03167
    """
    forward = _forward_of(saved)
    if forward.place is not None:
        return _start(forward.place, dy, forward, parameter_gradients, statistics, out).finish()
    return Prepared("backward", dy, forward, parameter_gradients, statistics, out).run()


@overload
def backward_start(
    dy: Like[ArrayT],
    saved: Saved[ArrayT],
    *,
    parameter_gradients: ParameterGradients = "local",
    statistics: Literal[False] = False,
    out: ArrayT | None = None,
) -> Started[Gradients[ArrayT]]: ...


@overload
def backward_start(
    dy: Like[ArrayT],
    saved: Saved[ArrayT],
    *,
    parameter_gradients: ParameterGradients = "local",
    statistics: Literal[True],
    out: ArrayT | None = None,
) -> Started[StatisticsGradients[ArrayT]]: ...


def backward_start(
    dy: Like[ArrayT],
    saved: Saved[ArrayT],
    *,
    parameter_gradients: ParameterGradients = "local",
    statistics: bool = False,
    out: ArrayT | None = None,
) -> Started[Gradients[ArrayT] | StatisticsGradients[ArrayT]]:
    """Begin the `backward` of a forward with `comm=`, and leave time for other work until its `finish`.

    Takes this rank's sums and begins to send them; dx is written in `finish`.

    Parameters
    ----------
    dy, saved, parameter_gradients, statistics, out
        As in `backward`; saved of a forward with `comm=`.

    Returns
    -------
    Started
        Its `finish()` returns what `backward` returns.

    Raises
    ------
    TypeError, ValueError, CollectiveMismatch
        As in `backward`; here or in `finish`, but on all ranks in the same place.
    """
    forward = _forward_of(saved)
    if forward.place is None:
        remedy = "Use backward, or give the forward a comm."
        raise ValueError(message("backward_start", "saved", "be of a forward with comm=", "one without", remedy))
    return _start(forward.place, dy, forward, parameter_gradients, statistics, out)


class Prepared:
    """A backward whose arguments were checked and whose outputs are ready; nothing is written yet."""

    def __init__(
        self,
        function: str,
        dy: Any,
        forward: Forward,
        parameter_gradients: ParameterGradients,
        statistics: bool,
        out: Any,
    ) -> None:
        self.everywhere = one_of(_WHOSE, parameter_gradients, function, "parameter_gradients") == "global"
        self.by_statistics = flag(statistics, function, "statistics")
        if self.by_statistics and forward.frozen is None:
            rule, remedy = (
                "be False unless the statistics are frozen",
                "What passes through a batch's own is part of dx.",
            )
            raise ValueError(message(function, "statistics", rule, True, remedy))
        self.forward = forward
        self.source = x = forward.source
        self.backend = x.backend
        array, dy_operand = _arguments.beside(function, "dy", dy, x)
        _check_unchanged(forward)
        self.in_given = out is not None
        if out is None:
            self.dx = _arrays.empty_like(x.array)
        else:
            masked = (region("mask", forward.mask.array),) if forward.mask else ()
            apart = (region("x", x.array), *masked)
            self.dx = _arguments.destination(function, out, x, {"dy": array}, apart)
        self.dresidual = _arrays.empty_like(x.array) if forward.has_residual else None
        self.dgamma, self.dbeta = _parameter_outputs(forward)
        self.normalised = forward.statistics, forward.parameters.affine
        self.arrays = Arrays(
            x.operand,
            dy_operand,
            operand(self.dx.array, x.axis),
            self.dresidual and operand(self.dresidual.array, x.axis),
            forward.mask and forward.mask.operand,
        )

    @cached_property
    def terms(self) -> Terms:
        forward, (array, _, (N, C, _), _, _) = self.forward, self.source
        on = {
            "relu": forward.gate.kind != "none",
            "residual": forward.has_residual,
            "frozen": forward.frozen is not None,
            "global parameter gradients": self.everywhere,
        }
        return Terms(
            "backward",
            C,
            N,
            array.dtype,
            forward=forward.place.exchange if forward.place else 0,
            options=frozenset(name for name in on if on[name]),
            gathers=self.everywhere or forward.frozen is None,
        )

    def run(self) -> AnyGradients:
        """The whole batch is here."""
        source, forward = self.source, self.forward
        if self.in_given and self._may_fail():
            sums = self.backend.root_sums(self.part(0))
            return self._apply(sums, sums)
        sums = self.backend.backward(
            source.extents,
            self.arrays,
            *self.normalised,
            frozen=forward.frozen is not None,
            gate=forward.gate,
            parameters=self.parameters,
        )
        return self._written(self._of_channels(sums))

    def part(self, start: int) -> Nodes:
        extents, gate = self.source.extents, self.forward.gate
        return self.backend.backward_sums(extents, self.arrays, *self.normalised, gate=gate, start=start)

    def accept(self, values: int) -> None:
        """The forward has been."""

    def finish(self, gathered: Gathered) -> AnyGradients:
        sums = self.backend.root_sums(gathered.nodes) if self.terms.gathers else None
        needed = self.parameters or self.by_statistics
        own = (sums if self.everywhere else self.backend.root_sums(gathered.own)) if needed else None
        return self._apply(own, sums)

    def _apply(self, own: Sums | None, sums: Sums | None) -> AnyGradients:
        """Gradients of channels from own sums, then dx from those of all ranks: what may fail comes before `out`."""
        if self.parameters and own:
            self.backend.parameter_gradients(self.forward.statistics, own, *self.parameters)
        of_channels = self._of_channels(own)
        extents, gate = self.source.extents, self.forward.gate
        applied = sums if self.forward.frozen is None else None
        self.backend.backward_apply(extents, self.arrays, *self.normalised, applied, gate=gate)
        return self._written(of_channels)

    @property
    def parameters(self) -> tuple[Vector, Vector] | None:
        """dgamma and dbeta."""
        if self.dgamma is None or self.dbeta is None:
            return None
        return vector(self.dgamma.array), vector(self.dbeta.array)

    def _may_fail(self) -> bool:
        """Whether a library makes gradients of channels of its own accord."""
        return self.by_statistics or any(d and d.array.library.adopts for d in (self.dgamma, self.dbeta))

    def _of_channels(self, sums: Sums | None) -> OfChannels:
        """What of the gradients of channels is asked for; `parameters` are written."""
        dgamma, dbeta = self.dgamma, self.dbeta
        gamma, beta = self.forward.parameters
        return (
            dgamma and gamma and dgamma.finish(),
            dbeta and beta and dbeta.finish(),
            *(self._of_statistics(sums) if self.by_statistics and sums else (None, None)),
        )

    @default_floating_point
    @np.errstate(all="ignore")
    def _of_statistics(self, sums: Sums) -> tuple[Any, Any]:
        """The gradients by given mean and variance, of which invstd is a function."""
        forward, home = self.forward, self.forward.frozen
        assert home is not None, "checked at first"
        gamma = forward.parameters.gamma
        sum_dy, sum_dy_xmu, invstd = (self.backend.to_host(a) for a in (*sums, forward.statistics.invstd))
        scale = invstd * self.backend.to_host(gamma.values) if gamma else invstd
        dmean, dvar = -(sum_dy * scale), -0.5 * (sum_dy_xmu * scale * (invstd * invstd))
        new = home.library.from_numpy
        return new(dmean, home.dtype, home), new(dvar, home.dtype, home)

    def _written(self, of_channels: OfChannels) -> AnyGradients:
        dgamma, dbeta, dmean, dvar = of_channels
        dx, dresidual = self.dx.finish(), self.dresidual and self.dresidual.finish()
        if self.by_statistics:
            return StatisticsGradients(dx, dgamma, dbeta, dresidual, dmean, dvar)
        return Gradients(dx, dgamma, dbeta, dresidual)


def _start(place: SyncContext, *arguments: Any) -> Started[AnyGradients]:
    return collective.start("backward", place.communicator, place.sizes, partial(Prepared, "backward", *arguments))


def _forward_of(saved: Saved[Any]) -> Forward:
    if not isinstance(saved, Saved):
        remedy = "It is the second result of forward_train and forward_frozen."
        raise TypeError(message("backward", "saved", "be a Saved", type(saved).__name__, remedy))
    return saved._forward


def _parameter_outputs(forward: Forward) -> tuple[Output | None, Output | None]:
    """Where dgamma and dbeta go: each like its parameter, or like the other where there is but one of them."""
    gamma, beta = forward.parameters
    either = gamma or beta
    if either is None:
        return None, None
    homes = ((kept or either).home for kept in (gamma, beta))
    dgamma, dbeta = (_arrays.empty_vector(forward.source.extents.C, home.dtype, home) for home in homes)
    return dgamma, dbeta


def _check_unchanged(forward: Forward) -> None:
    """x and the mask must hold what the forward read: the gradient depends on it."""
    out = "Give the forward an `out` of its own, and change x only after the last backward."
    if forward.overwritten:
        rule = "be kept until backward, but y was written over it"
        raise ValueError(refusal("backward", "x", rule, forward.source.array, out))
    for name, array, version in forward.read:
        if array.capsule is not None:  # an export holds its memory, and may be another one each time
            continue
        now = _arrays.describe(array.owner, "backward", name, BOOL if name == "mask" else FLOATS, detach=True)
        if now[:4] != array[:4] or array.library.version(now) != version:
            rule = "be as it was in the forward, but was changed since"
            remedy = out if name == "x" else "Change it only after the last backward."
            raise ValueError(refusal("backward", name, rule, now, remedy))
