"""Second derivatives over ranks: one answer for any cut. Runs under plain pytest, and in processes under mpiexec."""

import itertools

import numpy as np
import pytest

import cubn
from tests import oracle
from tests.mpi.parts import CUTS, LAYOUTS, Batch, C
from tests.ops import arrays

FIRST = Batch(masked=True)
SECOND = Batch(masked=True, seed=1)  # whose values are the gradients by what a backward of the first returned
FLAT = Batch(masked=False)


def second_derivatives(lo, hi, ddgamma, ddbeta, layout="nchw", *, batch=FIRST, frozen=False, whose="local", **comm):
    """Of samples [lo, hi), as stores in the order (N, C, ...)."""
    x, dy, residual, mask, axis = batch.part(lo, hi, layout)
    _, ddx, ddresidual, _, _ = SECOND.part(lo, hi, layout)
    forward = cubn.forward_frozen if frozen else cubn.forward_train
    _, saved = forward(x, batch.state(axis), mask=mask, residual=residual, relu=True, **comm)
    options = {"ddresidual": ddresidual, "parameter_gradients": whose}
    ddy, dx, dgamma = cubn.double_backward(ddx, ddgamma, ddbeta, dy, saved, **options)
    return *(np.moveaxis(array, axis, 1) for array in (ddy, dx)), dgamma


@pytest.mark.parametrize("frozen", [False, True], ids=["train", "frozen"])
@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_the_cut_does_not_matter_where_ddgamma_is_the_same(ranks, cut, declared, frozen):
    given = {"frozen": frozen, "whose": "global"}

    def body(comm):
        lo, hi = FIRST.range(cut, comm.rank)
        sizes = {"sizes": cut} if declared else {}
        layout = LAYOUTS[comm.rank % len(LAYOUTS)]
        return second_derivatives(lo, hi, SECOND.gamma, SECOND.beta, layout, comm=comm, **sizes, **given)

    ddy, dx, dgamma = second_derivatives(0, 32, SECOND.gamma, SECOND.beta, **given)
    found = ranks(len(cut), body)
    arrays.assert_same(np.concatenate([part[0] for part in found]), ddy, "ddy")
    arrays.assert_same(np.concatenate([part[1] for part in found]), dx, "dx")
    for part in found:
        arrays.assert_same(part[2], dgamma, "dgamma")


@pytest.mark.parametrize("frozen", [False, True], ids=["train", "frozen"])
def test_shares_of_dgamma_add_up(ranks, frozen):
    cut = [5, 0, 13, 14]

    def body(comm):
        lo, hi = FIRST.range(cut, comm.rank)
        return second_derivatives(lo, hi, SECOND.gamma, None, frozen=frozen, comm=comm)[2].astype(np.float64)

    whole = second_derivatives(0, 32, SECOND.gamma, None, frozen=frozen)[2]
    shares = ranks(4, body)
    assert not shares[1].any()
    np.testing.assert_allclose(sum(shares), whole, rtol=1e-5, atol=1e-5 * abs(whole).max())


@pytest.mark.parametrize("frozen", [False, True], ids=["train", "frozen"])
def test_every_rank_may_have_a_ddgamma_of_its_own(ranks, frozen):
    """The scalar is a sum over ranks, which moves with dy and x as the gradients say."""
    cut, step, batch = [3, 9, 4], 1e-5, Batch("float64", N=16)
    edges = list(itertools.pairwise(np.cumsum([0, *cut])))
    u, w = np.random.default_rng(5).standard_normal((2, 3, C))
    towards = np.random.default_rng(6).standard_normal((2, *batch.x.shape))
    ddx = np.random.default_rng(7).standard_normal(batch.x.shape)

    given = {"gamma": batch.gamma, "beta": batch.beta, "running_mean": np.ones(C), "running_var": np.ones(C)}

    def state():
        return cubn.BatchNormState.from_arrays(**{name: array.astype(np.float64) for name, array in given.items()})

    def body(comm):
        part, forward = slice(*edges[comm.rank]), cubn.forward_frozen if frozen else cubn.forward_train
        _, saved = forward(batch.x[part], state(), comm=comm)
        found = cubn.double_backward(ddx[part], u[comm.rank], w[comm.rank], batch.dy[part], saved)
        scalars = []
        for move in (step, -step):
            of_dy, of_x = (move * way[part] for way in towards)
            _, saved = forward(batch.x[part] + of_x, state(), comm=comm)
            by = cubn.backward(batch.dy[part] + of_dy, saved)
            scalars.append((ddx[part] * by.dx).sum() + u[comm.rank] @ by.dgamma + w[comm.rank] @ by.dbeta)
        slope = (scalars[0] - scalars[1]) / (2 * step)
        return slope, sum((way[part] * gradient).sum() for way, gradient in zip(towards, found[:2], strict=True))

    slopes, wanted = zip(*ranks(3, body), strict=True)
    assert sum(wanted) == pytest.approx(sum(slopes), rel=1e-5)
    assert abs(sum(wanted)) > 1


def test_local_shares_are_of_the_rank_s_own_sums(ranks):
    """Over the blocks of the whole batch's order: the oracle takes them with the rank's first index."""
    batch, cut = FLAT, [5, 13, 14]
    arguments = oracle.as_ncs(batch.x), oracle.as_ncs(batch.dy), oracle.as_ncs(SECOND.dy)

    def body(comm):
        part = slice(*batch.range(cut, comm.rank))
        _, saved = cubn.forward_frozen(batch.x[part], batch.state(), comm=comm)
        return cubn.double_backward(SECOND.dy[part], None, None, batch.dy[part], saved).dgamma

    stats = oracle.frozen_statistics(np.zeros(C, np.float32), np.ones(C, np.float32), 1e-5)
    for rank, dgamma in enumerate(ranks(3, body)):
        lo, hi = batch.range(cut, rank)
        x, dy, ddx = (a[lo:hi] for a in arguments)
        zeros = np.zeros(C)
        wanted = oracle.double_backward(ddx, zeros, zeros, dy, x, stats, batch.gamma, frozen=True, start=lo).dgamma
        arrays.assert_same(dgamma, wanted, "dgamma")


def test_among_operations_that_are_together(ranks):
    """It has an exchange of its own, before theirs."""
    cut = [20, 12]

    def body(comm):
        part = slice(*FLAT.range(cut, comm.rank))
        x, dy = FLAT.x[part], FLAT.dy[part]
        _, saved = cubn.forward_train(x, FLAT.state(), comm=comm)
        with cubn.together(comm):
            started = cubn.backward_start(dy, saved)
            inside = cubn.double_backward(x, None, None, dy, saved)
        alone = cubn.double_backward(x, None, None, dy, saved)
        for one, other in zip(inside, alone, strict=True):
            arrays.assert_same(one, other)
        return started.finish().dx, cubn.backward(dy, saved).dx

    for one, other in ranks(2, body):
        arrays.assert_same(one, other)
