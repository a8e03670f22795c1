"""What a pass is given besides x, checked; and what a forward leaves for its backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cubn._inputs import bind_x, parameter
from cubn._state.arrays import ARRAYS, STATISTICS, StateArrays, checked_arrays
from cubn._state.options import checked_eps, checked_momentum
from cubn._types import Statistics
from cubn.backends.protocol import ReluMask
from cubn.errors import message, reporting_as
from cubn.saved import Forward, Layouts, Read, Saved
from cubn.state import BatchNormState
from cubn.sync.collective import SyncContext

Vectors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""weight, bias, running_mean and running_var."""


class Left(NamedTuple):
    """What a forward leaves for its backward besides tensors of the input's size."""

    layouts: Layouts
    held: StateArrays  # as the vectors, but of no memory
    statistics: Statistics
    frozen: bool
    context: SyncContext | None


Result = tuple[Tensor, Left, ReluMask | None]
"""y, what is left, and which elements of y are positive, where a residual is added before a ReLU."""


def new_state(x: Tensor, vectors: Vectors, eps: float, momentum: float | None = 0.1) -> BatchNormState:
    """A state for one call, whose arguments are checked under the names that PyTorch has for them."""
    with reporting_as("batch_norm"):
        inputs = bind_x(x.detach(), 1)
        _check_channels(x, vectors)
        for name, vector in zip(("weight", "bias", *STATISTICS), vectors, strict=True):
            if vector is not None:
                parameter(name, vector, inputs)
        checked_eps(eps)
        checked_momentum(momentum)
    arrays: dict[str, Any] = dict(zip(ARRAYS, vectors, strict=True))
    return BatchNormState.from_arrays(**arrays, num_features=x.shape[1], eps=eps, momentum=momentum, check=False)


def _check_channels(x: Tensor, vectors: Vectors) -> None:
    """Where all vectors have one length, it is the input that does not fit."""
    shapes = {vector.shape for vector in vectors if vector is not None}
    if len(shapes) == 1 and len(shape := shapes.pop()) == 1 and shape[0] != x.shape[1]:
        rule = f"have {shape[0]} channels, on its second axis"
        raise ValueError(message("input", rule, x.shape[1], shape=tuple(x.shape)))


def left_by(saved: Saved[Tensor]) -> tuple[Left, ReluMask | None]:
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


def detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def saved(x: Tensor, mask: Tensor | None, left: Left, relu_mask: ReluMask | None) -> Saved[Tensor]:
    """What the core's backward reads: that a tensor did not change meanwhile is autograd's business."""
    layouts, held, statistics, is_frozen, context = left
    x = x.detach()
    of_mask = None if mask is None else Read(mask, mask.data_ptr(), _version(mask), None)
    of_x = Read(x, x.data_ptr(), _version(x), None)
    return Saved._of(Forward(layouts, of_x, of_mask, held, statistics, relu_mask, is_frozen, False, context))
