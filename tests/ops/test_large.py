"""Arrays and strides that need 64-bit indices."""

import os

import numpy as np
import pytest

import cubn
from cubn import reference
from tests import oracle
from tests.ops import arrays

EPS = 1e-5
GIB = 2**30


def needs_memory(gib):
    """Skip, by name, where there is not that much memory free."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    if free < gib:
        pytest.skip(f"needs {gib} GiB of memory; {free:.1f} GiB are free")


def tiled(node, S):
    """Nodes of the tiles of S positions that repeat one tile; node(part) gives that of a part of the tile."""
    tiles, rest = divmod(S, 2048)
    whole, last = node(slice(0, 2048)), node(slice(0, rest))
    return tuple(
        np.append(np.repeat(a[..., None], tiles, -1), b[..., None], -1) for a, b in zip(whole, last, strict=True)
    )


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(backend):
    """Two channels of 2**30 + 5 positions, every tile alike: the oracle needs one tile, and the tree above it."""
    needs_memory(10)
    S = 2**30 + 5
    rng = np.random.default_rng(0)
    tile, beta = arrays.normal(rng, (1, 2, 2048), "float16"), arrays.normal(rng, 2)
    x = np.empty((1, 2, S), np.float16)
    x[..., : 2**30].reshape(1, 2, -1, 2048)[...] = tile[:, :, None]
    x[..., 2**30 :] = tile[..., :5]
    state = cubn.BatchNormState.from_arrays(beta=beta, running_mean=np.zeros(2), running_var=np.ones(2), eps=EPS)
    y, saved = cubn.forward_train(x, state, relu=True)

    count, mean, m2 = oracle.tree(
        tiled(lambda part: tuple(np.squeeze(a, 0) for a in oracle.sample_moments(tile[..., part])), S), reference.merge
    )
    stats = oracle.statistics((count, mean, m2), EPS)
    assert int(saved.count) == S
    arrays.assert_same(saved.mean, stats.mean, "mean")
    arrays.assert_same(saved.invstd, stats.invstd, "invstd")
    expected = oracle.normalize(tile, stats, beta=beta, relu=True)
    assert_tiles(y, expected, "y")

    dy = y  # 4 GiB saved: dy is y, and dx goes where it was
    gated = reference.behind_relu(oracle.widen(expected), oracle.widen(expected))
    terms = gated, gated * reference.centre(oracle.widen(tile), stats.mean)
    _, *sums = oracle.tree(
        tiled(lambda part: tuple(np.squeeze(a, 0) for a in oracle.sample_sums(*(t[..., part] for t in terms))), S),
        reference.add,
    )
    ones = np.ones(2, np.float32)
    dx = reference.input_gradient(gated, oracle.widen(tile), stats.mean, stats.invstd, ones, stats.count, *sums)
    grads = cubn.backward(dy, saved, out=dy)
    arrays.assert_same(grads.dbeta, sums[0].astype(np.float32), "dbeta")
    assert_tiles(grads.dx, oracle.narrow(dx, np.float16), "dx")


def assert_tiles(got, tile, what):
    """Every tile of got is this one."""
    whole = got[..., : 2**30].reshape(2, -1, 2048)
    for lo in range(0, whole.shape[1], 2**14):
        assert (whole[:, lo : lo + 2**14] == tile[0][:, None]).all(), f"{what}: tile {lo} or a later one"
    arrays.assert_same(got[..., 2**30 :], tile[..., :5], what)


@pytest.mark.parametrize("axis", ["samples", "channels", "positions"])
def test_strides_beyond_two_to_the_31(backend, axis):
    """A view whose elements lie gigabytes apart; of the memory between them nothing is ever touched."""
    rng = np.random.default_rng(0)
    store = arrays.normal(rng, (2, 2, 3), "float16")
    far = {"samples": (2**31 + 7, 40, 2), "channels": (40, 2**31 + 7, 2), "positions": (40, 20, 2**30 + 7)}[axis]
    try:
        memory = np.zeros(2**31 + 200, np.float16)
    except MemoryError:
        pytest.skip("4 GiB of address space cannot be had")
    x = np.lib.stride_tricks.as_strided(memory, store.shape, [2 * step for step in far])
    x[...] = store
    state = cubn.BatchNormState(2, eps=EPS)
    stats = oracle.batch_statistics(store, EPS)
    y, saved = cubn.forward_train(x, state)
    arrays.assert_same(y, oracle.normalize(store, stats), "y")
    arrays.assert_same(cubn.backward(x, saved).dx, oracle.backward(store, store, stats).dx, "dx")
    assert cubn.forward_train(x, state, out=x)[0] is x
    arrays.assert_same(x, oracle.normalize(store, stats), "y in place")
