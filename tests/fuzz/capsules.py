"""DLPack capsules with every field drawn at random, as each argument that takes an array.

Pointers lead to live memory between guard pages, and extents stay inside it, or the capsule says something that has to
be refused, and is drawn together with the errors it has to meet.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

import cubn
from tests.fuzz import memory
from tests.fuzz.memory import Memory, Placed
from tests.fuzz.producer import CODES, IS_COPIED, READ_ONLY, UNVERSIONED, VERSIONED, Fields, Foreign, capsule
from tests.ops import arrays

SHAPE, C = (3, 4, 2), 4
ROLES = ["x", "residual", "out", "dy", "mask", "gamma", "running_mean", "running_var"]
REFUSED = (TypeError, ValueError, BufferError)
FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Case:
    """An argument, what its capsule says, and what is wrong with that."""

    role: str
    dtype: str
    memory: Memory
    fields: Fields
    said: tuple[int, int] = (1, 0)  # by __dlpack_device__
    takes_version: bool = True  # whether __dlpack__ knows max_version
    null: bool = False  # whether data is NULL
    moved: int = 0  # bytes that the first element lies behind its place
    fault: str = "none"
    seed: int = 0


class Fault(NamedTuple):
    """What is made wrong with a case, and the errors that has to meet."""

    make: Callable[[random.Random, Case], Case]
    raises: tuple[type[Exception], ...]
    roles: tuple[str, ...] = tuple(ROLES)


def _fields(**change: Any) -> Callable[[random.Random, Case], Case]:
    def make(rng: random.Random, case: Case) -> Case:
        drawn = {name: value(rng, case) if callable(value) else value for name, value in change.items()}
        return replace(case, fields=replace(case.fields, **drawn))

    return make


def _negative(rng: random.Random, case: Case) -> tuple[int, ...]:
    shape = list(case.fields.shape or ())
    shape[rng.randrange(len(shape))] = rng.choice([-1, -3, -(2**31), -(2**63)])
    return tuple(shape)


def _other_device(rng: random.Random, case: Case) -> tuple[int, int]:
    return (rng.choice([2, 2, 3, 4, 8, 10, 13, 17, 0, -1, 99]), rng.choice([0, 0, 1, -1]))


WRITTEN = ("out", "running_mean", "running_var")
FAULTS = {
    "NULL data": Fault(lambda rng, case: replace(case, null=True), REFUSED),
    "NULL shape": Fault(_fields(shape=None, ndim=lambda rng, case: len(case.fields.shape or ())), REFUSED),
    "negative ndim": Fault(_fields(ndim=lambda rng, case: rng.choice([-1, -3, -(2**31)])), REFUSED),
    "negative extent": Fault(_fields(shape=_negative), REFUSED),
    "other dtype": Fault(
        _fields(
            code=lambda rng, case: rng.choice([0, 1, 3, 5, 7, 14, 255]),
            bits=lambda rng, case: rng.choice([8, 16, 32, 64, 128]),
        ),
        REFUSED,
    ),
    "odd bits": Fault(_fields(bits=lambda rng, case: rng.choice([0, 1, 4, 24, 80, 255])), REFUSED),
    "lanes": Fault(_fields(lanes=lambda rng, case: rng.choice([0, 2, 4, 65535])), REFUSED),
    "version": Fault(_fields(name=VERSIONED, version=lambda rng, case: (rng.choice([0, 2, 2**32 - 1]), 0)), REFUSED),
    "used": Fault(_fields(name=lambda rng, case: b"used_" + rng.choice([VERSIONED, UNVERSIONED])), REFUSED),
    "other capsule": Fault(_fields(name=lambda rng, case: rng.choice([b"", b"dltensor2", b"arrow_array"])), REFUSED),
    "the capsule's device": Fault(_fields(device=_other_device), (*REFUSED, NotImplementedError)),
    "the device said": Fault(
        lambda rng, case: replace(case, said=_other_device(rng, case)),
        (*REFUSED, NotImplementedError, ImportError, cubn.BackendUnavailable),
    ),
    "misaligned": Fault(
        lambda rng, case: replace(case, moved=1), (ValueError,), tuple(r for r in ROLES if r != "mask")
    ),
    "flags": Fault(
        _fields(name=VERSIONED, flags=lambda rng, case: rng.choice([READ_ONLY, IS_COPIED])), REFUSED, WRITTEN
    ),
    "no flags": Fault(_fields(name=UNVERSIONED), REFUSED, WRITTEN),
    "broadcast": Fault(_fields(strides=lambda rng, case: tuple(0 for _ in case.fields.shape or ())), REFUSED, WRITTEN),
    "another shape": Fault(
        _fields(shape=lambda rng, case: tuple(max(0, n - 1) for n in case.fields.shape or ())),
        REFUSED,
        tuple(r for r in ROLES if r != "x"),
    ),
}


def draw(rng: random.Random) -> Case:
    role = rng.choice(ROLES)
    shape = {"mask": (3, 2), "x": SHAPE, "residual": SHAPE, "out": SHAPE, "dy": SHAPE}.get(role, (C,))
    if role == "mask":
        dtype = "bool"
    elif role in ("x", "gamma"):
        dtype = rng.choice(FLOATS)
    else:
        dtype = "float32"
    repeat = () if role in WRITTEN else tuple(range(len(shape)))
    where = memory.draw(rng, shape, "foreign", repeat=repeat, gap=0.5)
    code, bits = CODES[dtype]
    fields = Fields(
        shape,
        where.strides(shape),
        code,
        bits,
        byte_offset=rng.choice([0, 0, 8, 4096]),
        version=(1, rng.choice([0, 0, 1, 7])),
        name=VERSIONED if role in WRITTEN else rng.choice([VERSIONED, UNVERSIONED]),
        flags=0 if role in WRITTEN else rng.choice([0, READ_ONLY, IS_COPIED]),
    )
    if where == memory.dense(len(shape)) and rng.random() < 0.7:
        fields = replace(fields, strides=None)
    case = Case(role, dtype, where, fields, takes_version=rng.random() < 0.8, seed=rng.randrange(1 << 30))
    if rng.random() < 0.5:
        name = rng.choice([name for name, fault in FAULTS.items() if role in fault.roles])
        case = replace(FAULTS[name].make(rng, case), fault=name)
        if name == "other dtype" and (case.fields.code, case.fields.bits) == CODES[dtype]:
            return draw(rng)
    return case


class Exporter(Foreign):
    """An array as its capsule has it."""

    def __init__(self, case: Case, store: Any) -> None:
        self.store = store
        self.fields = case.fields
        self._case = case

    def __dlpack_device__(self) -> Any:
        return self._case.said

    def __dlpack__(self, **options: Any) -> Any:
        if "max_version" in options and not self._case.takes_version:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        address = 0 if self._case.null else self.store.ctypes.data + self._case.moved - self.fields.byte_offset
        fields = replace(self.fields, byte_offset=0) if self._case.null else self.fields
        return capsule(fields, address)


def run(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    values = _values(rng, case)
    placed = Placed(values, case.memory)
    array = Exporter(case, placed.array)
    before = placed.array.copy()
    world = _World(rng, case.dtype if case.role == "x" else "float32")
    raises = FAULTS[case.fault].raises if case.fault != "none" else ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cubn.StateWarning)
            got = world.call(case.role, array)
    except raises:
        assert np.array_equal(placed.array, before, equal_nan=case.dtype != "bool"), (
            "refused, but something was changed"
        )
        placed.check_neighbours(case.role)
        return
    assert not raises, f"accepted, with a fault: {case.fault}"
    expected = world.again().call(case.role, Foreign(before.copy()) if case.dtype != "bool" else _mask(before))
    for one, other in zip(got, expected, strict=True):
        arrays.assert_same(_plain(one), _plain(other), case.role)
    placed.check_neighbours(case.role)


def _values(rng: np.random.Generator, case: Case) -> Any:
    shape = (3, 2) if case.role == "mask" else SHAPE if case.role in ("x", "residual", "out", "dy") else (C,)
    if case.role == "mask":
        present = rng.random(shape) < 0.7
        present[0] = True
        return present
    values = arrays.normal(rng, shape, case.dtype)
    return np.abs(values) if case.role == "running_var" else values


def _mask(present: Any) -> Foreign:
    return Foreign(present.copy(), "bool")


def _plain(value: Any) -> Any:
    return value.store if isinstance(value, Foreign) else np.asarray(value)


class _World:
    """What the capsule is passed along with: arrays of the same library."""

    def __init__(self, rng: np.random.Generator, dtype: str) -> None:
        self._arrays = {name: arrays.normal(rng, SHAPE, dtype) for name in ("x", "dy")}
        self.again()

    def again(self) -> _World:
        self.x, self.dy = (Foreign(store.copy()) for store in self._arrays.values())
        self.state = cubn.BatchNormState(C)
        return self

    def call(self, role: str, array: Any) -> list[Any]:
        if role == "x":
            y, saved = cubn.forward_train(array, self.state)
            moments = cubn.moments(array)
            dx = cubn.backward(self.dy, saved).dx
            return [y, dx, moments.mean, moments.m2, self.state.running_mean]
        if role == "mask":
            return [cubn.forward(self.x, self.state, mask=array), cubn.moments(self.x, mask=array).m2]
        if role == "gamma":
            return [cubn.normalize(self.x, cubn.moments(self.x), gamma=array)]
        if role == "dy":
            _, saved = cubn.forward_train(self.x, self.state)
            return [cubn.backward(array, saved).dx]
        if role in ("residual", "out"):
            return [cubn.forward(self.x, self.state, **{role: array})]
        other = {"running_mean": "running_var", "running_var": "running_mean"}[role]
        state = cubn.BatchNormState.from_arrays(**{role: array, other: Foreign(np.ones(C, np.float32))})
        y = cubn.forward(self.x, state)
        cubn.forward_train(self.x, state)
        return [y, array, getattr(state, other), state.tracked]
