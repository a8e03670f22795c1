"""Batch norm's passes on tensors: from tensors to a backend, and from what a forward left to its backward.

Nothing here is differentiable, and nothing belongs to a module. The first call with tensors of given layouts goes
through the operations of `cubn`, with every check. What that prepared is kept under a key that native code reads off
the tensors, and later calls go straight to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cubn import _calls
from cubn._arrays.library import ALIGNMENT
from cubn._calls import Call
from cubn._differentiation import BACKWARDS
from cubn._inputs import bind_x, parameter
from cubn._kept import Store
from cubn._moments import Moments
from cubn._state.arrays import ARRAYS, STATISTICS, StateArrays, checked_arrays
from cubn._state.holding import Counted
from cubn._state.options import checked_eps, checked_momentum
from cubn._training import TRAININGS
from cubn._types import Affine, Running, Statistics
from cubn._types import Counters as Addresses
from cubn.backends import threads
from cubn.backends.protocol import ReluMask
from cubn.backward import backward as core_backward
from cubn.double_backward import double_backward as core_double_backward
from cubn.errors import message, reporting_as
from cubn.forward import FORWARDS, FROZEN, forward, forward_frozen
from cubn.forward_train import forward_train
from cubn.gradients import DoubleGradients, Gradients
from cubn.moments import update as core_update
from cubn.saved import Forward, Layouts, Read, Saved
from cubn.state import BatchNormState
from cubn.sync import Comm
from cubn.sync.collective import SyncContext
from cubn.torch._reading import Found, counter, read
from cubn.torch._recomputation import recomputing

increment_version = torch.autograd.graph.increment_version

Vectors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""weight, bias, running_mean and running_var."""


class Counters(NamedTuple):
    """Of updates of the running statistics: an int64 scalar, and int64 (C,), how many of them passed a channel over."""

    num_batches_tracked: Tensor
    skipped: Tensor


class Left(NamedTuple):
    """What a forward leaves for its backward besides tensors of the input's size."""

    layouts: Layouts
    held: StateArrays  # as the vectors, but of no memory
    statistics: Statistics
    frozen: bool
    context: SyncContext | None


Result = tuple[Tensor, Left, ReluMask | None]
"""y, what is left, and which elements of y are positive, where a residual is added before a ReLU."""


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
    tracked, skipped = _NO_COUNTERS if counters is None else counters
    key, found = _look_up(_TRAININGS, relu, comm, x, *vectors, mask, residual, tracked, skipped)
    result = found and _train_again(*found, x, vectors, counters, mask, momentum, eps)
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
    key, found = _look_up(_FROZEN, relu, comm, x, *vectors, mask, residual)
    result = found and _frozen_again(*found, x, eps)
    if result is not None:
        return result
    x, state, residual = x.detach(), new_state(x, vectors, eps), _detached(residual)
    y, saved = forward_frozen(x, state, mask=mask, residual=residual, relu=relu, comm=comm)
    left, relu_mask = _left(saved)
    _keep(_FROZEN, key, FROZEN, left, x, state, mask, residual, relu)
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
    key, found = _look_up(_INFERENCES, relu, None, x, *vectors, mask, residual)
    y: Tensor
    if found is not None and 0 < eps < math.inf:
        known, (_, at_x, gamma, beta, mean, var, at_mask, at_residual) = found
        y, at_y = known.call.allocate(x)
        if at_y % ALIGNMENT == known.call.alignment:
            known.call.prepared(at_x, at_residual, at_y, at_mask, gamma, beta, mean, var, eps)
            return y
    x, state, residual = x.detach(), new_state(x, vectors, eps), _detached(residual)
    y = forward(x, state, mask=mask, residual=residual, relu=relu)
    _keep(_INFERENCES, key, FORWARDS, None, x, state, mask, residual, relu)
    return y


def update(vectors: Vectors, counters: Counters | None, moments: Moments, *, momentum: float | None) -> None:
    """Update the running statistics by Moments, and their counters."""
    _, _, mean, var = vectors
    assert mean is not None
    state = BatchNormState.from_arrays(running_mean=mean, running_var=var, momentum=momentum, check=False)
    tracked, skipped = _per_channel(counters, mean, momentum)
    _count_in(state, tracked, skipped)
    core_update(state, moments)
    if counters:
        _count(counters, tracked if momentum is None else None)


