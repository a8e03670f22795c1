"""NCCL between threads whose devices are on the CPU: what is asked of it, and the bits."""

import builtins
import re
import sys
import types

import numpy as np
import pytest

import cubn
from cubn.backends.cuda.backend import CudaBackend
from cubn.sync import nccl, threads
from tests.mpi.devices import Nccl, device  # noqa: F401
from tests.mpi.parts import CUTS, Batch, C, assert_one_answer, step


@pytest.fixture
def library(device, monkeypatch):  # noqa: F811
    library = Nccl(device)
    monkeypatch.setattr(nccl, "_library", lambda: library)
    return library


def run(cut, body):
    """body(comm, range) on a rank for each part of the cut, over NCCL."""
    batch = Batch()
    return threads.run(len(cut), lambda host: body(nccl.communicator(host), batch.range(cut, host.rank)))


@pytest.mark.parametrize("cut", [[16, 16], [20, 12], [0, 5, 0, 27], [11, 11, 10], [32]], ids=str)
@pytest.mark.parametrize("declared", [False, True], ids=["agreed", "declared"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_ranks_get_the_answer_of_the_whole_batch(library, cut, declared, masked):
    batch = Batch(masked=masked)
    options = {"sizes": cut} if declared else {}
    ranks = run(cut, lambda comm, part: [step(batch, *part, comm=comm, **options) for _ in range(2)])
    for parts in zip(*ranks, strict=True):
        assert_one_answer(parts, step(batch, 0, 32))


def test_records_of_one_size_take_one_allgather_and_others_a_group_of_broadcasts(library):
    def moments(cut):
        library.calls.clear()
        run(cut, lambda comm, part: cubn.moments(Batch().x[slice(*part)], comm=comm))
        return sorted(library.calls)

    assert moments([16, 16]) == ["allGather"] * 2
    assert moments([4, 20, 8, 0]) == ["broadcast"] * 12 + ["end"] * 4 + ["start"] * 4


@pytest.mark.parametrize("declared", [False, True], ids=["agreed", "declared"])
def test_the_host_waits_for_no_device(library, device, declared):  # noqa: F811
    """Nor in the first step, in which the order of merges is brought there."""
    batch, cut = Batch(), [20, 12]

    def body(comm, part):
        x, dy = batch.x[slice(*part)], batch.dy[slice(*part)]
        state = batch.state()
        waits = []
        for _ in range(2):
            device.waits.clear()
            _, saved = cubn.forward_train(x, state, comm=comm, sizes=cut if declared else None)
            cubn.backward(dy, saved)
            waits.append(list(device.waits))
        return waits

    assert run(cut, body) == [[[], []]] * 2


def test_samples_without_positions(library):
    batch = Batch()

    def body(comm, part):
        x = batch.x[slice(*part)]
        state = batch.state()
        y, saved = cubn.forward_train(x[:, :, :, :0] if comm.rank else x, state, comm=comm)
        return cubn.backward(y, saved, parameter_gradients="global").dgamma, state.running_var, y.shape

    state = batch.state()
    y, saved = cubn.forward_train(batch.x[:20], state)
    dgamma = cubn.backward(y, saved).dgamma
    for rank, (got, running_var, shape) in enumerate(run([20, 12], body)):
        np.testing.assert_array_equal(got, dgamma)
        np.testing.assert_array_equal(running_var, state.running_var)
        assert shape == ((12, C, 5, 0) if rank else (20, C, 5, 7))


def test_another_cut_than_before_is_agreed_on_again(library):
    """A rank that took its nodes anew may have failed then; the host must know before the device goes on."""
    batch = Batch()
    cuts = [[16, 16, 0], [13, 11, 8], [16, 16, 0], [16, 10, 6]]

    def body(comm, _):
        return [step(batch, *batch.range(cut, comm.rank), comm=comm) for cut in cuts]

    for parts in zip(*run(cuts[0], body), strict=True):
        assert_one_answer(parts, step(batch, 0, 32))


def test_operations_together_get_the_answers_they_get_apart(library):
    batches = [Batch(seed=1), Batch("float16", seed=2, positions=(3,))]
    cut = [5, 27]

    def body(comm, part):
        library.calls.clear()
        with cubn.together(comm):
            started = [cubn.forward_train_start(batch.x[slice(*part)], batch.state(), comm=comm) for batch in batches]
        return [one.finish()[0] for one in started]

    parts = run(cut, body)
    assert library.calls.count("broadcast") == 4
    for i, batch in enumerate(batches):
        whole = step(batch, 0, 32, residual=False, relu=False)["samples"]["y"]
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), whole)


