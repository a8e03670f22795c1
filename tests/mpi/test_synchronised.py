"""One answer for any number of ranks and any cut. Runs under plain pytest, and in processes under mpiexec."""

import numpy as np
import pytest

import cubn
from cubn import reference
from cubn.backends.cpu.backend import CpuBackend
from cubn.sync import Communicator, communicator
from tests import oracle
from tests.mpi.parts import CUTS, LAYOUTS, Batch, C, assert_one_answer, step
from tests.ops import arrays


def layout_of(rank):
    return LAYOUTS[rank % len(LAYOUTS)]


@pytest.fixture(params=CUTS, ids=CUTS)
def cut(request):
    return CUTS[request.param]


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("dtype", arrays.DTYPES)
def test_cut_does_not_matter(ranks, cut, dtype, masked):
    batch = Batch(dtype, masked=masked)
    options = {"residual": dtype != "float64", "momentum": None if masked else 0.1}

    def body(comm):
        return step(batch, *batch.range(cut, comm.rank), layout_of(comm.rank), comm=comm, **options)

    assert_one_answer(ranks(len(cut), body), step(batch, 0, 32, **options))


def test_declared_sizes_do_not_matter(ranks, cut):
    batch = Batch()

    def body(comm):
        return step(batch, *batch.range(cut, comm.rank), comm=comm, sizes=cut)

    assert_one_answer(ranks(len(cut), body), step(batch, 0, 32))


def test_cuts_may_change_from_call_to_call(ranks):
    """The samples of the last call are a guess only."""
    batch = Batch()
    cuts = [[16, 16], [16, 16], [13, 19], [16, 16], [3, 29], [13, 19]]

    def body(comm):
        return [step(batch, *batch.range(cut, comm.rank), comm=comm) for cut in cuts]

    whole = step(batch, 0, 32)
    for parts in zip(*ranks(2, body), strict=True):
        assert_one_answer(parts, whole)


def test_statistics_are_taken_once_where_the_cut_is_as_before(ranks, monkeypatch):
    taken = []
    honest = CpuBackend.moments

    def moments(backend, extents, arrays, start):
        taken.append((extents.N, start))
        return honest(backend, extents, arrays, start)

    monkeypatch.setattr(CpuBackend, "moments", moments)

    def body(comm):
        for _ in range(3):
            cubn.moments(Batch().x[: (5, 11)[comm.rank]], comm=comm)
        return list(taken)

    both = ranks(2, body)
    seen = sorted(set(both[0] + both[1]))
    assert seen == [(5, 0), (11, 5), (11, 11)]
    for times, where in ((3, (5, 0)), (1, (11, 11)), (3, (11, 5))):
        assert times == max(part.count(where) for part in both)


@pytest.mark.parametrize("gradients", ["local", "global"])
def test_gradients_of_frozen_statistics_are_those_of_the_whole_batch(ranks, cut, gradients):
    batch = Batch()

    def body(comm):
        return step(batch, *batch.range(cut, comm.rank), frozen=True, gradients=gradients, comm=comm)

    parts = ranks(len(cut), body)
    assert_one_answer(parts, step(batch, 0, 32, frozen=True), parameters=gradients == "global")


@pytest.mark.parametrize("frozen", [False, True], ids=["train", "frozen"])
def test_local_parameter_gradients_are_the_rank_s_own_sums(ranks, frozen):
    """Over the blocks of the whole batch's order: the oracle takes them with the rank's first index."""
    batch, cut = Batch(), [5, 13, 14]

    def body(comm):
        lo, hi = batch.range(cut, comm.rank)
        x, dy, *_ = batch.part(lo, hi)
        state = batch.state()
        _, saved = (cubn.forward_frozen if frozen else cubn.forward_train)(x, state, comm=comm)
        return cubn.backward(dy, saved)

    ncs = oracle.as_ncs(batch.x)
    if frozen:
        stats = oracle.frozen_statistics(np.zeros(C, np.float32), np.ones(C, np.float32), 1e-5)
    else:
        stats = oracle.batch_statistics(ncs, 1e-5)
    for rank, grads in enumerate(ranks(3, body)):
        lo, hi = batch.range(cut, rank)
        arguments = (oracle.as_ncs(batch.dy)[lo:hi], ncs[lo:hi], stats, batch.gamma, batch.beta)
        expected = oracle.backward(*arguments, frozen=frozen, start=lo)
        arrays.assert_same(grads.dgamma, expected.dgamma, "dgamma")
        arrays.assert_same(grads.dbeta, expected.dbeta, "dbeta")


