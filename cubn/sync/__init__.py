"""Communicators: what carries records between the ranks of one batch.

Everything `comm=` does is built on one operation, `Communicator.gather`: each rank gives a record of bytes and gets
those of all ranks, in rank order. `cubn.sync.collective` makes batch normalisation of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from cubn.errors import message
from cubn.sync.transport import Communicator

__all__ = ["Comm", "Communicator", "communicator"]


class _MPIComm(Protocol):
    """mpi4py.MPI.Comm, by what no other communicator has."""

    def Get_rank(self) -> int: ...

    def Get_size(self) -> int: ...

    def Is_inter(self) -> bool: ...


class _ProcessGroup(Protocol):
    """torch.distributed.ProcessGroup."""

    def rank(self) -> int: ...

    def size(self) -> int: ...


Comm = Communicator | _MPIComm | _ProcessGroup
"""What a user may pass as `comm=`."""


def communicator(comm: Comm) -> Communicator:
    """The communicator behind what a user passed as `comm=`.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, torch.distributed.ProcessGroup or Communicator

    Returns
    -------
    Communicator
        The same one for the same comm. The first call of an mpi4py or torch comm makes a private duplicate, together
        with all its ranks.

    Raises
    ------
    TypeError
        If it is none of these.
    ValueError
        If it is an MPI communicator that does not connect a group with itself, or a group this process is not in.
    """
    return _way_to(comm)(comm)


def check_comm(comm: Comm | None) -> None:
    """Refuse what is no communicator, before its ranks meet."""
    if comm is not None:
        _way_to(comm)


def _way_to(comm: Any) -> Callable[[Any], Communicator]:
    """What makes the communicator behind one of its kind."""
    if isinstance(comm, Communicator):
        return _itself
    mpi4py = sys.modules.get("mpi4py.MPI")
    if mpi4py is not None and isinstance(comm, mpi4py.Comm):
        from cubn.sync import mpi

        return mpi.communicator
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and isinstance(comm, distributed.ProcessGroup):
        from cubn.sync import torch_distributed

        return torch_distributed.communicator
    if distributed is not None and distributed.is_available() and _is(comm, distributed.GroupMember.NON_GROUP_MEMBER):
        return _of_others
    rule = "be an mpi4py communicator, a torch.distributed process group or a cubn.sync.Communicator"
    raise TypeError(message("comm", rule, type(comm).__name__, function="cubn"))


def _itself(comm: Communicator) -> Communicator:
    return comm


def _of_others(comm: Any) -> NoReturn:
    rule, remedy = "be a process group this process is in", "Call it on the ranks of the group alone."
    raise ValueError(message("comm", rule, "torch's NON_GROUP_MEMBER", remedy, function="cubn"))


def _is(comm: Any, mark: Any) -> bool:
    """Whether comm is torch's mark, an object or a number, of no group of this process."""
    return comm is mark or (type(comm) is type(mark) is int and comm == mark)
