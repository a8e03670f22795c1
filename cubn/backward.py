"""The gradient of the training and the frozen forward."""

from __future__ import annotations

from typing import Any, NamedTuple

from cubn import _arguments, _arrays
from cubn._arguments import refusal
from cubn._layout import operand, vector
from cubn.errors import message
from cubn.forward import Saved


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


def backward(dy: Any, saved: Saved, *, out: Any = None) -> Gradients:
    """Gradients of a loss by x, gamma, beta and residual, from its gradient by y.

    With d = x - mean and dy taken as 0 where a ReLU or the mask stopped y:
    dbeta = sum(dy); dgamma = sum(dy * d) * invstd;
    dx = (dy - sum(dy) / count - d * invstd**2 * sum(dy * d) / count) * gamma * invstd; dresidual = dy.
    After `forward_frozen`, dx = dy * gamma * invstd.

    Parameters
    ----------
    dy : array like x
        Of x's shape, dtype, library and device; any layout.
    saved : Saved
        From `forward_train` or `forward_frozen`; it is not used up.
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

    Notes
    -----
    The same bits for every layout, number of threads and array library; dgamma and dbeta are rounded once.
    x and dy twice from memory at most, and writes dx (and dresidual) once.

    References
    ----------
    Ioffe & Szegedy 2015, "Batch normalization", https://arxiv.org/abs/1502.03167
    """
    if not isinstance(saved, Saved):
        remedy = "It is the second result of forward_train and forward_frozen."
        raise TypeError(message("backward", "saved", "be a Saved", type(saved).__name__, remedy))
    x = saved.source
    array, dy_operand = _arguments.beside("backward", "dy", dy, x)
    _check_unchanged(saved)
    if out is None:
        dx = _arrays.empty_like(x.array)
    else:
        apart = {"x": x.array, "mask": saved.mask and saved.mask.array}
        dx = _arguments.destination("backward", out, x, {"dy": array}, apart)
    dresidual = _arrays.empty_like(x.array) if saved.has_residual else None
    sums = x.backend.backward(
        x.extents,
        dy_operand,
        x.operand,
        operand(dx.array, x.axis),
        dresidual and operand(dresidual.array, x.axis),
        saved.statistics,
        saved.gamma and saved.gamma.vector,
        saved.beta and saved.beta.vector,
        frozen=saved.frozen,
        mask=saved.mask and saved.mask.operand,
        gate=saved.gate,
    )
    return Gradients(dx.finish(), *_parameter_gradients(saved, sums), dresidual and dresidual.finish())


def _parameter_gradients(saved: Saved, sums: Any) -> tuple[Any, Any]:
    """dgamma and dbeta, each like its parameter, or None where there is none."""
    homes = [kept and kept.home for kept in (saved.gamma, saved.beta)]
    either = homes[0] or homes[1]
    if either is None:
        return None, None
    beside = (home or either for home in homes)
    dgamma, dbeta = (_arrays.empty_vector(saved.source.extents.C, home.dtype, home) for home in beside)
    saved.source.backend.parameter_gradients(saved.statistics, sums, vector(dgamma.array), vector(dbeta.array))
    return homes[0] and dgamma.finish(), homes[1] and dbeta.finish()


def _check_unchanged(saved: Saved) -> None:
    """x must hold what the forward read: the gradient depends on it."""
    x = saved.source.array
    remedy = "Give the forward an `out` of its own, and change x only after the last backward."
    if saved.overwritten:
        raise ValueError(refusal("backward", "x", "be kept until backward, but y was written over it", x, remedy))
    if x.capsule is not None:  # an export holds its memory, and may be another one each time
        return
    now = _arrays.describe(x.owner, "backward", "x", detach=True)
    if now[:4] != x[:4] or x.library.version(now) != saved.version:
        raise ValueError(refusal("backward", "x", "be as it was in the forward, but was changed since", now, remedy))
