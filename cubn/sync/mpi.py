"""Communicators of mpi4py, and what is known about the MPI library behind them."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from mpi4py import MPI

from cubn.errors import message
from cubn.sync import Bytes, Communicator


class _Pending(NamedTuple):
    request: Any
    received: Bytes
    record: Bytes  # must outlive the request

    def wait(self) -> Bytes:
        self.request.Wait()
        return self.received


class MPICommunicator(Communicator):
    """A private duplicate of an MPI communicator, so that no message of the user's can be mistaken for one of cubn's.

    Freed with the communicator it was made from, or when the process ends.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size())
        self._comm = comm.Dup()
        _ALIVE.add(self)

    def gather(self, record: Bytes, sizes: Sequence[int]) -> _Pending:
        received = np.empty(sum(sizes), np.uint8)
        sending = [record, MPI.BYTE]
        if all(size == sizes[0] for size in sizes):
            request = self._comm.Iallgather(sending, [received, sizes[0], MPI.BYTE])
        else:
            offsets = np.cumsum([0, *sizes[:-1]]).tolist()
            request = self._comm.Iallgatherv(sending, [received, list(sizes), offsets, MPI.BYTE])
        return _Pending(request, received, record)

    def free(self) -> None:
        """Give the duplicate back; once is enough."""
        _ALIVE.discard(self)
        if self._comm != MPI.COMM_NULL and not MPI.Is_finalized():
            self._comm.Free()


_ALIVE: weakref.WeakSet[MPICommunicator] = weakref.WeakSet()
_KEY = MPI.Comm.Create_keyval(delete_fn=lambda comm, key, communicator: communicator.free())


@atexit.register
def _free_all() -> None:
    for communicator in list(_ALIVE):
        communicator.free()


def communicator(comm: MPI.Comm) -> MPICommunicator:
    """The communicator kept with an MPI communicator, as an attribute of it: it is found again, and goes with it."""
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        got = "COMM_NULL" if comm == MPI.COMM_NULL else type(comm).__name__
        remedy = "Merge an intercommunicator; pass no comm on ranks outside the group."
        raise ValueError(message("cubn", "comm", "be an intracommunicator this process is in", got, remedy))
    found = comm.Get_attr(_KEY)
    if found is None:
        found = MPICommunicator(comm)
        comm.Set_attr(_KEY, found)
    return cast(MPICommunicator, found)
