"""NCCL, through CuPy: nodes go from device to device in stream order, and the host waits for other hosts only."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np

from cubn._types import BackendArray
from cubn.backends.cuda.device import Device
from cubn.backends.protocol import Backend
from cubn.sync import communicator as host_communicator
from cubn.sync.transport import Bytes, Communicator, Pending

ID_BYTES = 1024
"""Enough for NCCL's unique id as CuPy has it, pickled."""


class _InStreamOrder:
    """A gather whose records are there for whatever comes next on the stream."""

    def wait(self) -> None:
        """The stream does."""


class NCCLCommunicator(Communicator):
    """NCCL for records in device memory, and a communicator of the same ranks for headers and all else.

    Made by `communicator`. NCCL wants each rank on a device of its own.
    """

    def __init__(self, host: Communicator, nccl: Any, library: Any) -> None:
        super().__init__(host.rank, host.size)
        self._host = host
        self._nccl = nccl
        self._library = library
        self._index = nccl.device_id()

    def gather(self, record: Bytes, received: Bytes, sizes: Sequence[int]) -> Pending:
        return self._host.gather(record, received, sizes)

    def takes(self, backend: Backend) -> bool:
        return backend.device is not None and backend.device.index == self._index

    def gather_on_device(
        self, device: Device, record: BackendArray, received: BackendArray, sizes: Sequence[int]
    ) -> _InStreamOrder:
        """One allgather; records of different sizes are broadcast in a group, which NCCL makes one launch of."""
        source, target = device.address(record), device.address(received)
        byte = self._library.NCCL_UINT8
        with device.current() as stream:
            if len(set(sizes)) == 1:
                self._nccl.allGather(source, target, sizes[0], byte, stream)
            else:
                self._library.groupStart()
                for rank, size in enumerate(sizes):
                    if size:
                        self._nccl.broadcast(source, target, size, byte, rank, stream)
                    target += size
                self._library.groupEnd()
        return _InStreamOrder()

    def lane(self, sizes: tuple[int, ...], on_device: bool, agreed: bool) -> Communicator | None:
        """NCCL writes nowhere but where it was told to; ranks that do not fit together are rid of it by `abandon`."""
        return self if on_device else self._host.lane(sizes, on_device, agreed)

    def abandon(self, why: str) -> None:
        """What is under way would keep the device for ever."""
        super().abandon(why)
        self._host.abandon(why)
        self._nccl.abort()


def communicator(comm: Any, nccl: Any = None) -> NCCLCommunicator:
    """A communicator whose records go over NCCL where arrays are on the current CUDA device; all its ranks make it.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, torch.distributed.ProcessGroup or cubn.sync.Communicator
        The ranks. Carries headers, and records of arrays that are elsewhere.
    nccl : cupy.cuda.nccl.NcclCommunicator, optional
        Of the same ranks in the same order, and for cubn alone; by default a new one, whose id goes over `comm`.

    Returns
    -------
    NCCLCommunicator
        To be passed as `comm=`; keep it for as long as it is used.

    Raises
    ------
    ImportError
        Without CuPy or NCCL.
    """
    library = _library()
    host = host_communicator(comm)
    if nccl is None:
        shared = np.zeros(ID_BYTES, np.uint8)
        if host.rank == 0:
            made = np.frombuffer(pickle.dumps(library.get_unique_id()), np.uint8)
            shared[: len(made)] = made
        received = np.empty(ID_BYTES, np.uint8)
        sizes = [ID_BYTES] + [0] * (host.size - 1)
        host.gather(shared[: sizes[host.rank]], received, sizes).wait()
        nccl = library.NcclCommunicator(host.size, pickle.loads(received.tobytes()), host.rank)
    return NCCLCommunicator(host, nccl, library)


def _library() -> Any:
    """CuPy's NCCL."""
    missing = "CuPy", "cupy-cuda13x (or cupy-cuda12x"
    try:
        from cupy.cuda import nccl

        if nccl.available:
            return nccl
        missing = "NCCL", "nvidia-nccl-cu13 (or nvidia-nccl-cu12"
    except ImportError:
        pass
    what, package = missing
    raise ImportError(
        f"cubn: communicating over NCCL needs CuPy and NCCL, and {what} is not installed. Install it with: "
        f"pip install {package}, as the driver allows)"
    )
