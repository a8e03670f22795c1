"""The gradient of a backward: second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from cubn._double_differentiation import DoubleDifferentiation, Reduction
from cubn.backward import forward_of
from cubn.errors import message, reporting_as
from cubn.gradients import DoubleGradients
from cubn.saved import Saved
from cubn.sync import collective
from cubn.sync.collective import Gathered, Started, SyncContext
from cubn.typing import ArrayT, Like, ParameterGradients, SupportsDLPack


@reporting_as("double_backward")
def double_backward(
    ddx: Like[ArrayT] | None,
    ddgamma: SupportsDLPack | None,
    ddbeta: SupportsDLPack | None,
    dy: Like[ArrayT],
    saved: Saved[ArrayT],
    *,
    ddresidual: Like[ArrayT] | None = None,
    parameter_gradients: ParameterGradients = "local",
) -> DoubleGradients[ArrayT]:
    """Gradients of a scalar by dy, x and gamma, from its gradients by what `backward(dy, saved)` returned.

    With d = x - mean, r = invstd, bars for means over a channel's values, and dy taken as 0 where a ReLU or the mask
    stopped y:
    ddy = gamma * r * (ddx - bar(ddx) - d * r**2 * bar(ddx * d)) + ddgamma * r * d + ddbeta + ddresidual,
    and 0 where the ReLU or the mask stopped y; dgamma = sum(ddx * dx) / gamma, as it is with a gamma of 1;
    dx = -gamma * r**3 * bar(dy * d) * (ddx - bar(ddx)) + (ddgamma * r - gamma * r**3 * bar(ddx * d)) * (dy - bar(dy))
    - r**3 * (gamma * (bar(dy * ddx) - bar(dy) * bar(ddx) - 3 * r**2 * bar(dy * d) * bar(ddx * d))
    + ddgamma * bar(dy * d)) * d.
    After `forward_frozen`, ddy = gamma * r * ddx + ddgamma * r * d + ddbeta + ddresidual, dx = ddgamma * r * dy and
    dgamma = r * sum(dy * ddx). There are no gradients by beta and residual: they decide only where the ReLU is 0.

    Parameters
    ----------
    ddx, ddgamma, ddbeta : arrays like dx, dgamma and dbeta, or None
        The gradients of the scalar by dx, dgamma and dbeta; None counts as zeros. ddx is of x's shape, dtype, library
        and device, of any layout; the others are of shape (C,), of any library on x's device.
    dy : array like x
        As given to `backward`.
    saved : Saved
        As given to `backward`; it is not used up. Of a forward with `comm=`, all ranks take part.
    ddresidual : array like x, optional
        The same by dresidual.
    parameter_gradients : {"local", "global"}
        Whose dgamma is returned, as in `backward`: this rank's share, or the sum over ranks.

    Returns
    -------
    DoubleGradients
        (ddy, dx, dgamma). ddy and dx are 0 where the mask is False; dgamma is None where the state has no gamma.

    Raises
    ------
    TypeError
        If an array is not one, has another dtype or library, or requires a gradient.
    ValueError
        If shapes or devices do not fit, x was overwritten since the forward, or there was no gamma, beta or residual of
        which the gradient is given.
    CollectiveMismatch
        With `comm=`, on all ranks: if they do not do the same thing, or another one failed.

    Notes
    -----
    The same bits for every layout, number of threads and array library. Waiting for a CUDA device is part of it. Reads
    x and ddx 4 times from memory and dy 3 times, and writes ddy and dx once; a ReLU adds a pass over x and dy.

    With `comm=` the scalar is the sum over ranks of sum(ddx * dx) + sum(ddgamma * dgamma) + sum(ddbeta * dbeta) +
    sum(ddresidual * dresidual), dgamma and dbeta being the **rank's own** sums: ddgamma and ddbeta may differ from rank
    to rank. Of a scalar of the *global* dgamma and dbeta, give its gradient by them on every rank, the same: that is
    one and the same thing, since the ranks' own sums add up to the global ones. Then ddy and dx are to the bit those of
    one process with all samples, and so is the dgamma of "global". One exchange: a header of 64 bytes, then
    48 C + 24 bytes for each aligned power-of-two block of a rank's samples.

    Examples
    --------
    >>> import numpy as np, cubn
    >>> x = np.random.default_rng(0).standard_normal((8, 3, 5), dtype=np.float32)
    >>> y, saved = cubn.forward_train(x, cubn.BatchNormState(3))
    >>> dy = np.ones_like(y) + y
    >>> dx = cubn.backward(dy, saved).dx
    >>> cubn.double_backward(2 * dx, None, None, dy, saved)  # of the penalty (dx**2).sum()
    DoubleGradients(ddy=float32 (8, 3, 5), dx=float32 (8, 3, 5), dgamma=float32 (3,))
    """
    forward = forward_of(saved)
    if forward.groups is not None:
        remedy = "Call forward_train, backward and double_backward for each group of samples."
        raise ValueError(message("saved", "be of a forward without groups", f"groups={forward.groups.size}", remedy))
    make = partial(DoubleDifferentiation, ddx, ddgamma, ddbeta, dy, forward, ddresidual, parameter_gradients)
    return make().run() if forward.context is None else _synchronised(forward.context, make)


def _synchronised(context: SyncContext, make: Callable[[], DoubleDifferentiation]) -> DoubleGradients[Any]:
    """All reductions in one exchange."""
    with collective.together(context.communicator):
        double = make()
        started = [_start(context, reduction) for reduction in double.reductions]
    return double.finish([each.finish() for each in started])


def _start(context: SyncContext, reduction: Reduction) -> Started[Gathered]:
    return collective.start(context.communicator, context.sizes, lambda: reduction)