def backward(dy: Tensor, x: Tensor, mask: Tensor | None, left: Left, relu_mask: ReluMask | None) -> Gradients[Tensor]:
    """dx, dgamma, dbeta and dresidual, of this rank alone where there are several."""
    layouts, held, _, is_frozen, context = left
    key = None
    if context is None and (found := read(dy, x, mask)) is not None and not (dy.is_neg() or x.is_neg()):
        words = None if relu_mask is None else relu_mask.layout
        key = found[0], layouts, held.layout, words, is_frozen, threads.limit
        known = _BACKWARDS.get(key)
        gradients = known and _backward_again(known.call, found, dy, left, relu_mask)
        if gradients is not None:
            return gradients
    dy = dy.detach()
    gradients = core_backward(dy, saved(x, mask, left, relu_mask))
    if key is not None and (described := _calls.signature(dy)) is not None:
        call = BACKWARDS.get((layouts, held.layout, words, described[0], None, is_frozen, threads.limit))
        if call is not None:
            _BACKWARDS.add(key, Known(call, None, (), None))
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
    ddx, ddgamma, ddbeta, ddresidual = (_detached(gradient) for gradient in given)
    of = saved(x, mask, left, relu_mask)
    return core_double_backward(ddx, ddgamma, ddbeta, dy.detach(), of, ddresidual=ddresidual)


def saved(x: Tensor, mask: Tensor | None, left: Left, relu_mask: ReluMask | None) -> Saved[Tensor]:
    """What the core's backward reads: that a tensor did not change meanwhile is autograd's business."""
    layouts, held, statistics, is_frozen, context = left
    x = x.detach()
    of_mask = None if mask is None else Read(mask, mask.data_ptr(), _version(mask), None)
    of_x = Read(x, x.data_ptr(), _version(x), None)
    return Saved._of(Forward(layouts, of_x, of_mask, held, statistics, relu_mask, is_frozen, False, context))


# --- calls that were made before --------------------------------------------------------------------------------------


class Known(NamedTuple):
    """A call for tensors of given layouts."""

    call: Call[Any, Any]
    left: Left | None
    """What it leaves, but for the statistics."""
    sizes: tuple[int, ...]
    """Bytes of the vectors."""
    uncounted: Uncounted | None

    @property
    def nbytes(self) -> int:
        return self.call.nbytes


_TRAININGS: Store[Known] = _calls.new_store()
_FROZEN: Store[Known] = _calls.new_store()
_INFERENCES: Store[Known] = _calls.new_store()
_BACKWARDS: Store[Known] = _calls.new_store()

_NO_STATISTICS = Statistics(None, 0, 0, False, False)


def _look_up(
    store: Store[Known], relu: bool, comm: Comm | None, x: Tensor, *others: Tensor | None
) -> tuple[Any, tuple[Known, Found] | None]:
    """The key of such tensors, and the call that was made before with such, and where they are."""
    if comm is not None:
        return None, None
    found = read(x, *others)
    if found is None or x.is_neg():
        return None, None
    key = found[0], relu, threads.limit
    known = store.get(key)
    return key, None if known is None else (known, found)


def _keep(
    store: Store[Known],
    key: Any,
    of_core: Store[Any],
    left: Left | None,
    x: Tensor,
    state: BatchNormState,
    mask: Tensor | None,
    residual: Tensor | None,
    *options: bool,
) -> None:
    """Keep what the core kept of a call, under the key of its tensors."""
    found = None if key is None else _calls.find(of_core, x, state, mask, residual, None, *options)
    if found is None:
        return
    call, held, *_ = found
    arrays = [held.arrays.get(name) for name in ARRAYS]
    if all(array is None or (array.strides == (1,) and not array.owner.is_neg()) for array in arrays):
        sizes = tuple(array.owner.nbytes if array else 0 for array in arrays)
        mean = state.running_mean if left and not left.frozen else None
        uncounted = None if mean is None else Uncounted.like(mean)
        store.add(key, Known(call, left and left._replace(statistics=_NO_STATISTICS), sizes, uncounted))


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
    state, tracked = new_state(x, vectors, eps, momentum), None
    if (mean := vectors[2]) is not None:
        tracked, skipped = _per_channel(counters, mean, momentum)
        _count_in(state, tracked, skipped)
    x, residual = x.detach(), _detached(residual)
    y, saved = forward_train(x, state, mask=mask, residual=residual, relu=relu, comm=comm)
    if counters is not None and tracked is not None:
        _count(counters, tracked if momentum is None else None)
    left, relu_mask = _left(saved)
    _keep(_TRAININGS, key, TRAININGS, left, x, state, mask, residual, relu, True)
    return y, left, relu_mask


