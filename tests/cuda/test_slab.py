"""The resident path: one kernel for a training step, one for its gradient, with the bits of the oracle."""

from typing import NamedTuple

import numpy as np
import pytest

from cubn import reference
from cubn.backends import Extents, Gate, Operand, Vector
from cubn.backends.cuda import plan
from cubn.backends.cuda.backend import CudaBackend
from cubn.backends.cuda.plan import Limits
from tests import oracle
from tests.cuda_on_cpu.build import unavailable
from tests.cuda_on_cpu.device import CpuDevice
from tests.cuda_on_cpu.runner import Order, shuffled

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())

EPS = 1e-5
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
    gap: int = 0
    in_place: bool = False
    order: int = Order.ASCENDING
    multiprocessors: int = 1


def random(rng, case):
    values = (rng.standard_normal(case.extents) * 2 + 0.5).astype(np.float32)
    return oracle.narrow(values, np.uint16) if case.dtype == "bfloat16" else values.astype(case.dtype)


def placed(values, offset, gap=0):
    """A copy in memory of its own: `offset` elements past a multiple of 16 bytes, `gap` elements between channels."""
    N, C, S = values.shape
    before = offset * values.itemsize % 16
    memory = np.full(before + (N * C * (S + gap) - gap) * values.itemsize, OUTSIDE, np.uint8)
    assert memory.ctypes.data % 16 == 0
    steps = [step * values.itemsize for step in (C * (S + gap), S + gap, 1)]
    copy = np.lib.stride_tricks.as_strided(memory[before:].view(values.dtype), values.shape, steps)
    copy[...] = values
    return memory, copy


def is_untouched(memory, copy):
    """Whether `placed` memory around the copy still is what it was; the copy is lost."""
    copy.view(np.uint8)[...] = OUTSIDE
    return bool((memory == OUTSIDE).all())


def operand(array, dtype):
    sample, channel, position = (step // array.itemsize for step in array.strides)
    return Operand(array.ctypes.data, dtype, sample, channel, (array.shape[2],), (position,))


def vector(values):
    return Vector(values.ctypes.data, str(values.dtype), 1)


def train_and_back(case):
    """What differs from the oracle, by name, and what was launched for the step and for its gradient."""
    rng = np.random.default_rng(sum(case.extents))
    device = CpuDevice(Limits(case.multiprocessors, case.kilobytes << 10, (9, 0)), case.order)
    backend = CudaBackend(device)
    extents = Extents(*case.extents)
    values = [random(rng, case) for _ in range(3)]
    gamma, beta = rng.standard_normal((2, extents.C)).astype(np.float32)
    places = [*zip(values, case.offsets[:3], strict=True), *[(np.zeros_like(values[0]), case.offsets[3])] * 3]
    memories = [placed(v, offset, case.gap) for v, offset in places]
    x, residual, dy, y, dx, dresidual = (copy for _, copy in memories)
    x_kept = x
    if case.in_place:
        x_kept = x.copy()
        y, dx, dresidual = x, dy, x_kept

    def view(array):
        return operand(array, case.dtype)

    statistics, bits = backend.train(
        extents,
        view(x),
        view(y),
        EPS,
        vector(gamma),
        vector(beta),
        mask=None,
        residual=view(residual) if case.residual else None,
        relu=case.relu,
        keep_bits=case.relu and case.residual,
    )
    step = list(device.launched)
    if case.frozen:
        statistics = backend.frozen_statistics(vector(statistics.mean), vector(statistics.var), extents.C, EPS)
    device.launched.clear()
    sums = backend.backward(
        extents,
        view(dy),
        view(x_kept),
        view(dx),
        view(dresidual) if case.residual else None,
        statistics,
        vector(gamma),
        vector(beta),
        frozen=case.frozen,
        mask=None,
        gate=Gate("none") if not case.relu else Gate("bits", bits) if case.residual else Gate("recompute"),
    )
    found = {"y": y, "dx": dx, **statistics._asdict(), "sum_dy": sums[0], "sum_dy_xmu": sums[1]}
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
    return {"y": y, **vars(statistics), **vars(gradients), "sum_dy": sums[0], "sum_dy_xmu": sums[1]}


def clusters(*launches):
    """Of resident launches, each the only one: their clusters and groups of channels."""
    assert [[launch.kernel for launch in launched] for launched in launches] == [["slab"]] * len(launches)
    return tuple((launched[0].cluster, dict(launched[0].fields)["group"]) for launched in launches)


SHORT = (3, 11, 49)  # a sample's positions are no whole vectors, and the last group of channels is short
MANY = (9, 11, 49)  # rows enough for a thread each
TILES = (3, 2, 4500)  # three tiles a sample, the last one short


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("extents", "options"),
    [
        (SHORT, {"relu": True}),
        (MANY, {"relu": True}),
        ((9, 16, 49), {"residual": True, "relu": True}),
        ((2, 3, 264), {"frozen": True, "residual": True}),
        (TILES, {"relu": True}),
    ],
    ids=["short rows", "many short rows", "many short rows with bits", "rows, frozen", "tiles"],
)
def test_every_dtype(dtype, extents, options):
    different, *launched = train_and_back(Case(extents, dtype, 227, **options))
    assert different == []
    clusters(*launched)


