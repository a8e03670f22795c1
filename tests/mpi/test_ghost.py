"""Groups that straddle ranks, and batches of one value over all ranks. Also under mpiexec."""

import numpy as np
import pytest

import cubn
from cubn import reference
from cubn.sync import communicator
from tests import oracle
from tests.mpi.devices import device  # noqa: F401
from tests.mpi.parts import CUTS, LAYOUTS, Batch, C, assert_one_answer
from tests.mpi.test_device_records import Passing
from tests.ops import arrays

ON_RANKS = {cut: CUTS[cut] for cut in ("32", "20-12", "0-5-0-27", "thirds", "4x8")}


def step(batch, lo, hi, size, layout="nchw", *, gradients="global", momentum=0.1, **options):
    """Forward and backward of samples [lo, hi) by groups, as stores in the order (N, C, ...)."""
    x, dy, residual, mask, axis = batch.part(lo, hi, layout)
    state = batch.state(axis, momentum)
    y, saved = cubn.forward_train(x, state, groups=size, mask=mask, residual=residual, relu=True, **options)
    found = cubn.backward(dy, saved, parameter_gradients=gradients)

    def in_order(array):
        return np.moveaxis(arrays.store_of(array), axis, 1)

    of_state = ("running_mean", "running_var", "tracked", "skipped")
    return {
        "samples": {"y": in_order(y), "dx": in_order(found.dx), "dresidual": in_order(found.dresidual)},
        "parameters": {"dgamma": found.dgamma, "dbeta": found.dbeta},
        "channels": {
            **{name: np.array(getattr(state, name)) for name in of_state},
            **{name: np.array(getattr(saved, name)) for name in ("count", "mean", "var", "invstd")},
        },
    }


@pytest.mark.every_value
@pytest.mark.parametrize("cut", ON_RANKS)
@pytest.mark.parametrize("size", [1, 5, 8, 50])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_cut_does_not_matter(ranks, cut, size, masked):
    batch, cut = Batch("bfloat16" if size == 5 else "float32", masked=masked), ON_RANKS[cut]

    def body(comm):
        return step(batch, *batch.range(cut, comm.rank), size, LAYOUTS[comm.rank % len(LAYOUTS)], comm=comm)

    assert_one_answer(ranks(len(cut), body), step(batch, 0, 32, size))


@pytest.mark.full
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("size", [2, 3, 4, 7, 31])
@pytest.mark.parametrize("declared", [False, True], ids=["agreed", "declared"])
def test_no_cut_matters(ranks, cut, size, declared):
    batch, cut = Batch("float64", positions=(3,)), CUTS[cut]

    def body(comm):
        options = {"comm": comm} | ({"sizes": cut} if declared else {})
        return step(batch, *batch.range(cut, comm.rank), size, momentum=None, **options)

    assert_one_answer(ranks(len(cut), body), step(batch, 0, 32, size, momentum=None))


def test_cuts_may_change_from_call_to_call(ranks):
    """The samples of the last call are a guess only."""
    batch, cuts = Batch(positions=(2,)), [[16, 16], [16, 16], [13, 19], [16, 16], [3, 29]]

    def body(comm):
        return [step(batch, *batch.range(cut, comm.rank), 6, comm=comm) for cut in cuts]

    whole = step(batch, 0, 32, 6)
    for parts in zip(*ranks(2, body), strict=True):
        assert_one_answer(parts, whole)


@pytest.mark.every_value
@pytest.mark.parametrize("how", [communicator, Passing], ids=["by way of the host", "as they are"])
@pytest.mark.parametrize("cut", [[16, 16], [20, 0, 12]], ids=str)
def test_nodes_of_a_device_give_the_same(ranks, device, how, cut):  # noqa: F811
    batch = Batch(masked=True, positions=(3,))

    def body(comm):
        comm = how(comm)
        found = [step(batch, *batch.range(cut, comm.rank), 5, comm=comm) for _ in range(2)]
        device.waits.clear()
        lo, hi = batch.range(cut, comm.rank)
        _, saved = cubn.forward_train(batch.x[lo:hi], batch.state(), groups=5, comm=comm)
        cubn.backward(batch.dy[lo:hi], saved, parameter_gradients="global")
        return found, list(device.waits)

    both = ranks(len(cut), body)
    for parts in zip(*(found for found, _ in both), strict=True):
        assert_one_answer(parts, step(batch, 0, 32, 5))
    if how is Passing:  # the host waits once an exchange, and for this stream only
        assert [waits for _, waits in both] == [["synchronize"] * 2] * len(cut)


