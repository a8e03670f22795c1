"""A layer's calls on a backend, over arrays of its own at chosen addresses: what comes out can be compared."""

from dataclasses import dataclass, replace

import numpy as np

from cubn import reference
from cubn._types import (
    Affine,
    CombineOptions,
    Counters,
    Extents,
    GradientOptions,
    NormalizeOptions,
    Operand,
    Operands,
    Running,
    Update,
    Vector,
)
from cubn.backends.cuda.plan import VECTOR_BYTES
from tests import oracle
from tests.cuda_on_cpu import sanitized
from tests.ops import arrays

EPS = 1e-5
GUARD = 64  # bytes behind an array; a sanitizer has its own there
UNTOUCHED = 0xA5

LAYOUTS = {
    "nchw": lambda N, C, S: (C * S, S, (S, 1)),
    "nchw, channels apart": lambda N, C, S: (C * (S + 8), S + 8, (S, 1)),
    "nchw, whole vectors apart": lambda N, C, S: (C * (S + -S % 8), S + -S % 8, (S, 1)),
    "nchw, samples apart": lambda N, C, S: ((C + 8) * S, S, (S, 1)),
    "nhwc": lambda N, C, S: (C * S, 1, (S, C)),
    "nhwc, positions apart": lambda N, C, S: (2 * C * S, 1, (S, 2 * C)),
    "nhwc, samples apart": lambda N, C, S: (C * (S + 8), 1, (S, C)),
    "nhwc, rows apart": lambda N, C, S: (C * (S + 8), 1, (2, C * (S // 2 + 4)), (S // 2, C)),
    "backwards": lambda N, C, S: (-C * S, -S, (S, -1)),
}
"""Strides of samples and channels, then extent and stride of each axis of positions."""


@dataclass(frozen=True)
class Layer:
    """A batch normalisation and the arrays it works on."""

    extents: tuple[int, int, int]
    dtype: str = "float32"
    layout: str = "nchw"
    offsets: tuple[int, ...] = (0,) * 6  # elements that x, residual, y, dy, dx, dresidual begin after a vector
    residual: bool = False
    relu: bool = False
    masked: bool = False
    frozen: bool = False


class Placed:
    """An array at an address, and the memory around and between its elements, which nobody may write to."""

    def __init__(self, values, layer, offset=0):
        N, C, S = values.shape
        item, self.dtype = values.itemsize, layer.dtype
        self.sample, self.channel, *axes = LAYOUTS[layer.layout](N, C, S)
        self.axes = [axis for axis in axes if axis[0] > 1]
        steps = [(N, self.sample), (C, self.channel), *self.axes]
        reach = [(extent - 1) * step * item for extent, step in steps]
        before = offset * item - sum(r for r in reach if r < 0)
        size = before + sum(r for r in reach if r > 0) + item
        self.memory = np.full(size + (0 if sanitized.active() else GUARD), UNTOUCHED, np.uint8)
        assert self.memory.ctypes.data % VECTOR_BYTES == 0
        first = self.memory[before:][:item].view(values.dtype)
        shape, strides = zip(*((extent, step * item) for extent, step in steps), strict=True)
        self.array = np.lib.stride_tricks.as_strided(first, shape, strides)
        self.array[...] = values.reshape(shape)
        self.extents = values.shape

    @property
    def operand(self):
        shape, strides = zip(*self.axes, strict=True) if self.axes else ((), ())
        return Operand(self.array.ctypes.data, self.dtype, self.sample, self.channel, shape, strides)

    def values(self):
        """A copy of the elements, as (N, C, S); nothing else was written to."""
        copy = self.array.reshape(self.extents).copy()
        self.array[...] = np.frombuffer(bytes([UNTOUCHED]) * copy.itemsize, copy.dtype)
        assert (self.memory == UNTOUCHED).all(), "memory around an array's elements was written to"
        self.array[...] = copy.reshape(self.array.shape)
        return copy


class Values:
    """The numbers of a layer: what its arrays hold, as (N, C, S)."""

    def __init__(self, layer):
        rng = np.random.default_rng(0)
        N, C, S = layer.extents
        self.x, self.residual, self.dy = (arrays.normal(rng, layer.extents, layer.dtype, centre=0.5) for _ in range(3))
        self.gamma, self.beta, self.mean = (arrays.normal(rng, C, centre=1.0) for _ in range(3))
        self.var = np.abs(self.mean) + np.float32(0.5)
        self.mask = rng.random((N, S)) < 0.7


def vector(values):
    return Vector(values.ctypes.data, "float32", 1)


def pointer(given):
    """Of an operand or vector; 0 of what is absent."""
    return given.pointer if given else 0


def new_counters(backend, C):
    """Two of zeros, and where they are."""
    arrays = [backend.from_host(np.zeros(C, np.int64)) for _ in range(2)]
    return arrays, Counters(*map(backend.address, arrays))


def forward(backend, extents, operands, affine, running, options, eps=EPS):
    """As `Backend.prepare_forward` and its call."""
    call = backend.prepare_forward(extents, operands, affine, running, options)
    x, g, y, _, mask = map(pointer, operands)
    call(x, g, y, mask, *map(pointer, affine), *map(pointer, running), eps)


def train(backend, extents, operands, affine, options, running=None, counters=(), momentum=0.1, eps=EPS):
    """As `Backend.prepare_train` and its call; what is running is updated in place."""
    call = backend.prepare_train(extents, operands, affine, running, False, options)
    x, g, y, _, mask = map(pointer, operands)
    moved = (*map(pointer, (*running, *running)), *counters, momentum) if running else ()
    return call(x, g, y, mask, *map(pointer, affine), eps, *moved)


def backward(backend, extents, operands, statistics, relu_mask, options, parameters=None):
    """As `Backend.prepare_backward` and its call."""
    call = backend.prepare_backward(extents, operands, statistics, relu_mask, parameters, options)
    pointers = map(pointer, operands)
    return call(*pointers, statistics, relu_mask, *map(pointer, parameters or (None, None)), True)


def results(backend, layer):
    """What every operation gives, by name: forwards, moments, an update, the backward in one call and in two."""
    values = Values(layer)
    extents = Extents(*layer.extents)
    C, S = extents[1:]
    nothing = np.zeros_like(values.x)
    held = {
        "x": values.x,
        "residual": values.residual,
        "y": nothing,
        "dy": values.dy,
        "dx": nothing,
        "dresidual": nothing,
    }
    placed = {name: Placed(held[name], layer, offset) for name, offset in zip(held, layer.offsets, strict=True)}
    x, residual, y, dy, dx, dresidual = (placed[name].operand for name in held)
    positions = ((S,), (1,)) if S > 1 else ((), ())
    mask = Operand(values.mask.ctypes.data, "bool", S, 0, *positions) if layer.masked else None
    if not layer.residual:
        residual = dresidual = None
    keep = layer.relu and layer.residual
    operands, options = Operands(x, residual, y, mask=mask), NormalizeOptions(layer.residual, layer.relu, keep)
    affine = Affine(vector(values.gamma), vector(values.beta))
    running = Running(vector(values.mean), vector(values.var))
    found = {}

    if layer.frozen:
        forward(backend, extents, operands, affine, running, replace(options, keep_mask=False))
        found["y of forward"] = placed["y"].values()
        statistics = backend.new_statistics(C, affine)
        backend.keep(affine, statistics)
        backend.frozen_statistics(running, EPS, statistics)
        relu_mask = backend.normalize(extents, operands, statistics, affine, options)
    else:
        (tracked, skipped), counters = new_counters(backend, C)
        later = [values.mean.copy(), values.var.copy()]  # of an update by itself
        statistics, relu_mask = train(backend, extents, operands, affine, options, running, counters)
        rows = ("count", "mean", "m2", "invstd")
        found |= {name: backend.to_host(getattr(statistics, name)) for name in rows}
        found |= {name: backend.to_host(statistics.row(name)) for name in ("gamma", "beta")}
        found |= {"tracked": backend.to_host(tracked), "skipped": backend.to_host(skipped)}
        found |= {"running_mean": values.mean, "running_var": values.var}
        old = Running(*map(vector, later))
        _, counters = others = new_counters(backend, C)  # held
        backend.update(statistics, old, old, counters, Update(0.1, False))
        del others
        found |= {"mean of update": later[0], "var of update": later[1]}
        found |= renormalised(backend, statistics, affine, old)
        root = backend.root(backend.moments(extents, operands, 5))
        found |= dict(zip(("count from 5", "mean from 5", "m2 from 5"), map(backend.to_host, root), strict=True))
        again = backend.new_statistics(C, Affine(None, None))
        backend.statistics(statistics.count, statistics.mean, statistics.m2, EPS, again)
        found |= {f"{name} of statistics": backend.to_host(getattr(again, name)) for name in rows}
    found["y"] = placed["y"].values()

    outputs = ["dx", "dresidual"] if layer.residual else ["dx"]
    relu = "mask" if keep else "recompute" if layer.relu else "none"
    gradient = GradientOptions(relu, layer.frozen, layer.residual)
    given = (extents, Operands(x, dy, dx, dresidual, mask), statistics, relu_mask)
    gradients = {name: np.zeros(C, np.float32) for name in ("dgamma", "dbeta", "dgamma of sums", "dbeta of sums")}
    dgamma, dbeta, *of_sums = map(vector, gradients.values())
    sums = backward(backend, *given, gradient, (dgamma, dbeta))
    found |= {name: placed[name].values() for name in outputs}
    found |= {"sum_dy": backend.to_host(sums[0]), "sum_dy_xmu": backend.to_host(sums[1])}
    backend.parameter_gradients(statistics, sums, *of_sums)
    found |= gradients
    parts = backend.root_sums(backend.backward_sums(*given, gradient, 3))
    found |= {
        f"{name} from 3": backend.to_host(part) for name, part in zip(("sum_dy", "sum_dy_xmu"), parts, strict=True)
    }
    for name in outputs:
        placed[name].array[...] = 0
    backend.backward_apply(*given, None if layer.frozen else sums, gradient)
    found |= {f"{name} of sums": placed[name].values() for name in outputs}
    if not layer.frozen:  # whose count is 0
        read = Operands(x, dy, dx, residual if layer.residual else None, mask)
        backend.backward_apply(extents, read, statistics, relu_mask, sums, CombineOptions(relu, third(layer)))
        found["combination"] = placed["dx"].values()
    return found


LIMITS = 1.5, 0.5


def renormalised(backend, statistics, affine, running):
    """r, d, and what takes the place of gamma and beta."""
    C = statistics.C
    before, given = backend.new_statistics(C, Affine(None, None)), backend.new_renormalised(C, affine)
    backend.frozen_statistics(running, EPS, before)
    backend.keep(affine, given)
    given = backend.statistics(statistics.count, statistics.mean, statistics.m2, EPS, given)
    rows = backend.renormalise(given, before, *LIMITS)
    dgamma, dbeta = np.zeros((2, C), np.float32)
    backend.parameter_gradients(rows, (statistics.mean, statistics.var), vector(dgamma), vector(dbeta))
    found = {f"{name} of renorm": backend.to_host(rows.row(name)) for name in ("r", "d", "gamma", "beta")}
    return found | {"dgamma of renorm": dgamma, "dbeta of renorm": dbeta}


def third(layer):
    """How a layer's residual takes part in a combination."""
    return "none" if not layer.residual else "added" if layer.relu else "weighted"


def expected(layer):
    """The same by the oracle."""
    v = Values(layer)
    mask, C = v.mask if layer.masked else None, layer.extents[1]
    options = {"mask": mask, "residual": v.residual if layer.residual else None, "relu": layer.relu}
    found = {}
    if layer.frozen:
        stats = oracle.frozen_statistics(v.mean, v.var, EPS)
    else:
        stats = oracle.batch_statistics(v.x, EPS, mask=mask)
        after = oracle.update(oracle.State(v.mean, v.var, *np.zeros((2, C), np.int64)), stats, 0.1)
        for of in ("", " of statistics"):
            found |= {f"{name}{of}": np.asarray(getattr(stats, name)) for name in ("count", "mean", "m2", "invstd")}
        found |= {"tracked": after.tracked, "skipped": after.skipped}
        found |= {"running_mean": after.mean, "running_var": after.var}
        found |= {"mean of update": after.mean, "var of update": after.var}
        found |= {"gamma": v.gamma.astype(np.float64), "beta": v.beta.astype(np.float64)}
        renormed = oracle.renormalised(stats, after.mean, after.var, EPS, LIMITS, v.gamma, v.beta)
        found |= {f"{name} of renorm": row for name, row in vars(renormed).items()}
        of_sums = stats.invstd, stats.mean, stats.var, renormed.r, renormed.d
        dgamma = reference.renormalised_gamma_gradient(*of_sums)
        found |= {"dgamma of renorm": dgamma.astype(np.float32), "dbeta of renorm": stats.mean.astype(np.float32)}
        later = oracle.batch_statistics(v.x, EPS, mask=mask, start=5)
        found |= {f"{name} from 5": np.asarray(getattr(later, name)) for name in ("count", "mean", "m2")}
    found["y"] = oracle.normalize(v.x, stats, v.gamma, v.beta, **options)
    if layer.frozen:
        found["y of forward"] = found["y"]
    gradients = oracle.backward(v.dy, v.x, stats, v.gamma, v.beta, frozen=layer.frozen, **options)
    for of in ("", " of sums"):
        found |= {f"dgamma{of}": gradients.dgamma, f"dbeta{of}": gradients.dbeta}
    for name in ["dx", "dresidual"] if layer.residual else ["dx"]:
        found[name] = found[f"{name} of sums"] = getattr(gradients, name)
    if not layer.frozen:
        found["combination"] = combination(layer, v, stats, mask)
    gated = oracle.widen(gradients.dresidual)
    samples = oracle.sample_sums(gated, gated * reference.centre(oracle.widen(v.x), stats.mean), mask=mask)
    for start, suffix in ((0, ""), (3, " from 3")):
        _, found[f"sum_dy{suffix}"], found[f"sum_dy_xmu{suffix}"] = oracle.root(samples, reference.add, start)
    return found


def combination(layer, v, stats, mask):
    """Of x, dy and residual, by the coefficients of a backward."""
    options = {"mask": mask, "residual": v.residual if layer.residual else None, "relu": layer.relu}
    x, dy, residual = map(oracle.widen, (v.x, v.dy, v.residual))
    passed = oracle.widen(oracle.backward(v.dy, v.x, stats, v.gamma, v.beta, **options).dresidual)
    samples = oracle.sample_sums(passed, passed * reference.centre(x, stats.mean), mask=mask)
    _, first, second = oracle.root(samples, reference.add)
    scale = (stats.invstd.astype(x.dtype) * v.gamma.astype(x.dtype)).astype(np.float64)
    k1, k2 = first / stats.count, (second / stats.count) * (stats.invstd * stats.invstd)
    weight = v.beta.astype(np.float64) if third(layer) == "weighted" else None
    by = reference.Combination(scale, k1, k2, weight)
    y = reference.combine(dy, x, stats.mean, by, residual if layer.residual else None)
    if layer.relu:
        y = reference.behind_relu(y, oracle.widen(oracle.normalize(v.x, stats, v.gamma, v.beta, **options)))
    present = np.broadcast_to(True if mask is None else mask[:, None], y.shape)
    return oracle.narrow(np.where(present, y, y.dtype.type(0)), v.x.dtype)


def check(backend, layer):
    """Raise where a result is not the oracle's to the bit."""
    got, wanted = results(backend, layer), expected(layer)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        arrays.assert_same(got[name], value, name)
