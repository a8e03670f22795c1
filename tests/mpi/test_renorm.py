"""Batch renormalisation over ranks: that of one process with the whole batch. Also under mpiexec."""

import math

import numpy as np
import pytest

import cubn
from cubn.sync import communicator
from tests import oracle
from tests.mpi.devices import device  # noqa: F401
from tests.mpi.parts import CUTS, LAYOUTS, Batch, C, assert_one_answer, step
from tests.ops import arrays

LIMITS = (2.5, 5.0)


@pytest.mark.every_pair
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("dtype", arrays.DTYPES)
@pytest.mark.parametrize("cut", CUTS)
def test_cut_does_not_matter(ranks, cut, dtype, masked):
    batch, cut = Batch(dtype, masked=masked), CUTS[cut]
    options = {"residual": dtype != "float64", "momentum": None if masked else 0.1, "renorm": LIMITS}

    def body(comm):
        return step(batch, *batch.range(cut, comm.rank), LAYOUTS[comm.rank % len(LAYOUTS)], comm=comm, **options)

    whole = step(batch, 0, 32, **options)
    assert (whole["channels"]["r"] != 1).all()
    assert_one_answer(ranks(len(cut), body), whole)


@pytest.mark.parametrize("declared", [False, True], ids=["agreed", "declared"])
def test_ranks_with_devices(ranks, device, declared):  # noqa: F811
    """The host waits for the exchange of nodes, and for nothing of r and d."""
    batch, cut = Batch(masked=True), [20, 12]

    def body(comm):
        options = {"comm": communicator(comm), "renorm": LIMITS} | ({"sizes": cut} if declared else {})
        for _ in range(2):  # in the first, where merges go is brought to the device
            device.waits.clear()
            lo, hi = batch.range(cut, comm.rank)
            _, saved = cubn.forward_train(batch.x[lo:hi], batch.state(), **options)
            cubn.backward(batch.dy[lo:hi], saved, parameter_gradients="global")
        return list(device.waits), step(batch, lo, hi, **options)

    found = ranks(2, body)
    assert [waits for waits, _ in found] == [["to_host"] * 2] * 2
    assert_one_answer([part for _, part in found], step(batch, 0, 32, renorm=LIMITS))


def test_a_rank_s_own_parameter_gradients_add_up_to_those_of_all(ranks):
    """They are dgamma = r * (sum of its own) + d * (its own dbeta)."""
    batch, cut = Batch("float64"), [20, 12]

    def body(comm):
        return step(batch, *batch.range(cut, comm.rank), gradients="local", renorm=LIMITS, comm=comm)

    whole = step(batch, 0, 32, renorm=LIMITS)
    parts = ranks(2, body)
    for name, expected in whole["parameters"].items():
        np.testing.assert_allclose(sum(part["parameters"][name] for part in parts), expected, rtol=1e-5)


def test_the_running_statistics_are_those_of_finish(ranks):
    """A step that came between start and finish counts."""
    batch, cut = Batch(), [16, 16]

    def two_steps(x, start, state):
        first = start(x, state)
        second = start(x[::-1].copy(), state)
        return [started.finish()[1].d for started in (first, second)]

    def body(comm):
        def start(x, state):
            return cubn.forward_train_start(x, state, comm=comm, renorm=(math.inf, math.inf))

        lo, hi = batch.range(cut, comm.rank)
        return two_steps(batch.x[lo:hi], start, batch.state())

    for first, second in ranks(2, body):
        assert (np.abs(second) < np.abs(first)).all()  # the running mean has moved towards the batch's
        assert len(first) == C


@pytest.mark.parametrize("library", ["numpy", "jax"])
@pytest.mark.parametrize(
    ("samples", "option"),
    [(16, {"renorm": (math.inf, math.inf)}), (1, {"on_single": "running"})],
    ids=["renorm", "on_single"],
)
def test_without_an_update_they_are_those_of_finish_too(ranks, library, samples, option):
    """Of a library whose arrays are replaced, and where they are assigned."""
    batch = Batch(positions=())

    def body(comm):
        state = batch.state()
        for name in ("running_mean", "running_var"):
            setattr(state, name, arrays.carry(getattr(state, name), library))
        x = batch.x[:samples][comm.rank :: 2]

        def start():
            return cubn.forward_train_start(x, state, comm=comm, update=False, **option)

        moved, assigned = cubn.moments(batch.x + 3), arrays.carry(np.full(C, 7, np.float32), library)
        found = []
        for change in (None, lambda: cubn.update(state, moved), lambda: setattr(state, "running_mean", assigned)):
            started = start()
            if change:
                change()
            found += [(started.finish()[0], start().finish()[0])]
        return found

    for found in ranks(2, body):
        for early, late in found:
            arrays.assert_same(early, late)
        if len(found[0][0]):
            assert not oracle.equal(found[0][0], found[1][0]) and not oracle.equal(found[1][0], found[2][0])


@pytest.mark.parametrize("declared", [False, True])
def test_a_rank_with_limits_of_its_own_that_are_none_fails_on_all(outcomes, declared):
    batch, state = Batch(), {}

    def body(comm):
        own = state.setdefault(comm.rank, batch.state())
        sizes = {"sizes": [16, 16]} if declared else {}
        renorm = (0.5, 1) if comm.rank else LIMITS
        return cubn.forward_train(batch.x[:16], own, comm=comm, renorm=renorm, **sizes)

    (_, first), (_, second) = outcomes(2, body)
    assert type(first) is cubn.errors.CollectiveMismatch
    assert str(second).startswith("forward_train: renorm's r_max must be 1 or more; got 0.5.")
    assert all((own.tracked == 0).all() for own in state.values())


def test_one_value_over_all_ranks_is_normalised_by_running_statistics(ranks):
    x, whole = np.array([[3.0, 5.0]], np.float32), cubn.BatchNormState(2)
    y, _ = cubn.forward_train(x, whole, on_single="running")

    def body(comm):
        state = cubn.BatchNormState(2)
        y, saved = cubn.forward_train(x[comm.rank :], state, on_single="running", renorm=LIMITS, comm=comm)
        return y, saved.r, state.skipped

    for rank, (own, r, skipped) in enumerate(ranks(2, body)):
        assert np.array_equal(own, y[rank:]) and r is None and skipped.tolist() == [1, 1]
