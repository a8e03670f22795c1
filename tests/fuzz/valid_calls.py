"""Valid calls, drawn at random and held to the oracle to the bit: any shape, layout, dtype, library, option and cut.

Arrays lie between guard pages; those an operation only reads are write-protected while it runs, and what lies between
the elements of those it writes must stay as it was. The constants of the planner, which may change no result, are drawn
too.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import cubn
from cubn.backends.cpu import plan, prepare
from cubn.sync import threads
from tests import oracle
from tests.fuzz import memory, producer
from tests.fuzz.memory import Memory, Placed
from tests.ops import arrays

EDGES = [1, 2, 3, 5, 7, 8, 9, 12, 15, 16, 17, 31, 32, 33, 49, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 511, 513]
EDGES += [1023, 1024, 1025, 2047, 2048, 2049, 4095, 4097]
LIBRARIES = ["numpy", "torch", "jax", "foreign"]
OPERATIONS = ["forward", "train", "frozen", "normalize", "ranks"]
CONSTANTS = {
    "SERIAL_BYTES": [0, 1 << 12],
    "STREAM_BYTES": [0, 1 << 14],
    "BLOCK_BYTES": [1, 64, 1 << 10],
    "FEW_CHANNELS": [0, 3, 64],
    "PERIOD": [128, 200],
    "SLAB_BYTES": [0, 1 << 12, 1 << 30],
    "STRETCH_BYTES": [1, 1 << 9, 1 << 20],
    "WIDEST_SLAB": [1, 2, 64],
    "TASKS": [1, 3, 1000],
    "WIDEST": [16, 48],
    "SAMPLES_A_ROW": [1, 16, 2048],
    "VALUES_A_ROW": [1, 1 << 12, 1 << 20],
}
"""Other values for constants of `plan`: all make valid plans."""


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


def draw(rng: random.Random) -> Case:
    operation = rng.choices(OPERATIONS, [2, 5, 2, 3, 2])[0]
    library = rng.choices(LIBRARIES, [4, 3, 1, 2])[0]
    shape, axis = _shape(rng, operation)
    N = shape[_sample_axis(shape, axis)]
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
        constants=tuple((name, rng.choice(CONSTANTS[name])) for name in CONSTANTS if rng.random() < 0.3),
        seed=rng.randrange(1 << 30),
    )
    return _settled(case)


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


def _sample_axis(shape: tuple[int, ...], axis: int) -> int:
    return 1 if axis % len(shape) == 0 else 0


def _settled(case: Case) -> Case:
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
        case = replace(case, repeats=1)
    if case.operation not in ("train", "frozen") or case.residual or case.out == "in place":
        case = replace(case, restated=False)
    return case


def simpler(case: Case) -> Iterator[Case]:
    """Cases with one thing less to think of, the largest steps first."""
    plain = {
        "constants": (),
        "threads": 1,
        "cut": (),
        "mask": "none",
        "residual": False,
        "relu": False,
        "affine": (),
        "wild": 0.0,
        "out": "fresh",
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
            yield _settled(replace(case, **{name: value}))
    for i in range(len(case.constants)):
        yield replace(case, constants=case.constants[:i] + case.constants[i + 1 :])
    for axis, extent in enumerate(case.shape):
        for less in {extent // 2, extent - 1} - {0, extent}:
            shape = (*case.shape[:axis], less, *case.shape[axis + 1 :])
            N = shape[_sample_axis(shape, case.axis)]
            if math.prod(shape) >= 2 * shape[case.axis]:
                yield replace(case, shape=shape, cut=tuple(min(edge, N) for edge in case.cut))


# --- running a case ---------------------------------------------------------------------------------------------------


class Given:
    """A case's arrays: as stores for the oracle, and in memory of its own for cubn."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(case.seed)
        self.C = case.shape[case.axis]
        values = dict(centre=case.centre, scale=case.scale, wild=case.wild)
        self.read: list[Placed] = []
        self.written: dict[str, Placed] = {}
        self.x = self._placed(arrays.normal(rng, case.shape, case.dtype, **values), case.x)
        self.dy = self._placed(arrays.normal(rng, case.shape, case.dtype, wild=case.wild), case.others)
        self.residual = None
        if case.residual:
            self.residual = self._placed(arrays.normal(rng, case.shape, case.dtype, **values), case.others)
        self.mask = self._mask(rng)
        self.parameters = {
            name: self._placed(arrays.normal(rng, self.C, case.parameters, centre=0.3, wild=case.wild), case.vectors)
            for name in case.affine
        }
        dtype = "float64" if case.dtype == "float64" else "float32"
        mean = arrays.normal(rng, self.C, dtype, centre=case.centre, wild=case.wild)
        var = np.abs(arrays.normal(rng, self.C, dtype, centre=2.0, wild=case.wild))
        self.running_mean, self.running_var = (Placed(v, case.vectors) for v in (mean, var))
        self.values = {  # as they are before anything is written over them
            "x": self.x.array.copy(),
            "dy": self.dy.array.copy(),
            "residual": None if self.residual is None else self.residual.array.copy(),
            "running_mean": mean,
            "running_var": var,
        }
        self.written |= {"running_mean": self.running_mean, "running_var": self.running_var}

    def _placed(self, values: Any, where: Memory) -> Placed:
        placed = Placed(values, where)
        self.read.append(placed)
        return placed

    def _mask(self, rng: np.random.Generator) -> Placed | None:
        shape, axis, kind = self.case.shape, self.case.axis % len(self.case.shape), self.case.mask
        if kind == "none":
            return None
        extents = [n for a, n in enumerate(shape) if a != axis]
        if kind == "samples":
            extents = [extents[0], *[1] * (len(extents) - 1)]
        if kind == "positions":
            extents = [1, *extents[1:]]
        present = rng.random(extents) < 0.7
        present.flat[:2] = True  # a channel needs two values
        if kind == "rank":
            present = np.expand_dims(present, axis)
        order = tuple(int(a) for a in rng.permutation(present.ndim))
        return self._placed(present, Memory(order, at_end=bool(rng.random() < 0.8)))

    def protect(self) -> None:
        for placed in self.read:
            if not any(placed is other for other in self.written.values()):
                placed.keep_from_writes()

    def destination(self, what: str) -> dict[str, Any]:
        """`out` as the case has it, for a y or (then `what` is "dx") a gradient."""
        out, case = self.case.out, self.case
        if out == "fresh" or (out == "in place" and what == "y" and case.repeats > 1):
            return {}
        if out == "given":
            placed = Placed(np.zeros(case.shape, self.x.array.dtype), case.others)
        elif out == "in place":
            placed = self.x if what == "y" else self.dy
        elif what == "y" and self.residual is not None and case.repeats == 1:
            placed = self.residual
        else:
            return {}
        self.written[what] = placed
        return {"out": placed}

    # --- what the oracle makes of them ---

    def ncs(self, name: str = "x") -> Any:
        value = self.values[name]
        return None if value is None else oracle.as_ncs(value, self.case.axis)

    def flat_mask(self) -> Any:
        if self.mask is None:
            return None
        mask, shape, axis = self.mask.array, self.case.shape, self.case.axis
        if self.case.mask == "rank":
            mask = np.squeeze(mask, axis % len(shape))
        return oracle.mask_as_ns(mask, shape, axis)

    def options(self) -> dict[str, Any]:
        given = {name: placed.array for name, placed in self.parameters.items()}
        return {**given, "mask": self.flat_mask(), "residual": self.ncs("residual"), "relu": self.case.relu}

    def statistics(self, start: int = 0) -> Any:
        if self.case.operation in ("forward", "frozen"):
            old = self.values["running_mean"], self.values["running_var"]
            return oracle.frozen_statistics(*old, self.case.eps)
        return oracle.batch_statistics(self.ncs(), self.case.eps, mask=self.flat_mask(), start=start)

    def output(self, statistics: Any) -> dict[str, Any]:
        return {"y": oracle.normalize(self.ncs(), statistics, **self.options())}

    def gradients(self, statistics: Any) -> dict[str, Any]:
        frozen = self.case.operation == "frozen"
        found = oracle.backward(self.ncs("dy"), self.ncs(), statistics, frozen=frozen, **self.options())
        wanted = {"dx": found.dx} | {f"d{name}": getattr(found, f"d{name}") for name in self.parameters}
        return wanted | ({"dresidual": found.dresidual} if self.case.residual else {})

    def updated(self, statistics: Any) -> dict[str, Any]:
        zeros = np.zeros(self.C, np.int64)
        after = oracle.State(self.values["running_mean"], self.values["running_var"], zeros, zeros)
        biased = {"biased": True} if self.case.biased else {}
        for _ in range(self.case.repeats):
            after = oracle.update(after, statistics, self.case.momentum, **biased)
        return {
            "running_mean": after.mean,
            "running_var": after.var,
            "tracked": after.tracked,
            "skipped": after.skipped,
        }

    # --- what cubn gets ---

    def state(self, copied: bool = False) -> Any:
        def carried(placed: Placed) -> Any:
            return carry(placed.array.copy() if copied else placed.array, self.case.library)

        with warnings.catch_warnings():
            if hasattr(cubn, "StateWarning"):  # statistics that are not finite are part of the campaign
                warnings.simplefilter("ignore", cubn.StateWarning)
            return cubn.BatchNormState.from_arrays(
                **{name: carried(placed) for name, placed in self.parameters.items()},
                running_mean=carried(self.running_mean),
                running_var=carried(self.running_var),
                eps=self.case.eps,
                momentum=self.case.momentum,
                channel_axis=self.case.axis,
                **({"running_variance": "biased"} if self.case.biased else {}),
            )

    def arguments(self, lo: int | None = None, hi: int | None = None) -> tuple[Any, dict[str, Any]]:
        """x and its options; of samples [lo, hi) where they are given."""
        part = slice(lo, hi)
        options: dict[str, Any] = {"relu": self.case.relu}
        if self.residual is not None:
            options["residual"] = self.carried(self.residual, part)
        if self.mask is not None:
            options["mask"] = self.carried_mask(part)
        return self.carried(self.x, part), options

    def carried(self, placed: Placed, part: slice = slice(None)) -> Any:
        axis = _sample_axis(self.case.shape, self.case.axis)
        return carry(placed.array[(slice(None),) * axis + (part,)], self.case.library)

    def carried_mask(self, part: slice = slice(None)) -> Any:
        assert self.mask is not None
        mask, axis = self.mask.array, 0
        if self.case.mask == "rank":
            axis = _sample_axis(self.case.shape, self.case.axis)
        if mask.shape[axis] > 1:
            mask = mask[(slice(None),) * axis + (part,)]
        return carry(mask, self.case.library)


