"""Communicators by number, for operators, whose arguments are tensors and numbers."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cubn.sync import Comm, communicator
from cubn.sync.transport import Communicator

_KNOWN: list[Communicator] = []
_LOCK = threading.Lock()


def handle(comm: Comm) -> int:
    """The number of a communicator, 1 or more, the same for as long as the process lives."""
    group = communicator(comm)
    with _LOCK:  # ranks may be threads
        for number, known in enumerate(_KNOWN, 1):
            if known is group:
                return number
        _KNOWN.append(group)
        return len(_KNOWN)


def of(handle: int) -> Communicator:
    """The communicator of a number."""
    return _KNOWN[handle - 1]


class Orders(NamedTuple):
    """Of one graph."""

    forward: Tensor
    backward: Tensor


_ORDERS: WeakKeyDictionary[Any, Orders] = WeakKeyDictionary()


def _orders() -> Orders:
    """Tensors that operators claim to write when they meet the other ranks.

    So no compiler leaves one of them out or puts them in another order. Torch's own effects, of
    `torch.library._register_effectful_op`, are no substitute: inductor was seen to exchange two of them.

    Each graph has its own: autograd keeps that of the backward, and would take what a forward or another graph's
    backward wrote for a change of what it kept.
    """
    trace = torch._guards.TracingContext.try_get()  # private in torch: which graph is being made
    found = None if trace is None else _ORDERS.get(trace)
    if found is None:
        found = Orders(*(torch.zeros((), dtype=torch.int64) for _ in Orders._fields))
        if trace is not None:
            _ORDERS[trace] = found
    return found


def forward_order() -> Tensor:
    return _orders().forward


def backward_order() -> Tensor:
    return _orders().backward


# A compiler takes what they return for a constant of its graph, and calls it by the function's name:
# torch.compiler.assume_constant_result, whose import of all of torch._dynamo takes seconds.
_CONSTANTS: tuple[Any, ...] = handle, forward_order, backward_order
for _constant in _CONSTANTS:
    _constant._dynamo_marked_constant = True
