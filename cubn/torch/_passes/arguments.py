"""What a pass is given besides x, checked; and what a forward leaves for its backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cubn import _arrays
from cubn._arrays import Array
from cubn._inputs import bind_x, parameter
from cubn._state.arrays import ARRAYS, STATISTICS, StateArrays, checked_arrays
from cubn._state.options import checked_eps, checked_momentum
from cubn._types import BOOL, FLOATS, Statistics
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


def saved(x: Tensor, mask: Tensor | None, left: Left, relu_mask: ReluMask | None) -> Saved[Tensor]:
    """What the core's backward reads: that a tensor did not change meanwhile is autograd's business."""
    layouts, held, statistics, is_frozen, context = left
    of_x = _read("x", x.detach(), layouts.x)
    of_mask = None if mask is None or layouts.mask is None else _read("mask", mask, layouts.mask)
    return Saved._of(Forward(layouts, of_x, of_mask, held, statistics, relu_mask, is_frozen, False, context))


def places(saved: Saved[Tensor]) -> tuple[int, int]:
    """Where x and the mask are that a backward reads."""
    _, x, mask, *_ = saved._forward
    return x.pointer, mask.pointer if mask else 0


def _read(name: str, x: Tensor, like: Array) -> Read:
    """What the forward read, in the layout it had then: hooks on saved tensors may bring back a copy in another one,
    as torch's `save_on_cpu` does with pinned memory.
    """
    with reporting_as("backward"):
        found = _arrays.describe(x, name, BOOL if like.dtype in BOOL else FLOATS, detach=True)
    if (found.shape, found.dtype, found.device) != (like.shape, like.dtype, like.device):
        remedy = "Hooks on saved tensors, and assignments to .data, must leave shape, dtype and device."
        got = f"{found.dtype} {found.shape}"
        raise ValueError(
            message(name, f"be {like.dtype} {like.shape} as in the forward", got, remedy, function="backward")
        )
    if found.strides != like.strides:
        x = in_strides(found.owner, like.strides)
        found = found._replace(owner=x, pointer=x.data_ptr())
    return Read.of(found)


def in_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A copy of such strides, some of which may be 0."""
    copy = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
    once = tuple(slice(None) if step else slice(1) for step in strides)
    copy[once] = x[once]
    return copy
