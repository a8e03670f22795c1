"""A device for each rank, on the CPU, whose work waits on a stream as a GPU's does; and an NCCL for them."""

import contextlib
import ctypes
import threading

import pytest

from cubn.backends.cuda.backend import CudaBackend
from tests.backends import forget_backends
from tests.cuda.named import RESIDENT
from tests.cuda_on_cpu.build import unavailable
from tests.cuda_on_cpu.device import CpuDevice


class StreamDevice(CpuDevice):
    """Each thread is a process with a stream of its own. What is put there runs when a kernel or the host waits for it.

    `to_host` and `synchronize`, which make the host wait, are written down.
    """

    def __init__(self):
        super().__init__(RESIDENT)
        self.of_thread = threading.local()

    @property
    def queue(self):
        return self.of_thread.__dict__.setdefault("queue", [])

    @property
    def waits(self):
        """What made this thread's host wait."""
        return self.of_thread.__dict__.setdefault("waits", [])

    def run(self):
        while self.queue:
            self.queue.pop(0)()

    def launch(self, launch, parameters, stream):
        self.run()
        super().launch(launch, parameters, stream)

    def to_host(self, array, out=None):
        self.run()
        self.waits.append("to_host")
        return super().to_host(array, out)

    def synchronize(self):
        self.run()
        self.waits.append("synchronize")


@pytest.fixture
def device(monkeypatch):
    """What NumPy's arrays are on in this test."""
    if reason := unavailable():
        pytest.skip(reason)
    device = StreamDevice()
    backend = CudaBackend(device)
    monkeypatch.setattr("cubn.backends.cpu.backend", lambda: backend)
    forget_backends()
    yield device
    forget_backends()


class Nccl:
    """What cubn uses of cupy.cuda.nccl, between threads of one process, by its documentation.

    A call only queues work; the work of a collective ends when all ranks have come to theirs. Counts that differ are an
    error of the test. An aborted communicator lets go of what waits.
    """

    NCCL_UINT8 = 1
    available = True

    def __init__(self, device):
        self.device = device
        self.calls = []
        self.groups = {}

    def get_unique_id(self):
        return bytes(range(128))

    def groupStart(self):
        self.calls.append("start")

    def groupEnd(self):
        self.calls.append("end")

    def NcclCommunicator(self, ndev, commId, rank):
        group = self.groups.setdefault((ndev, commId), Group(ndev))
        return NcclCommunicator(self, group, rank)


class Group:
    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=60)
        self.said = {}


class NcclCommunicator:
    def __init__(self, library, group, rank):
        self.library = library
        self.group = group
        self.rank = rank

    def device_id(self):
        return 0

    def abort(self):
        self.group.barrier.abort()
        self.library.calls.append("abort")

    def allGather(self, sendbuf, recvbuf, count, datatype, stream):
        self.library.calls.append("allGather")
        self._collective(sendbuf, [(recvbuf + rank * count, rank, count) for rank in range(self.group.barrier.parties)])

    def broadcast(self, sendbuff, recvbuff, count, datatype, root, stream):
        self.library.calls.append("broadcast")
        self._collective(sendbuff, [(recvbuff, root, count)])

    def _collective(self, source, copies):
        counts = [count for _, _, count in copies]

        def work():
            self.group.said[self.rank] = source, counts
            self.group.barrier.wait()
            assert all(said[1] == counts for said in self.group.said.values()), "counts that differ"
            for target, rank, count in copies:
                ctypes.memmove(target, self.group.said[rank][0], count)
            self.group.barrier.wait()

        def unless_aborted():
            with contextlib.suppress(threading.BrokenBarrierError):
                work()

        self.library.device.queue.append(unless_aborted)