def test_a_rank_without_samples_says_nothing_of_their_size(ranks):
    batch = Batch(positions=(2,))

    def body(comm):
        x = batch.x[:0, :, :1] if comm.rank else batch.x
        return cubn.forward_train(x, batch.state(), groups=1, comm=comm)[1].count.tolist()

    assert ranks(2, body) == [[2] * 32] * 2


def test_all_groups_share_one_exchange(ranks):
    batch = Batch(positions=(2,))

    def body(comm):
        comm, before = communicator(comm), communicator(comm).exchanges
        step(batch, *batch.range([20, 12], comm.rank), 3, comm=comm)
        return comm.exchanges - before

    assert ranks(2, body) == [2, 2]


def test_local_parameter_gradients_are_the_rank_s_own_sums(ranks):
    """Over its pieces of groups, in blocks of each group's order, merged in the order of all groups."""
    batch, cut, size = Batch(), [5, 13, 0, 14], 4

    def body(comm):
        lo, hi = batch.range(cut, comm.rank)
        _, saved = cubn.forward_train(batch.x[lo:hi], batch.state(), groups=size, comm=comm)
        return cubn.backward(batch.dy[lo:hi], saved)

    x, dy = oracle.as_ncs(batch.x), oracle.as_ncs(batch.dy)
    for rank, found in enumerate(ranks(4, body)):
        lo, hi = batch.range(cut, rank)
        nodes, invstd, first = [], [], None
        for i, group in enumerate(reference.groups(32, size)):
            begin, end = max(lo, group.start), min(hi, group.stop)
            if begin < end:
                stats = oracle.batch_statistics(x[group], 1e-5)
                terms = dy[begin:end], dy[begin:end] * reference.centre(x[begin:end], stats.mean)
                nodes.append(oracle.root(oracle.sample_sums(*terms), reference.add, begin - group.start))
                invstd.append(stats.invstd)
                first = i if first is None else first
        want = [np.zeros(C, np.float32)] * 2
        if nodes:
            want = reference.group_parameter_gradients(nodes, invstd, np.float32, first)
        arrays.assert_same(found.dgamma, want[0], "dgamma")
        arrays.assert_same(found.dbeta, want[1], "dbeta")


def test_groups_of_several_layers_may_go_together(ranks):
    batch = Batch(positions=(2,))

    def body(comm):
        lo, hi = batch.range([20, 12], comm.rank)
        with cubn.together(comm):
            started = [cubn.forward_train_start(k * batch.x[lo:hi], batch.state(), groups=5, comm=comm) for k in (1, 2)]
        forwards = [one.finish() for one in started]
        with cubn.together(comm):
            started = [cubn.backward_start(batch.dy[lo:hi], saved) for _, saved in forwards]
        return [(y, one.finish().dx) for (y, _), one in zip(forwards, started, strict=True)]

    parts = ranks(2, body)
    for i, k in enumerate((1, 2)):
        y, saved = cubn.forward_train(k * batch.x, batch.state(), groups=5)
        arrays.assert_same(np.concatenate([part[i][0] for part in parts]), y)
        arrays.assert_same(np.concatenate([part[i][1] for part in parts]), cubn.backward(batch.dy, saved).dx)


def start_both(x, batch, comm):
    with cubn.together(comm):
        cubn.forward_train_start(x, batch.state(), groups=5, comm=comm)
        cubn.forward_train_start(x, batch.state(), comm=comm)


def test_other_cuts_do_not_go_together(ranks):
    batch = Batch(positions=(2,))

    def body(comm):
        x = batch.x[16 * comm.rank :][:16]
        text = "groups must be the same in all operations of a `with together` block, which are all forwards or all "
        with pytest.raises(ValueError, match=f"{text}backwards; got None. Start it outside"):
            start_both(x, batch, comm)
        return cubn.forward_train(x, batch.state(), comm=comm)[0].shape

    assert ranks(2, body) == [(16, C, 2)] * 2


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [None, [16, 16]], ids=["agreed", "declared"])
def test_ranks_that_do_not_agree_on_groups_hear_of_it(outcomes, sizes):
    batch = Batch(positions=(2,))

    def body(comm):
        state = batch.state()
        try:
            cubn.forward_train(batch.x[:16], state, groups=(4, 8)[comm.rank], comm=comm, sizes=sizes)
        finally:
            assert not state.tracked.any()

    for _, error in outcomes(2, body):
        assert type(error) is cubn.CollectiveMismatch
        assert "got groups=4 on rank 0; groups=8 on rank 1. Call the same operations" in str(error)


