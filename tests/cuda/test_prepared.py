"""Prepared calls: they serve whatever arrays have the layouts they were prepared for, and those kept are bounded."""

import numpy as np
import pytest

from cubn._types import Affine, Extents, GradientOptions, NormalizeOptions, Operand, Operands, Running, Vector
from cubn.backends.cuda.backend import CudaBackend
from tests import oracle
from tests.cuda import calls
from tests.cuda.named import PASSES, RESIDENT
from tests.cuda.specialisations import ADDRESS, Recorder
from tests.cuda_on_cpu.build import unavailable
from tests.cuda_on_cpu.device import CpuDevice
from tests.ops.arrays import assert_same

on_cpu = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "")

SHAPE = N, C, S = 3, 8, 49
EXTENTS = Extents(*SHAPE)
PLAIN = NormalizeOptions(False, False)
LIMITS = pytest.mark.parametrize("limits", [RESIDENT, PASSES], ids=["resident", "passes"])


def operand(values):
    """Dense, (N, C, S)."""
    return Operand(values.ctypes.data, "float32", C * S, S, (S,), (1,))


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def vector(values, stride=1):
    return Vector(values.ctypes.data, str(values.dtype), stride)


@on_cpu
@LIMITS
def test_other_arrays_numbers_and_memory(limits):
    backend = CudaBackend(CpuDevice(limits))
    x, y, gamma = normal(4, *SHAPE), np.zeros((4, *SHAPE), np.float32), normal(4, C)
    mean, var, dy = normal(4, C), np.abs(normal(4, C)), normal(4, *SHAPE)[::-1].copy()
    arrays = Operands(operand(x[0]), None, operand(y[0]))
    affine, running = Affine(vector(gamma[0]), None), Running(vector(mean[0]), vector(var[0]))
    forward = backend.prepare_forward(EXTENTS, arrays, affine, running, PLAIN)
    train = backend.prepare_train(EXTENTS, arrays, affine, running, True, PLAIN)
    backward = None
    for i, (eps, momentum) in enumerate([(1e-5, 0.1), (1e-3, None), (0.5, 1.0), (1e-5, 0.0)]):
        at = [values[i].ctypes.data for values in (x, y, gamma, mean, var)]
        forward(at[0], 0, at[1], 0, at[2], 0, at[3], at[4], eps)
        frozen = oracle.frozen_statistics(mean[i], var[i], eps)
        assert_same(y[i], oracle.normalize(x[i], frozen, gamma[i], None), "y of forward")

        before = oracle.State(mean[i].copy(), var[i].copy(), np.full(C, 3), np.full(C, 1))
        tracked, skipped, new_mean, new_var = (
            np.full(C, 3),
            np.full(C, 1),
            np.empty(C, np.float32),
            np.empty(C, np.float32),
        )
        new = [values.ctypes.data for values in (new_mean, new_var, tracked, skipped)]
        statistics, relu_mask = train(at[0], 0, at[1], 0, at[2], 0, eps, at[3], at[4], *new, momentum)
        expected = oracle.batch_statistics(x[i], eps)
        after = oracle.update(before, expected, momentum, biased=True)
        assert relu_mask is None
        assert_same(y[i], oracle.normalize(x[i], expected, gamma[i], None), "y")
        for name in ("count", "mean", "m2", "var", "invstd"):
            assert_same(getattr(statistics, name), np.asarray(getattr(expected, name)), name)
        assert_same(new_mean, after.mean, "running mean")
        assert_same(new_var, after.var, "running var")
        assert_same(tracked, after.tracked, "tracked")

        dx, dgamma, dbeta = np.zeros(SHAPE, np.float32), *np.zeros((2, C), np.float32)
        if backward is None:
            reads = Operands(operand(x[i]), operand(dy[i]), operand(dx))
            gradients = (vector(dgamma), vector(dbeta))
            options = GradientOptions("none", False, False)
            backward = backend.prepare_backward(EXTENTS, reads, statistics, None, gradients, options)
        gamma_then, gamma[i] = gamma[i].copy(), 0  # the copy counts
        to = [values.ctypes.data for values in (dx, dgamma, dbeta)]
        backward(at[0], dy[i].ctypes.data, to[0], 0, 0, statistics, None, *to[1:])
        wanted = oracle.backward(dy[i], x[i], expected, gamma_then, None)
        assert_same(dx, wanted.dx, "dx")
        assert_same(dgamma, wanted.dgamma, "dgamma")
        assert_same(dbeta, wanted.dbeta, "dbeta")


