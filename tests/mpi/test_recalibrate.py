"""Recalibration over ranks that are threads or processes: one answer for any cut, and errors of which all hear."""

import numpy as np
import pytest

import cubn
from tests.health.recalibrating import data, rank_by_rank, state_of


@pytest.mark.parametrize("size", range(1, 5))
def test_contiguous_ranges_in_rank_order_give_the_bits_of_the_whole(size, ranks):
    for seed in range(5):
        rank_by_rank(size, seed, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("size", range(1, 5))
def test_200_cuts(size, ranks):
    for seed in range(200):
        rank_by_rank(size, seed, ranks)


X = data(12, (3,), "float32")
FAILURES = {  # of rank 1 of 3; what the others say
    "a bad batch": (lambda: dict(batches=[X, X[:, :2]]), ValueError, "got an error on rank 1"),
    "no iterable": (lambda: dict(batches=3), TypeError, "got an error on rank 1"),
    "no state": (lambda: dict(states_or_model=3), TypeError, "got an error on rank 1"),
    "other state": (lambda: dict(states_or_model=cubn.BatchNormState(5)), None, "ranks must agree on the subject"),
    "no start": (lambda: dict(start=None), None, "ranks must agree on the start given"),
    "a gap": (lambda: dict(start=14), ValueError, "start must be the global index of each rank's first sample"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_is_wrong_on_one_rank_is_an_error_on_all_and_changes_nothing(name, outcomes):
    wrong, own, text = FAILURES[name]

    def body(comm):
        state = state_of(X)
        arguments = dict(states_or_model=state, batches=[X], start=12 * comm.rank)
        with pytest.raises((ValueError, TypeError)) as failed:
            cubn.recalibrate(**arguments | (wrong() if comm.rank == 1 else {}), comm=comm)
        assert (state.running_mean == 0).all() and (state.running_var == 1).all() and not state.tracked.any()
        again = cubn.recalibrate(state, [X], comm=comm)
        return type(failed.value), str(failed.value), again

    for rank, (result, error) in enumerate(outcomes(3, body)):
        if error is not None:
            raise error
        kind, said, again = result
        assert again.count == 3 * 36
        if rank == 1 and own is not None:
            assert kind is own
        else:
            assert text in said and said.startswith("recalibrate: ")


def test_a_rank_that_does_something_else_is_told_so(outcomes):
    def body(comm):
        state = state_of(X)
        if comm.rank == 1:
            return cubn.moments(X, comm=comm)
        return cubn.recalibrate(state, [X], comm=comm)

    for _, error in outcomes(2, body):
        assert isinstance(error, cubn.CollectiveMismatch)
        assert "recalibrate on rank 0; moments on rank 1" in str(error)


def test_all_ranks_without_batches_are_refused(outcomes):
    for _, error in outcomes(2, lambda comm: cubn.recalibrate(state_of(X), [], comm=comm)):
        assert isinstance(error, ValueError) and "batches must hold a batch; got none" in str(error)


def test_parts_without_order_have_the_same_bits_on_all_ranks(ranks):
    whole = cubn.moments(X)
    results = ranks(3, lambda comm: cubn.recalibrate(state_of(X), [X[comm.rank :: 3]], comm=comm))
    assert all((one.m2 == results[0].m2).all() for one in results)
    np.testing.assert_allclose(results[0].m2, whole.m2, rtol=1e-6)
