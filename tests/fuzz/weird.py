"""Values that nobody should pass, each with the errors it has to meet; by the role of the argument it is passed as."""

from __future__ import annotations

import decimal
import fractions
import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from numpy.exceptions import AxisError

from cubn.sync import threads
from tests.fuzz import producer
from tests.fuzz.no_arrays import (
    BOTH,
    KIND,
    NO_ARRAYS,
    OTHER_ARRAYS,
    OTHER_DTYPES,
    RANGE,
    Raises,
    made_once,
    misaligned,
    read_only,
)

FINE = ()  # no error: a value that means something, `means`
EITHER = (*BOTH, None)  # an error or none: this is about crashes, aborts and hangs


class Weird(NamedTuple):
    """What makes the value of a valid one, and what it has to meet."""

    make: Callable[[Any], Any]
    raises: tuple[Any, ...]
    means: Any = None


def _arrays(expected_dtype):
    """What is no array of a dtype that an operation takes."""
    found = {name: Weird(make, KIND) for name, make in NO_ARRAYS.items()}
    for dtype in OTHER_DTYPES:
        found[f"dtype {dtype}"] = Weird(lambda a, dtype=dtype: np.zeros(a.shape, dtype), KIND)
    if expected_dtype == "bool":
        found |= {f"dtype {d}": Weird(lambda a, d=d: np.ones(a.shape, d), KIND) for d in ("f2", "f4", "f8", "i1")}
    else:
        found["dtype bool"] = Weird(lambda a: np.ones(a.shape, bool), KIND)
    others = {name: Weird(make, errors) for name, (make, errors) in OTHER_ARRAYS.items()}
    if expected_dtype == "bool":  # of one byte, and so never misaligned
        del others["misaligned"], others["between elements"]
    return found | others


def _shapes(*shapes, dtype="f4"):
    return {f"shape {shape}": Weird(lambda a, shape=shape: np.ones(shape, dtype), RANGE) for shape in shapes}


OF_OTHER_LIBRARIES = {
    "a tensor": Weird(lambda a: torch.from_numpy(np.ascontiguousarray(a)), KIND),
    "a JAX array": Weird(made_once(jax.numpy.array), KIND),
    "a foreign array": Weird(lambda a: producer.Foreign(np.ascontiguousarray(a)), KIND),
}
WITH_GRADIENT = {
    "requires a gradient": Weird(lambda a: torch.zeros(a.shape, requires_grad=True), KIND),
    "a parameter": Weird(lambda a: torch.nn.Parameter(torch.zeros(a.shape)), KIND),
}
HALVES = {f"dtype {d}": Weird(lambda a, d=d: a.astype(d), KIND) for d in ("f2", "f8")}
NOTHING = {"None": Weird(lambda a: None, KIND)}

