"""Every operation on the device: the bodies of tests/ops, and the CPU backend's bits for shapes of every kind."""

import numpy as np
import pytest

import cubn
from tests.gpu import device_arrays
from tests.gpu.results import run_everything
from tests.ops import arrays, cases
from tests.ops.pairwise import every_pair

pytestmark = pytest.mark.gpu

ROWS = every_pair(cases.AXES, cases.allowed, seed=6)

SHAPES = {
    "resident, a block": (8, 64, 14, 14),
    "resident, a cluster": (32, 16, 56, 56),
    "two passes": (160, 4, 112, 112),
    "a few channels": (20, 3, 224, 224),
    "one channel": (3, 1, 300, 301),
    "odd channels": (6, 65, 7, 7),
    "odd positions": (5, 17, 23, 23),
    "short rows": (33, 320, 3, 3),
    "one sample": (1, 160, 33, 65),
    "2-d": (4096, 1024),
    "2-d, two passes": (70001, 64),
    "2-d, a few values": (128, 512),
    "2-d, long and narrow": (100003, 3),
    "2-d, short and wide": (2, 70001),
    "3-d": (2, 32, 32, 32, 32),
    "many samples": (70001, 2, 3),
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_every_pair_of_options_gives_the_oracle_s_bits(row, on_device):
    cases.run(row)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", arrays.DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_the_bits_of_the_cpu(name, dtype, channels_last):
    shape = SHAPES[name]
    rng = np.random.default_rng(len(name))
    stores = [arrays.normal(rng, shape, dtype, centre=0.5, scale=2) for _ in range(3)]
    if channels_last:
        stores = [arrays.in_memory(store, "channels_last", 1) for store in stores]
    got = run_everything(*(device_arrays.to_torch(store) for store in stores))
    expected = run_everything(*(arrays.carry(store, "torch") for store in stores))
    for what, array in expected.items():
        arrays.assert_same(device_arrays.store_of(got[what]), arrays.store_of(array), what)


@pytest.mark.parametrize("offset", range(1, 8))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_any_alignment_gives_the_bits_of_the_host(dtype, offset):
    """Views that begin at every element within 16 bytes."""
    rng = np.random.default_rng(offset)
    shape = (5, 24, 7, 8)
    stores = [arrays.normal(rng, shape, dtype) for _ in range(3)]

    def shifted(store):
        memory = np.zeros(store.size + offset, store.dtype)
        memory[offset:] = store.ravel()
        return device_arrays.to_cupy(memory)[offset:].reshape(shape)

    got = run_everything(*map(shifted, stores))
    expected = run_everything(*(arrays.carry(store, "numpy") for store in stores))
    for what, array in expected.items():
        arrays.assert_same(device_arrays.store_of(got[what]), arrays.store_of(array), what)


def test_a_mask_is_never_looked_at_by_the_host():
    """A channel with too few values is skipped and counted, where the CPU raises."""
    x = device_arrays.to_torch(np.ones((2, 3, 4), np.float32))
    state = cubn.BatchNormState(3, like=x)
    cubn.forward_train(x, state, mask=device_arrays.to_torch(np.zeros((2, 4), bool)))
    assert device_arrays.store_of(state.skipped).tolist() == [1, 1, 1]
    assert device_arrays.store_of(state.running_mean).tolist() == [0, 0, 0]
