"""Batch norm's passes on tensors: from tensors to a backend, and from what a forward left to its backward.

Nothing here is differentiable, and nothing belongs to a module. The first call with tensors of given layouts goes
through the operations of `cubn`, with every check. What that prepared is kept under a key that native code reads off
the tensors, and later calls go straight to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cubn import _calls
from cubn._differentiation import BACKWARDS
from cubn._moments import Moments
from cubn._training import TRAININGS
from cubn.backends import threads
from cubn.backends.protocol import ReluMask
from cubn.backward import backward as core_backward
from cubn.double_backward import double_backward as core_double_backward
from cubn.forward import FORWARDS, FROZEN, forward, forward_frozen
from cubn.forward_train import forward_train
from cubn.gradients import DoubleGradients, Gradients
from cubn.moments import update as core_update
from cubn.state import BatchNormState
from cubn.sync import Comm
from cubn.torch._passes import known
from cubn.torch._passes.arguments import Left, Result, Vectors, detached, left_by, new_state, places, saved
from cubn.torch._passes.counters import NO_COUNTERS, Counters, check_unlocked, count, count_in, per_channel
from cubn.torch._passes.known import Known
from cubn.torch._passes.reading import read
from cubn.torch._passes.recomputation import recomputing
from cubn.torch._passes.refusals import heard_by, in_torchs_words


def train(
    x: Tensor,
    vectors: Vectors,
    counters: Counters | None = None,
    *,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    comm: Comm | None = None,
) -> Result:
    """Normalise by the batch's statistics; update the running ones, where there are any, and their counters.

    A forward that is computed again in a backward pass updates nothing.
    """
    if vectors[2] is not None and recomputing():
        vectors, counters = (*vectors[:2], None, None), None
    tracked, skipped = NO_COUNTERS if counters is None else counters
    options = relu, type(eps), type(momentum)
    key, found = known.look_up(known.TRAININGS, options, comm, x, residual, *vectors, mask, tracked, skipped)
    result = found and known.train(*found, x, vectors, counters, mask, momentum, eps)
    return result or _train(key, x, vectors, counters, momentum, eps, mask, residual, relu, comm)


def frozen(
    x: Tensor,
    vectors: Vectors,
    *,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    comm: Comm | None = None,
) -> Result:
    """Normalise by the running statistics, with a backward."""
    key, found = known.look_up(known.FROZEN, (relu, type(eps)), comm, x, residual, *vectors, mask)
    result = found and known.frozen(*found, x, eps)
    if result is not None:
        return result
    with in_torchs_words():
        x, state, residual = x.detach(), new_state(x, vectors, eps), detached(residual)
        y, of = forward_frozen(x, state, mask=mask, residual=residual, relu=relu, comm=comm)
    left, relu_mask = left_by(of)
    known.keep(known.FROZEN, key, FROZEN, left, x, state, mask, residual, relu)
    return y, left, relu_mask


def inference(
    x: Tensor,
    vectors: Vectors,
    *,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Normalise by the running statistics."""
    key, found = known.look_up(known.INFERENCES, (relu, type(eps)), None, x, residual, *vectors, mask)
    y = None if found is None else known.inference(*found, x, eps)
    if y is not None:
        return y
    with in_torchs_words():
        x, state, residual = x.detach(), new_state(x, vectors, eps), detached(residual)
        y = forward(x, state, mask=mask, residual=residual, relu=relu)
    known.keep(known.INFERENCES, key, FORWARDS, None, x, state, mask, residual, relu)
    return y


@in_torchs_words()
def update(vectors: Vectors, counters: Counters | None, moments: Moments, *, momentum: float | None) -> None:
    """Update the running statistics by Moments, and their counters."""
    _, _, mean, var = vectors
    assert mean is not None
    state = BatchNormState.from_arrays(running_mean=mean, running_var=var, momentum=momentum, check=False)
    tracked, skipped = per_channel(counters, mean, momentum)
    count_in(state, tracked, skipped)
    core_update(state, moments)
    if counters:
        count(counters, tracked if momentum is None else None)


def backward(dy: Tensor, x: Tensor, mask: Tensor | None, left: Left, relu_mask: ReluMask | None) -> Gradients[Tensor]:
    """dx, dgamma, dbeta and dresidual, of this rank alone where there are several."""
    layouts, held, _, is_frozen, context = left
    key = found = None
    if context is None and (found := read(dy, x, mask)) is not None and not (dy.is_neg() or x.is_neg()):
        words = None if relu_mask is None else relu_mask.layout
        key = found[0], layouts, held.layout, words, is_frozen, threads.limit
        one = known.BACKWARDS.get(key)
        gradients = None if one is None else known.backward(one.call, found, dy, left, relu_mask)
        if gradients is not None:
            return gradients
    dy = dy.detach()
    of = saved(x, mask, left, relu_mask)
    gradients = core_backward(dy, of)
    if key is None or found is None or found[2:] != places(of):  # copies were read, whose layouts are not the key's
        return gradients
    if (described := _calls.signature(dy)) is not None:
        call = BACKWARDS.get((layouts, held.layout, words, described[0], None, is_frozen, threads.limit))
        if call is not None:
            known.BACKWARDS.add(key, Known(call, None, (), None))
    return gradients


def double_backward(
    given: Sequence[Tensor | None],
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    left: Left,
    relu_mask: ReluMask | None,
) -> DoubleGradients[Tensor]:
    """Gradients by dy, x and weight, given those by dx, dgamma, dbeta and dresidual."""
    ddx, ddgamma, ddbeta, ddresidual = (detached(gradient) for gradient in given)
    of = saved(x, mask, left, relu_mask)
    return core_double_backward(ddx, ddgamma, ddbeta, dy.detach(), of, ddresidual=ddresidual)


@in_torchs_words()
def _train(
    key: Any,
    x: Tensor,
    vectors: Vectors,
    counters: Counters | None,
    momentum: float | None,
    eps: float,
    mask: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    comm: Comm | None,
) -> Result:
    """With every check."""
    tracked = None
    with heard_by(comm):
        state = new_state(x, vectors, eps, momentum)
        if (mean := vectors[2]) is not None:
            check_unlocked(mean)
            tracked, skipped = per_channel(counters, mean, momentum)
            count_in(state, tracked, skipped)
        x, residual = x.detach(), detached(residual)
    y, of = forward_train(x, state, mask=mask, residual=residual, relu=relu, comm=comm)
    if counters is not None and tracked is not None:
        count(counters, tracked if momentum is None else None)
    left, relu_mask = left_by(of)
    known.keep(known.TRAININGS, key, TRAININGS, left, x, state, mask, residual, relu, True)
    return y, left, relu_mask
