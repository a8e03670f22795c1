"""Exceptions raised by signal handlers at random moments of operations on several threads.

Whatever is interrupted, nobody may still write to an array once the exception is out: what is then put into the outputs
and into new memory stays. The state has moved as a whole or not at all, and the next call is right.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

import cubn
from tests.fuzz.memory import UNTOUCHED, Placed, dense
from tests.fuzz.plans import planned
from tests.ops import arrays

OPERATIONS = ["forward", "train", "frozen", "backward", "moments", "normalize", "update"]
SHAPES = [(16, 24, 300), (64, 33, 40), (200, 64), (8, 16, 49), (4, 7, 3000)]
LAYOUTS = ["nchw", "nhwc"]


@dataclass(frozen=True)
class Case:
    operation: str
    shape: tuple[int, ...]
    layout: str
    threads: int
    delays: tuple[float, ...]  # seconds until the signal, in each of the calls
    seed: int = 0


class Interrupted(Exception):
    """Raised by the handler."""


def draw(rng: random.Random) -> Case:
    delays = tuple(10 ** rng.uniform(-5, -2.3) for _ in range(20))
    shape = rng.choice(SHAPES)
    return Case(rng.choice(OPERATIONS), shape, rng.choice(LAYOUTS), rng.randint(2, 7), delays, rng.randrange(1 << 30))


def run(case: Case) -> None:
    before = signal.signal(signal.SIGALRM, _raise)
    cubn.set_num_threads(case.threads)
    try:
        with planned((("SERIAL_BYTES", 0),)):  # threads for arrays of any size
            _interrupt(case)
    finally:
        signal.signal(signal.SIGALRM, before)


def _interrupt(case: Case) -> None:
    step = Step(case)
    step.renew()
    step.call()
    expected = step.results()
    before = step.renew()
    for delay in case.delays:
        if interrupted(step.call, delay):
            check_nobody_writes(step.outputs())
            now = step.of_state()
            assert any(_same(now, whole) for whole in (before, step.of_state(expected))), "the state has moved in part"
        else:
            assert _same(step.results(), expected), f"{case.operation} of a call that was not interrupted"
        before = step.renew()
    step.call()
    assert _same(step.results(), expected), f"{case.operation} after the interrupts"
    for name, placed in step.placed.items():
        placed.check_neighbours(name)


def _raise(number: int, frame: Any) -> None:
    raise Interrupted


def interrupted(call: Callable[[], Any], delay: float) -> bool:
    """Whether a signal that comes after `delay` seconds was in time to end the call."""
    try:
        signal.setitimer(signal.ITIMER_REAL, delay)
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupted:
        return True
    return False


def check_nobody_writes(outputs: Iterable[Any]) -> None:
    """What is put into these arrays, and into new ones of their sizes, is still there a moment later."""
    watched = list(outputs)
    watched += [np.empty(a.nbytes, np.uint8) for a in watched for _ in range(2)]
    pattern = [np.frombuffer(bytes([UNTOUCHED]) * a.itemsize, a.dtype) for a in watched]
    for a, value in zip(watched, pattern, strict=True):
        a[...] = value
    time.sleep(1e-3)
    for a, value in zip(watched, pattern, strict=True):
        assert (a.view(np.uint8) == value.view(np.uint8)[0]).all(), "written to after the call had ended"


def _same(got: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(np.array_equal(got[name], expected[name], equal_nan=True) for name in expected)


class Step:
    """An operation over arrays in memory of their own."""

    STATE = ("running_mean", "running_var", "tracked", "skipped")

    def __init__(self, case: Case) -> None:
        rng = np.random.default_rng(case.seed)
        self.operation = case.operation
        store, self.axis = arrays.lay_out(arrays.normal(rng, case.shape, centre=0.5), case.layout)
        self.C = case.shape[1]
        rank = store.ndim
        self.placed = {name: Placed(store, dense(rank)) for name in ("x", "dy", "y", "dx")}
        self.placed |= {name: Placed(np.ones(self.C, np.float32), dense(1)) for name in ("running_mean", "running_var")}
        self.x, self.dy, self.y, self.dx, self.mean, self.var = (placed.array for placed in self.placed.values())
        self.found: Any = None

    def renew(self) -> dict[str, Any]:
        """Everything as it was before the call; the state's part of it."""
        self.y[...] = self.dx[...] = 0
        self.mean[...], self.var[...] = 0, 1
        self.state = cubn.BatchNormState.from_arrays(
            running_mean=self.mean, running_var=self.var, channel_axis=self.axis
        )
        if self.operation in ("backward", "normalize", "update"):
            _, self.saved = cubn.forward_train(self.x, self.state, update=False, relu=True)
            self.moments = cubn.moments(self.x, channel_axis=self.axis)
        return self.of_state()

    def call(self) -> None:
        """The operation, `y` and `dx` being where it writes to."""
        match self.operation:
            case "forward":
                cubn.forward(self.x, self.state, out=self.y)
            case "train":
                cubn.forward_train(self.x, self.state, out=self.y, relu=True)
            case "frozen":
                cubn.forward_frozen(self.x, self.state, out=self.y, residual=self.dy, relu=True)
            case "backward":
                self.found = cubn.backward(self.dy, self.saved, out=self.dx)
            case "moments":
                self.found = cubn.moments(self.x, channel_axis=self.axis)
            case "normalize":
                cubn.normalize(self.x, self.moments, channel_axis=self.axis, out=self.y)
            case "update":
                cubn.update(self.state, self.moments)

    def outputs(self) -> list[Any]:
        return [self.y, self.dx]

    def results(self) -> dict[str, Any]:
        found = {"y": self.y.copy(), "dx": self.dx.copy(), **self.of_state()}
        if self.operation == "moments":
            found |= {"moments.mean": self.found.mean, "moments.m2": self.found.m2}
        return found

    def of_state(self, results: dict[str, Any] | None = None) -> dict[str, Any]:
        """Copies of what the state holds, or held among these results."""
        found = results or {name: np.array(getattr(self.state, name)) for name in self.STATE}
        return {name: found[name] for name in self.STATE}
