"""Data sets, and what a recalibration over them must give."""

from itertools import pairwise

import numpy as np

import cubn


def data(N, positions, dtype, channels=4, seed=0):
    rng = np.random.default_rng(seed)
    scale = np.arange(1.0, channels + 1).reshape(-1, *(1 for _ in positions))
    return (rng.normal(3, 2, (N, channels, *positions)) * scale).astype(dtype)


def state_of(x):
    return cubn.BatchNormState(x.shape[1], dtype="float64" if x.dtype == np.float64 else "float32")


def assert_same_statistics(state, pooled, x):
    """Those of the whole set, to the bit."""
    whole = cubn.moments(x)
    assert pooled.count == whole.count
    assert (pooled.mean == whole.mean).all() and (pooled.m2 == whole.m2).all()
    assert (state.running_mean == whole.mean.astype(state.running_mean.dtype)).all()
    assert (state.running_var == whole.var_unbiased().astype(state.running_var.dtype)).all()


def cut_at_random(rng, N, parts):
    """Ranges, many of them empty."""
    return [*pairwise([0, *sorted(rng.integers(0, N + 1, parts - 1).tolist()), N])]


def rank_by_rank(ranks, seed, run):
    """A data set cut at random over ranks, and there into batches."""
    rng = np.random.default_rng(seed)
    N = int(rng.integers(2, 70))
    x = data(N, (3,), "float32", seed=seed)
    cut = cut_at_random(rng, N, ranks)
    inner = [cut_at_random(rng, hi - lo, int(rng.integers(1, 5))) for lo, hi in cut]

    def body(comm):
        state, (first, last) = state_of(x), cut[comm.rank]
        batches = [x[first:last][lo:hi] for lo, hi in inner[comm.rank]]
        return state, cubn.recalibrate(state, batches, comm=comm, start=first)

    for state, pooled in run(ranks, body):
        assert_same_statistics(state, pooled, x)
        assert (state.tracked == sum(map(len, inner))).all()
