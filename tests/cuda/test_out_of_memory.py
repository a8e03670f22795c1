"""A device that runs out of memory in the middle of a call: the error comes through, and the state is as it was."""

import copy

import numpy as np
import pytest

import cubn
from cubn.backends.cuda.backend import CudaBackend
from tests.backends import forget_backends
from tests.cuda.named import PASSES, RESIDENT
from tests.cuda_on_cpu.build import unavailable
from tests.cuda_on_cpu.device import CpuDevice

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "")


class FullDevice(CpuDevice):
    """Has room for so many more allocations."""

    room = 10**9

    def empty(self, shape, dtype):
        if not self.room:
            raise MemoryError("the device is full")
        self.room -= 1
        return super().empty(shape, dtype)


@pytest.fixture(params=[RESIDENT, PASSES], ids=["resident", "passes"])
def device(request, monkeypatch):
    device = FullDevice(request.param)
    monkeypatch.setattr("cubn.backends.cpu.backend", lambda: CudaBackend(device))
    forget_backends()
    yield device
    forget_backends()


def test_training_without_memory_leaves_the_state(device):
    x = np.random.default_rng(0).standard_normal((4, 3, 5, 5), dtype=np.float32)
    state = cubn.BatchNormState(3)
    before = copy.deepcopy(state.to_dict())

    def fits(room):
        device.room = room
        try:
            cubn.forward_train(x, state, residual=x.copy(), relu=True)
        except MemoryError:
            return False
        return True

    rooms = 0
    while not fits(rooms):
        for name, value in state.to_dict().items():
            np.testing.assert_array_equal(value, before[name], name)
        rooms += 1
    assert rooms > 1, "every allocation of the call was refused once"
    assert state.tracked.tolist() == [1, 1, 1]
