"""Random cuts over up to 16 ranks, with everything else random too."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import cubn
from cubn.sync import threads
from tests.mpi.parts import LAYOUTS, Batch, assert_one_answer, step


@st.composite
def cuts(draw):
    """Samples of each rank; many empty, or the same power of two."""
    ranks = draw(st.integers(1, 16))
    sizes = st.one_of(st.integers(0, 9), st.sampled_from([0, 1, 2, 4, 8, 16, 31]))
    cut = draw(st.lists(sizes, min_size=ranks, max_size=ranks))
    return cut if sum(cut) > 1 else [*cut[:-1], 2]


@settings(max_examples=60)
@given(
    cut=cuts(),
    positions=st.sampled_from([(), (1,), (7,), (3, 5), (9, 300)]),
    masked=st.booleans(),
    declared=st.booleans(),
    shuffle=st.integers(0, len(LAYOUTS) - 1),
    guess=st.booleans(),
    seed=st.integers(0, 3),
)
def test_any_cut_of_any_batch(cut, positions, masked, declared, shuffle, guess, seed):
    batch = Batch(masked=masked, N=sum(cut), positions=positions, seed=seed)
    if masked:
        batch.mask.flat[:2] = True
    options = {"sizes": cut if declared else None}

    def body(comm):
        if guess:  # what was before misleads about where the samples start
            other = np.roll(cut, 1)
            cubn.moments(np.zeros((other[comm.rank], 2), np.float32), comm=comm)
        layout = LAYOUTS[(comm.rank + shuffle) % len(LAYOUTS)]
        return step(batch, *batch.range(cut, comm.rank), layout, comm=comm, **options)

    assert_one_answer(threads.run(len(cut), body), step(batch, 0, sum(cut)))
