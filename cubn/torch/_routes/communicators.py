"""Communicators by number, for operators, whose arguments are tensors and numbers."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from cubn.sync import Comm, communicator
from cubn.sync.transport import Communicator


class _Known(NamedTuple):
    communicator: Communicator
    order: Tensor


_KNOWN: list[_Known] = []
_LOCK = threading.Lock()


def handle(comm: Comm) -> int:
    """The number of a communicator, 1 or more, the same for as long as the process lives."""
    group = communicator(comm)
    with _LOCK:  # ranks may be threads
        for number, known in enumerate(_KNOWN, 1):
            if known.communicator is group:
                return number
        _KNOWN.append(_Known(group, torch.zeros((), dtype=torch.int64, device="cpu")))
        return len(_KNOWN)


def of(handle: int) -> Communicator:
    """The communicator of a number."""
    return _KNOWN[handle - 1].communicator


def order(handle: int) -> Tensor:
    """A tensor that operators claim to write when they meet the other ranks.

    So no compiler leaves one of them out or puts them in another order. Torch's own effects, of
    `torch.library._register_effectful_op`, are no substitute: inductor was seen to exchange two of them.
    """
    return _KNOWN[handle - 1].order


# A compiler takes what they return for a constant of its graph: torch.compiler.assume_constant_result, whose import of
# all of torch._dynamo takes seconds.
handle._dynamo_marked_constant = order._dynamo_marked_constant = True  # type: ignore[attr-defined]
