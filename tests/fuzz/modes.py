"""Valid calls from a thread whose floating-point mode is not the usual one: the same bits.

Subnormal numbers flushed to zero, as torch.set_flush_denormal(True) has it, and the directions of rounding.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from tests.fuzz import valid_calls

_X86 = {"down": 0x400, "up": 0x800, "to zero": 0xC00}
_ARM = {"up": 0x400000, "down": 0x800000, "to zero": 0xC00000}
ROUNDING = {"nearest": 0} | (_X86 if platform.machine() in ("x86_64", "AMD64") else _ARM)
"""fesetround's numbers, see fenv.h."""

_libm = ctypes.CDLL("libm.so.6") if platform.system() == "Linux" else ctypes.CDLL(None)


@dataclass(frozen=True)
class Case:
    rounding: str
    flush: bool
    call: valid_calls.Case


def draw(rng: random.Random) -> Case:
    flush = rng.random() < 0.6
    rounding = rng.choice(list(ROUNDING)) if flush else rng.choice(["down", "up", "to zero"])
    call = valid_calls.draw(rng)
    tiny = {"scale": rng.choice([1e-38, 1e-30, 1.0]), "centre": 0.0, "wild": rng.choice([0.0, 0.2])}
    return Case(rounding, flush, replace(call, **tiny))


def simpler(case: Case) -> Iterator[Case]:
    for call in valid_calls.simpler(case.call):
        yield replace(case, call=call)


def run(case: Case) -> None:
    valid_calls.run(case.call, partial(mode, case.rounding, case.flush))


def flushes() -> bool:
    """Whether this thread takes subnormal numbers for 0."""
    return not np.any(_SUBNORMAL * np.float32(1))


_SUBNORMAL = np.array([1e-39], np.float32)


@contextlib.contextmanager
def mode(rounding: str, flush: bool) -> Iterator[None]:
    """The calling thread's mode, and that of threads it starts."""
    torch.set_flush_denormal(flush)
    _libm.fesetround(ROUNDING[rounding])
    try:
        yield
        assert _libm.fegetround() == ROUNDING[rounding], "the caller's direction of rounding was changed"
        assert flushes() == flush, "whether subnormal numbers are flushed was changed"
    finally:
        _libm.fesetround(0)
        torch.set_flush_denormal(False)
