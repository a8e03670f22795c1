"""Valid calls: any shape, layout, dtype, library, option and cut."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tests.fuzz import memory, plans
from tests.fuzz.memory import Memory
from tests.ops import arrays

EDGES = [1, 2, 3, 5, 7, 8, 9, 12, 15, 16, 17, 31, 32, 33, 49, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 511, 513]
EDGES += [1023, 1024, 1025, 2047, 2048, 2049, 4095, 4097]
LIBRARIES = ["numpy", "torch", "jax", "foreign"]
OPERATIONS = ["forward", "train", "frozen", "normalize", "ranks"]


@dataclass(frozen=True)
class Case:
    """One operation, and all that it depends on."""

    operation: str
    shape: tuple[int, ...]
    axis: int
    dtype: str
    library: str
    x: Memory
    others: Memory  # residual, dy and a given out
    vectors: Memory  # gamma, beta, running_mean and running_var
    mask: str = "none"
    residual: bool = False
    relu: bool = False
    affine: tuple[str, ...] = ("gamma", "beta")
    parameters: str = "float32"
    out: str = "fresh"
    eps: float = 1e-5
    momentum: float | None = 0.1
    wild: float = 0.0
    scale: float = 1.0
    centre: float = 0.5
    threads: int = 1
    start: int = 0
    cut: tuple[int, ...] = ()  # edges between parts, besides the first and the last
    gradients: str = "local"
    sizes: bool = False
    repeats: int = 1
    biased: bool = False  # running_variance
    restated: bool = False  # whether the backward is made a second time, by backward_from
    constants: tuple[tuple[str, int], ...] = ()
    seed: int = 0
    groups: int = 0  # samples of a ghost batch
    limits: tuple[float, float] | None = None  # of batch renormalisation
    known: bool = False  # whether there was a call of the same layouts before, with other values in other places


def draw(rng: random.Random) -> Case:
    operation = rng.choices(OPERATIONS, [2, 5, 2, 3, 2])[0]
    library = rng.choices(LIBRARIES, [4, 3, 1, 2])[0]
    shape, axis = _shape(rng, operation)
    N = shape[sample_axis(shape, axis)]
    repeat = [a for a in range(len(shape)) if shape[a] > 1] if library != "jax" else []
    case = Case(
        operation,
        shape,
        axis - len(shape) if rng.random() < 0.3 else axis,
        rng.choice(arrays.DTYPES),
        library,
        memory.draw(rng, shape, library, repeat=repeat),
        memory.draw(rng, shape, library),
        memory.draw(rng, (shape[axis],), library),
        mask=rng.choice(["none", "none", "none", "full", "samples", "positions", "rank"]),
        residual=rng.random() < 0.4,
        relu=rng.random() < 0.4,
        affine=rng.choice([("gamma", "beta"), ("gamma", "beta"), ("gamma",), ("beta",), ()]),
        parameters=rng.choice(["float32", "float32", "float16", "bfloat16", "float64"]),
        out=rng.choice(["fresh", "fresh", "given", "in place", "residual"]),
        eps=rng.choice([1e-5, 1e-5, 1e-3, 1e-12, 1.0]),
        momentum=rng.choice([0.1, 0.1, None, 1.0, 0.0, rng.random()]),
        wild=rng.choice([0.0, 0.0, 0.0, 0.001, 0.2]),
        scale=rng.choice([1.0, 1.0, 1e-3, 100.0]),
        centre=rng.choice([0.5, 0.0, -30.0]),
        threads=rng.choice([1, 2, 3, 7]),
        start=rng.choice([0, 0, 1, 5, rng.randrange(1 << 20), (1 << 40) + 3]),
        cut=tuple(sorted(rng.randint(0, N) for _ in range(rng.choice([0, 0, 1, 2, 4])))),
        gradients=rng.choice(["local", "global"]),
        sizes=rng.random() < 0.3,
        repeats=rng.choice([1, 1, 1, 2]),
        biased=rng.random() < 0.2,
        restated=rng.random() < 0.2,
        constants=plans.draw(rng),
        seed=rng.randrange(1 << 30),
        known=rng.random() < 0.5,
        groups=rng.choice([0, 0, 0, 0, 0, 2, 3, 8, max(2, N // 2)]),
        limits=rng.choice([None, None, None, None, (1.0, 0.0), (1.5, 0.25), (1e300, 1e300)]),
    )
    return settled(case)


def _shape(rng: random.Random, operation: str) -> tuple[tuple[int, ...], int]:
    """A shape and its channel axis, with extents on both sides of what kernels are cut at."""
    room = rng.choice([1 << 6, 1 << 9, 1 << 12, 1 << 14, 1 << 14, 1 << 16])
    extents = {}
    for name in rng.sample("NCS", 3):
        extents[name] = rng.choice(
            [e for e in EDGES if e <= room] if rng.random() < 0.8 else range(1, min(room, 40) + 1)
        )
        room = max(1, room // extents[name])
    N, C, S = (extents[name] for name in "NCS")
    if operation == "train" and N * S < 2:
        N = 2
    if operation in ("forward", "frozen") and rng.random() < 0.03:
        N, S = rng.choice([(0, S), (N, 0)])
    positions = [S] if S != 1 or rng.random() < 0.3 else []
    if S and rng.random() < 0.4:
        a = rng.choice([d for d in range(1, S + 1) if S % d == 0])
        positions = rng.choice([[a, S // a], [a, 1, S // a]])
    axis = rng.choice([1, 1, len(positions) + 1, rng.randint(0, len(positions) + 1)])
    rest = [N, *positions]
    return (*rest[:axis], C, *rest[axis:]), axis


def sample_axis(shape: tuple[int, ...], axis: int) -> int:
    return 1 if axis % len(shape) == 0 else 0


def settled(case: Case) -> Case:
    """The case without the options that cannot meet."""
    immutable = case.library == "jax"
    if case.out == "residual" and not case.residual:
        case = replace(case, out="given")
    if immutable or (case.out == "in place" and case.x.repeated):
        case = replace(case, out="fresh")
    if len(case.shape) == 2 and case.mask == "positions":
        case = replace(case, mask="full")
    if case.operation == "ranks":
        if case.out != "given":
            case = replace(case, out="fresh")
        if case.mask in ("samples", "positions"):
            case = replace(case, mask="full")
        if math.prod(case.shape) < 2 * case.shape[case.axis]:
            case = replace(case, operation="normalize")
    if case.operation != "train":
        case = replace(case, repeats=1, groups=0, limits=None)
    if case.groups:
        case = replace(case, repeats=1, limits=None)
        if case.mask != "positions":  # every group needs two values
            case = replace(case, mask="none")
    if case.limits:
        case = replace(case, repeats=1)
    otherwise = case.groups or case.limits or case.residual or case.out == "in place"
    if case.operation not in ("train", "frozen") or otherwise:
        case = replace(case, restated=False)
    return case


def simpler(case: Case) -> Iterator[Case]:
    """Cases with one thing less to think of, the largest steps first."""
    plain = {
        "known": False,
        "constants": (),
        "threads": 1,
        "cut": (),
        "mask": "none",
        "residual": False,
        "relu": False,
        "affine": (),
        "wild": 0.0,
        "out": "fresh",
        "groups": 0,
        "limits": None,
        "repeats": 1,
        "biased": False,
        "restated": False,
        "start": 0,
        "library": "numpy",
        "dtype": "float32",
        "parameters": "float32",
        "momentum": 0.1,
        "eps": 1e-5,
        "scale": 1.0,
        "centre": 0.5,
        "x": memory.dense(len(case.shape)),
        "others": memory.dense(len(case.shape)),
        "vectors": memory.dense(1),
    }
    for name, value in plain.items():
        if getattr(case, name) != value:
            yield settled(replace(case, **{name: value}))
    for i in range(len(case.constants)):
        yield replace(case, constants=case.constants[:i] + case.constants[i + 1 :])
    for axis, extent in enumerate(case.shape):
        for less in {extent // 2, extent - 1} - {0, extent}:
            shape = (*case.shape[:axis], less, *case.shape[axis + 1 :])
            N = shape[sample_axis(shape, case.axis)]
            if math.prod(shape) >= 2 * shape[case.axis]:
                yield replace(case, shape=shape, cut=tuple(min(edge, N) for edge in case.cut))
