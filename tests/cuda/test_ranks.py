"""Ranks whose arrays are on CUDA devices: nodes travel through host memory, and there is one answer."""

import pytest

from cubn.sync import threads
from tests.mpi.parts import Batch, assert_one_answer, step


@pytest.mark.parametrize("cut", [[16, 16], [20, 0, 12], [7, 9, 3, 13]], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("backend", ["cuda-on-cpu"], indirect=True)
def test_any_cut(backend, cut, masked):
    batch = Batch(masked=masked)
    ranks = threads.run(len(cut), lambda comm: step(batch, *batch.range(cut, comm.rank), comm=comm))
    assert_one_answer(ranks, step(batch, 0, sum(cut)))
