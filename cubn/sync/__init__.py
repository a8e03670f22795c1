"""Communicators: what carries records between the ranks of one batch.

Everything `comm=` does is built on one operation, `Communicator.gather`: each rank gives a record of bytes and gets
those of all ranks, in rank order. `cubn.sync.collective` makes batch normalisation of it.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cubn._types import BackendArray
from cubn.backends.protocol import Backend
from cubn.errors import message

if TYPE_CHECKING:
    from cubn.backends.cuda.device import Device

Bytes = NDArray[np.uint8]


class Pending(Protocol):
    """A gather that is under way."""

    def wait(self) -> None:
        """Return when the records of all ranks are there; called once. On a device: when they are, in stream order."""


class Communicator(ABC):
    """A fixed group of ranks, each with a part of the batch; the order of the ranks is the order of the samples.

    To make cubn work over something new, derive from this class and pass an instance as `comm=`. It must be for cubn
    alone: nothing else may pass through the same channel.

    Parameters
    ----------
    rank, size : int
        Which rank this is, and of how many.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self.exchanges = 0
        """How many exchanges have begun; the same number on every rank."""
        self.samples: tuple[int, ...] | None = None
        """Samples on each rank, as last agreed on: a guess of the next."""
        self.broken: str | None = None
        """Why nothing more can be exchanged, if so."""

    @abstractmethod
    def gather(self, record: Bytes, received: Bytes, sizes: Sequence[int]) -> Pending:
        """Begin to give this rank's record to every rank, and to get theirs.

        Parameters
        ----------
        record : contiguous numpy.ndarray of uint8
            Of sizes[rank] bytes; it is not changed, and the caller keeps it until the gather is done.
        received : contiguous numpy.ndarray of uint8
            Where the records of all ranks go, one behind the other in rank order.
        sizes : sequence of int
            Bytes from each rank, the same on every rank.

        Returns
        -------
        Pending
            Gathers of one communicator begin in the same order on all ranks, and may be waited for in any.
        """

    def takes(self, backend: Backend) -> bool:
        """Whether records may be in the memory of this backend's device, for `gather_on_device`."""
        return False

    def gather_on_device(
        self, device: Device, record: BackendArray, received: BackendArray, sizes: Sequence[int]
    ) -> Pending:
        """`gather` of dense arrays on a device, behind the work on its stream."""
        raise NotImplementedError

    def lane(self, sizes: tuple[int, ...], on_device: bool, agreed: bool) -> Communicator | None:
        """Where records of these sizes may go before all ranks are known to agree on them; None: nowhere (yet).

        If they have `agreed`, they may make one together.
        """
        return None

    def abandon(self, why: str) -> None:
        """Ranks are out of step: what is under way may never arrive, and nothing more can be exchanged."""
        self.broken = why


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
    if isinstance(comm, Communicator):
        return comm
    mpi4py = sys.modules.get("mpi4py.MPI")
    if mpi4py is not None and isinstance(comm, mpi4py.Comm):
        from cubn.sync import mpi

        return mpi.communicator(comm)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and isinstance(comm, distributed.ProcessGroup):
        from cubn.sync import torch_distributed

        return torch_distributed.communicator(comm)
    if distributed is not None and distributed.is_available() and _is(comm, distributed.GroupMember.NON_GROUP_MEMBER):
        rule, remedy = "be a process group this process is in", "Call it on the ranks of the group alone."
        raise ValueError(message("cubn", "comm", rule, "torch's NON_GROUP_MEMBER", remedy))
    rule = "be an mpi4py communicator, a torch.distributed process group or a cubn.sync.Communicator"
    raise TypeError(message("cubn", "comm", rule, type(comm).__name__))


def _is(comm: Any, mark: Any) -> bool:
    """Whether comm is torch's mark, an object or a number, of no group of this process."""
    return comm is mark or (type(comm) is type(mark) is int and comm == mark)
