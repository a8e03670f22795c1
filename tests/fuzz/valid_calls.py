"""Valid calls, drawn at random and held to the oracle to the bit: any shape, layout, dtype, library, option and cut.

Arrays lie between guard pages; those an operation only reads are write-protected while it runs, and what lies between
the elements of those it writes must stay as it was. The constants of the planner, which may change no result, are drawn
too. Half of the calls are made after others of the same layouts, which leave a short way behind.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

import cubn
from tests import oracle
from tests.fuzz.cases import Case, draw, sample_axis, simpler
from tests.fuzz.given import Given, store_of
from tests.fuzz.operations import prepared
from tests.fuzz.plans import planned
from tests.ops import arrays

__all__ = ["Case", "draw", "run", "simpler"]


def run(case: Case, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
    """Call cubn `around` something, and compare all it gives with the oracle."""
    given = Given(case)
    cubn.set_num_threads(case.threads)
    perform, expected = prepared(given)
    before = prepared(Given(replace(case, seed=case.seed + 1)))[0] if case.known else None
    with planned(case.constants), around():
        if before:
            before()
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
        value = np.concatenate([store_of(part) for part in value], sample_axis(shape, axis))
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
