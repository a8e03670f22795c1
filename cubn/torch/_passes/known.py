"""Passes on tensors whose layouts were met before: straight to what the core prepared for the first of them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cubn import _calls
from cubn._arrays.library import ALIGNMENT
from cubn._calls import Call
from cubn._kept import Store
from cubn._state.arrays import ARRAYS
from cubn._types import Statistics
from cubn.backends import threads
from cubn.backends.protocol import ReluMask
from cubn.gradients import Gradients
from cubn.state import BatchNormState
from cubn.sync import Comm
from cubn.torch._passes.arguments import Left, Result, Vectors
from cubn.torch._passes.counters import Counters, Uncounted, count, is_locked
from cubn.torch._passes.reading import Found, counter, read

increment_version = torch.autograd.graph.increment_version


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


TRAININGS: Store[Known] = _calls.new_store()
FROZEN: Store[Known] = _calls.new_store()
INFERENCES: Store[Known] = _calls.new_store()
BACKWARDS: Store[Known] = _calls.new_store()

_NO_STATISTICS = Statistics(None, 0, 0, False, False)


def look_up(
    store: Store[Known],
    options: tuple[Any, ...],
    comm: Comm | None,
    x: Tensor,
    residual: Tensor | None,
    *others: Tensor | None,
) -> tuple[Any, tuple[Known, Found] | None]:
    """The key of such tensors, and the call that was made before with such, and where they are.

    options: relu, and the types of numbers, of which the full way refuses some.
    """
    if comm is not None:
        return None, None
    found = read(x, residual, *others)
    if found is None or x.is_neg() or (residual is not None and residual.is_neg()):
        return None, None
    key = found[0], options, threads.limit
    known = store.get(key)
    return key, None if known is None else (known, found)


def keep(
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
        uncounted = None if mean is None else Uncounted.of(len(mean), mean.device)
        store.add(key, Known(call, left and left._replace(statistics=_NO_STATISTICS), sizes, uncounted))


def train(
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
    _, at_x, at_residual, gamma, beta, mean, var, at_mask, at_tracked, at_skipped = found
    if mask is not None and call.library.count(mask) * call.facts.values < 2:
        return None
    if not 0 < eps < math.inf or (momentum is not None and not 0 <= momentum <= 1):
        return None
    moves: tuple[Any, ...] = ()
    tracked = None
    if uncounted is not None:
        if not _apart(sizes, (gamma, beta, mean, var)) or is_locked(vectors[2]):  # type: ignore[arg-type]
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
            count(counters, tracked)
    assert left
    layouts, held, _, is_frozen, context = left
    return y, Left(layouts, held, statistics, is_frozen, context), relu_mask


def frozen(known: Known, found: Found, x: Tensor, eps: float) -> Result | None:
    """None where something is in the way."""
    (call, left, *_), (_, at_x, at_residual, gamma, beta, mean, var, at_mask) = known, found
    y, at_y = call.allocate(x)
    if at_y % ALIGNMENT != call.alignment or not 0 < eps < math.inf:
        return None
    assert left
    statistics, relu_mask = call.prepared(at_x, at_residual, at_y, at_mask, gamma, beta, mean, var, eps)
    return y, left._replace(statistics=statistics), relu_mask


def inference(known: Known, found: Found, x: Tensor, eps: float) -> Tensor | None:
    """None where something is in the way."""
    _, at_x, at_residual, gamma, beta, mean, var, at_mask = found
    if not 0 < eps < math.inf:
        return None
    y: Tensor
    y, at_y = known.call.allocate(x)
    if at_y % ALIGNMENT != known.call.alignment:
        return None
    known.call.prepared(at_x, at_residual, at_y, at_mask, gamma, beta, mean, var, eps)
    return y


def backward(
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
