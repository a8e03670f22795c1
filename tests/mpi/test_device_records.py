"""Records of arrays on a device: handed to MPI as they are, or by way of the host. Also under mpiexec."""

import os

import numpy as np
import pytest

import cubn
from cubn.sync import Communicator, communicator
from tests.mpi.devices import device  # noqa: F401
from tests.mpi.launch import UNDER_MPI
from tests.mpi.parts import Batch, assert_one_answer, step
from tests.mpi.test_double_backward import FIRST, SECOND, second_derivatives
from tests.ops import arrays

under_mpi = pytest.mark.skipif(not os.environ.get(UNDER_MPI), reason="test_under_mpi.py runs this under mpiexec")


class Passing(Communicator):
    """Another communicator, made to take device memory; the devices of these tests have the host's."""

    def __init__(self, comm):
        self.inner = communicator(comm)
        super().__init__(self.inner.rank, self.inner.size)
        self.inner.device_memory = True

    def gather(self, record, received, sizes):
        return self.inner.gather(record, received, sizes)

    def takes(self, backend):
        return True

    def gather_on_device(self, device, record, received, sizes):  # noqa: F811
        if hasattr(self.inner, "_comm"):
            return self.inner.gather_on_device(device, record, received, sizes)
        device.synchronize()
        return self.inner.gather(*(array.reshape(-1).view(np.uint8) for array in (record, received)), sizes)


@pytest.mark.parametrize("cut", [[16, 16], [20, 0, 12]], ids=str)
@pytest.mark.parametrize("declared", [False, True], ids=["agreed", "declared"])
@pytest.mark.parametrize("how", [communicator, Passing], ids=["by way of the host", "as they are"])
def test_ranks_get_the_answer_of_the_whole_batch(ranks, device, cut, declared, how):  # noqa: F811
    batch = Batch(masked=True)

    def body(comm):
        options = {"comm": how(comm)} | ({"sizes": cut} if declared else {})
        return [step(batch, *batch.range(cut, comm.rank), **options) for _ in range(3)]

    for parts in zip(*ranks(len(cut), body), strict=True):
        assert_one_answer(parts, step(batch, 0, 32))


@pytest.mark.parametrize("how", [communicator, Passing], ids=["by way of the host", "as they are"])
def test_second_derivatives_are_those_of_the_whole_batch(ranks, device, how):  # noqa: F811
    def body(comm):
        lo, hi = FIRST.range([20, 12], comm.rank)
        return second_derivatives(lo, hi, SECOND.gamma, SECOND.beta, comm=how(comm), whose="global")

    ddy, dx, dgamma = second_derivatives(0, 32, SECOND.gamma, SECOND.beta)
    found = ranks(2, body)
    for i, whole in enumerate((ddy, dx)):
        arrays.assert_same(np.concatenate([part[i] for part in found]), whole)
    for part in found:
        arrays.assert_same(part[2], dgamma)


@pytest.mark.parametrize(
    ("how", "waits"),
    [(communicator, ["to_host"]), (Passing, ["synchronize"])],
    ids=["by way of the host", "as they are"],
)
def test_the_host_waits_once_an_exchange_and_for_this_stream_only(ranks, device, how, waits):  # noqa: F811
    batch, cut = Batch(), [20, 12]

    def body(comm):
        comm = how(comm)
        lo, hi = batch.range(cut, comm.rank)
        for _ in range(2):  # in the first, where merges go is brought to the device
            device.waits.clear()
            _, saved = cubn.forward_train(batch.x[lo:hi], batch.state(), comm=comm)
            cubn.backward(batch.dy[lo:hi], saved, parameter_gradients="global")
        return list(device.waits)

    assert ranks(2, body) == [waits * 2] * 2


def test_device_memory_on_some_ranks_only_is_a_mismatch(ranks, device):  # noqa: F811
    def body(comm):
        comm = (communicator, Passing)[comm.rank](comm)
        with pytest.raises(cubn.CollectiveMismatch, match="got no options on rank 0; device memory on rank 1"):
            cubn.moments(Batch().x, comm=comm)
        return True

    assert ranks(2, body) == [True, True]


def test_staging_memory_stays_until_it_is_copied(ranks, device, monkeypatch):  # noqa: F811
    """What comes from the other ranks is in memory of `staging` when it goes to the device: the device keeps it."""
    stages, honest_staging, honest = [], device.staging, device.from_host
    monkeypatch.setattr(device, "staging", lambda *a: stages.append(honest_staging(*a)) or stages[-1])
    seen = []
    monkeypatch.setattr(device, "from_host", lambda values: seen.append(values) or honest(values))

    def body(comm):
        cubn.moments(Batch().x[16 * comm.rank :][:16], comm=comm)
        tables = [values for values in seen if values.ndim == 2]
        return [any(np.shares_memory(values, stage) for stage in stages) for values in tables]

    for staged in ranks(2, body):
        assert staged and all(staged)


class CudaArray:
    """Says where it is as arrays on CUDA devices do, and in no other way."""

    def __init__(self, array):
        self.array = array
        self.__cuda_array_interface__ = {**array.__array_interface__, "version": 3, "strides": None}


@under_mpi
@pytest.mark.parametrize("uneven", [False, True])
def test_mpi_gets_the_pointers_of_arrays_that_are_not_on_the_host(uneven, device):  # noqa: F811
    from mpi4py import MPI

    comm = communicator(MPI.COMM_WORLD)
    words = [3 + uneven * rank for rank in range(comm.size)]
    record = CudaArray(np.full(words[comm.rank], comm.rank, np.float64))
    received = CudaArray(np.full(sum(words), np.nan))
    comm.gather_on_device(device, record, received, [8 * n for n in words]).wait()
    np.testing.assert_array_equal(received.array, np.repeat(np.arange(comm.size), words))
    assert device.waits == ["synchronize"]


@under_mpi
def test_who_says_whether_mpi_takes_device_memory(device, monkeypatch):  # noqa: F811
    """The library's own word, unless the caller knows better."""
    from mpi4py import MPI

    from cubn.backends import backend_for
    from cubn.sync import mpi

    cuda = backend_for((1, 0))
    mine = MPI.COMM_WORLD.Dup()
    ours = mpi.communicator(mine)
    assert not ours.takes(cuda)
    assert mpi.communicator(mine, device_memory=True) is ours and ours.takes(cuda)
    assert mpi.communicator(mine).takes(cuda)
    assert not mpi.communicator(mine, device_memory=False).takes(cuda)
    monkeypatch.setattr(mpi, "_is_cuda_aware", lambda: True)
    ours.device_memory = None
    assert ours.takes(cuda)
    mine.Free()
