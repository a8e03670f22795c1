"""States, Moments and gradients of arrays on a CUDA device, by a library that has its arrays there: with the CUDA
backend, its kernels compiled for the CPU, and memory that only says it is a device's.
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest

import cubn
from cubn import _arrays
from cubn._arrays import dlpack
from cubn._types import CUDA
from cubn.backends import cuda
from cubn.backends.cuda.backend import CudaBackend
from tests.backends import forget_backends
from tests.cuda_on_cpu.build import unavailable
from tests.cuda_on_cpu.device import CpuDevice

C = 5
X = np.random.default_rng(0).standard_normal((6, C, 7), dtype=np.float32)


class Watched(CpuDevice):
    """Writes down what makes the host wait."""

    def __init__(self):
        super().__init__()
        self.waits = 0

    def to_host(self, array, out=None):
        self.waits += 1
        return super().to_host(array, out)


class Remote(dlpack.Exporter):
    """An array of a library whose arrays are all on the device."""

    shape = property(lambda self: self.buffer.shape)

    def __dlpack_device__(self):
        return CUDA, 0

    def __dlpack__(self, *, stream=None, **options):
        return said_to_be_remote(super().__dlpack__(**options))

    def __array_namespace__(self):
        return SimpleNamespace(from_dlpack=lambda exporter: Remote(exporter.buffer.values, exporter.dtype))

    def __deepcopy__(self, memo):
        return remote(self.buffer.copy())


class Buffer:
    """What CuPy's arrays are to an output."""

    def __init__(self, shape, strides, dtype, index):
        self.values = np.ndarray(shape, dtype, np.empty(max(1, np.prod(shape)) * dtype.itemsize, np.uint8), 0, strides)
        self.data = SimpleNamespace(ptr=self.values.ctypes.data)

    def __dlpack_device__(self):
        return CUDA, 0


def said_to_be_remote(capsule):
    dlpack._open(capsule)[0].device.type = CUDA
    return capsule


def host_copy(pointer, shape, strides, dtype, index):
    interface = {"version": 3, "data": (pointer, True), "shape": shape, "strides": strides, "typestr": dtype.str}
    return np.array(SimpleNamespace(__array_interface__=interface))


def remote(values):
    values = np.array(values)
    return Remote(values, values.dtype.name)


@pytest.fixture
def device(monkeypatch):
    if reason := unavailable():
        pytest.skip(reason)
    device = Watched()
    backend = CudaBackend(device)
    monkeypatch.setattr(cuda, "backend", lambda index, *libraries: backend)
    monkeypatch.setattr(cuda, "new_buffer", Buffer)
    monkeypatch.setattr(cuda, "capsule_of", lambda b, stream=None, **o: said_to_be_remote(b.values.__dlpack__(**o)))
    monkeypatch.setattr(cuda, "host_copy", host_copy)
    forget_backends()
    yield device
    forget_backends()


STATES = {
    "plain": {},
    "cumulative": {"momentum": None, "tracked": 5, "skipped": 2},
    "biased": {"running_variance": "biased", "momentum": 1},
    "broken": {"running_mean": [np.nan, 0, 0, -np.inf, 1], "running_var": [1, 1, np.inf, 1, 1]},
    "broken, cumulative": {"running_mean": [np.nan, 0, 0, 0, 1], "momentum": None, "tracked": 3},
}


def states(running_mean=(0,) * C, running_var=(1,) * C, **options):
    """The same state on the device and on the host."""
    held = {"gamma": range(C), "beta": (0.5,) * C, "running_mean": running_mean, "running_var": running_var}
    return [
        cubn.BatchNormState.from_arrays(
            **{name: place(np.array(values, np.float32)) for name, values in held.items()}, **options, check=False
        )
        for place in (remote, np.array)
    ]


def assert_same_states(there, here):
    np.testing.assert_equal(there.to_dict(), here.to_dict())


@pytest.mark.parametrize("kind", STATES)
def test_recalibrating_there_is_recalibrating_here(device, kind):
    there, here = states(**STATES[kind])
    cubn.recalibrate(there, [remote(X[:5]), remote(X[5:])])
    cubn.recalibrate(here, [X[:5], X[5:]])
    assert_same_states(there, here)
    assert (here.running_mean == cubn.moments(X).mean.astype(np.float32)).all() and (here.tracked == 2).all()


@pytest.mark.parametrize("kind", STATES)
def test_training_there_is_training_here(device, kind):
    there, here = states(**STATES[kind])
    for _ in range(2):
        device.waits = 0
        y, saved = cubn.forward_train(remote(X), there)
        gradients = cubn.backward(y, saved)
        assert not device.waits and there._counters.device is device
        expected, saved = cubn.forward_train(X, here)
        np.testing.assert_array_equal(y.buffer, expected)
        for got, want in zip(gradients, cubn.backward(expected, saved), strict=True):
            assert got is want is None or np.array_equal(got.buffer, want)
        assert_same_states(there, here)
    np.testing.assert_array_equal(there.tracked, here.tracked)
    there.tracked = here.tracked = here.tracked + 3  # counters that are on the device by now
    for copied, state in ((copy.copy(there), copy.copy(here)), (there, here)):
        cubn.update(copied, cubn.moments(remote(2 * X)))
        cubn.update(state, cubn.moments(2 * X))
        assert_same_states(copied, state)
    there.reset()
    here.reset()
    assert_same_states(there, here)


def test_a_repr_waits_for_nothing(device):
    there, _ = states()
    cubn.forward_train(remote(X), there)
    assert "tests float32 on cuda:0" in repr(there) and not device.waits


@pytest.mark.parametrize("bad", [-0.5, np.nan])
def test_what_comes_from_the_host_is_looked_at_before_it_is_on_the_device(device, monkeypatch, bad):
    written = states()[1].to_dict() | {"running_var": np.array([1, 1, bad, 1, 1], np.float32)}
    like = remote(np.zeros(1, np.float32))
    library = _arrays.describe(like, "like").library
    monkeypatch.setattr(type(library), "from_numpy", lambda self, values, dtype, like: remote(values))
    expected = (
        pytest.raises(ValueError, match="channel 2") if bad < 0 else pytest.warns(cubn.StateWarning, match="channel 2")
    )
    with expected:
        cubn.BatchNormState.from_dict(written, like=like)
    state = cubn.BatchNormState.from_dict(written, like=like, check=False)
    assert isinstance(state.running_var, Remote)
    with expected:  # which has to wait all the same
        cubn.fold(state)


def test_gradients_by_given_statistics(device):
    there, here = states(running_mean=range(C))
    got, want = (
        cubn.backward(x, cubn.forward_frozen(x, state)[1], statistics=True)
        for x, state in ((remote(X), there), (X, here))
    )
    np.testing.assert_array_equal(got.dx.buffer, want.dx)
    np.testing.assert_array_equal(got.dmean, want.dmean)
    np.testing.assert_array_equal(got.dvar, want.dvar)
    mask = np.arange(42).reshape(6, 7) % 3 > 0
    given = {"invstd": np.linspace(1, 2, C), "mean": np.arange(C, dtype=np.float64)}
    want = cubn.backward_from(X, X, mask=mask, **given)
    given = {name: remote(values) for name, values in given.items()} | {"mask": remote(mask)}
    got = cubn.backward_from(remote(X), remote(X), count=int(mask.sum()), **given)
    np.testing.assert_array_equal(got.dx.buffer, want.dx)
    with pytest.raises(ValueError, match=r"count must be given together with a mask on a device; got None\. It is how"):
        cubn.backward_from(remote(X), remote(X), **given)