@pytest.mark.parametrize("S", [2, 8, 9, 15, 16, 17, 23, 24, 49, 64, 65, 100, 127, 129, 196, 225, 248, 255, 256])
def test_a_row_a_thread(S):
    different, *launched = train_and_back(Case((33, 1, S), "float16", 227, relu=True))
    assert different == []
    assert clusters(*launched) == ((1, 1), (1, 1))
    assert all("-DTILE_LANES=1" in launch.options for (launch,) in launched)


@pytest.mark.parametrize(
    ("case", "step", "gradient"),
    [
        (Case((9, 3, 600), kilobytes=14), (4, 1), (8, 1)),  # blocks of 4, 4, 1, 0 samples; of 2
        (Case((5, 24, 49), "bfloat16", 3, residual=True, relu=True), (4, 8), (8, 8)),
        (Case(TILES, kilobytes=34), (8, 1), (8, 1)),  # blocks of two of a sample's three tiles, of one, of none
        (Case((1, 2, 16000), "bfloat16", 9, residual=True, relu=True), (4, 1), (8, 1)),
        (Case((4, 1, 2100), kilobytes=227, multiprocessors=2), (2, 1), (2, 1)),  # not needed, but there is room
    ],
    ids=lambda value: "" if isinstance(value, tuple) and len(value) == 2 else None,
)
@pytest.mark.parametrize("order", [Order.ASCENDING, Order.REVERSED, shuffled(3)])
def test_clusters(case, step, gradient, order):
    different, *launched = train_and_back(case._replace(order=order))
    assert different == []
    assert clusters(*launched) == (step, gradient)


@pytest.mark.parametrize(
    ("extents", "options"),
    [(SHORT, {}), (MANY, {}), (SHORT, {"gap": 3}), ((2, 3, 300), {}), ((2, 3, 264), {"relu": True})],
    ids=["short rows", "many short rows", "short rows apart", "rows", "rows with bits"],
)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("offset", range(8))
def test_every_alignment(extents, options, in_place, offset):
    offsets = (offset, (3 * offset + 1) % 8, (5 * offset + 2) % 8, (7 * offset + 4) % 8)
    case = Case(extents, "bfloat16", residual=True, offsets=offsets, in_place=in_place, **options)
    different, *launched = train_and_back(case)
    assert different == []
    clusters(*launched)


def slab(extents, *, kilobytes=227, capability=(9, 0), keep_bits=False, gap=0):
    """What is planned for a training step of float32."""
    _, C, S = extents
    o = Operand(0, "float32", C * (S + gap), S + gap, (S,), (1,))
    limits = Limits(1, kilobytes << 10, capability)
    return plan.slab(Extents(*extents), {"x": o, "y": o}, 1, (), keep_bits, limits)


def test_what_does_not_fit_is_not_resident():
    assert slab((32, 64, 56 * 56)).cluster == 4
    assert slab((32, 64, 56 * 56), capability=(8, 0)) is None  # there are no clusters
    assert slab((8, 64, 56 * 56), capability=(8, 0)).cluster == 1
    assert slab((512, 64, 56 * 56)) is None
    assert slab((0, 3, 49)) is None
    assert slab((4, 3, 1)) is None


def test_blocks_share_no_byte_of_bits():
    assert slab((2, 16, 49), keep_bits=True)
    assert slab((2, 12, 49), keep_bits=True) is None  # a sample ends within a byte
    assert slab((1, 12, 49), keep_bits=True)
    assert slab((2, 8, 2049), keep_bits=True) is None  # so does a channel that is a group
    assert slab((2, 16, 49), gap=1, keep_bits=True) is None