def carry(store: Any, library: str) -> Any:
    """The store as an array of a library, in its own memory (JAX: in a copy)."""
    return producer.Foreign(store) if library == "foreign" else arrays.carry(store, library)


def store_of(array: Any) -> Any:
    return array.store if isinstance(array, producer.Foreign) else arrays.store_of(array)


Perform = Callable[[], dict[str, Any]]


def prepared(given: Given) -> tuple[Perform, Callable[[], dict[str, Any]]]:
    """What calls cubn, and what then asks the oracle for the same."""
    return {
        "forward": _forward,
        "train": _train,
        "frozen": _train,
        "normalize": _normalize,
        "ranks": _ranks,
    }[given.case.operation](given)


def _outs(given: Given, what: str, x: Any, options: dict[str, Any]) -> dict[str, Any]:
    """`out` among the options, as the very object that x, dy or residual is where it is in place."""
    destination = given.destination(what)
    if not destination:
        return {}
    placed = destination["out"]
    if placed is given.x or placed is given.dy:
        return {"out": x}
    return {"out": options["residual"] if placed is given.residual else given.carried(placed)}


def _forward(given: Given) -> Any:
    x, options = given.arguments()
    state = given.state()
    options |= _outs(given, "y", x, options)
    given.protect()
    return lambda: {"y": cubn.forward(x, state, **options)}, lambda: given.output(given.statistics())


