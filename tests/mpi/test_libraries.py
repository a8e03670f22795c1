"""Ranks may hold their samples in arrays of different libraries."""

import numpy as np
import pytest

import cubn
from cubn.sync import threads
from tests import oracle
from tests.mpi.parts import Batch, C
from tests.ops import arrays


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_answer_from_ranks_of_every_library(dtype):
    batch, cut = Batch(dtype), [5, 20, 7]

    def body(comm):
        library = arrays.LIBRARIES[comm.rank]
        lo, hi = batch.range(cut, comm.rank)
        x, dy = (arrays.carry(store[lo:hi].copy(), library) for store in (batch.x, batch.dy))
        state = cubn.BatchNormState(C, like=x)
        y, saved = cubn.forward_train(x, state, comm=comm)
        grads = cubn.backward(dy, saved, parameter_gradients="global")
        assert {arrays.library_of(a) for a in (y, grads.dx, grads.dgamma, state.running_var)} == {library}
        return [arrays.store_of(a) for a in (y, grads.dx, grads.dgamma, grads.dbeta, state.running_mean)]

    ncs = oracle.as_ncs(batch.x)
    stats = oracle.batch_statistics(ncs, 1e-5)
    expected = oracle.backward(oracle.as_ncs(batch.dy), ncs, stats)
    zeros = np.zeros(C, np.float32)
    after = oracle.update(oracle.State(zeros, zeros + 1, zeros.astype(int), zeros.astype(int)), stats, 0.1)
    ranks = threads.run(3, body)
    y, dx = (oracle.as_ncs(np.concatenate([rank[i] for rank in ranks])) for i in (0, 1))
    arrays.assert_same(y, oracle.normalize(ncs, stats), "y")
    arrays.assert_same(dx, expected.dx, "dx")
    for rank in ranks:
        for got, one in zip(rank[2:], (expected.dgamma, expected.dbeta, after.mean), strict=True):
            arrays.assert_same(got, one)
