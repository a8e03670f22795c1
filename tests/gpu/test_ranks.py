"""Ranks on one device: by way of pinned memory; over MPI that takes device memory, and over NCCL where there are."""

import numpy as np
import pytest

import cubn
from cubn.sync import threads
from tests.gpu import device_arrays
from tests.mpi.launch import ROOT, libraries
from tests.mpi.parts import Batch, C

pytestmark = pytest.mark.gpu


def step(batch, part, library, comm, **options):
    """y, dx, dgamma and the running mean of a part of the batch on the device, in NumPy."""
    x, dy = (device_arrays.carry(store[slice(*part)].copy(), library) for store in (batch.x, batch.dy))
    state = cubn.BatchNormState(C, like=x)
    y, saved = cubn.forward_train(x, state, comm=comm, **options)
    grads = cubn.backward(dy, saved, parameter_gradients="global")
    return [device_arrays.store_of(a).copy() for a in (y, grads.dx, grads.dgamma, state.running_mean)]


def assert_same_as_on_the_host(batch, ranks):
    state = cubn.BatchNormState(C)
    y, saved = cubn.forward_train(batch.x, state)
    grads = cubn.backward(batch.dy, saved)
    for i, whole in enumerate((y, grads.dx)):
        np.testing.assert_array_equal(np.concatenate([rank[i] for rank in ranks]), whole)
    for _, _, dgamma, running_mean in ranks:
        np.testing.assert_array_equal(dgamma, grads.dgamma)
        np.testing.assert_array_equal(running_mean, state.running_mean)


@pytest.mark.parametrize("library", device_arrays.LIBRARIES)
@pytest.mark.parametrize("cut", [[16, 16], [20, 0, 12], [7, 9, 3, 13]], ids=str)
def test_ranks_that_are_threads_get_the_bits_of_the_host(cut, library):
    batch = Batch()
    ranks = threads.run(len(cut), lambda comm: step(batch, batch.range(cut, comm.rank), library, comm))
    assert_same_as_on_the_host(batch, ranks)


def test_pinned_memory_is_not_given_away_while_it_is_copied():
    """Large records, one behind the other: each is in the memory of the one before as soon as that is free."""
    batches = [np.random.default_rng(seed).standard_normal((2, 65536), dtype=np.float32) for seed in range(20)]

    def body(comm):
        import cupy

        rows = [cupy.asarray(batch[comm.rank : comm.rank + 1]) for batch in batches]
        states = [cubn.BatchNormState(65536, like=rows[0]) for _ in rows]
        for x, state in zip(rows, states, strict=True):
            cubn.forward_train(x, state, comm=comm)
        return [state.running_mean.get() for state in states]

    ranks = threads.run(2, body)
    for i, batch in enumerate(batches):
        state = cubn.BatchNormState(65536)
        cubn.forward_train(batch, state)
        for rank in ranks:
            np.testing.assert_array_equal(rank[i], state.running_mean)


def test_a_rank_of_nccl_gets_the_bits_of_the_host():
    """One rank: NCCL wants a device for each."""
    from cubn.sync import nccl

    try:
        comm = nccl.communicator(threads.communicators(1)[0])
    except ImportError as error:
        pytest.skip(str(error))
    batch = Batch()
    for options in ({}, {"sizes": [32]}):
        assert_same_as_on_the_host(batch, [step(batch, (0, 32), "numpy", comm, **options)])


def test_device_pointers_over_mpi():
    """Where the MPI at hand says that it takes them; several ranks share the device."""
    aware = [mpi for mpi in libraries().values() if "\nyes:" in mpi.run(1, "-m", "cubn.sync.cuda_aware").stdout]
    if not aware:
        pytest.skip("no CUDA-aware MPI: see docs/synchronised.md")
    for mpi in aware:
        run = mpi.run(3, "-m", "mpi4py", str(ROOT / "tests" / "gpu" / "test_ranks.py"))
        assert (run.returncode, run.stdout) == (0, "done\n" * 3), run.stderr


def main():
    """A rank of the test above."""
    from mpi4py import MPI

    from cubn.sync import mpi

    comm = mpi.communicator(MPI.COMM_WORLD, device_memory=True)
    batch = Batch()
    for cut in ([16, 16, 0], [7, 22, 3]):
        for options in ({}, {"sizes": cut}, {"sizes": cut}):
            part = step(batch, batch.range(cut, comm.rank), "numpy", comm, **options)
            assert_same_as_on_the_host(batch, MPI.COMM_WORLD.allgather(part))
    print("done")


if __name__ == "__main__":
    main()
