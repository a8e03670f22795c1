"""Ranks that should hold the same: what differs is named, on each of them, and nobody hangs."""

import numpy as np
import pytest

import cubn
from cubn.sync.threads import run

C = 4


def states():
    rng = np.random.default_rng(0)
    made = {"a": cubn.BatchNormState(C), "b": cubn.BatchNormState(C)}
    for state in made.values():
        for _ in range(100):
            cubn.update(state, cubn.moments(rng.standard_normal((32, C), np.float32)))
    return made


def diagnosed(size, spoil):
    """Each rank's findings, as (rule, severity, layer, channels, message), after `spoil(rank, states)`."""

    def on_a_rank(comm):
        mine = states()
        spoil(comm.rank, mine)
        found = cubn.diagnose(mine, comm=comm).findings
        return [(each.rule, each.severity, each.layer, each.channels, each.message) for each in found]

    return run(size, on_a_rank)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_ranks_that_agree_find_nothing(size):
    assert diagnosed(size, lambda rank, states: None) == [[]] * size


@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
def test_channels_that_differ_are_named_with_their_ranks(name):
    def spoil(rank, states):
        if rank in (1, 2):
            getattr(states["b"], name)[[0, rank]] += 0.5

    first, second, third, fourth = diagnosed(4, spoil)
    others, everybody = f"{name} differs on ranks 1, 2", f"{name} differs on ranks 0, {{}}, 3"
    assert first == fourth == [("ranks", "error", "b", (0, 1, 2), others)]
    assert second == [("ranks", "error", "b", (0, 1, 2), everybody.format(2))]
    assert third == [("ranks", "error", "b", (0, 1, 2), everybody.format(1))]


def test_what_they_hold_is_evidence():
    def on_a_rank(comm):
        mine = states()
        mine["a"].running_mean[2] = comm.rank
        (found,) = cubn.diagnose(mine, comm=comm).findings
        return found.evidence

    assert run(3, on_a_rank)[1] == {"here": [1.0], "rank 0": [0.0], "rank 2": [2.0]}


def test_bits_that_another_order_of_additions_moves_are_worth_knowing():
    def spoil(rank, states):
        if rank:
            states["a"].running_var[1] *= np.float32(1 + 2e-7)

    assert [found[:4] for found in diagnosed(2, spoil)[0]] == [("ranks", "info", "a", (1,))]


def test_counts_options_and_layers_that_differ():
    def spoil(rank, states):
        if rank == 1:
            states["a"].skipped = 1
            states["b"].eps = 1e-3
            states["c"] = states.pop("b")

    def others(rank, states):
        if rank == 1:
            states["a"].tracked = 90
            states["b"].eps = 1e-3

    assert [found[1:] for found in diagnosed(2, others)[0]] == [
        ("error", "b", (), "eps differs on rank 1"),
        ("warning", "a", tuple(range(C)), "tracked differs on rank 1"),
    ]
    for rank, found in enumerate(diagnosed(2, spoil)):
        layers = {each[2]: each[4] for each in found if each[1] == "error"}
        assert layers == {"b": "rank 1 has no such layer", "c": "rank 0 has no such layer"}, rank


@pytest.mark.parametrize("name", ["running_mean", "gamma"])
def test_nan_everywhere_is_the_same_everywhere(name):
    def spoil(rank, states):
        states["a"].running_mean[1] = np.nan
        getattr(states["a"], name)[2] = 5 + rank

    found = diagnosed(2, spoil)[0]
    assert [each[:4] for each in found] == [("non-finite", "error", "a", (1,)), ("ranks", "error", "a", (2,))]


def failures(size, function):
    with pytest.raises(ExceptionGroup) as caught:
        run(size, function)
    return {error.__notes__[0]: error for error in caught.value.exceptions}


def test_an_error_of_one_rank_is_one_of_all():
    def on_a_rank(comm):
        cubn.diagnose(states() if comm.rank != 1 else "nothing", comm=comm)

    found = failures(3, on_a_rank)
    assert isinstance(found.pop("on rank 1"), TypeError) and len(found) == 2
    for error in found.values():
        assert isinstance(error, cubn.CollectiveMismatch) and "an error on rank 1" in str(error)


def test_ranks_that_do_something_else_are_told():
    def on_a_rank(comm):
        if comm.rank:
            return cubn.diagnose(states(), comm=comm)
        return cubn.moments(np.ones((2, C)), comm=comm)

    for error in failures(2, on_a_rank).values():
        assert isinstance(error, cubn.CollectiveMismatch) and "moments on rank 0; diagnose on rank 1" in str(error)


def test_the_ranks_go_on_afterwards():
    def on_a_rank(comm):
        x = np.arange(float((3 + comm.rank) * C)).reshape(-1, C)
        before = cubn.moments(x, comm=comm)
        mine = states()
        mine["a"].running_mean[0] = comm.rank
        with pytest.raises((TypeError, cubn.CollectiveMismatch)):
            cubn.diagnose(mine if comm.rank else 3, comm=comm)
        cubn.diagnose(mine, comm=comm)
        assert cubn.moments(x, comm=comm).mean.tolist() == before.mean.tolist()
        return cubn.diagnose(states(), comm=comm).findings

    assert run(3, on_a_rank) == [()] * 3