def _train(given: Given) -> Any:
    """A forward that knows a backward, and that."""
    trains, case = given.case.operation == "train", given.case
    x, options = given.arguments()
    dy = given.carried(given.dy)
    state = given.state()
    options |= _outs(given, "y", x, options)
    gradient = _outs(given, "dx", dy, options)
    given.protect()
    goes_back = options.get("out") is not x

    def perform() -> dict[str, Any]:
        for _ in range(case.repeats):
            y, saved = (cubn.forward_train if trains else cubn.forward_frozen)(x, state, **options)
        found = {"y": y, "running_mean": state.running_mean, "running_var": state.running_var}
        if trains:
            found |= {"tracked": state.tracked, "skipped": state.skipped}
        restated = _restated(given, dy, x, saved) if goes_back and case.restated else {}
        return found | (_backward(given, dy, saved, gradient) if goes_back else {}) | restated

    def expected() -> dict[str, Any]:
        statistics = given.statistics()
        kept = {name: given.values[name] for name in ("running_mean", "running_var")}
        found = given.output(statistics) | (given.updated(statistics) if trains else kept)
        gradients = given.gradients(statistics) if goes_back else {}
        again = {f"{name} again": value for name, value in gradients.items() if goes_back and case.restated}
        return found | gradients | again

    return perform, expected


