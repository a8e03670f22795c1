"""Batch norm's passes on tensors: from tensors to a backend, and from what a forward left to its backward.

Nothing here is differentiable, and nothing belongs to a module. The first call with tensors of given layouts goes
through the operations of `cubn`, with every check; later ones go straight to what that prepared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cubn import _arrays, _calls
from cubn._arrays import Array
from cubn._arrays.library import ALIGNMENT
from cubn._calls import Call
from cubn._inputs import Inputs, bind
from cubn._state.arrays import ARRAYS, StateArrays, checked_arrays
from cubn._state.holding import Counted
from cubn._training import Training
from cubn._types import ITEMSIZE, Affine, NormalizeOptions, Running, Statistics, Vector
from cubn._types import Counters as Addresses
from cubn.backends.protocol import ReluMask
from cubn.backward import backward as core_backward
from cubn.forward import forward, forward_frozen
from cubn.forward_train import forward_train
from cubn.gradients import Gradients
from cubn.saved import Forward, Layouts, Read, Saved
from cubn.state import BatchNormState
from cubn.sync import Comm
from cubn.sync.collective import SyncContext

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
    """Normalise by the batch's statistics; update the running ones, where there are any, and their counters."""
    x, vectors, residual = _detached(x, vectors, residual)
    tracked, skipped = _per_channel(counters, vectors[2], momentum)
    at_counters = Addresses(tracked.data_ptr(), skipped.data_ptr())
    found = None
    if comm is None:
        found = _calls.look_up(_TRAININGS, (x, *vectors, mask, residual), relu)
    result = found and _train_again(*found, x, mask, at_counters, momentum, eps)
    if result is None:
        state = new_state(x, vectors, eps, momentum)
        if state._counters is not None:
            state._counters = Counted(tracked, skipped, state._counters.device, at_counters)
        if comm is None:
            result = _train(Training(x, state, mask, residual, relu, True, None))
        else:
            y, saved = forward_train(x, state, mask=mask, residual=residual, relu=relu, comm=comm)
            result = y, *_left(saved)
    elif vectors[2] is not None:
        increment_version([vector for vector in vectors[2:] if vector is not None])
    if counters:
        _count(counters, tracked, momentum)
    return result


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
    x, vectors, residual = _detached(x, vectors, residual)
    if comm is None:
        found = _calls.look_up(_FROZEN, (x, *vectors, mask, residual), relu)
        result = found and _frozen_again(*found, x, eps)
        if result is not None:
            return result
    y, saved = forward_frozen(x, new_state(x, vectors, eps), mask=mask, residual=residual, relu=relu, comm=comm)
    left, relu_mask = _left(saved)
    inputs = bind(x, new_state(x, vectors, eps), mask, residual)
    options = NormalizeOptions(residual is not None, relu, keep_mask=left.layouts.relu == "mask")
    copies = Affine(*(vector and Vector(0, "float64", 1) for vector in inputs.held.affine))
    operands = inputs.operands(_described(y))
    prepared = inputs.backend.prepare_normalize(inputs.extents, operands, copies, options)
    _remember(_FROZEN, prepared, left._replace(statistics=_NONE), inputs, y, relu)
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
    x, vectors, residual = _detached(x, vectors, residual)
    found = _calls.look_up(_FORWARDS, (x, *vectors, mask, residual), relu)
    if found is not None and 0 < eps < math.inf:
        call, (at_x, gamma, beta, mean, var, at_mask, at_residual) = found
        y: Tensor
        y, at_y = call.allocate(x)
        if at_y % ALIGNMENT == call.alignment:
            call.prepared(at_x, at_residual, at_y, at_mask, gamma, beta, mean, var, eps)
            return y
    state = new_state(x, vectors, eps)
    y = forward(x, state, mask=mask, residual=residual, relu=relu)
    inputs = bind(x, state, mask, residual)
    if inputs.held.running:
        options = NormalizeOptions(residual is not None, relu)
        operands = inputs.operands(_described(y))
        prepared = inputs.backend.prepare_forward(
            inputs.extents, operands, inputs.held.affine, inputs.held.running, options
        )
        _remember(_FORWARDS, prepared, None, inputs, y, relu)
    return y


def backward(dy: Tensor, x: Tensor, mask: Tensor | None, left: Left, relu_mask: ReluMask | None) -> Gradients[Tensor]:
    """dx, dgamma, dbeta and dresidual."""
    return core_backward(dy.detach(), saved(x, mask, left, relu_mask))


def saved(x: Tensor, mask: Tensor | None, left: Left, relu_mask: ReluMask | None) -> Saved[Tensor]:
    """What the core's backward reads: that a tensor did not change meanwhile is autograd's business."""
    layouts, held, statistics, is_frozen, context = left
    x = x.detach()
    return Saved._of(
        Forward(
            layouts,
            Read(x, x.data_ptr(), _version(x), None),
            None if mask is None else Read(mask, mask.data_ptr(), _version(mask), None),
            held,
            statistics,
            relu_mask,
            is_frozen,
            False,
            context,
        )
    )


# --- calls that were made before --------------------------------------------------------------------------------------

_NONE = Statistics(None, 0, 0, False, False)  # those of a call that is kept

_TRAININGS, _FROZEN, _FORWARDS = _calls.new_store(), _calls.new_store(), _calls.new_store()