def test_local_sums_where_the_samples_were_thought_to_begin_elsewhere(ranks):
    """[7, 13) and [3, 9) are both cut in 1, 4 and 1; which two merge first is not the same."""
    batch = Batch(N=9)
    batch.dy[...] = 0
    batch.dy[3:9, :, 0, 0] = np.array([1e20, -1e20, 0, 0, 0, 1], np.float32)[:, None]

    def body(comm):
        lo, hi = ((0, 3), (3, 9))[comm.rank]
        _, saved = cubn.forward_train(batch.x[lo:hi], batch.state(), comm=comm)
        cubn.moments(batch.x[: (7, 6)[comm.rank]], comm=comm)
        return cubn.backward(batch.dy[lo:hi], saved)

    ncs = oracle.as_ncs(batch.x)
    arguments = (oracle.as_ncs(batch.dy)[3:], ncs[3:], oracle.batch_statistics(ncs, 1e-5), batch.gamma, batch.beta)
    expected, other = (oracle.backward(*arguments, start=start) for start in (3, 7))
    assert (expected.dbeta == 1).all() and (other.dbeta == 0).all()
    grads = ranks(2, body)[1]
    arrays.assert_same(grads.dgamma, expected.dgamma, "dgamma")
    arrays.assert_same(grads.dbeta, expected.dbeta, "dbeta")


def test_without_comm_the_parts_differ(ranks):
    """The control: were these equal, the tests above would show nothing."""
    batch, cut = Batch(), [20, 12]
    parts = ranks(2, lambda comm: step(batch, *batch.range(cut, comm.rank)))
    whole = step(batch, 0, 32)
    for name in ("y", "dx"):
        assert not oracle.equal(np.concatenate([part["samples"][name] for part in parts]), whole["samples"][name])
    for name in ("running_mean", "running_var", "moments.mean", "moments.m2"):
        assert not oracle.equal(parts[0]["channels"][name], whole["channels"][name])
    for name in ("dgamma", "dbeta"):
        assert not oracle.equal(parts[0]["parameters"][name], whole["parameters"][name])


def test_fully_masked_ranks_and_ranks_without_a_mask(ranks):
    batch, cut = Batch(masked=True), [4, 20, 8]
    batch.mask[:4] = False
    batch.mask[4:24] = True

    def body(comm):
        if comm.rank == 1:
            unmasked = Batch()
            return step(unmasked, 4, 24, comm=comm)
        return step(batch, *batch.range(cut, comm.rank), comm=comm)

    assert_one_answer(ranks(3, body), step(batch, 0, 32))


def test_one_value_on_each_of_two_ranks_is_enough(ranks):
    batch = Batch(N=2, positions=())
    parts = ranks(2, lambda comm: step(batch, comm.rank, comm.rank + 1, comm=comm))
    assert_one_answer(parts, step(batch, 0, 2))


