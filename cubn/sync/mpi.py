"""Communicators of mpi4py: records in host memory, or in a device's where the MPI library takes it."""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import weakref
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from mpi4py import MPI

from cubn._types import BackendArray
from cubn.backends.cuda.device import Device
from cubn.backends.protocol import Backend
from cubn.errors import message
from cubn.sync import cuda_aware
from cubn.sync.transport import Bytes, Communicator

LANES = 64
"""Most record sizes with a communicator of their own; an MPI library has a few thousand communicators at most."""


class _Pending:
    """A request and its memory, which lives until it is done, also where nobody waits."""

    def __init__(self, request: MPI.Request, comm: MPI.Intracomm, *memory: Any) -> None:
        self._request = request
        self._memory = memory
        self.comm = comm
        _UNDER_WAY.add(self)

    def wait(self) -> None:
        self._request.Wait()
        _UNDER_WAY.discard(self)


_UNDER_WAY: set[_Pending] = set()


class MPICommunicator(Communicator):
    """A private duplicate of an MPI communicator, so that no message of the user's can be mistaken for one of cubn's.

    Freed with the communicator it was made from, or when the process ends.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size())
        self.device_memory: bool | None = None
        self._comm = comm.Dup()
        self._lanes: dict[tuple[int, ...], MPICommunicator] = {}
        _ALIVE[next(_NUMBERS)] = self

    def gather(self, record: Bytes, received: Bytes, sizes: Sequence[int]) -> _Pending:
        return self._gather(record, received, sizes)

    def _gather(self, record: Any, received: Any, sizes: Sequence[int]) -> _Pending:
        if self._comm == MPI.COMM_NULL or MPI.Is_finalized():
            rule, got = "be kept until the last backward of its forwards", "one that was freed, or after MPI.Finalize"
            raise ValueError(message("comm", rule, got, "Free it later.", function="cubn"))
        sending = [record, MPI.BYTE]
        if all(size == sizes[0] for size in sizes):
            request = self._comm.Iallgather(sending, [received, sizes[0], MPI.BYTE])
        else:
            offsets = np.cumsum([0, *sizes[:-1]]).tolist()
            request = self._comm.Iallgatherv(sending, [received, list(sizes), offsets, MPI.BYTE])
        return _Pending(request, self._comm, record, received)

    def takes(self, backend: Backend) -> bool:
        if backend.device is None:
            return False
        return _is_cuda_aware() if self.device_memory is None else self.device_memory

    def gather_on_device(
        self, device: Device, record: BackendArray, received: BackendArray, sizes: Sequence[int]
    ) -> _Pending:
        """MPI knows no streams: what is to be sent, and what used the memory before, must be done."""
        device.synchronize()
        return self._gather(record, received, sizes)

    def lane(self, sizes: tuple[int, ...], on_device: bool, agreed: bool) -> MPICommunicator | None:
        """A duplicate for these sizes alone: what does not fit together never meets.

        A message of another length than expected is an error of the program to MPI, which may overwrite memory.
        """
        if agreed and sizes not in self._lanes and len(self._lanes) < LANES:
            self._lanes[sizes] = MPICommunicator(self._comm)
        return self._lanes.get(sizes)

    def free(self) -> None:
        """Give the duplicates back; once is enough.

        Not where ranks are out of step: messages nobody waits for would be taken for those of the next communicator.
        """
        for lane in self._lanes.values():
            lane.broken = self.broken
            lane.free()
        in_use = self.broken is not None or any(pending.comm is self._comm for pending in _UNDER_WAY.copy())
        if not in_use and self._comm != MPI.COMM_NULL and not MPI.Is_finalized():
            self._comm.Free()


_NUMBERS = itertools.count()
_ALIVE: weakref.WeakValueDictionary[int, MPICommunicator] = weakref.WeakValueDictionary()
"""In the order in which they were made: ranks free them in the same."""


@functools.cache
def _key() -> int:
    """Of the attribute; an MPI that was not initialised has none."""
    return MPI.Comm.Create_keyval(delete_fn=lambda comm, key, communicator: communicator.free())


@atexit.register
def _free_all() -> None:
    """MPI is finalised after Python's objects are gone, and until then may write what was not waited for."""
    for communicator in list(_ALIVE.values()):
        communicator.free()
    for pending in _UNDER_WAY:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pending))


@functools.cache
def _is_cuda_aware() -> bool:
    return cuda_aware.verdict(cuda_aware.evidence())[0]


def communicator(comm: MPI.Comm, *, device_memory: bool | None = None) -> MPICommunicator:
    """The communicator kept with an MPI communicator, as an attribute of it: it is found again, and goes with it.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
    device_memory : bool, optional
        Whether MPI gets pointers to a device's memory where arrays are on one; from then on, on all ranks. Otherwise
        records of such arrays pass through pinned host memory. By default as before; at first, as `python -m cubn info`
        says. A wrong True is a segmentation fault.

    Returns
    -------
    MPICommunicator
        Can be passed as `comm=`, like the one it was made from.

    Raises
    ------
    ValueError
        If it does not connect a group with itself, this process is not in the group, or MPI is not running.
    """
    if MPI.Is_finalized() or (comm in (MPI.COMM_WORLD, MPI.COMM_SELF) and not MPI.Is_initialized()):
        got = "one after MPI.Finalize" if MPI.Is_finalized() else "one before MPI.Init"
        raise ValueError(message("comm", "be used between MPI.Init and MPI.Finalize", got, function="cubn"))
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        got = "COMM_NULL" if comm == MPI.COMM_NULL else type(comm).__name__
        remedy = "Merge an intercommunicator; pass no comm on ranks outside the group."
        raise ValueError(message("comm", "be an intracommunicator this process is in", got, remedy, function="cubn"))
    found = cast("MPICommunicator | None", comm.Get_attr(_key()))
    if found is None:
        found = MPICommunicator(comm)
        comm.Set_attr(_key(), found)
    if device_memory is not None:
        found.device_memory = device_memory
    return found
