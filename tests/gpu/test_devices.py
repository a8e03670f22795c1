"""Several devices in one process, and what is refused or fails: the state is as it was."""

from dataclasses import replace

import numpy as np
import pytest

import cubn
from tests.backends import forget_backends
from tests.gpu import device_arrays, digests
from tests.gpu.results import run_everything
from tests.ops import arrays

pytestmark = pytest.mark.gpu

cupy = pytest.importorskip("cupy")
torch = pytest.importorskip("torch")

SHAPE = (4, 6, 5, 7)


def stores():
    return [arrays.normal(np.random.default_rng(seed), SHAPE) for seed in range(3)]


def unchanged(state):
    """Whether a fresh state still is one."""
    held = {name: device_arrays.store_of(getattr(state, name)) for name in ("running_mean", "running_var", "tracked")}
    return not held["running_mean"].any() and (held["running_var"] == 1).all() and not held["tracked"].any()


@pytest.mark.usefixtures("torch_device")
def test_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    given = [device_arrays.to_torch(store).to("cuda:1") for store in stores()]
    assert torch.cuda.current_device() == 0
    got = run_everything(*given)
    assert torch.cuda.current_device() == 0 and cupy.cuda.runtime.getDevice() == 0
    for what, array in run_everything(*stores()).items():
        arrays.assert_same(device_arrays.store_of(got[what]), array, what)
    state = cubn.BatchNormState(SHAPE[1], like=given[0])
    with pytest.raises(ValueError, match=r"^forward_train: .* must be on x's device"):
        cubn.forward_train(given[0].to("cuda:0"), state)
    assert unchanged(state)


def test_a_state_on_the_host():
    x = device_arrays.to_torch(stores()[0])
    state = cubn.BatchNormState(SHAPE[1])
    with pytest.raises(ValueError, match=r"^forward_train: "):
        cubn.forward_train(x, state)
    assert unchanged(state)


def test_a_residual_on_the_host():
    x = device_arrays.to_torch(stores()[0])
    state = cubn.BatchNormState(SHAPE[1], like=x)
    with pytest.raises(ValueError, match=r"^forward_train: residual must "):
        cubn.forward_train(x, state, residual=torch.from_numpy(stores()[1]))
    assert unchanged(state)


@pytest.fixture
def other_limits(monkeypatch):
    """A function that gives the device other limits."""
    from cubn.backends import cuda
    from cubn.backends.cuda import cupy_device

    def change(**limits):
        changed = replace(cupy_device.limits_of(0), **limits)
        monkeypatch.setattr(cupy_device, "limits_of", lambda index: changed)
        cuda.backend.cache_clear()
        forget_backends()

    yield change
    cuda.backend.cache_clear()
    forget_backends()


@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_a_device_that_holds_smaller_clusters_gives_the_same_bits(cluster, other_limits):
    """As a part of one does (MIG)."""
    other_limits(cluster=cluster)
    for case in digests.CLUSTERS:
        assert digests.computed(case, device_arrays.to_cupy, device_arrays.store_of) == digests.expected(case)


def test_no_memory_for_the_result():
    x = device_arrays.to_torch(stores()[0])
    state = cubn.BatchNormState(SHAPE[1], like=x)
    cubn.forward_train(x, cubn.BatchNormState(SHAPE[1], like=x))  # compiles
    torch.cuda.empty_cache()
    large = torch.empty(1 << 20, device="cuda").expand(64, SHAPE[1], -1)  # its result is larger than the memory left
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            cubn.forward_train(large, state)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert unchanged(state)
    cubn.forward_train(x, state)


def test_no_memory_in_the_middle_of_a_call():
    """y is there, and what the kernels need besides is not."""
    x = device_arrays.to_cupy(stores()[0])
    y = cupy.empty_like(x)
    state = cubn.BatchNormState(SHAPE[1], like=x)
    cubn.forward_train(x, cubn.BatchNormState(SHAPE[1], like=x))  # compiles
    cupy.cuda.runtime.deviceSynchronize()
    pool = cupy.cuda.MemoryPool()
    pool.set_limit(512)  # one small array
    with cupy.cuda.using_allocator(pool.malloc), pytest.raises(MemoryError):
        cubn.forward_train(x, state, out=y)
    assert unchanged(state)
    cubn.forward_train(x, state, out=y)