def _train(training: Training) -> Result:
    """With every check."""
    training.check_count()
    y, saved = training.run()
    left, relu_mask = _left(saved)
    inputs, options = training.inputs, training.options
    if training.values is not None:
        held, (N, _, S) = inputs.held, inputs.extents
        prepared = inputs.backend.prepare_train(
            inputs.extents, training.operands, held.affine, held.running if training.updates else None, False, options
        )
        each = N * S // max(1, math.prod(inputs.mask.shape)) if inputs.mask else N * S
        sizes = [a.shape[0] * ITEMSIZE[a.dtype] if (a := held.arrays.get(name)) else 0 for name in ARRAYS]
        _remember(_TRAININGS, prepared, (left._replace(statistics=_NONE), each, sizes), inputs, y, options.relu)
    return y, left, relu_mask


def _train_again(
    call: Call[Any, Any],
    at: list[int],
    x: Tensor,
    mask: Tensor | None,
    counters: Addresses,
    momentum: float | None,
    eps: float,
) -> Result | None:
    """None where something is in the way."""
    at_x, gamma, beta, mean, var, at_mask, at_residual = at
    left, values, sizes = call.facts
    if mask is not None and call.library.count(mask) * values < 2:
        return None
    if not 0 < eps < math.inf or (momentum is not None and not 0 <= momentum <= 1):
        return None
    if not _apart(sizes, at[1:5]):
        return None
    y, at_y = call.allocate(x)
    if at_y % ALIGNMENT != call.alignment:
        return None
    statistics, relu_mask = call.prepared(
        at_x, at_residual, at_y, at_mask, gamma, beta, eps, mean, var, mean, var, *counters, momentum
    )
    return y, left._replace(statistics=statistics), relu_mask


def _frozen_again(call: Call[Any, Any], at: list[int], x: Tensor, eps: float) -> Result | None:
    """None where something is in the way."""
    at_x, gamma, beta, mean, var, at_mask, at_residual = at
    y, at_y = call.allocate(x)
    if at_y % ALIGNMENT != call.alignment or not 0 < eps < math.inf:
        return None
    left = call.facts
    backend, affine, running = left.layouts.backend, left.held.affine, left.held.running
    affine = Affine(*(vector and vector._replace(pointer=p) for vector, p in zip(affine, (gamma, beta), strict=True)))
    running = Running(*(vector._replace(pointer=p) for vector, p in zip(running, (mean, var), strict=True)))
    statistics = backend.new_statistics(left.layouts.extents.C, affine)
    backend.keep(affine, statistics)
    backend.frozen_statistics(running, eps, statistics)
    copies = (vector.pointer if vector else 0 for vector in statistics.affine)
    relu_mask = call.prepared(at_x, at_residual, at_y, at_mask, statistics, *copies)
    return y, left._replace(statistics=statistics), relu_mask


def _remember(store: Any, prepared: Any, facts: Any, inputs: Inputs, y: Tensor, relu: bool) -> None:
    """For tensors of the same layouts."""
    vectors = [inputs.held.arrays.get(name) for name in ARRAYS]
    if all(vector is None or vector.strides == (1,) for vector in vectors):
        call: Call[Any, Any] = Call(prepared, facts, inputs.x, _described(y))
        _calls.add(store, call, (inputs.x, *vectors, inputs.mask, inputs.residual_or_dy), relu)


def _apart(sizes: Sequence[int], at: Sequence[int]) -> bool:
    """Whether the running statistics share no memory with each other, gamma or beta."""
    return all(
        a + n <= b or b + m <= a
        for (a, n), (b, m) in itertools.combinations(zip(at, sizes, strict=True), 2)
        if n and m and not (a == at[0] and b == at[1])
    )


# --- from tensors, and to them ----------------------------------------------------------------------------------------


def _detached(x: Tensor, vectors: Vectors, residual: Tensor | None) -> tuple[Tensor, Vectors, Tensor | None]:
    weight, bias, mean, var = vectors
    return (
        x.detach(),
        (
            None if weight is None else weight.detach(),
            None if bias is None else bias.detach(),
            mean,
            var,
        ),
        None if residual is None else residual.detach(),
    )


def new_state(x: Tensor, vectors: Vectors, eps: float, momentum: float | None = 0.1) -> BatchNormState:
    arrays: dict[str, Any] = dict(zip(ARRAYS, vectors, strict=True))
    C = x.shape[1] if x.ndim > 1 else 1
    return BatchNormState.from_arrays(**arrays, num_features=C, eps=eps, momentum=momentum, check=False)


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


def _described(y: Tensor) -> Array:
    return _arrays.describe(y, "y")


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def _per_channel(counters: Counters | None, mean: Tensor | None, momentum: float | None) -> tuple[Tensor, Tensor]:
    """Counters of each channel, for kernels: what they were, where a weight depends on it."""
    if mean is None:
        return _NOTHING, _NOTHING
    if counters is None:
        return torch.zeros_like(mean, dtype=torch.int64), torch.zeros_like(mean, dtype=torch.int64)
    tracked, skipped = counters
    if momentum is None:
        return tracked.expand(len(skipped)).contiguous(), skipped
    return torch.zeros_like(skipped), skipped


def _count(counters: Counters, tracked: Tensor, momentum: float | None) -> None:
    """One more update. Where an average began anew, the batches before it count as skipped: the average is of
    num_batches_tracked - skipped.
    """
    counters.num_batches_tracked.add_(1)
    if momentum is None:
        counters.skipped.add_(counters.num_batches_tracked - tracked)
    else:
        increment_version((counters.skipped,))


_NOTHING = torch.empty(0, dtype=torch.int64)