def _train_again(
    known: Known,
    found: Found,
    x: Tensor,
    vectors: Vectors,
    counters: Counters | None,
    mask: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Result | None:
    """None where something is in the way."""
    call, left, sizes, uncounted = known
    _, at_x, gamma, beta, mean, var, at_mask, at_residual, at_tracked, at_skipped = found
    if mask is not None and call.library.count(mask) * call.facts.values < 2:
        return None
    if not 0 < eps < math.inf or (momentum is not None and not 0 <= momentum <= 1):
        return None
    moves: tuple[Any, ...] = ()
    tracked = None
    if uncounted is not None:
        if not _apart(sizes, (gamma, beta, mean, var)):
            return None
        if momentum is None:
            if counters is None:
                return None
            tracked = counters.num_batches_tracked.expand(len(counters.skipped)).contiguous()
        each = uncounted.tracked if tracked is None else tracked.data_ptr()
        moves = mean, var, mean, var, each, at_skipped or uncounted.skipped, momentum
    y, at_y = call.allocate(x)
    if at_y % ALIGNMENT != call.alignment:
        return None
    statistics, relu_mask = call.prepared(at_x, at_residual, at_y, at_mask, gamma, beta, eps, *moves)
    if counters is not None and tracked is None and x.is_cpu:
        counter()(at_tracked)
        increment_version((*vectors[2:], *counters))  # type: ignore[arg-type]
    elif moves:
        increment_version(vectors[2:])  # type: ignore[arg-type]
        if counters is not None:
            _count(counters, tracked)
    assert left
    layouts, held, _, is_frozen, context = left
    return y, Left(layouts, held, statistics, is_frozen, context), relu_mask


def _frozen_again(known: Known, found: Found, x: Tensor, eps: float) -> Result | None:
    """None where something is in the way."""
    (call, left, *_), (_, at_x, gamma, beta, mean, var, at_mask, at_residual) = known, found
    y, at_y = call.allocate(x)
    if at_y % ALIGNMENT != call.alignment or not 0 < eps < math.inf:
        return None
    assert left
    assert left.held.running
    place = left.layouts.backend
    affine = Affine(*(v and v._replace(pointer=p) for v, p in zip(left.held.affine, (gamma, beta), strict=True)))
    running = Running(*(v._replace(pointer=p) for v, p in zip(left.held.running, (mean, var), strict=True)))
    statistics = place.new_statistics(left.layouts.extents.C, affine)
    place.keep(affine, statistics)
    place.frozen_statistics(running, eps, statistics)
    copies = (vector.pointer if vector else 0 for vector in statistics.affine)
    relu_mask = call.prepared(at_x, at_residual, at_y, at_mask, statistics, *copies)
    return y, left._replace(statistics=statistics), relu_mask


def _backward_again(
    call: Call[Any, Any], found: Found, dy: Tensor, left: Left, relu_mask: ReluMask | None
) -> Gradients[Tensor] | None:
    """None where something is in the way."""
    _, at_dy, at_x, at_mask = found
    facts, statistics = call.facts, left.statistics
    dx, at_dx = call.allocate(dy)
    if at_dx % ALIGNMENT != call.alignment:
        return None
    dresidual = dgamma = dbeta = None
    at_dresidual = at_dgamma = at_dbeta = 0
    if facts.dresidual is not None:
        allocate, alignment = facts.dresidual
        dresidual, at_dresidual = allocate(dy)
        if at_dresidual % ALIGNMENT != alignment:
            return None
    if facts.dgamma is not None:
        dgamma, at_dgamma = facts.dgamma[1](dy)
        dbeta, at_dbeta = facts.dbeta[1](dy)
    call.prepared(at_x, at_dy, at_dx, at_dresidual, at_mask, statistics, relu_mask, at_dgamma, at_dbeta)
    return Gradients(dx, dgamma if statistics.gamma else None, dbeta if statistics.beta else None, dresidual)


def _apart(sizes: tuple[int, ...], at: tuple[int, ...]) -> bool:
    """Whether the running statistics share no memory with each other, weight or bias."""
    gamma, beta, mean, var = at
    of_gamma, of_beta, size, _ = sizes
    return not (
        -size < var - mean < size
        or -of_gamma < gamma - mean < size
        or -of_gamma < gamma - var < size
        or -of_beta < beta - mean < size
        or -of_beta < beta - var < size
    )


# --- counters ---------------------------------------------------------------------------------------------------------

_NO_COUNTERS = None, None


class Uncounted(NamedTuple):
    """Room for the counters of each channel that kernels write and nobody reads, and where they are."""

    memory: Tensor
    tracked: int
    skipped: int

    @classmethod
    def like(cls, mean: Tensor) -> Uncounted:
        memory = torch.zeros(2, len(mean), dtype=torch.int64, device=mean.device)
        return cls(memory, memory[0].data_ptr(), memory[1].data_ptr())


def _per_channel(counters: Counters | None, mean: Tensor, momentum: float | None) -> tuple[Tensor, Tensor]:
    """Counters of each channel, for kernels: what they were, where a weight depends on it."""
    if counters is None:
        tracked, skipped = torch.zeros(2, len(mean), dtype=torch.int64, device=mean.device)
        return tracked, skipped
    tracked, skipped = counters
    for name, given, count in zip(Counters._fields, counters, (1, len(mean)), strict=True):
        if given.dtype != torch.int64 or given.numel() != count or given.device != mean.device:
            rule = f"be {count} of int64 on the device of running_mean, {mean.device}"
            got = f"{given.dtype} {tuple(given.shape)} on {given.device}"
            raise ValueError(message(name, rule, got, function="batch_norm"))
    return tracked.expand(len(mean)).contiguous() if momentum is None else torch.zeros_like(skipped), skipped


def _count_in(state: BatchNormState, tracked: Tensor, skipped: Tensor) -> None:
    """Let a state count in these, which are where its running statistics are."""
    device = state._current().device
    assert device
    state._counters = Counted(tracked, skipped, device, Addresses(tracked.data_ptr(), skipped.data_ptr()))


def _count(counters: Counters, tracked: Tensor | None) -> None:
    """One more update. Where an average began anew, the batches before it count as skipped, so that it is always of
    num_batches_tracked - skipped.
    """
    counters.num_batches_tracked.add_(1)
    if tracked is None:
        increment_version((counters.skipped,))
    else:
        counters.skipped.add_(counters.num_batches_tracked - tracked)


# --- from tensors, and to them ----------------------------------------------------------------------------------------


def new_state(x: Tensor, vectors: Vectors, eps: float, momentum: float | None = 0.1) -> BatchNormState:
    """A state for one call, whose arguments are checked under the names that PyTorch has for them."""
    with reporting_as("batch_norm"):
        inputs = bind_x(x.detach(), 1)
        for name, vector in zip(("weight", "bias", *STATISTICS), vectors, strict=True):
            if vector is not None:
                parameter(name, vector, inputs)
        checked_eps(eps)
        checked_momentum(momentum)
    arrays: dict[str, Any] = dict(zip(ARRAYS, vectors, strict=True))
    return BatchNormState.from_arrays(**arrays, num_features=x.shape[1], eps=eps, momentum=momentum, check=False)


def _left(saved: Saved[Tensor]) -> tuple[Left, ReluMask | None]:
    forward = saved._forward
    held = without_memory(forward.held)
    return Left(forward.layouts, held, forward.statistics, forward.frozen, forward.context), forward.relu_mask


def without_memory(held: StateArrays) -> StateArrays:
    """Such vectors, but of no memory."""
    return checked_arrays(
        {
            name: array.nowhere()._replace(owner=torch.empty(0, dtype=array.owner.dtype, device=array.owner.device))
            for name, array in held.arrays.items()
        }
    )


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version