def _backward(given: Given, dy: Any, saved: Any, options: dict[str, Any]) -> dict[str, Any]:
    gradients = cubn.backward(dy, saved, **options)
    found = {f"d{name}": getattr(gradients, f"d{name}") for name in given.parameters}
    found |= {"dresidual": gradients.dresidual} if given.case.residual else {}
    return found | {"dx": gradients.dx}


def _restated(given: Given, dy: Any, x: Any, saved: Any) -> dict[str, Any]:
    """The same gradients by backward_from."""
    case = given.case
    gradients = cubn.backward_from(
        dy,
        x,
        mean=saved.mean,
        invstd=saved.invstd,
        **{name: carry(placed.array, case.library) for name, placed in given.parameters.items()},
        mask=None if given.mask is None else given.carried_mask(),
        relu=case.relu,
        frozen=case.operation == "frozen",
        channel_axis=case.axis,
        **({} if case.operation == "frozen" else {"count": int(saved.count)}),
    )
    return {f"d{name} again": getattr(gradients, f"d{name}") for name in ("x", *given.parameters)}


def _edges(case: Case) -> list[tuple[int, int]]:
    N = case.shape[_sample_axis(case.shape, case.axis)]
    return list(itertools.pairwise([0, *case.cut, N]))


def _normalize(given: Given) -> Any:
    """By moments of parts, merged in an order of their own."""
    case = given.case
    rng = random.Random(case.seed)
    parts = []
    for lo, hi in _edges(case):
        x, options = given.arguments(lo, hi)
        parts.append((x, {"mask": options["mask"]} if "mask" in options else {}, case.start + lo))
    x, options = given.arguments()
    parameters = {name: carry(placed.array, case.library) for name, placed in given.parameters.items()}
    options |= _outs(given, "y", x, options)
    given.protect()

    def perform() -> dict[str, Any]:
        found = [cubn.moments(x, channel_axis=case.axis, start=start, **mask) for x, mask, start in parts]
        while len(found) > 1:
            i = rng.randrange(len(found) - 1)
            a, b = found[i : i + 2]
            found[i : i + 2] = [a.merge(b) if rng.random() < 0.5 else b.merge(a)]
        (moments,) = found
        y = cubn.normalize(x, moments, **parameters, eps=case.eps, channel_axis=case.axis, **options)
        return {"y": y, "count": moments.count, "mean": moments.mean, "m2": moments.m2}

    def expected() -> dict[str, Any]:
        statistics = given.statistics(case.start)
        of_moments = {"count": statistics.count, "mean": statistics.mean, "m2": statistics.m2}
        return given.output(statistics) | of_moments

    return perform, expected


