"""What is particular to mpi4py communicators; runs in processes under mpiexec only."""

import gc
import os

import numpy as np
import pytest

import cubn
from cubn.sync import communicator
from tests.mpi.launch import UNDER_MPI
from tests.mpi.parts import Batch, assert_one_answer, step

pytestmark = pytest.mark.skipif(not os.environ.get(UNDER_MPI), reason="test_under_mpi.py runs this under mpiexec")


@pytest.fixture
def world():
    from mpi4py import MPI

    return MPI.COMM_WORLD


def test_the_duplicate_is_made_once_and_is_private(world):
    ours = communicator(world)
    assert communicator(world) is ours
    assert ours._comm != world
    assert (ours.rank, ours.size) == (world.rank, world.size)


def test_the_duplicate_goes_with_its_communicator(world):
    from mpi4py import MPI

    mine = world.Dup()
    ours = communicator(mine)
    mine.Free()
    assert ours._comm == MPI.COMM_NULL
    again = world.Dup()  # may get the handle of the one before
    assert communicator(again) is not ours
    again.Free()


def test_a_communicator_is_freed_while_another_thread_begins_a_gather(world, monkeypatch):
    from mpi4py import MPI

    from cubn.sync import mpi

    class Begun:
        @property
        def comm(self):
            mpi._UNDER_WAY.add(Begun())

    mine = world.Dup()
    ours = communicator(mine)
    monkeypatch.setattr(mpi, "_UNDER_WAY", {Begun()})
    mine.Free()
    assert ours._comm == MPI.COMM_NULL


def test_a_backward_needs_its_communicator(world):
    mine = world.Dup()
    batch = Batch()
    _, saved = cubn.forward_train(batch.x, batch.state(), comm=mine)
    mine.Free()
    with pytest.raises(
        ValueError, match="comm must be kept until the last backward of its forwards; got one that was freed"
    ):
        cubn.backward(batch.dy, saved)


def test_a_copy_of_a_communicator_has_a_duplicate_of_its_own(world):
    first = communicator(world)
    copy = world.Dup()
    assert communicator(copy) is not first
    copy.Free()


def test_ranks_in_another_order_hold_the_batch_in_that_order(world):
    """One state per domain: even and odd processes, each group backwards."""
    group = world.Split(world.rank % 2, -world.rank)
    batch = Batch(seed=world.rank % 2)
    cut = [3] * (group.size - 1) + [32 - 3 * (group.size - 1)]
    parts = group.allgather(step(batch, *batch.range(cut, group.rank), comm=group))
    assert_one_answer(parts, step(batch, 0, 32))
    assert group.allgather(world.rank) == sorted(group.allgather(world.rank), reverse=True)
    group.Free()


def test_messages_of_the_user_s_are_not_ours(world):
    """A gather of the user's own may be under way on the same communicator."""
    sent, received = np.full(8, world.rank, np.int64), np.empty((world.size, 8), np.int64)
    request = world.Iallgather(sent, received)
    batch = Batch()
    rows = slice(world.rank, world.rank + 2)
    cubn.forward_train(batch.x[rows], batch.state(), comm=world)
    request.Wait()
    assert (received == np.arange(world.size)[:, None]).all()


def test_unfinished_garbage_does_not_reach_another_exchange(world):
    """A record is kept as long as its message is under way."""
    batch = Batch()
    rows = [slice(2 * world.rank, 2 * world.rank + 2), slice(2 * world.rank + 1, 2 * world.rank + 3)]
    started = [cubn.forward_train_start(batch.x[part], batch.state(), comm=world) for part in rows]
    gc.collect()
    again = [cubn.forward_train(batch.x[part], batch.state(), comm=world)[0] for part in rows]
    for one, y in zip(reversed(started), reversed(again), strict=True):
        np.testing.assert_array_equal(one.finish()[0], y)


def test_what_is_no_group_is_refused(world):
    from mpi4py import MPI

    with pytest.raises(ValueError, match="comm must be an intracommunicator this process is in; got COMM_NULL"):
        communicator(MPI.COMM_NULL)
    if world.size > 1:
        half = world.Split(world.rank % 2)
        between = half.Create_intercomm(0, world, 1 - world.rank % 2)
        with pytest.raises(ValueError, match="comm must be an intracommunicator this process is in; got Intercomm"):
            communicator(between)
        between.Free()
        half.Free()


def test_records_of_declared_sizes_that_do_not_fit_never_meet(world):
    """To MPI, messages of another length than expected are an error, which may overwrite memory."""
    from cubn.sync import mpi

    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    mine = world.Dup()
    ours = communicator(mine)

    def moments(C):
        return cubn.moments(np.zeros((2, C), np.float32), comm=mine, sizes=[2] * world.size).count

    lanes = []
    for C in (5, 3000):
        record = (16 * C + 8,) * world.size
        assert ours.lane(record, on_device=False, agreed=False) is None
        assert [moments(C), moments(C)] == [2 * world.size] * 2
        lanes.append(ours.lane(record, on_device=False, agreed=False))
    assert len({lane._comm.handle for lane in (ours, *lanes)}) == 3
    before = set(mpi._UNDER_WAY)
    with pytest.raises(cubn.CollectiveMismatch, match="C=5 on rank 0; C=3000 on rank"):
        moments(5 if world.rank == 0 else 3000)
    (waiting,) = mpi._UNDER_WAY - before
    assert waiting.comm == lanes[world.rank > 0]._comm
    with pytest.raises(cubn.CollectiveMismatch, match="comm can no longer be used"):
        moments(5)


def test_lanes_are_limited_and_go_with_their_communicator(world, monkeypatch):
    """An MPI library has so many communicators only; other records wait for the headers."""
    from mpi4py import MPI

    from cubn.sync import mpi

    monkeypatch.setattr(mpi, "LANES", 2)
    mine = world.Dup()
    for C in (1, 2, 3, 3):
        cubn.moments(np.zeros((2, C), np.float32), comm=mine, sizes=[2] * world.size)
    lanes = list(communicator(mine)._lanes.values())
    assert len(lanes) == 2
    mine.Free()
    assert all(lane._comm == MPI.COMM_NULL for lane in lanes)
