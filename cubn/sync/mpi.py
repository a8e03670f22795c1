"""Communicators of mpi4py, and what is known about the MPI library behind them."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Sequence
from typing import cast

import numpy as np
from mpi4py import MPI

from cubn.errors import message
from cubn.sync import Bytes, Communicator


class _Pending:
    """A request and its memory, which lives until it is done, also where nobody waits."""

    def __init__(self, request: MPI.Request, record: Bytes, received: Bytes, comm: MPI.Intracomm) -> None:
        self._request = request
        self._record = record
        self._received = received
        self.comm = comm
        _UNDER_WAY.add(self)

    def wait(self) -> Bytes:
        self._request.Wait()
        _UNDER_WAY.discard(self)
        return self._received


_UNDER_WAY: set[_Pending] = set()


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
        return _Pending(request, record, received, self._comm)

    def free(self) -> None:
        """Give the duplicate back; once is enough.

        Not where ranks are out of step: messages nobody waits for would be taken for those of the next communicator.
        """
        _ALIVE.discard(self)
        in_use = self.broken is not None or any(pending.comm is self._comm for pending in _UNDER_WAY)
        if not in_use and self._comm != MPI.COMM_NULL and not MPI.Is_finalized():
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