X = {
    **_arrays("float32"),
    **NOTHING,
    **WITH_GRADIENT,
    **_shapes((), (4,), (0,), (3, 0, 2), (3, 0)),
    "deeper than any array": Weird(lambda a: np.ones((1,) * 64, "f4"), EITHER),
}
CHANNELS = {**X, **_shapes((3, 5, 2), (4, 3, 2), (2, 1), (0, 3))}
BESIDE = {
    **_arrays("float32"),
    **HALVES,
    **OF_OTHER_LIBRARIES,
    **WITH_GRADIENT,
    **_shapes((), (4,), (3, 4), (3, 4, 1), (2, 4, 2), (3, 4, 2, 1), (0, 4, 2)),
}
OUT = {
    **BESIDE,
    "read-only": Weird(read_only, RANGE),
    "broadcast": Weird(lambda a: np.lib.stride_tricks.as_strided(np.ones(8, "f4"), a.shape, (0, 8, 4)), RANGE),
}
MASK = {
    **_arrays("bool"),
    **_shapes((), (3,), (2, 2), (3, 4, 2), (3, 1, 1, 2), (0, 2), dtype=bool),
    "a tensor of bytes": Weird(lambda a: torch.ones(a.shape, dtype=torch.uint8), KIND),
}
PARAMETER = {**_arrays("float32"), **_shapes((), (5,), (3,), (0,), (4, 1), (1, 4), (1,))}
RUNNING = {
    **PARAMETER,
    "read-only": Weird(read_only, RANGE),
    "broadcast": Weird(lambda a: np.lib.stride_tricks.as_strided(np.ones(1, "f4"), (4,), (0,)), RANGE),
    "requires a gradient": Weird(lambda a: torch.zeros(4, requires_grad=True), BOTH),
    **HALVES,
    "None": Weird(lambda a: None, BOTH),
}
RUNNING_VAR = {**RUNNING, "negative": Weird(lambda a: -a - 1, RANGE)}
CHANGED = {
    "integers": Weird(lambda a: setattr(a, "dtype", np.int32), KIND),
    "big-endian": Weird(lambda a: setattr(a, "dtype", ">f4"), KIND),
    "halves": Weird(lambda a: setattr(a, "dtype", np.float16), RANGE),
    "two axes": Weird(lambda a: setattr(a, "shape", (2, 2)), RANGE),
    "shorter": Weird(lambda a: a.resize(3, refcheck=False), RANGE),
    "longer": Weird(lambda a: a.resize(1 << 16, refcheck=False), RANGE),
    "read-only": Weird(lambda a: setattr(a.flags, "writeable", False), ()),
    "other values": Weird(lambda a: a.fill(2), ()),
}
CHANGED_RUNNING = CHANGED | {"read-only": Weird(CHANGED["read-only"].make, RANGE)}
"""What happens to an array in place."""