def test_groups_on_some_ranks_only_are_a_mismatch(outcomes):
    batch = Batch(positions=(2,))

    def body(comm):
        cubn.forward_train(batch.x[:16], batch.state(), groups=(None, 8)[comm.rank], comm=comm)

    for _, error in outcomes(2, body):
        assert type(error) is cubn.CollectiveMismatch and "groups=0 on rank 0; groups=8 on rank 1" in str(error)


def test_a_group_with_too_few_values_over_all_ranks_is_the_same_error_everywhere(outcomes):
    batch = Batch(positions=(2,))
    batch.mask = np.ones((32, 2), bool)
    batch.mask[8:12] = False
    batch.mask[9, 0] = True
    states = []

    def body(comm):
        lo, hi = batch.range([9, 0, 23], comm.rank)
        state = batch.state()
        states.append(state)
        with pytest.raises(ValueError, match="every group; got 1 in group 2, samples 8 to 11") as caught:
            cubn.forward_train(batch.x[lo:hi], state, groups=4, mask=batch.mask[lo:hi], comm=comm)
        assert type(caught.value) is ValueError and not state.tracked.any()
        return cubn.forward_train(batch.x[lo:hi], state, groups=8, mask=batch.mask[lo:hi], comm=comm)[0].shape[0]

    assert [(result, error) for result, error in outcomes(3, body)] == [(9, None), (0, None), (23, None)]


# --- a batch of one value -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [None, [0, 1, 0]], ids=["agreed", "declared"])
@pytest.mark.parametrize("groups", [None, 4])
def test_one_value_over_all_ranks_is_normalised_by_running_statistics(ranks, sizes, groups):
    batch = Batch(positions=())
    options = {"groups": groups, "on_single": "running", "residual": True}

    def of_samples(lo, hi, **on):
        state = batch.state()
        state.running_mean[...] = 2
        given = options | {"residual": batch.residual[lo:hi], "relu": True} | on
        y, saved = cubn.forward_train(batch.x[lo:hi], state, **given)
        dx, *of_parameters, dresidual = cubn.backward(batch.dy[lo:hi], saved, parameter_gradients="global")
        entries = {name: value for name, value in state.to_dict().items() if name not in ("gamma", "beta")}
        return (y, dx, dresidual), (*of_parameters, saved.count), entries

    def body(comm):
        return of_samples(*((0, 0), (0, 1), (1, 1))[comm.rank], comm=comm, sizes=sizes)

    samples, channels, entries = of_samples(0, 1)
    parts = ranks(3, body)
    for i, whole in enumerate(samples):
        arrays.assert_same(np.concatenate([found[0][i] for found in parts]), whole)
    for _, others, state in parts:
        for got, want in zip(others, channels, strict=True):
            arrays.assert_same(got, want)
        np.testing.assert_equal(state, entries)
    assert channels[-1] == 0 and (entries["skipped"] == 1).all() and (entries["tracked"] == 1).all()


def test_more_than_one_value_over_all_ranks_trains(ranks):
    batch = Batch(positions=())

    def body(comm):
        state = batch.state()
        y, _ = cubn.forward_train(batch.x[comm.rank :][:1], state, on_single="running", comm=comm)
        return y, state.running_var

    y, _ = cubn.forward_train(batch.x[:2], whole := batch.state())
    parts = ranks(2, body)
    arrays.assert_same(np.concatenate([part[0] for part in parts]), y)
    for _, running_var in parts:
        arrays.assert_same(running_var, whole.running_var)


def test_ranks_that_do_not_agree_on_single_values_hear_of_it(outcomes):
    batch = Batch(positions=())

    def body(comm):
        how = ("raise", "running")[comm.rank]
        cubn.forward_train(batch.x[:1], batch.state(), on_single=how, comm=comm)

    for _, error in outcomes(2, body):
        assert type(error) is cubn.CollectiveMismatch
        assert "got update on rank 0; update, on_single=running on rank 1" in str(error)


def test_no_values_over_all_ranks_are_refused_all_the_same(outcomes):
    batch = Batch(positions=())

    def body(comm):
        cubn.forward_train(batch.x[:0], batch.state(), on_single="running", comm=comm)

    for _, error in outcomes(2, body):
        assert type(error) is ValueError and "have values to take statistics of over all ranks" in str(error)
