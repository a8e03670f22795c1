"""The gradient of the training and the frozen forward."""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any, NamedTuple

from cubn import _arguments, _arrays
from cubn._arguments import refusal, region
from cubn._arrays import BOOL, FLOATS, Output
from cubn._layout import operand, vector
from cubn.backends import Arrays, Nodes, Vector
from cubn.errors import message
from cubn.forward import Saved
from cubn.sync import collective
from cubn.sync.collective import Shared, Started, Terms


class Gradients(NamedTuple):
    """Gradients of a loss, from `backward`.

    Attributes
    ----------
    dx : array like x
    dgamma, dbeta : array of shape (C,) in gamma's and beta's dtype and library; None where the state has none
    dresidual : array like x; None where there was no residual
    """

    dx: Any
    dgamma: Any
    dbeta: Any
    dresidual: Any


def backward(dy: Any, saved: Saved, *, parameter_gradients: str = "local", out: Any = None) -> Gradients:
    """Gradients of a loss by x, gamma, beta and residual, from its gradient by y.

    With d = x - mean and dy taken as 0 where a ReLU or the mask stopped y:
    dbeta = sum(dy); dgamma = sum(dy * d) * invstd;
    dx = (dy - sum(dy) / count - d * invstd**2 * sum(dy * d) / count) * gamma * invstd; dresidual = dy.
    After `forward_frozen`, dx = dy * gamma * invstd.

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
    out : array like x, optional
        Where dx goes: exactly dy, or memory of its own.

    Returns
    -------
    Gradients
        (dx, dgamma, dbeta, dresidual). dx and dresidual share no memory, and are 0 where the mask is False.

    Raises
    ------
    TypeError
        If an array is not one, has another dtype or library, requires a gradient, or cannot be written (`out`).
    ValueError
        If shapes or devices do not fit, `out` overlaps another array, or x was overwritten since the forward.
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
    if _check_saved(saved).place is not None:
        return backward_start(dy, saved, parameter_gradients=parameter_gradients, out=out).finish()
    gradient = _Backward(dy, saved, parameter_gradients, out)
    source = gradient.source
    source.backend.backward(
        source.extents,
        gradient.arrays,
        *gradient.normalised,
        frozen=saved.frozen,
        gate=saved.gate,
        parameters=gradient.parameters,
    )
    return gradient.written()


def backward_start(dy: Any, saved: Saved, *, parameter_gradients: str = "local", out: Any = None) -> Started[Gradients]:
    """Begin the `backward` of a forward with `comm=`, and leave time for other work until its `finish`.

    Takes this rank's sums and begins to send them; dx is written in `finish`.

    Parameters
    ----------
    dy, saved, parameter_gradients, out
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
    place = _check_saved(saved).place
    if place is None:
        remedy = "Use backward, or give the forward a comm."
        raise ValueError(message("backward_start", "saved", "be of a forward with comm=", "one without", remedy))
    make = partial(_Backward, dy, saved, parameter_gradients, out)
    return collective.start("backward", place.communicator, place.sizes, make)