NO_NUMBERS = {name: Weird(NO_ARRAYS[name], KIND) for name in NO_ARRAYS.keys() - {"an integer", "a huge integer"}}
NO_NUMBERS |= {
    "a vector": Weird(lambda a: np.ones(4), KIND),
    "a decimal": Weird(lambda a: decimal.Decimal("0.1"), KIND),
    "raises": Weird(lambda a: Raises(), (ZeroDivisionError, BufferError, *BOTH)),
}
NO_REALS = {n: w for n, w in NO_NUMBERS.items() if n not in ("a float", "nan", "a NumPy scalar")}
BEYOND = {
    name: Weird(lambda a, value=value: value, RANGE)
    for name, value in {
        "nan": math.nan,
        "inf": math.inf,
        "-inf": -math.inf,
        "-1": -1,
        "a huge integer": 10**400,
        "a huge fraction": fractions.Fraction(10**400, 3),
        "float64 nan": np.float64("nan"),
        "float32 inf": np.float32("inf"),
        "-1e-300": -1e-300,
    }.items()
}
REALS = {
    "a fraction": Weird(lambda a: fractions.Fraction(1, 8), FINE, 0.125),
    "float32": Weird(lambda a: np.float32(0.25), FINE, 0.25),
    "float64": Weird(lambda a: np.float64(0.25), FINE, 0.25),
    "one": Weird(lambda a: 1, FINE, 1.0),
    "int8": Weird(lambda a: np.int8(1), FINE, 1.0),
    "True": Weird(lambda a: True, EITHER),
}
EPS = {
    **NO_REALS,
    **BEYOND,
    **REALS,
    "None": Weird(lambda a: None, KIND),
    "zero": Weird(lambda a: 0, RANGE),
    "-0.0": Weird(lambda a: -0.0, RANGE),
    "underflow": Weird(lambda a: fractions.Fraction(1, 10**400), RANGE),
}
MOMENTUM = {**NO_REALS, **BEYOND, **REALS, "1.0000001": Weird(lambda a: 1.0000001, RANGE)}
RENORM = {
    "a number": Weird(lambda a: 3.0, KIND),
    "a word": Weird(lambda a: "35", KIND),
    "an array": Weird(lambda a: np.array([3.0, 5.0]), KIND),
    "three": Weird(lambda a: (3, 5, 5), KIND),
    "None inside": Weird(lambda a: (3, None), KIND),
    "a huge integer": Weird(lambda a: (10**400, 0), RANGE),
    "below": Weird(lambda a: (0.9999999, 5), RANGE),
    "negative": Weird(lambda a: (1, -1e-300), RANGE),
    "nan": Weird(lambda a: (1, math.nan), RANGE),
}
INTEGER = {
    **NO_NUMBERS,
    "None": Weird(lambda a: None, KIND),
    "a fraction": Weird(lambda a: fractions.Fraction(1, 1), KIND),
    "float64": Weird(lambda a: np.float64(1), KIND),
    "two integers": Weird(lambda a: np.array([1, 1]), KIND),
    "a tensor of floats": Weird(lambda a: torch.tensor(1.0), KIND),
    "True": Weird(lambda a: True, EITHER),
}
AXIS = {
    **INTEGER,
    **{
        str(v): Weird(lambda a, v=v: v, (AxisError, ValueError, OverflowError)) for v in (3, -4, 2**31, -(2**63), 2**64)
    },
    "a huge integer": Weird(lambda a: 10**400, (AxisError, ValueError)),
    "int8": Weird(lambda a: np.int8(1), FINE, 1),
    "a 0-d array": Weird(lambda a: np.array(1), FINE, 1),
    "-2": Weird(lambda a: -2, FINE, 1),
}
START = {
    **INTEGER,
    **{str(v): Weird(lambda a, v=v: v, RANGE) for v in (-1, 2**62, 2**63, 2**64, -(2**63), 10**400)},
    "uint64": Weird(lambda a: np.uint64(7), FINE, 7),
    "the last": Weird(lambda a: 2**62 - 4, EITHER),
}
FEATURES = {
    **INTEGER,
    **{str(v): Weird(lambda a, v=v: v, RANGE) for v in (0, -1, 2**63, 2**64, 10**400, -(10**400))},
    "int8": Weird(lambda a: np.int8(4), FINE, 4),
}
THREADS = {
    **INTEGER,
    "None": Weird(lambda a: None, KIND),
    "True": Weird(lambda a: True, KIND),
    **{str(v): Weird(lambda a, v=v: v, RANGE) for v in (0, -1, -(2**63), -(10**400), 2**31, 2**63, 10**400)},
    "int8": Weird(lambda a: np.int8(2), FINE, 2),
    "a 0-d array": Weird(lambda a: np.array(2), FINE, 2),
}
COUNT = {**INTEGER, **{str(v): Weird(lambda a, v=v: v, RANGE) for v in (0, -1, 2**62, 2**63, 10**400, -(10**400))}}
GROUPS = {**INTEGER, **{str(v): Weird(lambda a, v=v: v, RANGE) for v in (0, -1, 3, 2**63, 10**400)}}
GHOST = {
    **START,
    **{str(v): Weird(lambda a, v=v: v, RANGE) for v in (0, -(10**400))},
    "uint64": Weird(lambda a: np.uint64(2), FINE, 2),
    "a 0-d array": Weird(lambda a: np.array(3), FINE, 3),
    "None": Weird(lambda a: None, EITHER),
    "the last": Weird(lambda a: 2**62 - 1, EITHER),
}
FLAG = {
    name: Weird(make, KIND)
    for name, make in {
        "no": lambda a: "no",
        "off": lambda a: b"off",
        "empty": lambda a: "",
        "a list": lambda a: [False],
        "None": lambda a: None,
        "a vector": lambda a: np.array([True, False]),
        "nan": lambda a: math.nan,
        "an object": lambda a: object(),
    }.items()
} | {
    "numpy True": Weird(lambda a: np.True_, FINE, True),
    "numpy False": Weird(lambda a: np.False_, FINE, False),
    "raises": Weird(lambda a: Raises(), (ZeroDivisionError, BufferError, *BOTH)),
    "1": Weird(lambda a: 1, EITHER),
}
WORD = {
    **{name: Weird(make, BOTH) for name, make in NO_ARRAYS.items()},
    "None": Weird(lambda a: None, BOTH),
    "upper case": Weird(lambda a: "GLOBAL", BOTH),
    "bytes": Weird(lambda a: b"local", BOTH),
    "float16": Weird(lambda a: "float16", BOTH),
}
DTYPE = {
    **{name: w for name, w in WORD.items() if name not in ("None", "a NumPy scalar")},
    "int8": Weird(lambda a: np.int8, BOTH),
    "bfloat16": Weird(lambda a: torch.bfloat16, BOTH),
    "float64": Weird(lambda a: np.float64, EITHER),
    "a structure": Weird(lambda a: np.dtype([("a", "f4")]), BOTH),
    "big-endian": Weird(lambda a: np.dtype(">f4"), EITHER),
}
OBJECT = {  # a state, Moments, Saved or communicator
    **{name: Weird(make, KIND) for name, make in NO_ARRAYS.items()},
    "None": Weird(lambda a: None, KIND),
    "an array": Weird(lambda a: np.ones(4, "f4"), KIND),
    "a module of torch": Weird(lambda a: torch.nn.Linear(4, 4), KIND),
    "a class": Weird(lambda a: producer.Foreign, KIND),
    "a namespace": Weird(lambda a: types.SimpleNamespace(tracked=0, count=1, num_features=4), KIND),
    "raises": Weird(lambda a: Raises(), (ZeroDivisionError, BufferError, *BOTH)),
}
COMMUNICATOR = {name: weird for name, weird in OBJECT.items() if name != "None"}
SIZES = {
    "an integer": Weird(lambda a: 3, BOTH),
    "text": Weird(lambda a: "3", BOTH),
    "too many": Weird(lambda a: [3, 3], RANGE),
    "too few": Weird(lambda a: [], RANGE),
    "negative": Weird(lambda a: [-3], RANGE),
    "floats": Weird(lambda a: [3.5], BOTH),
    "huge": Weird(lambda a: [10**400], BOTH),
    "large": Weird(lambda a: [2**63], BOTH),
    "other": Weird(lambda a: [4], RANGE),
    "objects": Weird(lambda a: [object()], BOTH),
}
COUNTER = {
    name: Weird(make, BOTH)
    for name, make in {
        "a list": lambda a: [0] * 4,
        "short": lambda a: np.zeros(1, np.int64),
        "two axes": lambda a: np.zeros((4, 1), np.int64),
        "long": lambda a: np.zeros(5, np.int64),
        "empty": lambda a: np.zeros(0, np.int64),
        "float64": lambda a: np.full(4, 1.5),
        "nans": lambda a: np.full(4, math.nan),
        "uint64": lambda a: np.full(4, 2**64 - 1, np.uint64),
        "objects": lambda a: np.array([None] * 4),
        "masked": lambda a: np.ma.zeros(4, np.int64),
        "complex": lambda a: np.zeros(4, np.complex64),
        "text": lambda a: "0000",
        "None": lambda a: None,
        "an object": lambda a: object(),
        "nan": lambda a: math.nan,
        "huge": lambda a: 10**400,
        "negative": lambda a: np.full(4, -5, np.int64),
        "a tensor of floats": lambda a: torch.full((4,), 0.5),
    }.items()
} | {
    name: Weird(make, EITHER)
    for name, make in {
        "0": lambda a: 0,
        "True": lambda a: True,
        "no axis": lambda a: np.zeros((), np.int64),
        "int32": lambda a: np.ones(4, np.int32),
        "bool": lambda a: np.zeros(4, bool),
        "big-endian": lambda a: np.ones(4, ">i8"),
        "strided": lambda a: np.arange(8, dtype=np.int64)[::2],
        "backwards": lambda a: np.arange(4, dtype=np.int64)[::-1],
        "broadcast": lambda a: np.broadcast_to(np.int64(3), (4,)),
        "misaligned": lambda a: misaligned(np.zeros(4, np.int64)),
        "read-only": lambda a: read_only(np.arange(4, dtype=np.int64)),
        "a tensor": lambda a: torch.arange(4),
        "a JAX array": made_once(lambda a: jax.numpy.ones(4, "int32")),
        "a foreign array": lambda a: producer.Foreign(np.arange(4)),
    }.items()
}
"""Counts are taken from anything that holds whole numbers, or refused; but nothing else is."""


def communicator():
    return threads.communicators(1)[0]