def _ranks(given: Given) -> Any:
    """A training step over ranks that are threads; each has a part of the samples, and a state of its own."""
    case = given.case
    ranges = _edges(case)
    states = [given.state(copied=True) for _ in ranges]
    calls = []
    for lo, hi in ranges:
        x, options = given.arguments(lo, hi)
        if case.out == "given":
            options["out"] = given.carried(
                Placed(np.zeros(case.shape, given.x.array.dtype), case.others), slice(lo, hi)
            )
        calls.append((x, options, given.carried(given.dy, slice(lo, hi))))
    given.protect()
    declared = {"sizes": [hi - lo for lo, hi in ranges]} if case.sizes else {}

    def body(comm: Any) -> Any:
        x, options, dy = calls[comm.rank]
        y, saved = cubn.forward_train(x, states[comm.rank], comm=comm, **declared, **options)
        return y, cubn.backward(dy, saved, parameter_gradients=case.gradients)

    def perform() -> dict[str, Any]:
        results = threads.run(len(ranges), body)
        whole: dict[str, Any] = {"y": [y for y, _ in results], "dx": [g.dx for _, g in results]}
        if case.residual:
            whole["dresidual"] = [g.dresidual for _, g in results]
        for rank, (_, gradients) in enumerate(results):
            whole |= {f"d{name} of rank {rank}": getattr(gradients, f"d{name}") for name in given.parameters}
            for name in ("running_mean", "running_var", "tracked", "skipped"):
                whole[f"{name} of rank {rank}"] = getattr(states[rank], name)
        return whole

    def expected() -> dict[str, Any]:
        statistics = given.statistics()
        found = given.output(statistics) | given.gradients(statistics)
        everywhere = {name: found.pop(name) for name in list(found) if name in ("dgamma", "dbeta")}
        for rank, (lo, hi) in enumerate(ranges):
            found |= {f"{name} of rank {rank}": value for name, value in given.updated(statistics).items()}
            own = everywhere if case.gradients == "global" else _own_sums(given, statistics, lo, hi)
            found |= {f"{name} of rank {rank}": own[name] for name in everywhere}
        return found

    return perform, expected


def _own_sums(given: Given, statistics: Any, lo: int, hi: int) -> dict[str, Any]:
    options = given.options()
    for name in ("mask", "residual"):
        options[name] = None if options[name] is None else options[name][lo:hi]
    found = oracle.backward(given.ncs("dy")[lo:hi], given.ncs()[lo:hi], statistics, start=lo, **options)
    return {"dgamma": found.dgamma, "dbeta": found.dbeta}


@contextlib.contextmanager
def planned(constants: tuple[tuple[str, int], ...]) -> Iterator[None]:
    """Plans made anew, with constants of their own."""
    before = {name: getattr(plan, name) for name, _ in constants}
    _set(dict(constants))
    try:
        yield
    finally:
        _set(before)


def _set(constants: dict[str, int]) -> None:
    if not constants:
        return
    for name, value in constants.items():
        setattr(plan, name, value)
    for module in (plan, prepare):
        for function in vars(module).values():
            if hasattr(function, "cache_clear") and function is not prepare.kernel:  # which stays loaded for ever
                function.cache_clear()


def run(case: Case, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
    """Call cubn `around` something, and compare all it gives with the oracle."""
    given = Given(case)
    cubn.set_num_threads(case.threads)
    perform, expected = prepared(given)
    with planned(case.constants), around():
        found = perform()
    wanted = expected()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        arrays.assert_same(_in_order(given, found[name]), value, name)
    for name, placed in given.written.items():
        placed.check_neighbours(name)
    if case.out == "fresh" and case.operation != "ranks" and case.library != "jax":
        _check_layout(given, store_of(found["y"]))


def _in_order(given: Given, value: Any) -> Any:
    """A result as a store; of x's shape as (N, C, S), put together where ranks have parts of it."""
    axis, shape = given.case.axis, given.case.shape
    if isinstance(value, list):
        value = np.concatenate([store_of(part) for part in value], _sample_axis(shape, axis))
        assert value.shape == shape
    elif not isinstance(value, np.generic):
        value = store_of(value)
    return oracle.as_ncs(value, axis) if np.ndim(value) == len(shape) and np.ndim(value) > 1 else value


def _check_layout(given: Given, y: Any) -> None:
    x = given.x.array
    if not x.size:
        return
    if arrays.is_dense(x):
        assert arrays.steps(y) == arrays.steps(x), "y is not laid out as x is"
    else:
        assert y.flags.c_contiguous