class _Backward:
    """A backward whose arguments were checked and whose outputs are ready; nothing is written yet."""

    def __init__(self, dy: Any, saved: Saved, parameter_gradients: str, out: Any) -> None:
        if parameter_gradients not in ("local", "global"):
            rule = "be 'local' or 'global'"
            raise ValueError(message("backward", "parameter_gradients", rule, repr(parameter_gradients)))
        self.saved = saved
        self.source = x = saved.source
        self.backend = x.backend
        self.everywhere = parameter_gradients == "global"
        array, dy_operand = _arguments.beside("backward", "dy", dy, x)
        _check_unchanged(saved)
        if out is None:
            self.dx = _arrays.empty_like(x.array)
        else:
            masked = (region("mask", saved.mask.array),) if saved.mask else ()
            apart = (region("x", x.array), *masked)
            self.dx = _arguments.destination("backward", out, x, {"dy": array}, apart)
        self.dresidual = _arrays.empty_like(x.array) if saved.has_residual else None
        self.dgamma, self.dbeta = _parameter_outputs(saved)
        self.normalised = saved.statistics, saved.parameters.affine
        self.arrays = Arrays(
            x.operand,
            dy_operand,
            operand(self.dx.array, x.axis),
            self.dresidual and operand(self.dresidual.array, x.axis),
            saved.mask and saved.mask.operand,
        )

    @cached_property
    def terms(self) -> Terms:
        saved, (array, _, (N, C, _), _, _) = self.saved, self.source
        on = {
            "relu": saved.gate.kind != "none",
            "residual": saved.has_residual,
            "frozen": saved.frozen,
            "global parameter gradients": self.everywhere,
        }
        return Terms(
            "backward",
            C,
            N,
            array.dtype,
            forward=saved.place.exchange if saved.place else 0,
            options=frozenset(name for name in on if on[name]),
            gathers=self.everywhere or not saved.frozen,
        )

    def part(self, start: int) -> Nodes:
        extents, gate = self.source.extents, self.saved.gate
        return self.backend.backward_sums(extents, self.arrays, *self.normalised, gate=gate, start=start)

    def accept(self, values: int) -> None:
        """The forward has been."""

    def finish(self, shared: Shared) -> Gradients:
        sums = self.backend.root_sums(shared.nodes) if self.terms.gathers else None
        applied, gate = None if self.saved.frozen else sums, self.saved.gate
        self.backend.backward_apply(self.source.extents, self.arrays, *self.normalised, applied, gate=gate)
        parameters = self.parameters
        if parameters:
            own = (self.everywhere and sums) or self.backend.root_sums(shared.own)
            self.backend.parameter_gradients(self.saved.statistics, own, *parameters)
        return self.written()

    @property
    def parameters(self) -> tuple[Vector, Vector] | None:
        """dgamma and dbeta."""
        if self.dgamma is None or self.dbeta is None:
            return None
        return vector(self.dgamma.array), vector(self.dbeta.array)

    def written(self) -> Gradients:
        """What the forward's state and residual ask for."""
        dgamma, dbeta = self.dgamma, self.dbeta
        gamma, beta = self.saved.parameters
        return Gradients(
            self.dx.finish(),
            dgamma and gamma and dgamma.finish(),
            dbeta and beta and dbeta.finish(),
            self.dresidual and self.dresidual.finish(),
        )


def _check_saved(saved: Saved) -> Saved:
    if not isinstance(saved, Saved):
        remedy = "It is the second result of forward_train and forward_frozen."
        raise TypeError(message("backward", "saved", "be a Saved", type(saved).__name__, remedy))
    return saved


def _parameter_outputs(saved: Saved) -> tuple[Output | None, Output | None]:
    """Where dgamma and dbeta go: each like its parameter, or like the other where there is but one of them."""
    gamma, beta = saved.parameters
    either = gamma or beta
    if either is None:
        return None, None
    homes = ((kept or either).home for kept in (gamma, beta))
    dgamma, dbeta = (_arrays.empty_vector(saved.source.extents.C, home.dtype, home) for home in homes)
    return dgamma, dbeta


def _check_unchanged(saved: Saved) -> None:
    """x and the mask must hold what the forward read: the gradient depends on it."""
    out = "Give the forward an `out` of its own, and change x only after the last backward."
    if saved.overwritten:
        rule = "be kept until backward, but y was written over it"
        raise ValueError(refusal("backward", "x", rule, saved.source.array, out))
    for name, array, version in saved.unchanged:
        if array.capsule is not None:  # an export holds its memory, and may be another one each time
            continue
        now = _arrays.describe(array.owner, "backward", name, BOOL if name == "mask" else FLOATS, detach=True)
        if now[:4] != array[:4] or array.library.version(now) != version:
            rule = "be as it was in the forward, but was changed since"
            remedy = out if name == "x" else "Change it only after the last backward."
            raise ValueError(refusal("backward", name, rule, now, remedy))