def test_samples_of_two_sizes(ranks):
    """S may differ between ranks; no single array holds such a batch, so the oracle says what it is."""
    small, large = Batch(N=3, positions=(4, 4), seed=1), Batch(N=2, positions=(9, 300), seed=2)
    stores = [small, large, Batch(N=2, positions=(0, 4), seed=3)]

    def body(comm):
        y, saved = cubn.forward_train(stores[comm.rank].x, cubn.BatchNormState(C), comm=comm)
        grads = cubn.backward(stores[comm.rank].dy, saved, parameter_gradients="global")
        return y, saved.mean, saved.var, grads

    ncs = [oracle.as_ncs(one.x) for one in stores]
    nodes = [oracle.sample_moments(x) for x in ncs]
    stats = oracle.statistics(oracle.root([np.concatenate(a) for a in zip(*nodes, strict=True)], reference.merge), 1e-5)
    terms = []
    for one, x in zip(stores, ncs, strict=True):
        dy = oracle.as_ncs(one.dy)
        terms.append(oracle.sample_sums(dy, dy * reference.centre(x, stats.mean)))
    _, sum_dy, sum_dy_xmu = oracle.root([np.concatenate(a) for a in zip(*terms, strict=True)], reference.add)
    for one, x, (y, mean, var, grads) in zip(stores, ncs, ranks(3, body), strict=True):
        arrays.assert_same(mean, stats.mean, "mean")
        arrays.assert_same(var, stats.var, "var")
        arrays.assert_same(oracle.as_ncs(y), oracle.normalize(x, stats), "y")
        arrays.assert_same(grads.dbeta, sum_dy.astype(np.float32), "dbeta")
        dx = reference.input_gradient(
            oracle.as_ncs(one.dy), x, stats.mean, stats.invstd, np.ones(C, np.float32), stats.count, sum_dy, sum_dy_xmu
        )
        arrays.assert_same(oracle.as_ncs(grads.dx), dx, "dx")


def test_moments_of_ranks_from_any_sample_on(ranks):
    batch = Batch()
    cut = [7, 0, 25]

    def body(comm):
        lo, hi = batch.range(cut, comm.rank)
        m = cubn.moments(batch.x[lo:hi], comm=comm, start=5)
        return m.start, m.stop, m.merge(cubn.moments(batch.x[:3], start=37)).m2

    expected = cubn.moments(batch.x, start=5).merge(cubn.moments(batch.x[:3], start=37)).m2
    for start, stop, m2 in ranks(3, body):
        assert (start, stop) == (5, 37)
        arrays.assert_same(m2, expected, "m2")


def test_moments_of_no_samples_at_all(ranks):
    m, _ = ranks(2, lambda comm: cubn.moments(np.zeros((0, 3, 4), np.float32), comm=comm))
    assert (m.start, m.stop, m.count) == (0, 0, 0)


def test_no_update_leaves_the_state_alone(ranks):
    batch = Batch()

    def body(comm):
        state = batch.state()
        cubn.forward_train(batch.x[comm.rank :: 2], state, comm=comm, update=False)
        return state.running_mean, state.tracked

    for mean, tracked in ranks(2, body):
        assert not mean.any() and not tracked.any()


# --- halves and bundles ---------------------------------------------------------------------------------------------


class Counting(Communicator):
    """Another communicator, with a list of the bytes each gather takes from this rank."""

    def __init__(self, comm):
        self.inner = communicator(comm)
        super().__init__(self.inner.rank, self.inner.size)
        self.bytes = []

    def gather(self, record, received, sizes):
        assert record.nbytes == sizes[self.rank] and received.nbytes == sum(sizes)
        self.bytes.append(record.nbytes)
        return self.inner.gather(record, received, sizes)


def test_a_started_operation_keeps_the_options_it_began_with(ranks):
    """They are what the ranks agreed on."""
    batch = Batch()
    expected = batch.state()
    whole, _ = cubn.forward_train(batch.x, expected)

    def body(comm):
        state = batch.state()
        lo, hi = batch.range([16, 16], comm.rank)
        started = cubn.forward_train_start(batch.x[lo:hi], state, comm=comm)
        state.eps, state.momentum = 0.5, None
        y, _ = started.finish()
        return y, state.running_mean, state.running_var

    for part, (y, mean, var) in zip((whole[:16], whole[16:]), ranks(2, body), strict=True):
        arrays.assert_same(y, part, "y")
        arrays.assert_same(mean, expected.running_mean, "running_mean")
        arrays.assert_same(var, expected.running_var, "running_var")