@on_cpu
@pytest.mark.parametrize("extents", [(0, 3, 4), (2, 3, 0)], ids=str)
def test_empty_batches(extents):
    """Statistics of no values; running statistics that stay, of which one batch more is counted; sums of 0."""
    backend = CudaBackend(CpuDevice(RESIDENT))
    nothing, (tracked, skipped) = np.zeros(3, np.float32), np.zeros((2, 3), np.int64)
    o = Operand(0, "float32", 3 * extents[2], extents[2], (extents[2],), (1,))
    one, affine = vector(nothing), Affine(None, None)
    counters = [tracked.ctypes.data, skipped.ctypes.data]
    options = NormalizeOptions(True, True, True)
    given = (backend, Extents(*extents), Operands(o, o, o))
    calls.forward(*given, affine, Running(one, one), NormalizeOptions(True, True))
    statistics, relu_mask = calls.train(*given, affine, options, Running(one, one), counters)
    assert relu_mask is None and statistics.count == 0
    assert not statistics.mean.any() and not statistics.m2.any() and not nothing.any()
    assert (tracked.tolist(), skipped.tolist()) == ([1] * 3, [1] * 3)
    dgamma, dbeta = np.ones((2, 3), np.float32)
    gradient = GradientOptions("mask", False, True)
    operands = Operands(o, o, o, o)
    sums = calls.backward(backend, given[1], operands, statistics, None, gradient, (vector(dgamma), vector(dbeta)))
    assert not np.any(sums) and not dbeta.any()
    backend.backward_apply(given[1], operands, statistics, None, sums, gradient)
    assert not np.any(backend.root_sums(backend.backward_sums(given[1], operands, statistics, None, gradient, 5)))
    assert not any(part.any() for part in backend.root(backend.moments(given[1], Operands(o), 5)))


def at(pointer):
    """An operand there."""
    return Operands(
        Operand(pointer, "float32", C * S, S, (S,), (1,)), None, Operand(ADDRESS, "float32", C * S, S, (S,), (1,))
    )


def test_what_is_prepared_serves_all_addresses_of_an_alignment():
    backend = CudaBackend(Recorder(RESIDENT))

    def prepared(pointer):
        return backend.prepare_train(EXTENTS, at(pointer), Affine(None, None), None, False, PLAIN)

    assert prepared(64) is prepared(1 << 40) is prepared(112)
    assert len({prepared(64), prepared(68), prepared(72)}) == 3


class FailingDevice(Recorder):
    """Refuses the launch of one kernel."""

    def __init__(self, kernel):
        super().__init__(PASSES)
        self.kernel = kernel

    def launch(self, launch, parameters, stream):
        if launch.kernel == self.kernel:
            raise RuntimeError(self.kernel)
        super().launch(launch, parameters, stream)


@pytest.mark.parametrize("kernel", ["reduce_rows", "finish", "apply_rows"])
def test_no_running_statistics_move_unless_all_before_was_launched(kernel):
    device = FailingDevice(kernel)
    ones = Vector(ADDRESS, "float32", 1)
    with pytest.raises(RuntimeError, match=kernel):
        calls.train(CudaBackend(device), EXTENTS, at(0), Affine(None, None), PLAIN, Running(ones, ones), (1, 2))
    assert "update" not in [launch.kernel for launch in device.launched]


def test_any_number_of_shapes_keeps_no_more_than_some(monkeypatch):
    monkeypatch.setitem(CudaBackend.__init__.__globals__, "MOST", 8)
    backend = CudaBackend(Recorder(RESIDENT))
    affine = Affine(None, None)
    ones = Vector(ADDRESS, "float32", 1)
    for n in range(1, 40):
        extents, o = Extents(n, 1, 1), Operand(ADDRESS, "float32", 1, 1, (), ())
        calls.forward(backend, extents, Operands(o, y=o), affine, Running(ones, ones), PLAIN)
        statistics, _ = calls.train(backend, extents, Operands(o, y=o), affine, PLAIN)
        given = (extents, Operands(o, o, o), statistics, None, GradientOptions("none", False, False))
        sums = calls.backward(backend, *given)
        backend.normalize(extents, Operands(o, y=o), statistics, affine, PLAIN)
        backend.backward_apply(*given[:4], sums, given[4])
        backend.root_sums(backend.backward_sums(*given, n))
    kept = [cache.cache_info() for cache in vars(backend).values() if hasattr(cache, "cache_info")]
    assert max(info.currsize for info in kept) == 8 and {info.maxsize for info in kept} == {8}
