"""Ranks whose arrays are on CUDA devices: nodes travel through host memory, and there is one answer."""

import weakref

import numpy as np
import pytest

from cubn._types import Nodes
from cubn.backends.cuda.backend import CudaBackend
from cubn.sync import threads
from tests.cuda.named import RESIDENT
from tests.cuda_on_cpu.build import unavailable
from tests.cuda_on_cpu.device import CpuDevice
from tests.mpi.parts import Batch, assert_one_answer, step


@pytest.mark.parametrize("cut", [[16, 16], [20, 0, 12], [7, 9, 3, 13]], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("backend", ["cuda-on-cpu"], indirect=True)
def test_any_cut(backend, cut, masked):
    batch = Batch(masked=masked)
    ranks = threads.run(len(cut), lambda comm: step(batch, *batch.range(cut, comm.rank), comm=comm))
    assert_one_answer(ranks, step(batch, 0, sum(cut)))


class WatchfulDevice(CpuDevice):
    """Knows whether arrays brought here are still there at a launch."""

    def __init__(self):
        super().__init__(RESIDENT)
        self.brought = []

    def from_host(self, values):
        array = super().from_host(values)
        self.brought.append(weakref.ref(array))
        return array

    def launch(self, launch, parameters, stream):
        assert all(array() is not None for array in self.brought)
        super().launch(launch, parameters, stream)


@pytest.mark.skipif(bool(unavailable()), reason=unavailable())
def test_an_order_of_merges_is_there_when_it_is_read():
    """As when two threads make the same one at once: then the cache holds but one of the two."""
    device = WatchfulDevice()
    backend = CudaBackend(device)
    backend._orders = backend._placed
    nodes = Nodes(((0, 1), (1, 2)), np.zeros((2, 7)))
    nodes.count[:] = 1
    backend.root(nodes)
    assert len(device.brought) == 1
