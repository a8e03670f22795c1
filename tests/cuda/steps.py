"""A training step and its gradient by resident kernels, over arrays of their own: what differs from the oracle."""

from typing import NamedTuple

import numpy as np

from cubn import reference
from cubn._types import Affine, Extents, GradientOptions, NormalizeOptions, Operand, Operands, Running, Vector
from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.plan import Limits
from tests import oracle
from tests.cuda import calls
from tests.cuda_on_cpu.device import CpuDevice
from tests.cuda_on_cpu.runner import Order

EPS, MOMENTUM = calls.EPS, 0.3
OUTSIDE = 0x5A
DTYPES = ("float16", "bfloat16", "float32", "float64")


class Case(NamedTuple):
    """A training step and its gradient, on a device that has so much shared memory for a block."""

    extents: tuple[int, int, int]
    dtype: str = "float32"
    kilobytes: int = 48
    residual: bool = False
    relu: bool = False
    frozen: bool = False
    offsets: tuple[int, int, int, int] = (0, 0, 0, 0)  # of x, residual, dy and outputs; see `placed`
    gap: int = 0  # elements between channels, or between positions where channels are last
    channels_last: bool = False
    in_place: bool = False
    order: int = Order.ASCENDING
    multiprocessors: int = 1
    l2_bytes: int = 0


def random(rng, case):
    values = (rng.standard_normal(case.extents) * 2 + 0.5).astype(np.float32)
    return oracle.narrow(values, np.uint16) if case.dtype == "bfloat16" else values.astype(case.dtype)


def placed(values, offset, case):
    """A copy in memory of its own, `offset` elements past a multiple of 16 bytes."""
    N, C, S = values.shape
    inner, outer = (C, S) if case.channels_last else (S, C)
    row = inner + case.gap
    before = offset * values.itemsize % 16
    memory = np.full(before + (N * outer * row - case.gap) * values.itemsize, OUTSIDE, np.uint8)
    assert memory.ctypes.data % 16 == 0
    steps = (outer * row, 1, row) if case.channels_last else (outer * row, row, 1)
    strides = [step * values.itemsize for step in steps]
    copy = np.lib.stride_tricks.as_strided(memory[before:].view(values.dtype), values.shape, strides)
    copy[...] = values
    return memory, copy


def is_untouched(memory, copy):
    """Whether `placed` memory around the copy still is what it was; the copy is lost."""
    copy[...] = np.frombuffer(bytes([OUTSIDE]) * copy.itemsize, copy.dtype)
    return bool((memory == OUTSIDE).all())


def operand(array, dtype):
    sample, channel, position = (step // array.itemsize for step in array.strides)
    positions = ((array.shape[2],), (position,)) if array.shape[2] > 1 else ((), ())
    return Operand(array.ctypes.data, dtype, sample, channel, *positions)


def vector(values):
    return Vector(values.ctypes.data, str(values.dtype), 1)


def start(C):
    """Running statistics before the step."""
    mean, var = np.random.default_rng(C).random((2, C), np.float32)
    return oracle.State(mean, var, np.full(C, 3), np.full(C, 1))


def train_and_back(case):
    """What differs from the oracle, by name, and what was launched for the step and for its gradient."""
    rng = np.random.default_rng(sum(case.extents))
    device = CpuDevice(Limits(case.multiprocessors, case.kilobytes << 10, (9, 0), case.l2_bytes), case.order)
    backend = CudaBackend(device)
    extents = Extents(*case.extents)
    values = [random(rng, case) for _ in range(3)]
    gamma, beta = rng.standard_normal((2, extents.C)).astype(np.float32)
    places = [*zip(values, case.offsets[:3], strict=True), *[(np.zeros_like(values[0]), case.offsets[3])] * 3]
    memories = [placed(v, offset, case) for v, offset in places]
    x, residual, dy, y, dx, dresidual = (copy for _, copy in memories)
    x_kept = x
    if case.in_place:
        memories.append(placed(x, case.offsets[0], case))
        x_kept = memories[-1][1]
        y, dx, dresidual = x, dy, x_kept

    def view(array):
        return operand(array, case.dtype)

    state = start(extents.C)
    running, affine = Running(vector(state.mean), vector(state.var)), Affine(vector(gamma), vector(beta))
    statistics, relu_mask = calls.train(
        backend,
        extents,
        Operands(view(x), view(residual) if case.residual else None, view(y)),
        affine,
        NormalizeOptions(case.residual, case.relu, case.relu and case.residual),
        running,
        (state.tracked.ctypes.data, state.skipped.ctypes.data),
        MOMENTUM,
    )
    step = list(device.launched)
    if case.frozen:
        given, statistics = statistics, backend.new_statistics(extents.C, affine)
        backend.keep(affine, statistics)
        backend.frozen_statistics(Running(vector(given.mean), vector(given.var)), EPS, statistics)
    device.launched.clear()
    dgamma, dbeta = np.empty((2, extents.C), np.float32)
    sums = calls.backward(
        backend,
        extents,
        Operands(view(x_kept), view(dy), view(dx), view(dresidual) if case.residual else None),
        statistics,
        relu_mask,
        GradientOptions(
            "none" if not case.relu else "mask" if case.residual else "recompute", case.frozen, case.residual
        ),
        (vector(dgamma), vector(dbeta)),
    )
    rows = {name: getattr(statistics, name) for name in ("count", "mean", "m2", "var", "invstd")}
    found = {"y": y, "dx": dx, **rows, "sum_dy": sums[0], "sum_dy_xmu": sums[1]}
    found |= {"dgamma": dgamma, "dbeta": dbeta, "gamma": statistics.row("gamma"), "beta": statistics.row("beta")}
    found |= {f"running {name}": values for name, values in vars(state).items()}
    if case.residual:
        found["dresidual"] = dresidual
    if case.frozen:
        del found["count"], found["m2"]
    expected = expected_of(case, *values, gamma, beta)
    different = [name for name, value in found.items() if not oracle.equal(value, expected[name])]
    different += [f"outside array {i}" for i, memory in enumerate(memories) if not is_untouched(*memory)]
    return different, step, device.launched


def expected_of(case, x, residual, dy, gamma, beta):
    statistics = oracle.batch_statistics(x, EPS)
    options = {"residual": residual if case.residual else None, "relu": case.relu}
    gradients = oracle.backward(dy, x, statistics, gamma, beta, frozen=case.frozen, **options)
    y = oracle.normalize(x, statistics, gamma, beta, **options)
    gated = reference.behind_relu(oracle.widen(dy), oracle.widen(y)) if case.relu else oracle.widen(dy)
    centred = reference.centre(oracle.widen(x), statistics.mean)
    _, *sums = oracle.root(oracle.sample_sums(gated, gated * centred), reference.add)
    found = {"y": y, **vars(statistics), **vars(gradients), "sum_dy": sums[0], "sum_dy_xmu": sums[1]}
    state = oracle.update(start(len(gamma)), statistics, MOMENTUM)
    found |= {f"running {name}": values for name, values in vars(state).items()}
    return found | {"gamma": gamma.astype(np.float64), "beta": beta.astype(np.float64)}


def clusters(kernel, *launches):
    """Of resident launches, each the only one: their clusters and groups of channels."""
    assert [[launch.kernel for launch in launched] for launched in launches] == [[kernel]] * len(launches)
    return tuple((launched[0].cluster, dict(launched[0].fields)["group"]) for launched in launches)
