"""Work goes to the caller's current stream and the host waits for nothing."""

import numpy as np
import pytest

import cubn
from tests.gpu import device_arrays, queues
from tests.gpu.results import run_everything
from tests.ops import arrays

pytestmark = pytest.mark.gpu

cupy = pytest.importorskip("cupy")

SHAPES = {
    "resident": (8, 16, 28, 28),
    "two passes": (300, 2, 112, 112),
    "resident, channels": (64, 96),
    "channels": (70001, 8),
}


@pytest.mark.parametrize("name", SHAPES)
def test_work_follows_what_is_on_the_stream(library, name):
    """x, dy and residual hold their values only once a busy side stream has come that far."""
    stores = [arrays.normal(np.random.default_rng(seed), SHAPES[name], "float32") for seed in range(3)]
    sources = [library.carry(store) for store in stores]
    given = [library.zeros_like(source) for source in sources]
    run_everything(*given)  # compiles
    cupy.cuda.runtime.deviceSynchronize()
    with library.current():
        library.busy()
        for to, source in zip(given, sources, strict=True):
            library.copy(to, source)
        got = run_everything(*given)
    library.stream.synchronize()
    expected = run_everything(*(arrays.carry(store, "numpy") for store in stores))
    for what, array in expected.items():
        arrays.assert_same(device_arrays.store_of(got[what]), arrays.store_of(array), what)


def train(x, dy, state):
    """A step without anything that must wait."""
    y, saved = cubn.forward_train(x, state, residual=dy, relu=True)
    grads = cubn.backward(dy, saved)
    return y, grads, cubn.forward(x, state), cubn.forward_frozen(x, state)


@pytest.mark.parametrize("name", SHAPES)
def test_the_host_does_not_wait(library, name):
    """All calls of a step have returned before the stream has finished what came before them."""
    x, dy = (library.carry(arrays.normal(np.random.default_rng(s), SHAPES[name], "bfloat16")) for s in range(2))
    state = cubn.BatchNormState(x.shape[1], like=x)
    with library.current():
        for _ in range(2):
            train(x, dy, state)
        library.stream.synchronize()
        is_done = library.busy()
        train(x, dy, state)
        assert not is_done()
    library.stream.synchronize()


def test_jax_waits_for_what_cubn_did():
    """Whatever stream is CuPy's current one: cubn works on JAX arrays on the legacy default stream, here a busy one."""
    store = arrays.normal(np.random.default_rng(0), SHAPES["resident"], "float32")
    x = device_arrays.to_jax(store)
    state = cubn.BatchNormState(store.shape[1], like=x)
    expected = cubn.forward(store, cubn.BatchNormState(store.shape[1]))
    for _ in range(2):  # the first compiles
        with cupy.cuda.Stream.null:
            queues.keep_busy()
        with cupy.cuda.Stream(non_blocking=True):
            y = cubn.forward(x, state)
        arrays.assert_same(np.asarray(y), expected)


@pytest.mark.parametrize("name", SHAPES)
def test_torch_sees_no_synchronisation(name):
    torch = queues.Torch().torch
    x, dy = (device_arrays.to_torch(arrays.normal(np.random.default_rng(s), SHAPES[name])) for s in range(2))
    state = cubn.BatchNormState(x.shape[1], like=x)
    train(x, dy, state)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(x, dy, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