def test_started_operations_may_be_finished_later_and_in_any_order(ranks):
    batches, cut = [Batch(seed=1), Batch(seed=2)], [20, 12]

    def body(comm):
        lo, hi = batches[0].range(cut, comm.rank)
        states = [batch.state() for batch in batches]
        started = [
            cubn.forward_train_start(batch.x[lo:hi], state, comm=comm)
            for batch, state in zip(batches, states, strict=True)
        ]
        assert not any(state.tracked.any() for state in states)
        (y1, saved1), (y0, saved0) = started[1].finish(), started[0].finish()
        assert started[0].finish()[0] is y0
        backward = [
            cubn.backward_start(batch.dy[lo:hi], saved, parameter_gradients="global")
            for batch, saved in zip(batches, (saved0, saved1), strict=True)
        ]
        dx1, dx0 = backward[1].finish().dx, backward[0].finish().dx
        return [(y0, dx0, states[0].running_var), (y1, dx1, states[1].running_var)]

    parts = ranks(2, body)
    for i, batch in enumerate(batches):
        whole = step(batch, 0, 32, residual=False, relu=False)
        arrays.assert_same(np.concatenate([part[i][0] for part in parts]), whole["samples"]["y"], "y")
        arrays.assert_same(np.concatenate([part[i][1] for part in parts]), whole["samples"]["dx"], "dx")
        arrays.assert_same(parts[1][i][2], whole["channels"]["running_var"], "running_var")


@pytest.mark.parametrize("declared", [False, True], ids=["agreed", "declared"])
def test_operations_together_share_one_message(ranks, declared):
    cut = [5, 27]
    batches = [Batch(seed=1), Batch("float16", seed=2, positions=(3,)), Batch("float64", seed=3, masked=True)]

    def body(comm):
        comm = Counting(comm)
        sizes = cut if declared else None
        lo, hi = batches[0].range(cut, comm.rank)
        with cubn.together(comm):
            started = [
                cubn.forward_train_start(
                    batch.x[lo:hi], batch.state(), mask=batch.part(lo, hi)[3], comm=comm, sizes=sizes
                )
                for batch in batches
            ]
        forward = [one.finish() for one in started]
        with cubn.together(comm):
            started = [
                cubn.backward_start(batch.dy[lo:hi], saved, parameter_gradients="global")
                for batch, (_, saved) in zip(batches, forward, strict=True)
            ]
        blocks = 2 if comm.rank == 0 else 4  # [0, 4), [4, 5); [5, 6), [6, 8), [8, 16), [16, 32)
        assert comm.bytes == [64, blocks * 3 * (16 * C + 8)] * 2
        return [
            (y, grads.dx, grads.dgamma) for (y, _), grads in zip(forward, [s.finish() for s in started], strict=True)
        ]

    parts = ranks(2, body)
    for i, batch in enumerate(batches):
        whole = step(batch, 0, 32, residual=False, relu=False)
        arrays.assert_same(np.concatenate([part[i][0] for part in parts]), whole["samples"]["y"], "y")
        arrays.assert_same(np.concatenate([part[i][1] for part in parts]), whole["samples"]["dx"], "dx")
        arrays.assert_same(parts[0][i][2], whole["parameters"]["dgamma"], "dgamma")


@pytest.mark.parametrize(
    ("cut", "nodes"), [([16, 16], [1, 1]), ([8, 8, 8, 8], [1] * 4), ([20, 12], [2, 2]), ([0, 32], [0, 1])]
)
def test_one_header_and_one_payload_each_way(ranks, cut, nodes):
    batch = Batch()

    def body(comm):
        comm = Counting(comm)
        lo, hi = batch.range(cut, comm.rank)
        _, saved = cubn.forward_train(batch.x[lo:hi], batch.state(), comm=comm)
        cubn.backward(batch.dy[lo:hi], saved)
        return comm.bytes

    assert ranks(len(cut), body) == [[64, n * (16 * C + 8)] * 2 for n in nodes]


def test_frozen_forward_exchanges_nothing_and_its_backward_no_more_than_asked(ranks):
    batch = Batch()

    def body(comm):
        comm = Counting(comm)
        part = slice(0, 16) if comm.rank == 0 else slice(16, 32)
        _, saved = cubn.forward_frozen(batch.x[part], batch.state(), comm=comm)
        assert comm.bytes == []
        cubn.backward(batch.dy[part], saved)
        assert comm.bytes == [64]
        cubn.backward(batch.dy[part], saved, parameter_gradients="global")
        return comm.bytes

    assert ranks(2, body) == [[64, 64, 16 * C + 8]] * 2
