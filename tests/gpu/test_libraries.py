"""One answer, whatever library brings the numbers and wherever they are."""

import numpy as np
import pytest

import cubn
from tests.gpu import device_arrays
from tests.gpu.results import run_everything
from tests.ops import arrays

pytestmark = pytest.mark.gpu

SHAPE = (6, 10, 9, 5)


def stores(dtype):
    rng = np.random.default_rng(0)
    return [arrays.normal(rng, SHAPE, dtype, centre=0.5, wild=0.01) for _ in range(3)]


@pytest.mark.parametrize("dtype", arrays.DTYPES)
@pytest.mark.parametrize("library", device_arrays.LIBRARIES, ids=device_arrays.LIBRARIES.get)
def test_every_library_gives_the_bits_of_numpy(library, dtype):
    given = [device_arrays.carry(store, library) for store in stores(dtype)]
    got = run_everything(*given)
    expected = run_everything(*(arrays.carry(store, "numpy") for store in stores(dtype)))
    for what, array in expected.items():
        arrays.assert_same(device_arrays.store_of(got[what]), arrays.store_of(array), what)
    for what in ("forward, plain", "forward_train, block: dx"):
        assert type(got[what]) is type(given[0]) and got[what].dtype == given[0].dtype


@pytest.mark.parametrize("home", device_arrays.LIBRARIES, ids=device_arrays.LIBRARIES.get)
@pytest.mark.parametrize("library", device_arrays.LIBRARIES, ids=device_arrays.LIBRARIES.get)
def test_a_state_of_any_library_serves_x_of_any_other(library, home):
    store, *_ = stores("float32")
    state = cubn.BatchNormState(SHAPE[1], like=device_arrays.carry(store, home))
    y, _ = cubn.forward_train(device_arrays.carry(store, library), state)
    plain = cubn.BatchNormState(SHAPE[1])
    expected, _ = cubn.forward_train(store, plain)
    assert device_arrays.library_of(y) == library
    assert device_arrays.library_of(state.running_mean) == home
    arrays.assert_same(device_arrays.store_of(y), expected)
    arrays.assert_same(device_arrays.store_of(state.running_mean), plain.running_mean)
    arrays.assert_same(device_arrays.store_of(state.tracked), plain.tracked)


def test_a_state_moves_with_its_module():
    """Buffers that a framework moves to the device take the counters along."""
    import torch

    store, *_ = stores("float32")
    module = torch.nn.BatchNorm2d(SHAPE[1])
    state = cubn.BatchNormState.from_arrays(
        gamma=module.weight, beta=module.bias, running_mean=module.running_mean, running_var=module.running_var
    )
    cubn.forward_train(torch.from_numpy(store), state)
    module.cuda()
    state.gamma, state.beta = module.weight, module.bias
    state.running_mean, state.running_var = module.running_mean, module.running_var
    cubn.forward_train(torch.from_numpy(store).cuda(), state)
    plain = cubn.BatchNormState(SHAPE[1])
    for _ in range(2):
        cubn.forward_train(store, plain)
    arrays.assert_same(device_arrays.store_of(module.running_var), plain.running_var)
    arrays.assert_same(device_arrays.store_of(state.tracked), plain.tracked)


def test_a_state_survives_saving():
    store, *_ = stores("float32")
    x = device_arrays.to_torch(store)
    state = cubn.BatchNormState(SHAPE[1], like=x)
    cubn.forward_train(x, state)
    for again in (state.copy(), cubn.BatchNormState.from_dict(state.to_dict())):
        for name in ("running_mean", "running_var", "tracked", "skipped"):
            arrays.assert_same(
                device_arrays.store_of(getattr(again, name)), device_arrays.store_of(getattr(state, name)), name
            )
