"""The gradient of the training and the frozen forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

from cubn import _calls
from cubn._arrays.library import ALIGNMENT
from cubn._calls import new_tuple
from cubn._differentiation import BACKWARDS, WHOSE, AnyGradients, Differentiation
from cubn._ghost import GhostDifferentiation
from cubn.backends import threads
from cubn.errors import message, reporting_as
from cubn.gradients import Gradients, StatisticsGradients
from cubn.saved import Forward, Saved
from cubn.sync import collective
from cubn.sync.collective import Started, SyncContext
from cubn.typing import ArrayT, Like, ParameterGradients


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
    if statistics is False and type(saved) is Saved and type(parameter_gradients) is str:
        done = _again(saved._forward, dy, out) if parameter_gradients in WHOSE else None
        if done is not None:
            return done
    with reporting_as("backward"):
        forward = forward_of(saved)
        make = partial(_kind(forward), dy, forward, parameter_gradients, statistics, out)
        return make().run() if forward.context is None else _start(forward.context, make).finish()


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


@reporting_as("backward")
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
    forward = forward_of(saved)
    if forward.context is None:
        remedy = "Use backward, or give the forward a comm."
        raise ValueError(
            message("saved", "be of a forward with comm=", "one without", remedy, function="backward_start")
        )
    return _start(forward.context, partial(_kind(forward), dy, forward, parameter_gradients, statistics, out))


def _again(forward: Forward, dy: Any, out: Any) -> Gradients[Any] | None:
    """A backward like one that was made before; None where something is in its way."""
    layouts, x, mask, held, statistics, relu_mask, frozen, overwritten, context, groups = forward
    found = _calls.signature(dy)
    if found is None or overwritten or context is not None or groups is not None:
        return None
    layout, at_dy = found
    given, at_dx = None, 0
    if out is not None:
        if (found := _calls.signature(out)) is None:
            return None
        given, at_dx = found
    kept = None if relu_mask is None else relu_mask.layout
    entry = BACKWARDS.entries.get((layouts, held.layout, kept, layout, given, frozen, threads.limit))
    if entry is None:
        return None
    entry.asked_for = True
    call = entry.value
    facts, library = call.facts, call.library
    if not library.is_still(x.owner, facts.x, x.pointer):
        return None
    if library.counts_versions and library.version(x.owner) != x.version:
        return None
    at_mask = 0
    if mask is not None:
        if _calls.signature(mask.owner) != (facts.mask, mask.pointer) or facts.version(mask.owner) != mask.version:
            return None
        at_mask = mask.pointer
    dx, dresidual, at_dresidual = out, None, 0
    if out is None:
        dx, at_dx = call.allocate(x.owner)
    elif not call.takes(out, at_dx, (at_dy,), (x.pointer, at_mask), None):
        return None
    if facts.dresidual is not None:
        allocate, alignment = facts.dresidual
        dresidual, at_dresidual = allocate(x.owner)
        if at_dresidual % ALIGNMENT != alignment:
            return None
    if at_dx % ALIGNMENT != call.alignment:
        return None
    dgamma = dbeta = None
    at_dgamma = at_dbeta = 0
    if facts.dgamma is not None and facts.dbeta is not None:
        home, allocate = facts.dgamma
        dgamma, at_dgamma = allocate(held.arrays[home].owner)
        home, allocate = facts.dbeta
        dbeta, at_dbeta = allocate(held.arrays[home].owner)
    call.prepared(x.pointer, at_dy, at_dx, at_dresidual, at_mask, statistics, relu_mask, at_dgamma, at_dbeta)
    if out is not None and library.counts_versions:
        library.mark_written(out)
    dgamma, dbeta = dgamma if statistics.gamma else None, dbeta if statistics.beta else None
    return new_tuple(Gradients, (dx, dgamma, dbeta, dresidual))


def _start(context: SyncContext, make: Callable[[], Differentiation]) -> Started[AnyGradients]:
    return collective.start(context.communicator, context.sizes, make)


def _kind(forward: Forward) -> type[Differentiation]:
    """Which backward belongs to a forward."""
    return Differentiation if forward.groups is None else GhostDifferentiation


def forward_of(saved: Saved[Any]) -> Forward:
    """What a Saved holds."""
    if not isinstance(saved, Saved):
        remedy = "It is the second result of forward_train and forward_frozen."
        raise TypeError(message("saved", "be a Saved", type(saved).__name__, remedy))
    return saved._forward