@pytest.mark.parametrize(("rows", "call"), [((4, 4), 1), ((8, 5), 2)], ids=["at once", "taken anew"])
def test_an_error_while_computing_reaches_the_others(library, device, monkeypatch, rows, call):  # noqa: F811
    """By the header, before anything is sent; where the cut was another than thought, by a second one."""
    batch = Batch()
    honest = CudaBackend.moments

    def moments(*arguments):
        device.of_thread.left -= 1
        if device.of_thread.left == 0:
            raise MemoryError("the device is full")
        return honest(*arguments)

    monkeypatch.setattr(CudaBackend, "moments", moments)

    def body(comm, _):
        device.of_thread.left = call if comm.rank == 1 else -1
        state = batch.state()
        try:
            cubn.forward_train(batch.x[: rows[comm.rank]], state, comm=comm)
        except Exception as error:
            assert not state.tracked.any() and device.of_thread.left <= 0
            return error, cubn.moments(batch.x[: rows[comm.rank]], comm=comm).count
        raise AssertionError("nothing was raised")

    zero, one = run([16, 16], body)
    assert type(one[0]) is MemoryError
    assert str(zero[0]).endswith("got an error on rank 1. Its own error says more.")
    assert zero[1] == one[1] == sum(rows) * 35
    assert "abort" not in library.calls


def test_ranks_that_disagree_after_records_went_out_are_rid_of_them(library):
    """Declared sizes, another number of channels: NCCL would wait for ever."""
    batch = Batch()

    def body(comm, _):
        state = cubn.BatchNormState(C - comm.rank)
        try:
            cubn.forward_train(batch.x[:4, : C - comm.rank], state, comm=comm, sizes=[4, 4])
        except cubn.CollectiveMismatch as error:
            with pytest.raises(cubn.CollectiveMismatch, match="comm can no longer be used"):
                cubn.moments(batch.x[:4], comm=comm)
            return str(error), state.tracked.any()
        raise AssertionError("nothing was raised")

    for said, tracked in run([16, 16], body):
        assert "C=6 on rank 0; C=5 on rank 1" in said and not tracked
    assert library.calls.count("abort") == 2


def test_arrays_elsewhere_go_over_the_host(library, device, monkeypatch):  # noqa: F811
    monkeypatch.setattr(device, "index", 1)
    batch, cut = Batch(), [20, 12]
    parts = run(cut, lambda comm, part: step(batch, *part, comm=comm, sizes=cut))
    assert_one_answer(parts, step(batch, 0, 32))
    assert library.calls == []


def test_a_communicator_of_the_caller_s(library):
    batch, cut = Batch(), CUTS["16-16"]

    def body(host):
        mine = library.NcclCommunicator(2, b"shared in some other way", host.rank)
        return step(batch, *batch.range(cut, host.rank), comm=nccl.communicator(host, mine))

    assert_one_answer(threads.run(2, body), step(batch, 0, 32))


@pytest.mark.parametrize(
    ("missing", "package"),
    [("CuPy", "cupy-cuda13x (or cupy-cuda12x"), ("NCCL", "nvidia-nccl-cu13 (or nvidia-nccl-cu12")],
)
def test_what_is_missing_is_named(monkeypatch, missing, package):
    if missing == "CuPy":
        honest = builtins.__import__

        def no_cupy(name, *arguments, **options):
            if name.partition(".")[0] == "cupy":
                raise ImportError(name)
            return honest(name, *arguments, **options)

        monkeypatch.setattr(builtins, "__import__", no_cupy)
    else:
        cuda = types.SimpleNamespace(nccl=types.SimpleNamespace(available=False))
        monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
        monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    with pytest.raises(ImportError, match=rf"and {missing} is not installed\. Install it .*{re.escape(package)}"):
        nccl.communicator(threads.communicators(1)[0])
